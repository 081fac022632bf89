"""torchrelay whole: client, gateway, queue and worker as processes on this machine, called over gRPC from this one."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.benchmarks.contestants.base import Contestant, Output, main
from tests.benchmarks.contestants.engine import add_arguments
from tests.benchmarks.processes import cpu_s, main_thread_cpu_s
from tests.benchmarks.workload import Request
from tests.builders_system import System
from torchrelay.client import AsyncClient

_NAME: Final = "model"


@contextmanager
def without_end(model: Path) -> Iterator[Path]:
    """Yield a copy of a model folder whose model names no end token: a caller cannot ask to ignore it."""
    with tempfile.TemporaryDirectory(prefix="torchrelay-bench-model-") as folder:
        copy = Path(folder) / _NAME
        copy.mkdir()
        for file in model.iterdir():
            try:
                os.link(file, copy / file.name)
            except OSError:  # another file system
                shutil.copy(file, copy / file.name)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            path = copy / name
            if path.exists():
                values = json.loads(path.read_text())
                values |= {"eos_token_id": None}  # left out, it would be the family's default
                values.pop("eos_token", None)
                path.unlink()  # not through the link
                path.write_text(json.dumps(values))
        yield copy


class Served(Contestant):
    """One gateway, one worker, the queue synced before each answer."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._stack = ExitStack()
        model = self._stack.enter_context(without_end(Path(args.model)))
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="torchrelay-bench-"))
        self._system = self._stack.enter_context(System(Path(folder)))
        self._system.add_gateway()
        self._system.add_worker(
            model,
            _NAME,
            TORCHRELAY_WORKER_DTYPE=args.dtype,
            TORCHRELAY_WORKER_QUANTIZATION=args.quantization,
            TORCHRELAY_WORKER_NUM_THREADS=str(args.threads),
            TORCHRELAY_ENGINE_SPECULATION=str(args.speculation),
            TORCHRELAY_ENGINE_MAX_NUM_SEQS=str(args.max_num_seqs),
            TORCHRELAY_ENGINE_KV_CACHE_BYTES=str(args.kv_cache_mib << 20),
        )
        # A client's loop runs already when it calls: what sets it up and starts it is not part of a call.
        self._loop = self._stack.enter_context(asyncio.Runner()).get_loop()
        self._client = self._loop.run_until_complete(self._connect())
        self.info = {
            "dtype": args.dtype,
            "quantization": args.quantization,
            "speculation": args.speculation,
            "threads": args.threads,
            "kv_cache_mib": args.kv_cache_mib,
        }

    async def _connect(self) -> AsyncClient:
        await self._system.ready(_NAME)
        return self._system.client()

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        return self._loop.run_until_complete(self._batch(requests))

    async def _batch(self, requests: Sequence[Request]) -> list[Output]:
        return await asyncio.gather(*(self._call(request) for request in requests))

    def stream(self, request: Request) -> Output:
        return self._loop.run_until_complete(self._call(request))

    async def _call(self, request: Request) -> Output:
        output = Output(called=time.perf_counter())
        options = {"model": _NAME, "max_tokens": request.max_tokens, "temperature": 0.0}
        async for event in self._client.stream(request.prompt, **options):  # type: ignore[arg-type]
            for delta in event.deltas.deltas:
                output.token_ids += delta.token_ids
                output.times += [time.perf_counter()] * len(delta.token_ids)
        return output

    def cpu_parts(self) -> dict[str, float]:
        """The worker's first thread is the agent's; the engine's thread and its pool are the rest."""
        worker, gateway = self._system.workers[0].process, self._system.gateways[0].process
        queue_pid = self._system.server.pid
        assert worker is not None and gateway is not None and queue_pid is not None  # noqa: PT018
        agent = main_thread_cpu_s(worker.pid)
        return {
            "client": time.process_time(),
            "gateway": cpu_s(gateway.pid),
            "redis": cpu_s(queue_pid),
            "agent": agent,
            "engine": cpu_s(worker.pid) - agent,
        }

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._stack.close()


if __name__ == "__main__":
    main(Served, add_arguments)
