"""The routes of the OpenAI door."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from itertools import accumulate
from typing import Any, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.catalog import MAX_INLINE_BYTES, Catalog, ServedModel, adapter_of
from gateway.generations import Generations
from gateway.identity.caller import current_caller
from gateway.openai import embeddings, schemas
from gateway.openai.answers import ChatChoices, Choices, CompletionChoices, Envelope
from gateway.openai.errors import HttpError, answer_to, merge_headers
from gateway.openai.exchange import Door, Exchange, while_wanted
from gateway.openai.requests import Parsed, chat_request, completion_requests, full_name, parse, split_model
from gateway.rights import check_model
from gateway.settings import GatewaySettings
from gateway.stream import EventStream
from gateway.tasks.core import Tasks
from gateway.validation import check_model_name
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2 as pb

_T = TypeVar("_T")

_GENERATE: Final = "/torchrelay.v1.GenerationService/StreamGenerate"
_EMBED: Final = "/torchrelay.v1.EmbeddingService/Embed"
_MODELS: Final = "/torchrelay.v1.ModelService/ListModels"
_MOST_TOKENS_PER_BYTE: Final = 16  # of a prompt, however its text is normalized; what may be more is counted
_DEFAULT_TEMPERATURE: Final = 1.0  # as OpenAI documents it, for models that have no own


class OpenAiDoor:
    """Completions, chat completions, embeddings and models."""

    def __init__(
        self, generations: Generations, tasks: Tasks, catalog: Catalog, settings: GatewaySettings, door: Door
    ) -> None:
        self._generations = generations
        self._tasks = tasks
        self._catalog = catalog
        self._settings = settings
        self.app = Starlette(
            routes=[
                Route("/v1/completions", door.route(_GENERATE, self._completions), methods=["POST"]),
                Route(
                    "/v1/chat/completions",
                    door.route(_GENERATE, self._chat_completions, is_chat=True),
                    methods=["POST"],
                ),
                Route("/v1/embeddings", door.route(_EMBED, self._embeddings), methods=["POST"]),
                Route("/v1/models", door.route(_MODELS, self._models), methods=["GET"]),
                Route("/v1/models/{model:path}", door.route(_MODELS, self._model), methods=["GET"]),
            ],
            exception_handlers={404: _no_such_path, 405: _no_such_path},
        )

    async def _completions(self, exchange: Exchange) -> None:
        body = await exchange.body(self._settings.max_message_bytes, current_caller().tenant)
        parsed = await self._named(await self._beside(body, lambda: parse(body, schemas.CompletionRequest)))
        temperature = await self._temperature(parsed)
        model = await self._catalog.get(parsed.request.model)
        requests = await self._beside(
            body,
            lambda: completion_requests(
                parsed,
                default_temperature=temperature,
                context_tokens=model.max_input_tokens + 1,
                idempotency_key=exchange.header("idempotency-key"),
            ),
        )
        config = requests[0].config
        if parsed.request.max_tokens is None:
            for request in requests:
                await self._cut_default(request, model)
        prompts: list[list[int]] = []
        if config.echo and config.logprobs:  # without echo nothing of the prompt belongs into the answer
            prompts = [(await model.encode(request.input, current_caller().tenant)).token_ids for request in requests]
        choices = CompletionChoices(model.codec.token_bytes, config.logprobs, config.num_outputs or 1, prompts)
        await self._answer(exchange, parsed, requests, choices)

    async def _chat_completions(self, exchange: Exchange) -> None:
        body = await exchange.body(self._settings.max_message_bytes, current_caller().tenant)
        parsed = await self._named(await self._beside(body, lambda: parse(body, schemas.ChatRequest)))
        temperature = await self._temperature(parsed)
        key = exchange.header("idempotency-key")
        request = await self._beside(
            body, lambda: chat_request(parsed, default_temperature=temperature, idempotency_key=key)
        )
        choices = ChatChoices(await self._token_bytes(parsed), request.config.logprobs)
        await self._answer(exchange, parsed, [request], choices)

    async def _answer(
        self, exchange: Exchange, parsed: Parsed, requests: Sequence[pb.StreamGenerateRequest], choices: Choices
    ) -> None:
        """Queue the generations, and send what they come to.

        Those of a client that goes away are cancelled: with an idempotency key after a grace, in which it may return.
        """

        async def work() -> None:
            async with AsyncExitStack() as stack:
                call = _HttpCall(exchange)
                opened = [
                    await stack.enter_async_context(self._generations.open(request, current_caller(), call, part))
                    for part, request in enumerate(requests)
                ]
                accepted = opened[0][1]
                options = parsed.request.stream_options
                envelope = Envelope(
                    f"{'chatcmpl' if isinstance(choices, ChatChoices) else 'cmpl'}-{accepted.generation_id}",
                    int(time.time()),
                    full_name(accepted.model, accepted.adapter),
                    accepted.model_revision,
                    include_usage=options is not None and bool(options.include_usage),
                )
                if parsed.request.stream:
                    await exchange.answer_events(_chunks(opened, choices, envelope))
                else:
                    await exchange.answer(await self._whole(opened, choices, envelope))

        await while_wanted(exchange, work())

    async def _whole(
        self, opened: Sequence[tuple[EventStream, pb.Accepted]], choices: Choices, envelope: Envelope
    ) -> dict[str, Any]:
        async def drain(stream: EventStream) -> None:
            async for _ in stream.events():
                pass

        try:
            async with asyncio.TaskGroup() as group:
                for stream, _ in opened:
                    group.create_task(drain(stream))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # an answer tells one error
        found = [await self._generations.whole(accepted.generation_id, current_caller()) for _, accepted in opened]
        made: list[dict[str, Any]] = []
        for generation in found:
            for output in generation.outputs:
                made.append(choices.of_output(len(made), output, generation.prompt_scores))
        return envelope.whole(choices.whole_kind, made, [generation.usage for generation in found])

    async def _embeddings(self, exchange: Exchange) -> None:
        body = await exchange.body(self._settings.max_message_bytes, current_caller().tenant)
        parsed = await self._beside(body, lambda: embeddings.parse(body))
        request = embeddings.embed_request(parsed, exchange.header("idempotency-key"))

        async def work() -> None:
            response = await self._tasks.run(request, current_caller(), _HttpCall(exchange))
            assert isinstance(response, epb.EmbedResponse)
            await exchange.answer(await self._beside(body, lambda: embeddings.answer_of(response, parsed)))

        await while_wanted(exchange, work())

    async def _models(self, exchange: Exchange) -> None:
        grants = current_caller().grants
        cards = [entry.card for entry in self._catalog.entries() if grants.allows_model(entry.card.name)]
        names = [(card.name, adapter) for card in cards for adapter in ("", *(one.name for one in card.adapters))]
        await exchange.answer({"object": "list", "data": [_model_object(*name) for name in names]})

    async def _model(self, exchange: Exchange) -> None:
        name, adapter = split_model(exchange.scope["path_params"]["model"])
        check_model(current_caller(), name, reveal=self._settings.reveal_models)
        card = self._catalog.entry(name).card
        adapter_of(card, adapter)
        await exchange.answer(_model_object(card.name, adapter))

    async def _cut_default(self, request: pb.StreamGenerateRequest, model: ServedModel) -> None:
        """Unset max_tokens, which nobody asked for, where so many do not fit: then they are what is left."""
        wanted, caps = request.config.max_tokens, current_caller().grants.caps
        context = min(model.card.context_tokens, caps.max_context_tokens or model.card.context_tokens)
        fits = caps.max_tokens is None or wanted <= caps.max_tokens
        if fits and _MOST_TOKENS_PER_BYTE * request.input.ByteSize() + wanted > context:
            encoded = await model.encode(request.input, current_caller().tenant)
            fits = len(encoded.token_ids) + wanted <= context
        if not fits:
            request.config.ClearField("max_tokens")

    async def _beside(self, body: bytes, read: Callable[[], _T]) -> _T:
        """Read a body here, a long one in the tenant's turn: the event loop is everybody's."""
        if len(body) <= MAX_INLINE_BYTES:
            return read()
        return await self._catalog.turns.run(current_caller().tenant, read)

    async def _temperature(self, parsed: Parsed) -> float:
        """Return what an unset temperature is: the model's own, if that samples."""
        model = await self._catalog.get(parsed.request.model)
        return model.defaults.temperature or _DEFAULT_TEMPERATURE

    async def _token_bytes(self, parsed: Parsed) -> Any:
        return (await self._catalog.get(parsed.request.model)).codec.token_bytes

    async def _named(self, parsed: Parsed) -> Parsed:
        """Take the adapter off the model's name.

        Raises PermissionDenied, ModelNotFound, InvalidRequest: before anything is told of the model; AdapterNotFound.
        """
        name, adapter = split_model(check_model_name(parsed.request.model))
        check_model(current_caller(), name, reveal=self._settings.reveal_models)
        (await self._catalog.get(name)).adapter(adapter)
        return Parsed(msgspec.structs.replace(parsed.request, model=name), parsed.extensions, adapter)


