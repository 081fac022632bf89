"""From request messages to what the queue takes. What can be refused is refused here, all bad fields at once."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Sequence

import msgspec
from google.protobuf.duration_pb2 import Duration

from common import parameter_limits
from common.errors import InvalidRequest
from common.generation import SamplingParams, StructuredOutput
from common.grants import NO_CAPS, Caps
from gateway import beams, log_budget, token_choice
from gateway.violations import Violations
from torchrelay.v1 import generation_pb2 as pb

MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_ALTERNATIVES = 20
MAX_TEMPERATURE = 2.0
MIN_TEMPERATURE = 1e-6
MAX_REPETITION_PENALTY = 10.0
MAX_IDEMPOTENCY_KEY = 128
_VISIBLE = re.compile("[!-~]*")
MAX_CACHE_SALT_BYTES = 128
_REPORTS = frozenset(("best_of", "top_logprobs", "prompt_logprobs"))
_FILTERS = frozenset(("top_k", "top_p", "min_p"))
# Of the fields that go to the engine as they are: what is not set has the same default there.
_OF_ENGINE = frozenset(
    (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "seed", "logprobs",
        "top_logprobs", "include_stop", "prompt_logprobs",
    )
)  # fmt: skip


class ConfigLimits(msgspec.Struct, frozen=True):
    """What bounds a config: the model's facts, the operator's settings and the caller's caps."""

    context_length: int  # of the model, or as much of it as the caller may use
    vocab_size: int
    max_outputs: int
    max_stop_strings: int
    has_eos: bool = True  # the model has an end-of-sequence id
    max_tokens: int | None = None  # of each output; None is what the context leaves
    max_sequences: int | None = None  # that a worker decodes together; None is not known
    max_log_bytes: int | None = None  # of a generation's events; None is not known

    @property
    def max_beams(self) -> int:
        """Beams are decoded as outputs are, and together."""
        return min(parameter_limits.MAX_BEAMS, self.max_outputs, self.max_sequences or parameter_limits.MAX_BEAMS)

    def within(self, caps: Caps) -> ConfigLimits:
        """These limits and a caller's caps, whichever is tighter."""
        if caps == NO_CAPS:
            return self
        return msgspec.structs.replace(
            self,
            context_length=min(self.context_length, caps.max_context_tokens or self.context_length),
            max_outputs=min(self.max_outputs, caps.max_outputs or self.max_outputs),
            max_tokens=caps.max_tokens,
        )


def check_model_name(name: str) -> str:
    """Return the name. Raises InvalidRequest if it is empty."""
    if not name:
        raise InvalidRequest("model is required", reason="FIELD_REQUIRED", field="model")
    return name


def check_token_ids(ids: Iterable[int], vocab_size: int, path: str) -> None:
    """Raise InvalidRequest for an id outside the vocabulary."""
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise InvalidRequest(
            f"token ids must be below {vocab_size}", reason="FIELD_OUT_OF_RANGE", field=path, limit=vocab_size - 1
        )


def resolve_config(
    config: pb.GenerationConfig,
    defaults: pb.GenerationConfig,
    num_prompt_tokens: int,
    limits: ConfigLimits,
    *,
    seed: int,
    is_chat: bool = False,
) -> pb.GenerationConfig:
    """Return the config in force: defaults filled in, lengths turned into numbers of tokens, the seed drawn (`seed`).

    Raises InvalidRequest with every bad field, or CONTEXT_LENGTH_EXCEEDED. Most requests set few fields, and this runs
    before a job is queued: what concerns fields that are not set is left out.
    """
    bad = Violations()
    given = token_choice.fields_of(config)
    _check_fields(config, defaults, limits, given, bad)
    if config.echo and is_chat:
        bad.add("config.echo", "is not for conversations", "FIELD_CONFLICT")
    bad.raise_if_any()
    room = limits.context_length - num_prompt_tokens
    least = 0 if config.HasField("max_tokens") and config.max_tokens == 0 else 1
    if room < least:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room in the model's context of "
            f"{limits.context_length}",
            reason="CONTEXT_LENGTH_EXCEEDED",
            field="input",
            limit=limits.context_length - least,
            got=num_prompt_tokens,
        )
    resolved = pb.GenerationConfig()
    resolved.CopyFrom(defaults)
    if config.stop:  # merging would add to the model's
        del resolved.stop[:]
    if config.stop_token_ids:
        del resolved.stop_token_ids[:]
    if not given.isdisjoint(token_choice.FIELDS):
        token_choice.clear_replaced(resolved, config)
    resolved.MergeFrom(config)
    resolved.max_tokens = _max_tokens(config, resolved, num_prompt_tokens, room, limits)
    resolved.ClearField("max_length")
    in_force = given | token_choice.fields_of(defaults)
    token_choice.resolve(resolved, config, num_prompt_tokens, in_force, has_eos=limits.has_eos)
    filters_given = not _FILTERS.isdisjoint(given) or token_choice.has_filter(given)
    if filters_given and "temperature" not in given and not resolved.temperature:
        resolved.temperature = 1.0  # asking for a filter is asking to sample
    if resolved.temperature < MIN_TEMPERATURE:
        resolved.temperature = 0.0  # the same token; dividing by less makes scores overflow
    beams.resolve(resolved, config, defaults, limits.max_beams, in_force)
    if "seed" not in given:
        resolved.seed = seed
    return resolved


