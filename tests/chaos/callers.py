"""Callers of many kinds, each of which writes down what it sees and complains at once where a stream breaks the law."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

import grpc
import grpc.aio

from tests.chaos.history import Generation, History, Outcome
from tests.chaos.system import MODEL, TENANTS, ChaosSystem
from tests.chaos.truth import LENGTHS, Truth
from torchrelay.client import AsyncClient, RelayError, RetryPolicy
from torchrelay.client.errors import from_rpc_error
from torchrelay.v1 import generation_pb2 as pb

GRACE_S: Final = 10 * 3600.0
SHORT_GRACE_S: Final = 1.0
_GRACES_S: Final = {"leave": SHORT_GRACE_S, "bare": 0.0}
_STRANGER_PAUSE_S: Final = 0.5
# What an accepted generation may be told: none of these says that anything is lost.
_GONE_ON: Final = ("SUPERSEDED",)


class Callers:
    """So many callers at a time until they are told to stop; every one of them then reads to its end."""

    def __init__(
        self, system: ChaosSystem, truth: Truth, history: History, rng: random.Random, num: int, give_up_s: float
    ) -> None:
        """`give_up_s` is how long a caller goes without any news."""
        self._system = system
        self._truth = truth
        self._history = history
        self._rng = rng
        self._num = num
        self._give_up_s = give_up_s
        self._stopping = False
        self._clients: dict[str, AsyncClient] = {}
        self._direct: dict[tuple[str, str], AsyncClient] = {}  # by tenant and gateway
        self._kinds: dict[str, tuple[int, Callable[[Generation], Awaitable[None]]]] = {
            "follow": (45, self._follow),
            "bare": (10, self._bare),
            "hop": (15, self._hop),
            "cancel": (10, self._cancel),
            "leave": (10, self._leave),
            "submit": (10, self._submit),
        }

    async def run(self) -> None:
        """Call until `stop`, and until the last caller has its answer."""
        links = {name: str(link.source) for name, link in self._system.to_gateway.items()}
        for tenant in TENANTS:
            key = self._system.keys[tenant]
            address = "ipv4:" + ",".join(links.values())
            self._clients[tenant] = self._client(address, key, GRACE_S)
            for name, address in links.items():
                self._direct[tenant, name] = self._client(f"ipv4:{address}", key, SHORT_GRACE_S)
        stranger = asyncio.create_task(self._meddle())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._num):
                    group.create_task(self._call_on())
        finally:
            stranger.cancel()
            await asyncio.gather(stranger, return_exceptions=True)
            for client in (*self._clients.values(), *self._direct.values()):
                await client.close()

    def stop(self) -> None:
        """Begin no more calls."""
        self._stopping = True

    def _client(self, address: str, key: str, grace_s: float) -> AsyncClient:
        policy = RetryPolicy(max_delay_s=1.0, give_up_after_s=self._give_up_s, first_contact_s=self._give_up_s)
        return AsyncClient(address, api_key=key, insecure=True, retry=policy, disconnect_grace_s=grace_s)

    async def _call_on(self) -> None:
        """One caller: a generation after another."""
        await asyncio.sleep(self._rng.uniform(0, 1))
        while not self._stopping:
            kinds = list(self._kinds)
            kind = self._rng.choices(kinds, [self._kinds[name][0] for name in kinds])[0]
            generation = Generation(
                kind=kind,
                tenant=self._rng.choice(TENANTS),
                prompt=self._rng.randrange(len(self._truth.prompts)),
                max_tokens=self._rng.choice(LENGTHS),
                idempotency_key=secrets.token_hex(8),
                grace_s=_GRACES_S.get(kind, GRACE_S),
                started=time.monotonic(),
            )
            self._history.generations.append(generation)
            try:
                await self._kinds[kind][1](generation)
            except RelayError as error:
                self._end(generation, error)
            generation.ended = time.monotonic()

    @staticmethod
    def _end(generation: Generation, error: RelayError) -> None:
        """Note the error that a call ended with."""
        generation.error = error.reason or error.code.name
        if not generation.generation_id:
            generation.outcome = Outcome.REFUSED
        elif error.reason in ("WORKER_FAILED", "ATTEMPTS_EXHAUSTED"):
            generation.outcome = Outcome.FAILED
        else:
            generation.outcome = Outcome.LOST

    # -- kinds ----------------------------------------------------------------------------------------------------

    async def _follow(self, generation: Generation) -> None:
        """Read to the end with the client library, which resumes by itself; sometimes ask for the whole afterwards."""
        client = self._clients[generation.tenant]
        stream = client.stream(
            self._truth.prompts[generation.prompt],
            model=MODEL,
            max_tokens=generation.max_tokens,
            temperature=0,
            idempotency_key=generation.idempotency_key,
        )
        try:
            async for event in stream:
                take_event(generation, event)
        finally:
            generation.num_resumes = stream.position.num_resumes
        if self._rng.random() < 0.2:
            await self._compare_whole(client, generation)

    async def _compare_whole(self, client: AsyncClient, generation: Generation) -> None:
        whole = await client.get(generation.generation_id)
        if [list(output.token_ids) for output in whole.outputs] != [generation.token_ids]:
            generation.complaints.append("I6: GetGeneration shows other tokens than the stream")

    async def _bare(self, generation: Generation) -> None:
        """Read one call to its end, as a stub without any care does: no grace, no second try once it is accepted."""
        async with contextlib.aclosing(await self._begin(generation)) as events:
            try:
                async for event in events:
                    take_event(generation, event)
            except RelayError as error:
                if not error.is_retryable:
                    raise
                generation.outcome = Outcome.LEFT  # its generation ends with it

    async def _hop(self, generation: Generation) -> None:
        """Break off again and again, and resume by hand behind the last event, at any gateway."""
        call = await self._begin(generation)
        try:
            while generation.outcome is Outcome.OPEN:
                stop_after = len(generation.token_ids) + self._rng.randrange(1, 20)
                try:
                    async for event in call:
                        take_event(generation, event)
                        if len(generation.token_ids) >= stop_after:
                            break
                except RelayError as error:
                    if not (error.is_retryable or error.reason in _GONE_ON):
                        raise
                    await asyncio.sleep(self._rng.uniform(0, 0.5))
                if generation.outcome is Outcome.OPEN:
                    if time.monotonic() - generation.started > 2 * self._give_up_s:
                        raise RelayError(grpc.StatusCode.UNAVAILABLE, "no end", reason="HOPPER_GAVE_UP")
                    await call.aclose()
                    generation.num_resumes += 1
                    call = self._resume(generation)
        finally:
            await call.aclose()

    async def _begin(self, generation: Generation) -> AsyncGenerator[pb.GenerationEvent, None]:
        """Have a generation accepted, whatever it takes; the key makes the repetitions safe."""
        end = time.monotonic() + self._give_up_s
        while True:
            generation.num_begins += 1
            call = self._stream_by_hand(generation, self._rng.choice(list(self._system.to_gateway)))
            try:
                event = await anext(call)
                take_event(generation, event)
                return call
            except StopAsyncIteration:
                pass
            except RelayError as error:
                if not error.is_retryable or time.monotonic() > end:
                    raise
            await call.aclose()
            await asyncio.sleep(self._rng.uniform(0, 0.5))

    def _stream_by_hand(self, generation: Generation, gateway: str) -> AsyncGenerator[pb.GenerationEvent, None]:
        client = self._direct[generation.tenant, gateway]
        request = pb.StreamGenerateRequest(
            model=MODEL,
            input=pb.GenerationInput(token_ids=pb.TokenIds(ids=self._truth.prompts[generation.prompt])),
            config=pb.GenerationConfig(max_tokens=generation.max_tokens, temperature=0),
            idempotency_key=generation.idempotency_key,
        )
        request.disconnect_grace.FromMilliseconds(int(generation.grace_s * 1000))
        generation.gateway = gateway
        return _events(client.generation.StreamGenerate(request, metadata=client.metadata))

    def _resume(self, generation: Generation) -> AsyncGenerator[pb.GenerationEvent, None]:
        gateway = self._rng.choice(list(self._system.to_gateway))
        client = self._direct[generation.tenant, gateway]
        known = sorted(generation.hashes)
        behind = known[-1] if known else 0
        request = pb.ResumeGenerationRequest(
            generation_id=generation.generation_id,
            after_sequence=behind,
            chain_hash=bytes.fromhex(generation.hashes.get(behind, "")),
        )
        generation.gateway = gateway
        return _events(client.generation.ResumeGeneration(request, metadata=client.metadata))

    async def _cancel(self, generation: Generation) -> None:
        """Follow, and cancel after some tokens, or none."""
        client = self._clients[generation.tenant]
        after = self._rng.randrange(0, generation.max_tokens)
        stream = client.stream(
            self._truth.prompts[generation.prompt],
            model=MODEL,
            max_tokens=generation.max_tokens,
            temperature=0,
            idempotency_key=generation.idempotency_key,
        )
        cancelling: asyncio.Task[None] | None = None
        try:
            async for event in stream:
                take_event(generation, event)
                if cancelling is None and len(generation.token_ids) >= after:
                    cancelling = asyncio.create_task(self._cancel_now(client, generation))
        finally:
            generation.num_resumes = stream.position.num_resumes
            if cancelling is not None:
                await cancelling

    async def _cancel_now(self, client: AsyncClient, generation: Generation) -> None:
        try:
            state = await client.cancel(generation.generation_id)
        except RelayError as error:
            generation.complaints.append(f"I10: a cancellation was answered {error.reason or error.code.name}")
            return
        generation.cancel_answered = time.monotonic()
        generation.cancel_state = pb.GenerationState.Name(state)

    async def _leave(self, generation: Generation) -> None:
        """Go away in the middle, for good; the grace is short."""
        call = await self._begin(generation)
        stop_after = self._rng.randrange(0, generation.max_tokens)
        try:
            async with contextlib.aclosing(call) as events:
                if stop_after:
                    async for event in events:
                        take_event(generation, event)
                        if len(generation.token_ids) >= stop_after:
                            break
        except RelayError as error:
            if not error.is_retryable and error.reason not in ("REQUEST_CANCELLED",):
                raise
        if generation.outcome is Outcome.OPEN:
            generation.outcome = Outcome.LEFT

    async def _submit(self, generation: Generation) -> None:
        """Submit at two gateways at once with one key, and follow what was made some time later."""
        request = pb.SubmitGenerationRequest(
            model=MODEL,
            input=pb.GenerationInput(token_ids=pb.TokenIds(ids=self._truth.prompts[generation.prompt])),
            config=pb.GenerationConfig(max_tokens=generation.max_tokens, temperature=0),
            idempotency_key=generation.idempotency_key,
        )
        ids = await asyncio.gather(
            *(self._submit_at(generation.tenant, gateway, request) for gateway in self._system.to_gateway)
        )
        generation.generation_id, *generation.other_ids = ids
        generation.accepted = time.monotonic()
        await asyncio.sleep(self._rng.uniform(0, 2))
        stream = self._clients[generation.tenant].resume(generation.generation_id)
        try:
            async for event in stream:
                take_event(generation, event)
        finally:
            generation.num_resumes = stream.position.num_resumes

    async def _submit_at(self, tenant: str, gateway: str, request: pb.SubmitGenerationRequest) -> str:
        client = self._direct[tenant, gateway]
        end = time.monotonic() + self._give_up_s
        while True:
            try:
                response = await client.generation.SubmitGeneration(request, metadata=client.metadata, timeout=30)
                return response.accepted.generation_id
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                is_worth_it = error.is_retryable or error.code is grpc.StatusCode.DEADLINE_EXCEEDED
                if not is_worth_it or time.monotonic() > end:
                    raise error from failure
            await asyncio.sleep(self._rng.uniform(0, 0.5))

    # -- strangers ------------------------------------------------------------------------------------------------

    async def _meddle(self) -> None:
        """Another tenant asks for what is not its own: it must hear the same as of what does not exist."""
        while True:
            await asyncio.sleep(_STRANGER_PAUSE_S)
            flying = [generation for generation in self._history.generations[-200:] if generation.generation_id]
            if not flying:
                continue
            victim = self._rng.choice(flying)
            tenant = next(tenant for tenant in TENANTS if tenant != victim.tenant)
            gateway = self._rng.choice(list(self._system.to_gateway))
            answer = await self._answer_to_stranger(self._direct[tenant, gateway], victim.generation_id)
            self._history.num_stranger_calls += 1
            if answer not in ("NOT_FOUND", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL:", "UNKNOWN:"):
                self._history.complaints.append(f"I12: a stranger was answered {answer}")

    async def _answer_to_stranger(self, client: AsyncClient, generation_id: str) -> str:
        stub = client.generation
        try:
            match self._rng.randrange(3):
                case 0:
                    get = pb.GetGenerationRequest(generation_id=generation_id)
                    await stub.GetGeneration(get, metadata=client.metadata, timeout=5)
                case 1:
                    cancel = pb.CancelGenerationRequest(generation_id=generation_id)
                    await stub.CancelGeneration(cancel, metadata=client.metadata, timeout=5)
                case _:
                    resume = pb.ResumeGenerationRequest(generation_id=generation_id)
                    call = stub.ResumeGeneration(resume, metadata=client.metadata, timeout=5)
                    if await call.read() is grpc.aio.EOF:
                        return (await call.code()).name
                    call.cancel()
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            return (
                f"{error.code.name}:"
                if error.is_connection_loss and error.code.name != "UNAVAILABLE"
                else error.code.name
            )
        return "OK"


async def _events(
    call: grpc.aio.UnaryStreamCall[pb.StreamGenerateRequest, pb.StreamGenerateResponse]
    | grpc.aio.UnaryStreamCall[pb.ResumeGenerationRequest, pb.ResumeGenerationResponse],
) -> AsyncGenerator[pb.GenerationEvent, None]:
    """Yield a call's events; a caller that closes this cancels the call. Raises RelayError."""
    try:
        async for response in call:
            yield response.event
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from failure
    finally:
        call.cancel()


