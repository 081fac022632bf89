"""Certificates renewed under load (row 43 of the fault table): no call fails, and nobody restarts anything."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.builders_calls import Outcome, events_of
from tests.builders_identity import Authority, Pair
from tests.builders_models import write_tiny_model
from tests.builders_system import Gateway, System, until
from torchrelay.client.requests import make_stream_request
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

MODEL = "tiny"
NUM_STREAMS = 64
NUM_CHANNELS = 8
SHORT_S = 10
# A connection of its own for each channel: the library would share one among all of the same address.
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


@dataclass
class Secrets:
    """The gateway's files, each replaced as a whole, but not at the same moment."""

    folder: Path
    # Clients trust all of them from the start: an authority is made known before it signs.
    authorities: list[Authority] = field(default_factory=lambda: [Authority(f"number {n}") for n in range(6)])
    num_used: int = 1

    @property
    def trusted(self) -> bytes:
        """What clients trust."""
        return b"".join(authority.pem for authority in self.authorities)

    @property
    def newest(self) -> Authority:
        """Who signs now."""
        return self.authorities[self.num_used - 1]

    def change_authority(self) -> Authority:
        """Have the next one sign from now on; return the one before."""
        self.num_used += 1
        return self.authorities[self.num_used - 2]

    def issue(self, **options: Any) -> Pair:
        """A certificate of the newest authority."""
        return self.newest.issue(hosts=("127.0.0.1",), **options)

    def put(self, name: str, content: bytes) -> None:
        (self.folder / "new").write_bytes(content)
        os.replace(self.folder / "new", self.folder / name)

    def install(self, pair: Pair) -> None:
        self.put("server.pem", pair.cert)
        self.put("server.key", pair.key)


