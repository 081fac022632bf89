"""Requests of EmbeddingService and ClassificationService: which method takes each, and how a repeat finds its end."""

from __future__ import annotations

import uuid
from typing import Any, Final, TypeVar

from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import embedding_pb2 as epb

TaskRequest = (
    epb.EmbedRequest | cpb.ClassifyRequest | cpb.ClassifyTokensRequest | cpb.AnswerQuestionRequest | cpb.RerankRequest
)
_R = TypeVar("_R", bound=TaskRequest)

_SERVICES: Final[dict[type[Any], str]] = {
    epb.EmbedRequest: "embedding",
    cpb.ClassifyRequest: "classification",
    cpb.ClassifyTokensRequest: "classification",
    cpb.AnswerQuestionRequest: "classification",
    cpb.RerankRequest: "classification",
}


def method_of(request: TaskRequest) -> tuple[str, str]:
    """Return a client's stub and its method that takes a request. Raises TypeError for any other message."""
    service = _SERVICES.get(type(request))
    if service is None:
        raise TypeError(f"{type(request).__name__} is no request of EmbeddingService or ClassificationService")
    return service, type(request).__name__.removesuffix("Request")


def keyed(request: _R) -> _R:
    """Return the request with an idempotency key, made up if it has none: it makes a repeat after a lost reply safe."""
    if request.idempotency_key:
        return request
    copy: _R = type(request)()
    copy.CopyFrom(request)  # type: ignore[arg-type]  # of its own type
    copy.idempotency_key = uuid.uuid4().hex
    return copy
