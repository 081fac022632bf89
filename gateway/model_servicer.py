"""ModelService: the catalog and its tokenizers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import grpc.aio

from common import errors
from common.job_queue import JobQueue
from common.registry import ModelEntry, ModelState
from common.tasks import TaskName
from gateway import validation as check
from gateway.catalog import Catalog, default_config
from gateway.identity.caller import current_caller
from gateway.rights import check_model
from gateway.sources import languages_of
from torchrelay.v1 import model_pb2 as pb
from torchrelay.v1 import model_pb2_grpc as pb_grpc

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
_MAX_DETOKENIZE_IDS: Final = 1 << 17

_TASKS: Final[Mapping[str, pb.Task.ValueType]] = {
    TaskName.GENERATE: pb.TASK_GENERATE,
    TaskName.EMBED: pb.TASK_EMBED,
    TaskName.CLASSIFY: pb.TASK_CLASSIFY,
    TaskName.RERANK: pb.TASK_RERANK,
    TaskName.CLASSIFY_TOKENS: pb.TASK_CLASSIFY_TOKENS,
    TaskName.ANSWER_QUESTION: pb.TASK_ANSWER_QUESTION,
    TaskName.TRANSLATE: pb.TASK_TRANSLATE,
    TaskName.SUMMARIZE: pb.TASK_SUMMARIZE,
}
_STATES: Final = {ModelState.READY: pb.MODEL_STATE_READY, ModelState.COLD: pb.MODEL_STATE_COLD}


class ModelServicer(pb_grpc.ModelServiceServicer):
    """Shows what the catalog holds."""

    def __init__(self, catalog: Catalog, queue: JobQueue, *, reveal: bool = True) -> None:
        """`reveal`: callers learn of models that they may not use."""
        self._catalog = catalog
        self._queue = queue
        self._reveal = reveal

    async def ListModels(  # noqa: N802 - the method's name in the contract
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        size = page_size(request.page_size)
        grants = current_caller().grants
        entries = [
            entry
            for entry in self._catalog.entries()
            if entry.card.name > request.page_token and (self._reveal or grants.allows_model(entry.card.name))
        ]
        page = entries[:size]
        models = await asyncio.gather(*(self._message(entry) for entry in page))
        more = len(entries) > size
        return pb.ListModelsResponse(models=models, next_page_token=page[-1].card.name if more else "")

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        name = check.check_model_name(request.model)
        if not self._reveal:
            check_model(current_caller(), name, reveal=False)
        entry = self._catalog.entry(name)
        return pb.GetModelResponse(model=await self._message(entry))

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        caller = current_caller()
        check_model(caller, check.check_model_name(request.model), reveal=self._reveal)
        model = await self._catalog.get(request.model)
        if request.input.WhichOneof("input") == "token_ids":
            raise errors.InvalidRequest(
                "token ids are tokenized already", reason="FIELD_INVALID", field="input.token_ids"
            )
        encoded = await model.encode(request.input, caller.tenant)
        return pb.TokenizeResponse(token_ids=encoded.source_token_ids or encoded.token_ids)

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DetokenizeResponse:
        caller = current_caller()
        check_model(caller, check.check_model_name(request.model), reveal=self._reveal)
        model = await self._catalog.get(request.model)
        if len(request.token_ids) > _MAX_DETOKENIZE_IDS:
            raise errors.InvalidRequest(
                f"at most {_MAX_DETOKENIZE_IDS} ids are taken",
                reason="FIELD_OUT_OF_RANGE",
                field="token_ids",
                limit=_MAX_DETOKENIZE_IDS,
                got=len(request.token_ids),
            )
        check.check_token_ids(request.token_ids, model.card.vocab_size, "token_ids")
        ids, keep = list(request.token_ids), request.keep_special_tokens
        text = await model.turns.run(caller.tenant, lambda: model.codec.decode(ids, keep_special_tokens=keep))
        return pb.DetokenizeResponse(text=text)

    async def _message(self, entry: ModelEntry) -> pb.Model:
        card = entry.card
        return pb.Model(
            name=card.name,
            revision=card.revision,
            state=_STATES[entry.state],
            tasks=[_TASKS[task] for task in card.tasks if task in _TASKS],
            context_length=card.context_tokens,
            vocab_size=card.vocab_size,
            eos_token_ids=card.eos_token_ids,
            default_config=default_config(card),
            has_chat_template=card.has_chat_template,
            family=card.family,
            dtype=card.dtype,
            num_parameters=card.num_parameters,
            num_workers=entry.num_workers,
            num_queued=await self._queue.num_queued(card.shard),
            weight_format=card.weight_format,
            weight_bytes=card.weight_bytes,
            attention_backend=card.attention_backend,
            adapters=[
                pb.Adapter(name=adapter.name, revision=adapter.revision, rank=adapter.rank) for adapter in card.adapters
            ],
            tool_format=card.tool_format,
            reasoning_format=card.reasoning_format,
            labels=card.encoder.labels if card.encoder is not None else (),
            embedding_dimensions=card.encoder.embedding_dimensions if card.encoder is not None else 0,
            languages=languages_of(card.seq2seq),
            max_source_tokens=0 if card.seq2seq is None else card.seq2seq.max_source_tokens,
        )


def page_size(wanted: int) -> int:
    """Return how many items a page holds."""
    return min(wanted or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
