"""transformers' own `generate`, one request at a time or in padded batches. In fp32 it is the reference."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.contestants.base import Contestant, Output, Score, main
from tests.benchmarks.workload import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--width", type=int, default=1, help="requests of one padded batch")


class TokenClock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Generate(Contestant):
    """Padded on the left; every batch runs to its longest output."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        self._torch, self._width = torch, args.width
        self._model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        self._model.eval()
        self._model.generation_config.eos_token_id = None
        self._pad_id = self._model.generation_config.pad_token_id or 0
        self._model.generation_config.pad_token_id = self._pad_id
        self.info = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "width": args.width,
        }

    def _generate(self, requests: Sequence[Request], **options: Any) -> list[Output]:
        torch, length = self._torch, max(len(request.prompt) for request in requests)
        token_ids = torch.full((len(requests), length), self._pad_id)
        mask = torch.zeros_like(token_ids)
        for row, request in enumerate(requests):
            token_ids[row, length - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, length - len(request.prompt) :] = 1
        longest = max(request.max_tokens for request in requests)
        with torch.inference_mode():
            done = self._model.generate(
                token_ids, attention_mask=mask, do_sample=False, use_cache=True, max_new_tokens=longest, **options
            )
        return [
            Output(done[row, length : length + request.max_tokens].tolist()) for row, request in enumerate(requests)
        ]

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        starts = range(0, len(requests), self._width)
        return [output for start in starts for output in self._generate(requests[start : start + self._width])]

    def stream(self, request: Request) -> Output:
        clock = TokenClock()
        output = self._generate([request], streamer=clock)[0]
        output.times = clock.times[1:]  # the first call hands over the prompt
        return output

    def score(self, windows: Sequence[list[int]]) -> list[Score]:
        torch, scores = self._torch, []
        for window in windows:
            with torch.inference_mode():
                logits = self._model(torch.tensor([window])).logits[0, len(window) // 2 : -1].double()
            nexts = torch.tensor(window[len(window) // 2 + 1 :])
            logprobs = logits.log_softmax(1).gather(1, nexts[:, None])[:, 0]
            scores.append(Score(logprobs.tolist(), logits.argmax(1).tolist()))
        return scores


if __name__ == "__main__":
    main(Generate, add_arguments)