def sampling_params(
    config: pb.GenerationConfig,
    eos_token_ids: Iterable[int],
    bad_words_ids: Collection[Sequence[int]] = (),
    constraint: StructuredOutput | None = None,
) -> SamplingParams:
    """Turn a resolved config into the engine's parameters.

    `bad_words_ids` are those that `bad_words` stand for; `constraint` is what the output must match.
    """
    ends = [] if config.ignore_eos else [*eos_token_ids]
    given = {field.name: value for field, value in config.ListFields()}
    return SamplingParams(
        max_tokens=config.max_tokens,
        num_outputs=config.best_of or config.num_outputs or 1,
        stop_strings=tuple(config.stop),
        stop_token_ids=tuple(dict.fromkeys([*ends, *config.stop_token_ids])),
        num_best=(config.num_outputs or 1) if "best_of" in given else 0,
        structured_output=constraint,
        **{name: value for name, value in given.items() if name in _OF_ENGINE},
        **token_choice.params_of(config, given, bad_words_ids),
        **beams.params_of(config),
    )


def milliseconds(duration: Duration, path: str, *, minimum: int, maximum: int | None = None) -> int:
    """Return a duration in milliseconds, cut to `maximum`. Raises InvalidRequest for an invalid or too small one."""
    if not 0 <= duration.nanos < 1_000_000_000 or not 0 <= duration.seconds <= 315_576_000_000:
        raise InvalidRequest("must be a valid, non-negative duration", reason="FIELD_OUT_OF_RANGE", field=path)
    value = duration.ToMilliseconds()
    if value < minimum:
        raise InvalidRequest(
            f"must be at least {minimum} ms", reason="FIELD_OUT_OF_RANGE", field=path, limit=minimum, got=value
        )
    return value if maximum is None else min(value, maximum)


def check_idempotency_key(key: str) -> str | None:
    """Return the key, None if there is none. Raises InvalidRequest."""
    if key and (len(key) > MAX_IDEMPOTENCY_KEY or not _VISIBLE.fullmatch(key)):
        raise InvalidRequest(
            f"must be at most {MAX_IDEMPOTENCY_KEY} printable ASCII characters without spaces",
            reason="FIELD_INVALID",
            field="idempotency_key",
            limit=MAX_IDEMPOTENCY_KEY,
        )
    return key or None


def idempotency_key_of(key: str, part: int) -> str | None:
    """Return the key of one of a call's generations, None if there is none. Raises InvalidRequest.

    The first has the caller's own; those of the others hold a blank, which no caller's may, and are short enough.
    """
    own = check_idempotency_key(key)
    return own if own is None or not part else f"{hashlib.sha256(own.encode()).hexdigest()} {part}"


def check_cache_salt(salt: bytes) -> bytes:
    """Return the salt. Raises InvalidRequest if it is too long."""
    if len(salt) > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest(
            f"must be at most {MAX_CACHE_SALT_BYTES} bytes",
            reason="FIELD_OUT_OF_RANGE",
            field="cache_salt",
            limit=MAX_CACHE_SALT_BYTES,
            got=len(salt),
        )
    return salt


def _max_tokens(
    config: pb.GenerationConfig, resolved: pb.GenerationConfig, num_prompt_tokens: int, room: int, limits: ConfigLimits
) -> int:
    """`resolved` has the model's defaults filled in."""
    log_bytes = limits.max_log_bytes
    field_name = "config.max_length" if config.HasField("max_length") else "config.max_tokens"
    cap = limits.max_tokens
    if config.HasField("max_length"):
        if config.max_length <= num_prompt_tokens:
            raise InvalidRequest(
                f"must be above the prompt's {num_prompt_tokens} tokens",
                reason="FIELD_OUT_OF_RANGE",
                field="config.max_length",
                limit=num_prompt_tokens + 1,
                got=config.max_length,
            )
        wanted = config.max_length - num_prompt_tokens
    elif config.HasField("max_tokens"):
        wanted = config.max_tokens
    else:
        most = room if cap is None else min(room, cap)
        if log_bytes is not None:  # nobody is given unasked what the log cannot hold
            most = min(most, max(1, log_budget.max_tokens(resolved, num_prompt_tokens, log_bytes, is_ample=True)))
        return min(most, resolved.max_tokens) if resolved.HasField("max_tokens") else most
    if cap is not None and wanted > cap:
        raise InvalidRequest(
            f"this key may ask for {cap} new tokens",
            reason="FIELD_OUT_OF_RANGE",
            field=field_name,
            limit=cap,
            got=wanted,
        )
    if wanted > room:
        raise InvalidRequest(
            f"the prompt's {num_prompt_tokens} tokens and {wanted} new ones exceed the model's context of "
            f"{limits.context_length}",
            reason="CONTEXT_LENGTH_EXCEEDED",
            field=field_name,
            limit=room,
            got=wanted,
        )
    if log_bytes is not None:
        most = log_budget.max_tokens(resolved, num_prompt_tokens, log_bytes)
        if wanted > most:
            raise log_budget.too_many_tokens(resolved, field_name, wanted, most, log_bytes)
    return wanted


