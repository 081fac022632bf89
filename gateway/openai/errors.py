"""From errors of the domain to what OpenAI's clients expect: a status, a body with `param` and `code`, retry-after."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from common import errors

# The first type that an error is an instance of decides; anything else is a bug: 500.
_KINDS: Final[tuple[tuple[type[errors.ServingError], int, str], ...]] = (
    (errors.InvalidRequest, 400, "invalid_request_error"),
    (errors.Unauthenticated, 401, "authentication_error"),
    (errors.PermissionDenied, 403, "permission_error"),
    (errors.NotFound, 404, "not_found_error"),
    (errors.FailedPrecondition, 400, "invalid_request_error"),
    (errors.Aborted, 409, "conflict_error"),
    (errors.QuotaExceeded, 429, "insufficient_quota"),
    (errors.ResourceExhausted, 429, "rate_limit_error"),
    (errors.Unavailable, 503, "server_error"),
    (errors.DeadlineExceeded, 504, "timeout_error"),
)
# Codes that OpenAI's clients or their users look for; every other code is our reason in lower case.
_CODES: Final = {
    "CREDENTIALS_MISSING": "invalid_api_key",
    "CREDENTIALS_INVALID": "invalid_api_key",
    "MODEL_NOT_FOUND": "model_not_found",
    "ADAPTER_NOT_FOUND": "model_not_found",
    "CONTEXT_LENGTH_EXCEEDED": "context_length_exceeded",
    "RATE_LIMITED": "rate_limit_exceeded",
    "QUOTA_EXCEEDED": "insufficient_quota",
}
_PARAMS: Final = {
    "config.num_outputs": "n",
    "config.structured_output": "response_format",
    "input.chat.template_arguments": "chat_template_kwargs",
    "input.chat.continue_last_message": "continue_final_message",
    "input.text": "prompt",
    "input.token_ids.ids": "prompt",
    "priority": "service_tier",
    "idempotency_key": "Idempotency-Key",
}
_PART: Final = re.compile(r"\.parts(\[\d+\])(?:\.(?:text|reasoning))?")
_TOOL_FIELD: Final = re.compile(r"^(tools\[\d+\])\.(name|description|parameters)$")


class HttpError(Exception):
    """An answer of HTTP's own: no such path, a body that is too long."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


class ErrorAnswer(NamedTuple):
    """What the caller gets."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def answer_to(error: errors.ServingError | HttpError, *, is_chat: bool) -> ErrorAnswer:
    """Return the answer to an error."""
    if isinstance(error, HttpError):
        return ErrorAnswer(error.status, body_of(error.message, _type_of(error.status), error.param, error.code), {})
    status, kind = next(
        ((status, kind) for type_, status, kind in _KINDS if isinstance(error, type_)), (500, "server_error")
    )
    param = None
    if isinstance(error, errors.InvalidRequest) and error.violations:
        param = param_of(error.violations[0].field, is_chat=is_chat)
    elif isinstance(error, errors.ModelNotFound | errors.AdapterNotFound):  # one name says both
        param = "model"
    code = _CODES.get(error.reason, error.reason.lower())
    return ErrorAnswer(status, body_of(error.message, kind, param, code), _retry_headers(error.retry_after_ms))


def body_of(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """Return the body of an error, as a response or as an event of a stream."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def param_of(field: str, *, is_chat: bool) -> str:
    """Return the parameter of OpenAI's request that became this field of ours."""
    for ours, theirs in _PARAMS.items():
        if field == ours or field.startswith(f"{ours}."):
            return theirs
    if field == "input":
        return "messages" if is_chat else "prompt"
    if field.partition("[")[0] == "texts":
        return f"input{field.removeprefix('texts')}"
    name = field.removeprefix("config.").removeprefix("input.chat.")
    name = _TOOL_FIELD.sub(r"\1.function.\2", _PART.sub(r".content\1", name))
    return name.replace(".parts", ".content") or field


def _retry_headers(retry_after_ms: int | None) -> dict[str, str]:
    if retry_after_ms is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(retry_after_ms / 1000))), "retry-after-ms": str(retry_after_ms)}


def _type_of(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def merge_headers(*headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as ASGI wants them."""
    return [(name.encode(), value.encode()) for some in headers for name, value in some.items()]
