"""The fields of a config that change scores, filter tokens by their probability, or keep an output from ending.

What they mean is transformers' (`generation/logits_process.py`); ranges are checked here, all bad fields at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any, Final

from common.errors import InvalidRequest
from common.generation import StructuredOutput
from common.parameter_limits import (
    MAX_BAD_WORD_BYTES,
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_FACTOR,
    MAX_NGRAM,
    MAX_PENALTY,
    MAX_PHRASE_IDS,
    MAX_PHRASES,
    MAX_TOKEN_IDS,
)
from common.registry import GenerationDefaults
from gateway.violations import Violations
from torchrelay.v1 import generation_pb2 as pb

_FILTERS: Final = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
_REPEATED: Final = (
    "bad_words", "bad_words_ids", "logit_bias", "sequence_bias", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
_SCALARS: Final = (
    "min_tokens", *_FILTERS, "presence_penalty", "frequency_penalty",
    "forced_eos_token_id", "forced_bos_token_id", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
)  # fmt: skip
FIELDS: Final = frozenset((*_REPEATED, *_SCALARS, "exponential_decay_length_penalty"))
# What is resolved here: a config in which none of them is in force is in force as it is.
_RESOLVED: Final = frozenset(
    ("min_tokens", "min_length", "forced_eos_token_id", "forced_bos_token_id", "exponential_decay_length_penalty")
)
_FORCED: Final[Mapping[str, tuple[str, ...]]] = {  # with the lists that keep a token from its place
    "forced_eos_token_id": ("suppress_tokens",),
    "forced_bos_token_id": ("suppress_tokens", "begin_suppress_tokens"),
}


def fields_of(config: pb.GenerationConfig) -> set[str]:
    """Return the names of the fields that a config sets: few, so that what concerns none of them can be left out."""
    return {field.name for field, _ in config.ListFields()}


def check(config: pb.GenerationConfig, vocab_size: int, bad: Violations) -> None:
    """Note every field that is out of its range by itself."""
    _check_number(config, "typical_p", bad, above=0, most=1)
    _check_number(config, "epsilon_cutoff", bad, least=0, below=1)
    _check_number(config, "eta_cutoff", bad, least=0, below=1)
    _check_number(config, "top_h", bad, least=0, most=1)
    _check_number(config, "presence_penalty", bad, least=-MAX_PENALTY, most=MAX_PENALTY)
    _check_number(config, "frequency_penalty", bad, least=-MAX_PENALTY, most=MAX_PENALTY)
    _check_number(config, "encoder_repetition_penalty", bad, above=0, most=MAX_FACTOR)
    if config.encoder_no_repeat_ngram_size > MAX_NGRAM:
        bad.add("config.encoder_no_repeat_ngram_size", f"must be at most {MAX_NGRAM}")
    if config.HasField("exponential_decay_length_penalty"):
        factor = config.exponential_decay_length_penalty.factor
        if not 0 < factor <= MAX_FACTOR:
            path = "config.exponential_decay_length_penalty.factor"
            bad.add(path, f"must be above 0 and at most {MAX_FACTOR:g}")
    for name in _FORCED:
        if getattr(config, name) >= vocab_size:
            bad.add(f"config.{name}", f"must be below {vocab_size}")
    _check_ids("suppress_tokens", config.suppress_tokens, vocab_size, bad)
    _check_ids("begin_suppress_tokens", config.begin_suppress_tokens, vocab_size, bad)
    _check_ids("logit_bias", config.logit_bias, vocab_size, bad)
    # What is too long is not looked into.
    if len(config.logit_bias) <= MAX_TOKEN_IDS and not all(
        -MAX_BIAS <= bias <= MAX_BIAS for bias in config.logit_bias.values()
    ):
        bad.add("config.logit_bias", f"each must be at least {-MAX_BIAS:g} and at most {MAX_BIAS:g}")
    if len(config.bad_words) > MAX_BAD_WORDS:
        bad.add("config.bad_words", f"at most {MAX_BAD_WORDS} words are taken")
    elif not all(1 <= len(word.encode()) <= MAX_BAD_WORD_BYTES for word in config.bad_words):
        bad.add("config.bad_words", f"each must be 1 to {MAX_BAD_WORD_BYTES} bytes")
    if _is_count("bad_words_ids", len(config.bad_words_ids), bad):
        _check_phrases("bad_words_ids", [phrase.ids for phrase in config.bad_words_ids], vocab_size, bad)
    if _is_count("sequence_bias", len(config.sequence_bias), bad):
        biased = [bias.token_ids for bias in config.sequence_bias]
        _check_phrases("sequence_bias", biased, vocab_size, bad)
        if not all(-MAX_BIAS <= bias.bias <= MAX_BIAS for bias in config.sequence_bias):
            bad.add("config.sequence_bias", f"each bias must be at least {-MAX_BIAS:g} and at most {MAX_BIAS:g}")
        if len({tuple(ids) for ids in biased}) < len(biased):
            bad.add("config.sequence_bias", "each sequence may occur once", "FIELD_CONFLICT")


def clear_replaced(resolved: pb.GenerationConfig, config: pb.GenerationConfig) -> None:
    """Take out what the model's defaults hold of fields that a request sets as a whole."""
    for name in _REPEATED:
        if getattr(config, name):
            resolved.ClearField(name)
    if config.HasField("exponential_decay_length_penalty"):
        resolved.ClearField("exponential_decay_length_penalty")


