"""LogService: levels of logs, changed while gateways and workers run."""

from __future__ import annotations

from typing import Any, Final

import grpc.aio

from common.errors import InvalidRequest
from common.telemetry.log_levels import LEVELS, LogLevels, ModuleLevel
from gateway import audit, convert
from gateway.validation import milliseconds
from torchrelay.admin.v1beta1 import log_pb2 as pb
from torchrelay.admin.v1beta1 import log_pb2_grpc as pb_grpc

_DEFAULT_MS: Final = 15 * 60_000
_LONGEST_MS: Final = 24 * 3600_000


class LogServicer(pb_grpc.LogServiceServicer):
    """Reads and writes the levels in the store."""

    def __init__(self, levels: LogLevels) -> None:
        self._levels = levels

    async def ListLogLevels(  # noqa: N802 - the method's name in the contract
        self, request: pb.ListLogLevelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListLogLevelsResponse:
        return pb.ListLogLevelsResponse(levels=map(_message, await self._levels.current()))

    async def SetLogLevel(  # noqa: N802
        self, request: pb.SetLogLevelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetLogLevelResponse:
        name = _level_of(request.severity)
        ttl_ms = _DEFAULT_MS
        if request.HasField("ttl"):
            ttl_ms = milliseconds(request.ttl, "ttl", minimum=1000, maximum=_LONGEST_MS)
        level = await self._levels.set(request.module, name, ttl_ms)
        audit.note(module=level.module, level=level.level)
        return pb.SetLogLevelResponse(level=_message(level))

    async def DeleteLogLevel(  # noqa: N802
        self, request: pb.DeleteLogLevelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DeleteLogLevelResponse:
        await self._levels.delete(request.module)
        audit.note(module=request.module)
        return pb.DeleteLogLevelResponse()


def _level_of(severity: int) -> str:
    """Raises InvalidRequest."""
    if severity not in range(1, len(LEVELS) + 1):
        raise InvalidRequest("severity is required: debug, info, warning or error", field="severity")
    return LEVELS[severity - 1]


def _message(level: ModuleLevel) -> pb.LogLevel:
    return pb.LogLevel(
        module=level.module,
        severity=pb.LogSeverity.ValueType(LEVELS.index(level.level) + 1),
        expire_time=convert.timestamp(level.until_ms),
    )
