"""What a log takes is told before it is written: never too much of what is asked for, never too little unasked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.chain import GENESIS
from common.errors import InvalidRequest
from common.generation import EventBody, OutputDelta, PromptScores
from common.records import encode_entry
from gateway import log_budget
from gateway import validation as check
from torchrelay.v1 import generation_pb2 as pb

VOCAB_SIZE = 200_000
LIMITS = check.ConfigLimits(100_000, VOCAB_SIZE, max_outputs=16, max_stop_strings=3, max_log_bytes=1 << 20)
NONE = pb.GenerationConfig(num_outputs=1)


def log_of(config: pb.GenerationConfig, length: int, token_id: int, num_prompt_tokens: int, text: str) -> int:
    """Bytes of a log in which each token comes alone, as in a system that is not busy."""

    def delta(output: int, at: int) -> OutputDelta:
        top = config.top_logprobs
        return OutputDelta(
            output,
            at,
            (token_id,),
            text,
            logprobs=(-0.1,) if config.logprobs else (),
            top_logprobs=(tuple((token_id, -0.1) for _ in range(top)),) if top else (),
            ranks=(1,) if top else (),
        )

    bodies = [EventBody(tuple(delta(output, at) for output in range(config.num_outputs))) for at in range(length)]
    if config.HasField("prompt_logprobs"):
        count = num_prompt_tokens - 1
        best = tuple((token_id, -0.1) for _ in range(config.prompt_logprobs))
        scores = PromptScores(1, (-0.1,) * count, (1,) * count, (best,) * count)
        bodies.insert(0, EventBody(prompt_scores=scores))
    return sum(len(encode_entry(GENESIS, 1, number, body)) for number, body in enumerate(bodies))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 20),
    st.none() | st.integers(0, 20),
    st.integers(0, VOCAB_SIZE - 1),
)
def test_the_least_is_less_than_any_log_and_the_ample_more(
    outputs: int, length: int, logprobs: bool, top: int, prompt: int | None, token_id: int
) -> None:
    config = pb.GenerationConfig(num_outputs=outputs, logprobs=logprobs, top_logprobs=top if logprobs else 0)
    if prompt is not None:
        config.prompt_logprobs = prompt
    shortest, usual = (log_of(config, length, token_id, 9, text) for text in ("", " internationally"))
    assert log_budget.max_tokens(config, 9, shortest) >= length
    if prompt is None:
        assert log_budget.max_tokens(config, 9, usual, is_ample=True) <= length


def refusal(num_prompt_tokens: int = 10, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        check.resolve_config(pb.GenerationConfig(**fields), NONE, num_prompt_tokens, LIMITS, seed=7)
    return raised.value


def resolved(num_prompt_tokens: int = 10, **fields: Any) -> pb.GenerationConfig:
    return check.resolve_config(pb.GenerationConfig(**fields), NONE, num_prompt_tokens, LIMITS, seed=7)


def test_more_than_the_log_may_hold_is_refused_with_what_it_may() -> None:
    asked = {"logprobs": True, "top_logprobs": 20, "num_outputs": 4}
    most = (1 << 20) // (4 * (1 + 9 + 2 + 20 * 11))
    assert resolved(max_tokens=most, **asked).max_tokens == most
    for field, before in (("max_tokens", 0), ("max_length", 10)):
        error = refusal(**{field: most + before + 1}, **asked)
        assert (error.reason, error.violations[0].field) == ("REQUEST_TOO_LARGE", f"config.{field}")
        assert (error.metadata["limit"], error.metadata["got"]) == (str(most), str(most + 1))
        assert f"at most {most} tokens fit" in error.message
    # Ids alone take next to nothing.
    assert resolved(max_tokens=60_000, num_outputs=16).max_tokens == 60_000
    scores = refusal(num_prompt_tokens=8000, max_tokens=1, prompt_logprobs=20)
    assert (scores.reason, scores.violations[0].field) == ("REQUEST_TOO_LARGE", "config.prompt_logprobs")


def test_a_length_that_nobody_gave_is_one_that_fits() -> None:
    assert resolved().max_tokens == (1 << 20) // (5 + 16 + 64)
    assert resolved(num_prompt_tokens=99_000).max_tokens == 1000
    wide = resolved(logprobs=True, top_logprobs=20, num_outputs=4)
    assert log_of(wide, wide.max_tokens, VOCAB_SIZE - 1, 10, " internationally") <= 1 << 20
    defaults = pb.GenerationConfig(num_outputs=1, max_tokens=50_000)
    cut = check.resolve_config(pb.GenerationConfig(), defaults, 10, LIMITS, seed=7)
    assert cut.max_tokens == (1 << 20) // (5 + 16 + 64)
