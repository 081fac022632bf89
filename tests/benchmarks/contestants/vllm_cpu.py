"""vLLM's CPU build, offline, its engine in this process."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.contestants.base import KV_CACHE_MIB, Contestant, Output, Score, main
from tests.benchmarks.workload import MAX_RUNNING, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16")


class Vllm(Contestant):
    """Chunked prefill, prefix caching and torch.compile on, as they are by default."""

    def __init__(self, args: argparse.Namespace) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_MIB >> 10),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        import torch
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(
            model=args.model,
            dtype=args.dtype,
            max_num_seqs=MAX_RUNNING,
            max_model_len=4096,
            enable_prefix_caching=True,
            seed=0,
        )
        self._num_streams = 0
        config = self._llm.llm_engine.vllm_config
        self.info = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "kv_cache_mib": KV_CACHE_MIB,
            "block_size": config.cache_config.block_size,
            "token_budget": config.scheduler_config.max_num_batched_tokens,
        }

    def _sampling(self, request: Request) -> Any:
        return self._vllm.SamplingParams(
            temperature=0, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False
        )

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        done = self._llm.generate(prompts, [self._sampling(request) for request in requests], use_tqdm=False)
        return [Output(list(result.outputs[0].token_ids)) for result in done]

    def stream(self, request: Request) -> Output:
        engine, output = self._llm.llm_engine, Output()
        self._num_streams += 1
        engine.add_request(f"s{self._num_streams}", {"prompt_token_ids": request.prompt}, self._sampling(request))
        while engine.has_unfinished_requests():
            for result in engine.step():
                token_ids = list(result.outputs[0].token_ids)
                output.times += [time.perf_counter()] * (len(token_ids) - len(output.token_ids))
                output.token_ids = token_ids
        return output

    def score(self, windows: Sequence[list[int]]) -> list[Score]:
        sampling = self._vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        prompts = [{"prompt_token_ids": window} for window in windows]
        scores = []
        for window, result in zip(windows, self._llm.generate(prompts, sampling, use_tqdm=False), strict=True):
            told = [result.prompt_logprobs[i] for i in range(len(window) // 2 + 1, len(window))]
            nexts = window[len(window) // 2 + 1 :]
            logprobs = [at[token_id].logprob for at, token_id in zip(told, nexts, strict=True)]
            scores.append(Score(logprobs, [min(at, key=lambda i: at[i].rank) for at in told]))
        return scores


if __name__ == "__main__":
    main(Vllm, add_arguments)
