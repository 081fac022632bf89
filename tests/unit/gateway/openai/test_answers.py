"""Log-probabilities of completions and chats as OpenAI's clients read them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gateway.openai.answers import ChatChoices, CompletionChoices
from torchrelay.v1 import generation_pb2 as pb

OUTPUT = pb.GenerationOutput(
    text="abc",
    token_ids=[99],
    logprobs=[-0.5],
    top_logprobs=[pb.TokenAlternatives(token_ids=[99, 100], logprobs=[-0.5, -math.inf])],
    end=pb.OutputEnd(finish_reason=pb.FINISH_REASON_STOP),
)
SCORES = pb.PromptScores(first_token_index=1, logprobs=[-math.inf])
DELTA = pb.Delta(text="c", token_ids=[99], logprobs=[-0.5], top_logprobs=OUTPUT.top_logprobs)


def token_bytes(token_id: int) -> bytes:
    return bytes([token_id])


def completions(*, logprobs: bool = True, prompt: tuple[int, ...] = ()) -> CompletionChoices:
    return CompletionChoices(token_bytes, logprobs, 1, [prompt] if prompt else [])


def streamed(choices: CompletionChoices, scores: pb.PromptScores | None) -> Any:
    """The log-probabilities of a stream's choices, joined; None if there are none."""
    parts = [*choices.first(0), *(choices.of_prompt(0, scores) if scores else []), choices.of_delta(0, DELTA)]
    found = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    return {name: [value for part in found for value in part[name]] for name in found[0]} if found else None


@pytest.mark.parametrize("scores", [pb.PromptScores(), SCORES])
@pytest.mark.parametrize("prompt", [(), (97,), (97, 98)])
def test_a_stream_tells_what_the_whole_answer_does(scores: pb.PromptScores, prompt: tuple[int, ...]) -> None:
    whole = completions(prompt=prompt).of_output(0, OUTPUT, scores)["logprobs"]
    assert whole == streamed(completions(prompt=prompt), scores)


def test_the_prompt_s_scores_are_shown_with_its_tokens_alone() -> None:
    assert completions().of_output(0, OUTPUT, SCORES)["logprobs"]["tokens"] == ["c"]
    found = completions(prompt=(97, 98)).of_output(0, OUTPUT, SCORES)["logprobs"]
    assert found == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -9999.0, -0.5],
        "top_logprobs": [None, None, {"c": -0.5, "d": -9999.0}],
        "text_offset": [0, 1, 2],
    }


def test_a_prompt_of_one_token_shows_it() -> None:
    found = completions(prompt=(97,)).of_output(0, OUTPUT, pb.PromptScores())["logprobs"]
    assert (found["tokens"], found["token_logprobs"], found["text_offset"]) == (["a", "c"], [None, -0.5], [0, 1])


def test_nothing_is_shown_where_nothing_was_asked_for() -> None:
    quiet = completions(logprobs=False, prompt=(97, 98))
    assert quiet.of_output(0, OUTPUT, SCORES)["logprobs"] is None
    assert streamed(quiet, SCORES) is None
    assert streamed(completions(logprobs=False, prompt=(97,)), None) is None


def test_a_chat_s_impossible_token_has_a_number_too() -> None:
    (entry,) = ChatChoices(token_bytes, logprobs=True).of_delta(0, DELTA)["logprobs"]["content"]
    assert [best["logprob"] for best in entry["top_logprobs"]] == [-0.5, -9999.0]