@dataclass
class Load:
    """Streams that live on, and new calls over new connections all the while. Nothing here is tried again."""

    address: str
    secrets: Secrets
    client: Pair
    stopping: bool = False
    num_new_calls: int = 0
    num_tokens: list[int] = field(default_factory=lambda: [0] * NUM_STREAMS)

    def channel(self, trusted: bytes | None = None) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(trusted or self.secrets.trusted, self.client.key, self.client.cert)
        return grpc.aio.secure_channel(self.address, credentials, options=OPTIONS)

    async def shows(self, authority: Authority) -> bool:
        """Whether the gateway shows a certificate of this authority to newcomers."""
        async with self.channel(authority.pem) as channel:
            try:
                await self.list_models(channel)
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNAVAILABLE:
                    return False
                raise
            return True

    async def is_up(self) -> bool:
        return await self.shows(self.secrets.authorities[0])

    async def list_models(self, channel: grpc.aio.Channel) -> None:
        stub: model_pb2_grpc.ModelServiceAsyncStub = model_pb2_grpc.ModelServiceStub(channel)
        response = await stub.ListModels(model_pb2.ListModelsRequest(), timeout=60)
        assert [model.name for model in response.models] == [MODEL]

    async def follow(self, index: int, stub: generation_pb2_grpc.GenerationServiceAsyncStub) -> None:
        """Hold one stream after the other, each to its end."""
        while not self.stopping:
            request = make_stream_request(
                MODEL,
                [3 + index, 7, 11],
                {"max_tokens": 1500, "temperature": 0},
                time_limit_s=None,
                disconnect_grace_s=0,
                idempotency_key=None,
            )

            async def events(request: pb.StreamGenerateRequest = request) -> AsyncIterator[pb.GenerationEvent]:
                async for event in events_of(stub.StreamGenerate(request)):
                    self.num_tokens[index] += sum(len(delta.token_ids) for delta in event.deltas.deltas)
                    yield event

            outcome = await Outcome(events()).read(until=lambda _: self.stopping)
            assert self.stopping or len(outcome.token_ids) == 1500, outcome.finished

    async def call_anew(self) -> None:
        """Make one call after the other, each over a connection that shakes hands anew."""
        while not self.stopping:
            async with self.channel() as channel:
                await self.list_models(channel)
            self.num_new_calls += 1

    async def have_all_moved(self) -> None:
        """Wait until each stream has had tokens, and three new calls were answered, after now."""
        tokens, calls = list(self.num_tokens), self.num_new_calls

        async def moved() -> bool:
            self.check()
            more = all(new > old for new, old in zip(self.num_tokens, tokens, strict=True))
            return more and self.num_new_calls >= calls + 3

        await until(moved, 120, "every stream has more tokens")

    def start(self, group: asyncio.TaskGroup) -> None:
        self._channels = [self.channel() for _ in range(NUM_CHANNELS)]
        stubs: list[Any] = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in self._channels]
        self._tasks = [
            group.create_task(self.follow(index, stubs[index % NUM_CHANNELS])) for index in range(NUM_STREAMS)
        ]
        self._tasks.append(group.create_task(self.call_anew()))

    def check(self) -> None:
        """Raise what a call failed with."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)
    with System(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        worker = system.add_worker(folder, MODEL, start=False, BROKEN_WORKER_TOKEN="0", BROKEN_WORKER_ACT="slow")
        worker.module = "tests.broken_worker"
        worker.start()
        asyncio.run(system.ready(MODEL))
        yield system


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    secrets = Secrets(tmp_path)
    secrets.install(secrets.issue())
    secrets.put("clients.pem", secrets.newest.pem)
    return secrets


def add_tls_gateway(system: System, secrets: Secrets, module: str = "gateway") -> Gateway:
    gateway = system.add_gateway(
        start=False,
        TORCHRELAY_GATEWAY_TLS_CERT_FILE=str(secrets.folder / "server.pem"),
        TORCHRELAY_GATEWAY_TLS_KEY_FILE=str(secrets.folder / "server.key"),
        TORCHRELAY_GATEWAY_TLS_CLIENT_CA_FILE=str(secrets.folder / "clients.pem"),
        TORCHRELAY_GATEWAY_CLIENT_CERTIFICATES="required",
        TORCHRELAY_AUTH_CERTIFICATE_TENANTS="spiffe://prod/ns/{tenant}/sa/*",
    )
    gateway.module = module
    gateway.start()
    return gateway


async def test_certificates_are_renewed_under_64_streams_and_no_call_fails(system: System, secrets: Secrets) -> None:
    gateway = add_tls_gateway(system, secrets)
    client = secrets.authorities[0].issue(uris=("spiffe://prod/ns/acme/sa/web",))
    load = Load(gateway.address, secrets, client)
    shows = load.shows
    await until(load.is_up, 60, "the gateway answers over TLS")
    async with asyncio.TaskGroup() as group:
        load.start(group)
        await load.have_all_moved()

        for _ in range(3):  # a new authority each time, so that a newcomer can tell what it is shown
            before = secrets.change_authority()
            pair = secrets.issue()
            secrets.put("server.pem", pair.cert)  # for a while the key is another certificate's
            await load.have_all_moved()
            assert not await shows(secrets.newest)
            secrets.put("server.key", pair.key)
            assert await shows(secrets.newest)
            assert not await shows(before)
            await load.have_all_moved()

        before = secrets.change_authority()
        secrets.install(secrets.issue(valid_for_s=-5))  # expired: what was there before goes on
        assert await shows(before)
        secrets.put("server.pem", b"half of a")  # not even that
        assert await shows(before)
        await load.have_all_moved()

        short = secrets.issue(valid_for_s=SHORT_S)
        secrets.install(short)  # takes the expired one's place
        assert await shows(secrets.newest)
        async with load.channel() as old:
            await load.list_models(old)
            secrets.change_authority()
            secrets.install(secrets.issue())
            assert await shows(secrets.newest)
            await asyncio.sleep(SHORT_S)
            await load.list_models(old)  # a connection that was made under it outlives it
        await load.have_all_moved()

        both = secrets.authorities[0].pem + secrets.newest.pem
        secrets.put("clients.pem", both)  # who signs clients' certificates changes, too
        load.client = secrets.newest.issue(uris=("spiffe://prod/ns/acme/sa/web",))
        await load.have_all_moved()
        load.stopping = True
    await load.close()
    events = gateway.log()
    assert events.count('"event": "tls.certificate_loaded"') >= 6
    assert '"event": "tls.certificate_refused"' in events


async def test_a_gateway_that_does_not_look_at_its_certificates_again_is_seen(system: System, secrets: Secrets) -> None:
    gateway = add_tls_gateway(system, secrets, "tests.gateway_with_old_certificates")
    load = Load(gateway.address, secrets, secrets.issue(uris=("spiffe://prod/ns/acme/sa/web",)))
    await until(load.is_up, 60, "the gateway answers over TLS")
    secrets.change_authority()
    secrets.install(secrets.issue())
    assert not await load.shows(secrets.newest)
    assert await load.shows(secrets.authorities[0])
    gateway.kill()