def take_event(generation: Generation, event: pb.GenerationEvent) -> None:
    """Write an event down, and complain if it cannot follow those before."""
    complain = generation.complaints.append
    if generation.outcome is Outcome.FINISHED:
        complain("I1: an event after the end")
    if event.HasField("accepted"):
        found = event.accepted.generation_id
        if generation.generation_id and found != generation.generation_id:
            complain("idempotency: one key made two generations")
        if not generation.accepted:
            generation.accepted = time.monotonic()
        generation.generation_id = found
    if event.sequence < generation.last_sequence:
        complain("I4: sequences go back")
    generation.last_sequence = max(generation.last_sequence, event.sequence)
    for delta in event.deltas.deltas:
        if delta.first_token_index != len(generation.token_ids):
            complain(f"I4: token {delta.first_token_index} follows {len(generation.token_ids)} tokens")
        generation.token_ids += delta.token_ids
        generation.text += delta.text
    if event.sequence and event.chain_hash:
        digest = event.chain_hash.hex()
        if generation.hashes.setdefault(event.sequence, digest) != digest:
            complain("I4: another hash for the same event")
    if event.HasField("finished"):
        generation.outcome = Outcome.FINISHED
        generation.finish_reason = pb.FinishReason.Name(event.finished.outputs[0].finish_reason)
        usage = event.finished.usage
        generation.usage = (usage.prompt_tokens, usage.completion_tokens)
        generation.num_takeovers = event.finished.timings.num_takeovers
