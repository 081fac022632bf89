"""torchrelay's engine in this process, loaded as a worker loads it; every step is called directly."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.benchmarks.contestants.base import KV_CACHE_MIB, Contestant, Output, Score, main
from tests.benchmarks.workload import MAX_RUNNING, Request

if TYPE_CHECKING:
    from worker.engine.loop import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is set of a worker and its engine."""
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--speculation",
        action="store_true",
        help="guess tokens: gains on text that repeats, so off beside engines without",
    )
    parser.add_argument("--quantization", choices=["none", "int8"], default="none", help="of the weights")
    parser.add_argument("--kv-cache-mib", type=int, default=KV_CACHE_MIB, help="memory for keys and values")
    parser.add_argument("--max-num-seqs", type=int, default=MAX_RUNNING, help="most sequences in one step")


class InProcessEngine(Contestant):
    """The engine without agent, queue and gateway around it."""

    def __init__(self, args: argparse.Namespace) -> None:
        from worker.engine.device import leave_out_triton, quiet_openmp

        # As a worker does, before torch and transformers are imported.
        quiet_openmp()
        leave_out_triton("cpu")
        import torch
        import transformers

        from common.startup import settle_heap
        from worker.assembly import assemble
        from worker.engine.settings import EngineSettings
        from worker.settings import WorkerSettings

        self.engine: Engine = assemble(
            WorkerSettings(
                model=args.model,
                dtype=args.dtype,
                quantization=args.quantization,
                num_threads=args.threads,
                device="cpu",
            ),
            EngineSettings(
                max_num_seqs=args.max_num_seqs,
                kv_cache_bytes=args.kv_cache_mib << 20,
                speculation=args.speculation,
            ),
        ).engine
        settle_heap()
        self._num_requests = 0
        self.info = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": args.dtype,
            "quantization": args.quantization,
            "speculation": args.speculation,
            "threads": torch.get_num_threads(),
            "kv_cache_mib": args.kv_cache_mib,
        }

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        outputs = [Output() for _ in requests]
        waiting = deque(zip(requests, outputs, strict=True))
        running: dict[str, Output] = {}
        while waiting or running:
            while waiting and len(running) < max_running:
                request, output = waiting.popleft()
                running[self.add(request)] = output
            self.step(running)
        return outputs

    def stream(self, request: Request) -> Output:
        return self.batch([request], 1)[0]

    def add(self, request: Request) -> str:
        """Queue a request that only ends at its length; return its id."""
        from common.generation import SamplingParams
        from worker.engine.types import GenerationRequest

        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        sampling = SamplingParams(max_tokens=request.max_tokens)
        self.engine.add(GenerationRequest(request_id, tuple(request.prompt), sampling))
        return request_id

    def step(self, running: dict[str, Output]) -> None:
        """Run one step; requests that end leave `running`."""
        result = self.engine.step(time.monotonic())
        now = time.perf_counter()
        for end in result.outputs:
            output = running[end.request_id]
            for delta in end.deltas:
                output.token_ids += delta.token_ids
                output.times += [now] * len(delta.token_ids)
            if end.error is not None:
                raise RuntimeError(f"the engine refused a request: {end.error}")
            if end.finished:
                del running[end.request_id]

    def score(self, windows: Sequence[list[int]]) -> list[Score]:
        from tests.benchmarks.scoring import score_windows

        return score_windows(self, windows)


if __name__ == "__main__":
    main(InProcessEngine, add_arguments)
