"""A call that replicas did not confirm in time is UNAVAILABLE, says so, and repeats safely by its idempotency key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from torchrelay.client.errors import from_rpc_error
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with running_system(tmp_path) as system:
        yield system


async def test_an_unconfirmed_call_is_repeated_by_its_key(system: System, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", "llama", max_position_embeddings=2048, eos_token_id=None)
    plain = system.add_gateway()
    strict = system.add_gateway(TORCHRELAY_REDIS_MIN_REPLICAS="1", TORCHRELAY_REDIS_WAIT_TIMEOUT_MS="100")
    worker = system.add_worker(folder, MODEL)
    await system.ready(MODEL)
    worker.stop()  # so that the generation cannot have ended before the call is repeated
    request = pb.StreamGenerateRequest(
        model=MODEL,
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=[5, 6, 7])),
        config=pb.GenerationConfig(max_tokens=20),
        idempotency_key="again",
    )
    async with system.client(strict) as client, system.client(plain) as other:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generation.StreamGenerate(request, metadata=client.metadata, wait_for_ready=True).read()
        refused = from_rpc_error(caught.value)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "REPLICATION_UNCONFIRMED")
        assert refused.metadata == {"limit": "1", "got": "0"}
        assert refused.retry_delay_s

        call = other.generation.StreamGenerate(request, metadata=other.metadata)
        accepted = (await call.read()).event.accepted
        assert accepted.replayed
        worker.start()
        finished = None
        while (response := await call.read()) is not grpc.aio.EOF:
            finished = response.event.finished
        assert finished is not None
        assert [output.finish_reason for output in finished.outputs] == [pb.FINISH_REASON_LENGTH]
        assert finished.usage.completion_tokens == 20
