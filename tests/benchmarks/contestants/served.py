"""torchrelay whole: gateway, queue and worker as processes on this machine, called over gRPC from this one.

What calls them is the contract's generated stubs, as in any other service: one blocking call where there is one caller,
asyncio's where there are many. Our client library adds its own time, which is no part of serving.
"""

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

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from grpc.experimental import ChannelOptions

from tests.benchmarks.contestants.base import Contestant, Output, main
from tests.benchmarks.contestants.engine import add_arguments
from tests.benchmarks.processes import cpu_s, main_thread_cpu_s
from tests.benchmarks.workload import Request
from tests.builders_system import System
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc as pb_grpc

_NAME: Final = "model"
_GRACE: Final = Duration(seconds=30)  # in which a broken stream can be resumed, as by our client library
# One stream is read by the thread that called: no other need be woken for each of its messages.
_ONE_THREAD: Final = ((ChannelOptions.SingleThreadedUnaryStream, True),)


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
        self._loop.run_until_complete(self._system.ready(_NAME))
        address = self._system.gateways[0].address
        self._metadata = (("authorization", f"Bearer {self._system.key}"),)
        channel = self._stack.enter_context(grpc.insecure_channel(address, _ONE_THREAD))
        self._stub = pb_grpc.GenerationServiceStub(channel)
        self._address = address
        self._async_channel: grpc.aio.Channel | None = None
        self.info = {
            "dtype": args.dtype,
            "quantization": args.quantization,
            "speculation": args.speculation,
            "threads": args.threads,
            "kv_cache_mib": args.kv_cache_mib,
        }

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        return self._loop.run_until_complete(self._batch(requests))

    async def _batch(self, requests: Sequence[Request]) -> list[Output]:
        if self._async_channel is None:
            self._async_channel = grpc.aio.insecure_channel(self._address)
        stub: pb_grpc.GenerationServiceAsyncStub = pb_grpc.GenerationServiceStub(self._async_channel)
        return await asyncio.gather(*(self._call(stub, request) for request in requests))

    async def _call(self, stub: pb_grpc.GenerationServiceAsyncStub, request: Request) -> Output:
        output = Output(called=time.perf_counter())
        async for response in stub.StreamGenerate(_message_of(request), metadata=self._metadata):
            _take(output, response)
        return output

    def _close_async_channel(self) -> None:
        if self._async_channel is not None:
            self._loop.run_until_complete(self._async_channel.close())
            self._async_channel = None

    def stream(self, request: Request) -> Output:
        # An open asyncio channel has a thread that polls every socket of its process, and would hand this call its own.
        self._close_async_channel()
        output = Output(called=time.perf_counter())
        for response in self._stub.StreamGenerate(_message_of(request), metadata=self._metadata):
            _take(output, response)
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
        self._close_async_channel()
        self._stack.close()


def _message_of(request: Request) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        model=_NAME,
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=request.prompt)),
        config=pb.GenerationConfig(max_tokens=request.max_tokens, temperature=0.0),
        disconnect_grace=_GRACE,
    )


def _take(output: Output, response: pb.StreamGenerateResponse) -> None:
    for delta in response.event.deltas.deltas:
        output.token_ids += delta.token_ids
        output.times += [time.perf_counter()] * len(delta.token_ids)


if __name__ == "__main__":
    main(Served, add_arguments)
