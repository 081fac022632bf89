"""What a model's generation_config.json says of the parameters that requests may set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog

from common.generation import EarlyStopping
from common.parameter_limits import (
    MAX_BEAMS,
    MAX_BIAS,
    MAX_FACTOR,
    MAX_LENGTH_PENALTY,
    MAX_PHRASE_IDS,
    MAX_PHRASES,
    MAX_TOKEN_IDS,
)

_log = structlog.get_logger(__name__)

_MOST: Final = 2**31 - 1

# generation_config.json's names and ours, with the values that make sense.
_NUMBERS: Final[Mapping[str, tuple[str, type, float, float]]] = {
    "max_new_tokens": ("max_tokens", int, 1, _MOST),
    "min_new_tokens": ("min_tokens", int, 0, _MOST),
    "min_length": ("min_length", int, 0, _MOST),
    "temperature": ("temperature", float, 0.0, 100.0),
    "top_k": ("top_k", int, 0, _MOST),
    "top_p": ("top_p", float, 1e-6, 1.0),
    "min_p": ("min_p", float, 0.0, 1.0 - 1e-6),
    "top_h": ("top_h", float, 1e-6, 1.0),
    "typical_p": ("typical_p", float, 1e-6, 1.0),
    "epsilon_cutoff": ("epsilon_cutoff", float, 0.0, 1.0 - 1e-6),
    "eta_cutoff": ("eta_cutoff", float, 0.0, 1.0 - 1e-6),
    "repetition_penalty": ("repetition_penalty", float, 1e-6, 100.0),
    "no_repeat_ngram_size": ("no_repeat_ngram_size", int, 0, _MOST),
    "encoder_repetition_penalty": ("encoder_repetition_penalty", float, 1e-6, 100.0),
    "encoder_no_repeat_ngram_size": ("encoder_no_repeat_ngram_size", int, 0, _MOST),
    "num_beams": ("num_beams", int, 1, MAX_BEAMS),
    "length_penalty": ("length_penalty", float, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
}
# A token that is forced, and the lists that would forbid it in its place.
_NOT_AMONG: Final[Mapping[str, tuple[str, ...]]] = {
    "forced_eos_token_id": ("suppress_tokens",),
    "forced_bos_token_id": ("suppress_tokens", "begin_suppress_tokens"),
}


def read_defaults(generation: Mapping[str, Any], vocab_size: int, *, num_started: int = 0) -> dict[str, Any]:
    """What it sets, by the names of GenerationDefaults. Without do_sample the model's default is greedy.

    Where a decoder begins with `num_started` tokens of its own, whatever the source, `max_length` counts them, and is a
    number of new tokens.
    A value outside its range is left out and logged: it must not keep the model from being served.
    """
    defaults: dict[str, Any] = {}
    for name, (field, kind, least, most) in _NUMBERS.items():
        value = generation.get(name)
        if value is None:
            continue
        if not _is_number(value) or not least <= value <= most:
            _log.warning("model.default_ignored", field=name, value=repr(value), least=least, most=most)
            continue
        defaults[field] = kind(value)
    for name, read in _OTHERS.items():
        value = generation.get(name)
        if value is None:
            continue
        found = read(value, vocab_size)
        if found is None:
            _log.warning("model.default_ignored", field=name, value=repr(value)[:200])
        else:
            defaults[name] = found
    for name, lists in _NOT_AMONG.items():
        for suppressed in lists:
            if name in defaults and defaults[name] in defaults.get(suppressed, ()):
                _log.warning("model.default_ignored", field=name, value=f"among {suppressed}")
                del defaults[name]
    max_length = generation.get("max_length")
    if num_started and "max_tokens" not in defaults and type(max_length) is int:
        if num_started < max_length <= _MOST:
            defaults["max_tokens"] = max_length - num_started
        else:
            _log.warning("model.default_ignored", field="max_length", value=max_length)
    if generation.get("do_sample"):
        defaults.setdefault("temperature", 1.0)
        if defaults.pop("num_beams", 1) > 1:  # beams that are sampled are not served
            _log.warning("model.default_ignored", field="num_beams", value="with do_sample")
    else:
        defaults["temperature"] = 0.0
    return defaults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ids(value: Any, vocab_size: int, most: int = MAX_TOKEN_IDS) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        return None
    is_sound = all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in value)
    return tuple(value) if is_sound else None


def _phrases(value: Any, vocab_size: int) -> tuple[tuple[int, ...], ...] | None:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PHRASES:
        return None
    phrases = [_ids(ids, vocab_size, MAX_PHRASE_IDS) for ids in value]
    return None if None in phrases else tuple(dict.fromkeys(ids for ids in phrases if ids is not None))


def _biases(value: Any, vocab_size: int) -> tuple[tuple[tuple[int, ...], float], ...] | None:
    """A list of [ids, bias], of which the last one of equal ids counts."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return None
    phrases = [_ids(ids, vocab_size, MAX_PHRASE_IDS) for ids, _ in value]
    if not 1 <= len(value) <= MAX_PHRASES or None in phrases:
        return None
    if not all(_is_number(bias) and abs(bias) <= MAX_BIAS for _, bias in value):
        return None
    return tuple({ids: float(pair[1]) for ids, pair in zip(phrases, value, strict=True) if ids is not None}.items())


def _decay(value: Any, vocab_size: int) -> tuple[int, float] | None:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
        return None
    start, factor = value
    is_sound = type(start) is int and 0 <= start <= _MOST and 0 < factor <= MAX_FACTOR and math.isfinite(factor)
    return (start, float(factor)) if is_sound else None


def _id(value: Any, vocab_size: int) -> int | None:
    """An id, or a list of one."""
    found = _ids(value if isinstance(value, list) else [value], vocab_size, 1)
    return None if found is None else found[0]


def _early_stopping(value: Any, vocab_size: int) -> EarlyStopping | None:
    """True, False or "never"."""
    if isinstance(value, bool):
        return EarlyStopping.WHEN_FULL if value else EarlyStopping.HEURISTIC
    return EarlyStopping.NEVER if value == "never" else None


_OTHERS: Final[Mapping[str, Callable[[Any, int], Any]]] = {
    "bad_words_ids": _phrases,
    "sequence_bias": _biases,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "exponential_decay_length_penalty": _decay,
    "forced_bos_token_id": _id,
    "forced_eos_token_id": _id,
    "early_stopping": _early_stopping,
}
