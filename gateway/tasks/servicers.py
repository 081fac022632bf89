"""EmbeddingService and ClassificationService: gRPC's doors to tasks."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc.aio

from gateway.identity.caller import current_caller
from gateway.servicer import GrpcCall
from gateway.tasks.core import Tasks
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import classification_pb2_grpc as cpb_grpc
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import embedding_pb2_grpc as epb_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class EmbeddingServicer(epb_grpc.EmbeddingServiceServicer):
    """Vectors of texts."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    async def Embed(self, request: epb.EmbedRequest, context: Context) -> epb.EmbedResponse:  # noqa: N802
        response = await self._tasks.run(request, current_caller(), GrpcCall(context))
        assert isinstance(response, epb.EmbedResponse)
        return response


class ClassificationServicer(cpb_grpc.ClassificationServiceServicer):
    """Labels of texts and of their parts."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    async def Classify(self, request: cpb.ClassifyRequest, context: Context) -> cpb.ClassifyResponse:  # noqa: N802
        response = await self._tasks.run(request, current_caller(), GrpcCall(context))
        assert isinstance(response, cpb.ClassifyResponse)
        return response

    async def ClassifyTokens(  # noqa: N802
        self, request: cpb.ClassifyTokensRequest, context: Context
    ) -> cpb.ClassifyTokensResponse:
        response = await self._tasks.run(request, current_caller(), GrpcCall(context))
        assert isinstance(response, cpb.ClassifyTokensResponse)
        return response

    async def AnswerQuestion(  # noqa: N802
        self, request: cpb.AnswerQuestionRequest, context: Context
    ) -> cpb.AnswerQuestionResponse:
        response = await self._tasks.run(request, current_caller(), GrpcCall(context))
        assert isinstance(response, cpb.AnswerQuestionResponse)
        return response

    async def Rerank(self, request: cpb.RerankRequest, context: Context) -> cpb.RerankResponse:  # noqa: N802
        response = await self._tasks.run(request, current_caller(), GrpcCall(context))
        assert isinstance(response, cpb.RerankResponse)
        return response
