"""What a generation's log takes, so that a request for more than it may hold is refused before it begins.

What is asked for is counted at the least that it is stored in, ids, log-probabilities and ranks alone (msgpack: a float
takes nine bytes, an id one or more): nothing is refused that could fit if it ran to its length. What nobody asked for,
the length where none is given, is counted amply, with text and all that stands around: what is given fits.
"""

from __future__ import annotations

from typing import Final

from common.errors import InvalidRequest
from torchrelay.v1 import generation_pb2 as pb

_RANK: Final = 1
_FLOAT: Final = 9
_ARRAY: Final = 1  # the head of one
_LEAST_ID: Final = 1
_MOST_ID: Final = 5
_TEXT: Final = 16  # of a token: more than the mean of any vocabulary
_EVENT: Final = 64  # around a token, where it comes alone


def token_bytes(config: pb.GenerationConfig, *, is_ample: bool = False) -> int:
    """Return the bytes of one token of an output."""
    id_bytes = _MOST_ID if is_ample else _LEAST_ID
    size = id_bytes + (_EVENT + _TEXT if is_ample else 0)
    if config.logprobs:
        size += _FLOAT
    if config.top_logprobs:
        size += _alternatives(config.top_logprobs, id_bytes)
    return size


def prompt_bytes(config: pb.GenerationConfig, num_prompt_tokens: int) -> int:
    """Return the least bytes of a prompt's scores: its first token has none."""
    if not config.HasField("prompt_logprobs"):
        return 0
    return max(0, num_prompt_tokens - 1) * (_FLOAT + _alternatives(config.prompt_logprobs, _LEAST_ID))


def max_tokens(
    config: pb.GenerationConfig, num_prompt_tokens: int, max_log_bytes: int, *, is_ample: bool = False
) -> int:
    """Return the most tokens of each output that can be stored. Raises InvalidRequest where the prompt's scores cannot.

    `config` has the model's defaults filled in.
    """
    of_prompt = prompt_bytes(config, num_prompt_tokens)
    if of_prompt > max_log_bytes:
        raise InvalidRequest(
            f"the log-probabilities of the prompt's {num_prompt_tokens} tokens take at least {of_prompt} bytes; "
            f"a generation may have {max_log_bytes}",
            reason="REQUEST_TOO_LARGE",
            field="config.prompt_logprobs",
            limit=max_log_bytes,
            got=of_prompt,
        )
    return (max_log_bytes - of_prompt) // (max(1, config.num_outputs) * token_bytes(config, is_ample=is_ample))


def too_many_tokens(
    config: pb.GenerationConfig, field: str, wanted: int, most: int, max_log_bytes: int
) -> InvalidRequest:
    """Return the refusal of more tokens than `max_tokens` says."""
    what = f"{max(1, config.num_outputs)} outputs of {wanted} tokens"
    if config.top_logprobs:
        what += f" with {config.top_logprobs} alternatives each"
    return InvalidRequest(
        f"{what} take more than the {max_log_bytes} bytes that a generation may have: at most {most} tokens fit",
        reason="REQUEST_TOO_LARGE",
        field=field,
        limit=most,
        got=wanted,
    )


def _alternatives(count: int, id_bytes: int) -> int:
    """Of one token: its rank and so many others."""
    return _RANK + _ARRAY + count * (_ARRAY + id_bytes + _FLOAT)