def _check_fields(
    config: pb.GenerationConfig,
    defaults: pb.GenerationConfig,
    limits: ConfigLimits,
    given: Collection[str],
    bad: Violations,
) -> None:
    """Note bad fields; `given` are the names of those that the config sets."""
    if "max_tokens" in given and "max_length" in given:
        bad.add("config.max_length", "must not be set together with max_tokens", "FIELD_CONFLICT")
    if "max_tokens" in given and config.max_tokens < 1 and not _reads_prompt(config):
        bad.add("config.max_tokens", "must be at least 1, but with prompt_logprobs or echo")
    if "temperature" in given:
        _check_number("temperature", config.temperature, 0, MAX_TEMPERATURE, bad)
    if "top_p" in given:
        _check_number("top_p", config.top_p, 0, 1, bad, above=True)
    if "repetition_penalty" in given:
        _check_number("repetition_penalty", config.repetition_penalty, 0, MAX_REPETITION_PENALTY, bad, above=True)
    if "min_p" in given and not 0 <= config.min_p < 1:
        bad.add("config.min_p", "must be at least 0 and below 1")
    if config.no_repeat_ngram_size > parameter_limits.MAX_NGRAM:
        bad.add("config.no_repeat_ngram_size", f"must be at most {parameter_limits.MAX_NGRAM}")
    if "num_outputs" in given and not 1 <= config.num_outputs <= limits.max_outputs:
        bad.add("config.num_outputs", f"must be 1 to {limits.max_outputs}")
    if "stop" in given:
        if len(config.stop) > limits.max_stop_strings:
            bad.add("config.stop", f"at most {limits.max_stop_strings} strings are taken")
        elif not all(1 <= len(stop.encode()) <= MAX_STOP_BYTES for stop in config.stop):
            bad.add("config.stop", f"each must be 1 to {MAX_STOP_BYTES} bytes")
    if "stop_token_ids" in given:
        if len(config.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            bad.add("config.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids are taken")
        elif any(token_id >= limits.vocab_size for token_id in config.stop_token_ids):
            bad.add("config.stop_token_ids", f"each must be below {limits.vocab_size}")

    if not token_choice.FIELDS.isdisjoint(given):
        token_choice.check(config, limits.vocab_size, bad)
    beams.check(config, defaults, limits.max_beams, given, bad)
    if not _REPORTS.isdisjoint(given):
        _check_reports(config, limits, bad)


def _reads_prompt(config: pb.GenerationConfig) -> bool:
    """Whether there is something to report without a new token."""
    return config.HasField("prompt_logprobs") or config.echo


def _check_reports(config: pb.GenerationConfig, limits: ConfigLimits, bad: Violations) -> None:
    """What is returned, and of which outputs."""
    if config.HasField("best_of"):
        least = config.num_outputs if config.HasField("num_outputs") else 1
        if not max(least, 1) <= config.best_of <= limits.max_outputs:
            bad.add("config.best_of", f"must be at least num_outputs and at most {limits.max_outputs}")
        if config.HasField("max_tokens") and config.max_tokens == 0 and _reads_prompt(config):
            bad.add("config.best_of", "needs new tokens to choose by, but max_tokens is 0", "FIELD_CONFLICT")
    for name in ("top_logprobs", "prompt_logprobs"):
        if getattr(config, name) > MAX_ALTERNATIVES:
            bad.add(f"config.{name}", f"must be at most {MAX_ALTERNATIVES}")
    if config.top_logprobs and not config.logprobs:
        bad.add("config.top_logprobs", "is taken only together with logprobs", "FIELD_CONFLICT")


def _check_number(name: str, value: float, low: float, high: float, bad: Violations, *, above: bool = False) -> None:
    inside = low < value <= high if above else low <= value <= high
    if not math.isfinite(value) or not inside:
        bad.add(f"config.{name}", f"must be {'above' if above else 'at least'} {low:g} and at most {high:g}")