def has_filter(given: Collection[str]) -> bool:
    """Whether a request that sets these fields asks for a filter of these, and so to sample."""
    return any(name in given for name in _FILTERS)


def resolve(
    resolved: pb.GenerationConfig,
    config: pb.GenerationConfig,
    num_prompt_tokens: int,
    in_force: Set[str],
    *,
    has_eos: bool,
) -> None:
    """Turn min_length into min_tokens, and hold what a request sets to the rest of what is in force.

    `resolved` has its max_tokens, `config` is the request's; no field but those `in_force` is set in either. Raises
    InvalidRequest.
    """
    if _RESOLVED.isdisjoint(in_force):
        return
    for name, num_before in (("min_tokens", 0), ("min_length", num_prompt_tokens)):
        most = resolved.max_tokens + num_before
        if getattr(config, name) > most:
            raise InvalidRequest(
                f"must be at most {most}: max_tokens is {resolved.max_tokens}, the prompt has {num_prompt_tokens}",
                reason="FIELD_OUT_OF_RANGE",
                field=f"config.{name}",
                limit=most,
                got=getattr(config, name),
            )
    # What only the model asks for gives way to a shorter output.
    least = min(max(resolved.min_tokens, resolved.min_length - num_prompt_tokens), resolved.max_tokens)
    resolved.ClearField("min_length")
    resolved.ClearField("min_tokens")
    if least > 0:
        resolved.min_tokens = least
    _settle_first_token(resolved, config, num_prompt_tokens)
    for name, lists in _FORCED.items():
        for suppressed in lists:
            _settle_forced(resolved, config, name, suppressed)
    has_end = bool(resolved.stop_token_ids) or (has_eos and not resolved.ignore_eos)
    if not has_end and resolved.HasField("exponential_decay_length_penalty"):
        if config.HasField("exponential_decay_length_penalty"):
            raise InvalidRequest(
                "needs an id that ends the output: an end-of-sequence id that is not ignored, or stop_token_ids",
                reason="FIELD_CONFLICT",
                field="config.exponential_decay_length_penalty",
            )
        resolved.ClearField("exponential_decay_length_penalty")


def _settle_first_token(resolved: pb.GenerationConfig, config: pb.GenerationConfig, num_prompt_tokens: int) -> None:
    """A first token is forced behind one token alone, as in transformers. Raises InvalidRequest."""
    if num_prompt_tokens == 1:
        return
    if config.HasField("forced_bos_token_id"):
        raise InvalidRequest(
            f"is taken only behind a prompt of one token, and this one has {num_prompt_tokens}",
            reason="FIELD_CONFLICT",
            field="config.forced_bos_token_id",
        )
    resolved.ClearField("forced_bos_token_id")


def _settle_forced(resolved: pb.GenerationConfig, config: pb.GenerationConfig, name: Any, suppressed: str) -> None:
    """A token cannot be forced and suppressed; what only the model asks for gives way. Raises InvalidRequest."""
    forced, ids = getattr(resolved, name), getattr(resolved, suppressed)
    if not resolved.HasField(name) or forced not in ids:
        return
    if not config.HasField(name):
        resolved.ClearField(name)
    elif not getattr(config, suppressed):
        kept = [token_id for token_id in ids if token_id != forced]
        del ids[:]
        ids.extend(kept)
    else:
        raise InvalidRequest(f"must not be among {suppressed}", reason="FIELD_CONFLICT", field=f"config.{name}")


