"""transformers' continuous batching: its manager with a paged cache."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, Final

from tests.benchmarks.contestants.base import KV_CACHE_MIB, Contestant, Output, main
from tests.benchmarks.workload import MAX_RUNNING, Request

_PAGE: Final = 32
_SILENCE_S: Final = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16")


class ContinuousBatching(Contestant):
    """Prefix sharing on. Without a number of pages it would size its cache from the machine's memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
        )
        model.eval()
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
        pages = (KV_CACHE_MIB << 20) // (token_bytes * _PAGE)
        generation = transformers.GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=config.pad_token_id or 0, max_new_tokens=256
        )
        batching = transformers.ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=pages,
            max_batch_tokens=1024,
            max_requests_per_batch=MAX_RUNNING,
            allow_block_sharing=True,
        )
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        with torch.inference_mode():
            self._manager.start()
        self.info = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "kv_cache_mib": KV_CACHE_MIB,
            "token_budget": 1024,
        }

    def _send(self, request: Request, **options: Any) -> str:
        request_id: str = self._manager.add_request(
            list(request.prompt), eos_token_id=-1, max_new_tokens=request.max_tokens, **options
        )
        return request_id

    def _wait(self) -> Any:
        """Return the next finished result."""
        end = time.monotonic() + _SILENCE_S
        while time.monotonic() < end:
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                return result
            if result is None and not self._manager.is_running():
                raise RuntimeError("the generation thread has stopped")
        raise TimeoutError(f"no result for {_SILENCE_S:.0f} s")

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        order = [self._send(request) for request in requests]
        done = {}
        while len(done) < len(order):
            result = self._wait()
            done[result.request_id] = Output(list(result.generated_tokens))
        return [done[request_id] for request_id in order]

    def stream(self, request: Request) -> Output:
        self._send(request, record_timestamps=True)
        result = self._wait()
        return Output(list(result.generated_tokens), list(result.timestamps))

    def close(self) -> None:
        self._manager.stop(block=True, timeout=20)


if __name__ == "__main__":
    main(ContinuousBatching, add_arguments)
