"""POST /v1/embeddings, as OpenAI's clients send it."""

from __future__ import annotations

import base64
from array import array
from typing import Any, Final, Literal

import msgspec

from common.errors import InvalidRequest
from gateway.openai.requests import invalid
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2 as pb

_NATIVE_IS_BIG: Final = array("i", [1]).tobytes()[0] == 0


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body. Null is as if it were not there. `truncate` is ours: a text that is too long loses its end."""

    model: str
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None  # a label of the caller's own; it changes nothing here, as there
    truncate: bool | None = None


def parse(body: bytes) -> EmbeddingRequest:
    """Read a body. Raises InvalidRequest."""
    try:
        return msgspec.json.decode(body, type=EmbeddingRequest)
    except msgspec.ValidationError as error:
        raise _named(invalid(str(error))) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise InvalidRequest("the body is not valid JSON", reason="MALFORMED_MESSAGE") from None


def _named(error: InvalidRequest) -> InvalidRequest:
    """Return the error with our name of the field, since `input` is another parameter for other routes."""
    field = error.metadata.get("field", "")
    name = f"texts{field.removeprefix('input')}" if field.startswith("input") else field
    return InvalidRequest(error.message, reason=error.reason, field=name)


def embed_request(request: EmbeddingRequest, idempotency_key: str) -> epb.EmbedRequest:
    """Return the request of EmbeddingService. Raises InvalidRequest.

    Token ids are refused: clients that send some have them of OpenAI's own tokenizers, not of the model's here.
    """
    texts = [request.input] if isinstance(request.input, str) else request.input
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(
            "must be a text or a list of texts; token ids are not taken, send the texts themselves",
            reason="UNSUPPORTED",
            field="texts",
        )
    found = epb.EmbedRequest(model=request.model, texts=texts, idempotency_key=idempotency_key)
    if request.dimensions is not None:
        if not 0 < request.dimensions < 1 << 31:
            raise InvalidRequest("must be at least 1", reason="FIELD_OUT_OF_RANGE", field="dimensions")
        found.dimensions = request.dimensions
    if request.truncate:
        found.truncation = pb.TRUNCATION_END
    return found


def answer_of(response: epb.EmbedResponse, request: EmbeddingRequest) -> dict[str, Any]:
    """Return the body of the answer."""
    as_text = request.encoding_format == "base64"
    used = response.usage.prompt_tokens
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(one) if as_text else list(one.values),
            }
            for index, one in enumerate(response.embeddings)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }


def _base64(one: epb.Embedding) -> str:
    """float32, little endian."""
    values = array("f", one.values)
    if _NATIVE_IS_BIG:
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()
