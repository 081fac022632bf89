"""GenerationService: gRPC's door to generations."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio

from common import errors
from gateway import convert
from gateway.generations import Generations
from gateway.identity.caller import current_caller
from gateway.progress import LogPosition
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc as pb_grpc

GENERATION_ID_METADATA: Final = "torchrelay-generation-id"


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """Serves generations of every model in the catalog."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def Generate(  # noqa: N802 - the method's name in the contract
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> pb.GenerateResponse:
        caller = current_caller()
        async with self._generations.open(request, caller, GrpcCall(context)) as (stream, accepted):
            async for _ in stream.events():
                pass
        return pb.GenerateResponse(generation=await self._generations.whole(accepted.generation_id, caller))

    async def StreamGenerate(  # noqa: N802
        self,
        request: pb.StreamGenerateRequest,
        context: grpc.aio.ServicerContext[pb.StreamGenerateRequest, pb.StreamGenerateResponse],
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        async with self._generations.open(request, current_caller(), GrpcCall(context)) as (stream, accepted):
            yield pb.StreamGenerateResponse(event=pb.GenerationEvent(accepted=accepted))
            async for event in stream.events():
                yield pb.StreamGenerateResponse(event=event)

    async def SubmitGeneration(  # noqa: N802
        self,
        request: pb.SubmitGenerationRequest,
        context: grpc.aio.ServicerContext[pb.SubmitGenerationRequest, pb.SubmitGenerationResponse],
    ) -> pb.SubmitGenerationResponse:
        accepted = await self._generations.submit(request, current_caller(), GrpcCall(context))
        return pb.SubmitGenerationResponse(accepted=accepted)

    async def ResumeGeneration(  # noqa: N802
        self,
        request: pb.ResumeGenerationRequest,
        context: grpc.aio.ServicerContext[pb.ResumeGenerationRequest, pb.ResumeGenerationResponse],
    ) -> AsyncIterator[pb.ResumeGenerationResponse]:
        caller = current_caller()
        self._generations.check_access(request.generation_id, caller)
        if request.chain_hash and len(request.chain_hash) != 8:
            raise errors.InvalidRequest("must be empty or 8 bytes", reason="FIELD_INVALID", field="chain_hash")
        position = LogPosition(request.after_sequence, request.chain_hash or None)
        if not request.after_sequence:
            position = LogPosition()
        async with self._generations.resume(
            request.generation_id, caller, GrpcCall(context), position, request.chain_hash
        ) as (stream, accepted):
            yield pb.ResumeGenerationResponse(
                event=pb.GenerationEvent(
                    sequence=position.sequence, chain_hash=convert.chain_hash(position), accepted=accepted
                )
            )
            async for event in stream.events():
                yield pb.ResumeGenerationResponse(event=event)

    async def GetGeneration(  # noqa: N802
        self,
        request: pb.GetGenerationRequest,
        context: grpc.aio.ServicerContext[pb.GetGenerationRequest, pb.GetGenerationResponse],
    ) -> pb.GetGenerationResponse:
        caller = current_caller()
        self._generations.check_access(request.generation_id, caller)
        return pb.GetGenerationResponse(generation=await self._generations.whole(request.generation_id, caller))

    async def CancelGeneration(  # noqa: N802
        self,
        request: pb.CancelGenerationRequest,
        context: grpc.aio.ServicerContext[pb.CancelGenerationRequest, pb.CancelGenerationResponse],
    ) -> pb.CancelGenerationResponse:
        caller = current_caller()
        self._generations.check_access(request.generation_id, caller)
        return pb.CancelGenerationResponse(state=await self._generations.cancel(request.generation_id, caller))

    async def DeleteGeneration(  # noqa: N802
        self,
        request: pb.DeleteGenerationRequest,
        context: grpc.aio.ServicerContext[pb.DeleteGenerationRequest, pb.DeleteGenerationResponse],
    ) -> pb.DeleteGenerationResponse:
        caller = current_caller()
        self._generations.check_access(request.generation_id, caller)
        await self._generations.delete(request.generation_id, caller)
        return pb.DeleteGenerationResponse()


class GrpcCall:
    """A call by gRPC, of any service."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context

    def time_remaining(self) -> float | None:
        return self._context.time_remaining()

    async def announce(self, generation_id: str) -> None:
        await self._context.send_initial_metadata(((GENERATION_ID_METADATA, generation_id),))