def settle_constraint(
    resolved: pb.GenerationConfig, config: pb.GenerationConfig, constraint: StructuredOutput | None
) -> None:
    """No token can be forced where an output must match something; what only the model asks for gives way.

    Raises InvalidRequest with both fields.
    """
    if constraint is None:
        return
    bad = Violations()
    other = "config.structured_output" if config.HasField("structured_output") else "input.chat.tools"
    for name in _FORCED:
        if not config.HasField(name):  # type: ignore[arg-type]
            resolved.ClearField(name)  # type: ignore[arg-type]
            continue
        bad.add(f"config.{name}", f"must not be set together with {other}", "FIELD_CONFLICT")
        bad.add(other, f"must not be set together with config.{name}", "FIELD_CONFLICT")
    bad.raise_if_any()


def default_config(defaults: GenerationDefaults) -> pb.GenerationConfig:
    """Return those of the model's defaults that change anything."""
    own = GenerationDefaults()
    config = pb.GenerationConfig()
    for name in (*_SCALARS, "min_length"):
        value = getattr(defaults, name, None)
        if value is not None and value != getattr(own, name):
            setattr(config, name, value)
    for ids in defaults.bad_words_ids:
        config.bad_words_ids.add(ids=ids)
    for ids, bias in defaults.sequence_bias:
        config.sequence_bias.add(token_ids=ids, bias=bias)
    config.suppress_tokens.extend(defaults.suppress_tokens)
    config.begin_suppress_tokens.extend(defaults.begin_suppress_tokens)
    if defaults.exponential_decay_length_penalty is not None:
        start, factor = defaults.exponential_decay_length_penalty
        config.exponential_decay_length_penalty.MergeFrom(pb.ExponentialDecay(start=start, factor=factor))
    return config


def params_of(
    config: pb.GenerationConfig, given: Collection[str], bad_words_ids: Collection[Sequence[int]]
) -> dict[str, Any]:
    """Return the fields of SamplingParams that a resolved config sets; `bad_words_ids` join its own.

    `given` are the names of all fields that it sets.
    """
    if not bad_words_ids and FIELDS.isdisjoint(given):
        return {}
    params: dict[str, Any] = {name: getattr(config, name) for name in _SCALARS if config.HasField(name)}
    bad = [*(tuple(phrase.ids) for phrase in config.bad_words_ids), *map(tuple, bad_words_ids)]
    if bad:
        params["bad_words_ids"] = tuple(dict.fromkeys(bad))
    biases = {tuple(bias.token_ids): bias.bias for bias in config.sequence_bias}
    for token_id, value in sorted(config.logit_bias.items()):
        biases[(token_id,)] = biases.get((token_id,), 0.0) + value
    if biases:
        params["sequence_bias"] = tuple(biases.items())
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        ids = getattr(config, name)
        if ids:
            params[name] = tuple(ids)
    if config.HasField("exponential_decay_length_penalty"):
        decay = config.exponential_decay_length_penalty
        params["exponential_decay_length_penalty"] = (decay.start, decay.factor)
    return params


def _check_number(
    config: pb.GenerationConfig,
    name: Any,
    bad: Violations,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    if not config.HasField(name):
        return
    value: float = getattr(config, name)
    # A value that is not a number is in no range.
    is_low = not (value > above if above is not None else least is not None and value >= least)
    is_high = not (value < below if below is not None else most is not None and value <= most)
    if is_low or is_high:
        low = f"above {above:g}" if above is not None else f"at least {least:g}"
        high = f"below {below:g}" if below is not None else f"at most {most:g}"
        bad.add(f"config.{name}", f"must be {low} and {high}")


def _check_ids(name: str, ids: Collection[int], vocab_size: int, bad: Violations) -> None:
    if len(ids) > MAX_TOKEN_IDS:
        bad.add(f"config.{name}", f"at most {MAX_TOKEN_IDS} ids are taken")
    elif max(ids, default=0) >= vocab_size:
        bad.add(f"config.{name}", f"each id must be below {vocab_size}")


def _is_count(name: str, count: int, bad: Violations) -> bool:
    """Whether so many sequences are taken."""
    if count > MAX_PHRASES:
        bad.add(f"config.{name}", f"at most {MAX_PHRASES} sequences are taken")
    return count <= MAX_PHRASES


def _check_phrases(name: str, phrases: Sequence[Sequence[int]], vocab_size: int, bad: Violations) -> None:
    if not all(1 <= len(ids) <= MAX_PHRASE_IDS for ids in phrases):
        bad.add(f"config.{name}", f"each sequence must have 1 to {MAX_PHRASE_IDS} ids")
    elif any(max(ids) >= vocab_size for ids in phrases):
        bad.add(f"config.{name}", f"each id must be below {vocab_size}")