class _HttpCall:
    """A call by HTTP: it has no deadline of its own, and lasts while its client is there."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def time_remaining(self) -> float | None:
        return None

    async def announce(self, generation_id: str) -> None:
        self._exchange.generation_id = self._exchange.generation_id or generation_id


async def _chunks(
    opened: Sequence[tuple[EventStream, pb.Accepted]], choices: Choices, envelope: Envelope
) -> AsyncIterator[dict[str, Any] | None]:
    """Yield the chunks of all generations as they come; None where there is only word that one goes on."""
    counts = [accepted.config.num_outputs or 1 for _, accepted in opened]
    starts = [0, *accumulate(counts)]
    for number in range(starts[-1]):
        for choice in choices.first(number):
            yield envelope.chunk(choices.chunk_kind, [choice])
    usages: list[pb.Usage] = []
    async with aclosing(_merged([stream for stream, _ in opened])) as events:
        async for number, event in events:
            for choice in _choices_of(event, starts[number], choices, counts[number]):
                yield envelope.chunk(choices.chunk_kind, [choice])
            if event.HasField("progress"):
                yield None
            if event.HasField("finished"):
                usages.append(event.finished.usage)
    if envelope.include_usage:
        yield envelope.last_chunk(choices.chunk_kind, usages)


def _choices_of(event: pb.GenerationEvent, start: int, choices: Choices, num_outputs: int) -> list[dict[str, Any]]:
    match event.WhichOneof("event"):
        case "deltas":
            return [choices.of_delta(start + delta.output_index, delta) for delta in event.deltas.deltas]
        case "prompt_scores":
            return [c for i in range(num_outputs) for c in choices.of_prompt(start + i, event.prompt_scores)]
        case "finished":
            return [choices.of_end(start + end.output_index, end) for end in event.finished.outputs]
        case _:
            return []


async def _merged(streams: Sequence[EventStream]) -> AsyncGenerator[tuple[int, pb.GenerationEvent], None]:
    """Yield the events of streams as they come, with the number of the stream; an error of one ends all."""
    if len(streams) == 1:
        async for event in streams[0].events():
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, pb.GenerationEvent]] = asyncio.Queue(maxsize=1)  # nothing runs ahead

    async def pump(number: int, stream: EventStream) -> None:
        async for event in stream.events():
            await queue.put((number, event))

    async def pump_all() -> None:
        async with asyncio.TaskGroup() as group:
            for number, stream in enumerate(streams):
                group.create_task(pump(number, stream))

    pumping = asyncio.create_task(pump_all())
    getting = asyncio.create_task(queue.get())
    try:
        while True:
            await asyncio.wait({getting, pumping}, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                yield getting.result()
                getting = asyncio.create_task(queue.get())
            elif queue.empty():
                break
        await pumping
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        getting.cancel()
        pumping.cancel()
        await asyncio.gather(getting, pumping, return_exceptions=True)


def _model_object(name: str, adapter: str = "") -> dict[str, Any]:
    """An adapter is a model of its own here, whose parent is the one that it belongs to."""
    known = {"object": "model", "created": 0, "owned_by": "torchrelay", "root": name}
    return {"id": full_name(name, adapter), **known, "parent": name if adapter else None}


async def _no_such_path(request: Any, error: Exception) -> Any:
    status = getattr(error, "status_code", 404)
    message = "no such path" if status == 404 else "this path does not take this method"
    found = answer_to(HttpError(status, message, "not_found" if status == 404 else "method_not_allowed"), is_chat=False)
    return _Plain(found.status, found.body)


class _Plain:
    """An answer of Starlette's own."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self._status = status
        self._data = msgspec.json.encode(body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = merge_headers({"content-type": "application/json", "content-length": str(len(self._data))})
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._data})
