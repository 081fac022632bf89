"""The fields of a config that ask for a beam search, and what does not go with one.

What they mean is transformers' (`_beam_search`, without sampling). Ranges are checked here, all bad fields at once.
"""

from __future__ import annotations

from collections.abc import Collection, Set
from typing import Any, Final

from common.errors import InvalidRequest
from common.generation import EarlyStopping, StructuredOutput
from common.parameter_limits import MAX_LENGTH_PENALTY
from common.registry import GenerationDefaults
from gateway.violations import Violations
from torchrelay.v1 import generation_pb2 as pb

_CONFLICT: Final = "FIELD_CONFLICT"
_EARLY_STOPPING: Final = {
    pb.EARLY_STOPPING_UNSPECIFIED: EarlyStopping.HEURISTIC,
    pb.EARLY_STOPPING_HEURISTIC: EarlyStopping.HEURISTIC,
    pb.EARLY_STOPPING_WHEN_FULL: EarlyStopping.WHEN_FULL,
    pb.EARLY_STOPPING_NEVER: EarlyStopping.NEVER,
}

_OF_CARD: Final = {
    EarlyStopping.HEURISTIC: pb.EARLY_STOPPING_HEURISTIC,
    EarlyStopping.WHEN_FULL: pb.EARLY_STOPPING_WHEN_FULL,
    EarlyStopping.NEVER: pb.EARLY_STOPPING_NEVER,
}


_FIELDS: Final = frozenset(("num_beams", "length_penalty", "early_stopping", "renormalize_logits"))


def is_asked_for(config: pb.GenerationConfig) -> bool:
    """Whether outputs are those of a beam search."""
    return config.num_beams > 1


def default_config(defaults: GenerationDefaults) -> pb.GenerationConfig:
    """Return what a model's card says of beams, as far as it says anything."""
    own = GenerationDefaults()
    config = pb.GenerationConfig()
    if defaults.num_beams != own.num_beams:
        config.num_beams = defaults.num_beams
    if defaults.length_penalty != own.length_penalty:
        config.length_penalty = defaults.length_penalty
    if defaults.early_stopping != own.early_stopping:
        config.early_stopping = _OF_CARD[defaults.early_stopping]
    return config


def is_by_default(config: pb.GenerationConfig, defaults: pb.GenerationConfig, max_beams: int) -> bool:
    """Whether a request gets a beam search since the model's default is one, as `generate` does it.

    Not where it asks for what does not go with one, or for more than one can give: a default refuses no request.
    """
    return (
        not config.HasField("num_beams")
        and is_asked_for(defaults)
        and defaults.num_beams <= max_beams
        and config.num_outputs <= defaults.num_beams
        and not (config.HasField("max_tokens") and config.max_tokens == 0)
        and not _conflicts(config)
    )


def check(
    config: pb.GenerationConfig,
    defaults: pb.GenerationConfig,
    max_beams: int,
    given: Collection[str],
    bad: Violations,
) -> None:
    """Note every field that is out of its range, or does not go with a beam search, or not without one.

    `given` are the names of those that the config sets.
    """
    if _FIELDS.isdisjoint(given) and not is_asked_for(defaults):
        return
    if config.HasField("num_beams") and not 1 <= config.num_beams <= max_beams:
        bad.add("config.num_beams", f"must be 1 to {max_beams}")
    # A value that is not a number is in no range.
    if config.HasField("length_penalty") and not -MAX_LENGTH_PENALTY <= config.length_penalty <= MAX_LENGTH_PENALTY:
        most = f"{MAX_LENGTH_PENALTY:g}"
        bad.add("config.length_penalty", f"must be at least -{most} and at most {most}")
    if config.early_stopping not in _EARLY_STOPPING:
        bad.add("config.early_stopping", "is not known", "UNSUPPORTED")
    if is_by_default(config, defaults, max_beams):
        return
    if not is_asked_for(config):
        for name in _own_fields(config):
            bad.add(f"config.{name}", "is taken only together with num_beams above 1", _CONFLICT)
        return
    for name in _conflicts(config):
        bad.add(f"config.{name}", "must not be set together with num_beams above 1", _CONFLICT)
    if config.num_outputs > config.num_beams:
        bad.add("config.num_outputs", f"must be at most num_beams, which is {config.num_beams}", _CONFLICT)
    if config.HasField("max_tokens") and config.max_tokens == 0:
        bad.add("config.num_beams", "needs new tokens to search among, but max_tokens is 0", _CONFLICT)


def _own_fields(config: pb.GenerationConfig) -> list[str]:
    given = {
        "length_penalty": config.HasField("length_penalty"),
        "early_stopping": config.early_stopping != pb.EARLY_STOPPING_UNSPECIFIED,
        "renormalize_logits": config.renormalize_logits,
    }
    return [name for name, is_given in given.items() if is_given]


def _conflicts(config: pb.GenerationConfig) -> list[str]:
    """What samples, filters by probability, or asks for what a search does not have."""
    given = {
        "temperature": config.temperature > 0,
        "top_k": config.top_k > 0,
        "top_p": config.HasField("top_p") and config.top_p != 1,
        "min_p": config.min_p > 0,
        "typical_p": config.HasField("typical_p") and config.typical_p != 1,
        "epsilon_cutoff": config.epsilon_cutoff > 0,
        "eta_cutoff": config.eta_cutoff > 0,
        "top_h": config.top_h > 0,
        "best_of": config.HasField("best_of"),
        "logprobs": config.logprobs,
        "top_logprobs": config.top_logprobs > 0,
        "structured_output": config.HasField("structured_output"),
    }
    return [name for name, is_given in given.items() if is_given]


def check_constraint(config: pb.GenerationConfig, constraint: StructuredOutput | None) -> None:
    """Raise InvalidRequest for a search among outputs that must match something: calls of a conversation's tools."""
    if is_asked_for(config) and constraint is not None:
        raise InvalidRequest(
            "config.num_beams: the calls of the conversation's tools are constrained, and beams cannot be",
            reason=_CONFLICT,
            field="config.num_beams",
        )


def resolve(
    resolved: pb.GenerationConfig,
    config: pb.GenerationConfig,
    defaults: pb.GenerationConfig,
    max_beams: int,
    in_force: Set[str],
) -> None:
    """Fill in what a search takes where nothing is set; without one leave out what the model's defaults say of it.

    No field but those `in_force` is set in any of the three.
    """
    if _FIELDS.isdisjoint(in_force):
        return
    if not is_asked_for(config) and not is_by_default(config, defaults, max_beams):
        give_up(resolved)
        if config.HasField("num_beams"):
            resolved.num_beams = config.num_beams
    else:
        resolved.temperature = 0.0  # asking for beams is asking not to sample, whatever the model's default
        resolved.length_penalty = resolved.length_penalty if resolved.HasField("length_penalty") else 1.0
        resolved.early_stopping = resolved.early_stopping or pb.EARLY_STOPPING_HEURISTIC


def give_up(resolved: pb.GenerationConfig) -> None:
    """Take a search out of a config: what the model's defaults say of it, and no request."""
    for name in ("num_beams", "length_penalty", "early_stopping"):
        resolved.ClearField(name)


def params_of(config: pb.GenerationConfig) -> dict[str, Any]:
    """Return the fields of SamplingParams that a resolved config sets."""
    if not is_asked_for(config):
        return {}
    return {
        "num_beams": config.num_beams,
        "length_penalty": config.length_penalty,
        "early_stopping": _EARLY_STOPPING[config.early_stopping],
        "renormalize_logits": config.renormalize_logits,
    }
