"""No parameter is ignored: each field of GenerationConfig has a case that shows its effect over gRPC.

A new field needs a case in the table; without one the first test fails.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from tests.builders_calls import Outcome
from tests.builders_models import VOCAB_SIZE, write_tiny_model
from tests.builders_system import System, gateway_and_worker
from torchrelay.client import AsyncClient, RelayError
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
EOS = 2
NUM_TOKENS = 12
PROMPT = [3 + (7 * i) % 250 for i in range(40)]
HOT: dict[str, Any] = {"temperature": 1.8, "seed": 5}
# Sixteen tokens that are far ahead of all others, and close together.
CLOSE = {"logit_bias": {100 + i: 90.0 for i in range(16)}}

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One request, which must differ from another as the field says."""

    options: Options | Callable[[Outcome], Options]  # the latter of the plain greedy output
    shows: Callable[[Outcome, Outcome], bool]  # of what `against` gives, and of what the case gives
    against: Options | Callable[[Outcome], Options] = field(default_factory=dict)  # default: the plain output
    prompt: Sequence[int] = tuple(PROMPT)


def same(one: Outcome, other: Outcome) -> bool:
    return one.token_ids == other.token_ids


def differ(one: Outcome, other: Outcome) -> bool:
    return one.token_ids != other.token_ids


def letter_of(outcome: Outcome) -> str:
    return next(character for character in outcome.output.text if character.isascii() and character.isprintable())


def usage_of(outcome: Outcome) -> int:
    return outcome.finished.usage.completion_tokens if outcome.finished is not None else 0


def score_of(outcome: Outcome) -> float:
    return outcome.finished.outputs[0].score if outcome.finished is not None else float("nan")


# Every fourth token ends a beam.
ENDING_BEAMS: dict[str, Any] = {"num_beams": 3, "stop_token_ids": list(range(3, 253, 4))}

CASES: dict[str, Case] = {
    "max_tokens": Case({"max_tokens": 3}, lambda plain, case: case.token_ids == plain.token_ids[:3]),
    "max_length": Case({"max_length": len(PROMPT) + 4}, lambda plain, case: case.token_ids == plain.token_ids[:4]),
    "temperature": Case(HOT, differ),
    "top_k": Case({**HOT, "top_k": 1}, differ, HOT),
    "top_p": Case({**HOT, "top_p": 1e-6}, differ, HOT),
    "min_p": Case({**HOT, "min_p": 0.999999}, differ, HOT),
    "repetition_penalty": Case({"repetition_penalty": 5.0}, differ),
    "no_repeat_ngram_size": Case(
        {"no_repeat_ngram_size": 1, **CLOSE},
        lambda free, case: len(set(case.token_ids)) == NUM_TOKENS > len(set(free.token_ids)),
        CLOSE,
    ),
    "seed": Case({**HOT, "seed": 6}, differ, HOT),
    "num_outputs": Case({**HOT, "num_outputs": 3}, lambda plain, case: len(case.outputs) == 3),
    "stop": Case(
        lambda plain: {"stop": [letter_of(plain)]},
        lambda plain, case: case.output.text == plain.output.text.partition(letter_of(plain))[0],
    ),
    "stop_token_ids": Case(
        lambda plain: {"stop_token_ids": [plain.token_ids[3]]},
        lambda plain, case: case.token_ids == plain.token_ids[: plain.token_ids.index(plain.token_ids[3]) + 1],
    ),
    "logprobs": Case(
        {"logprobs": True}, lambda plain, case: (len(plain.output.logprobs), len(case.output.logprobs)) == (0, 12)
    ),
    "min_tokens": Case(
        lambda plain: {"stop_token_ids": [plain.token_ids[0]], "min_tokens": 5},
        lambda short, case: (len(short.token_ids), len(case.token_ids) > 5) == (1, True),
        lambda plain: {"stop_token_ids": [plain.token_ids[0]]},
    ),
    "min_length": Case(
        lambda plain: {"stop_token_ids": [plain.token_ids[0]], "min_length": len(PROMPT) + 5},
        lambda short, case: (len(short.token_ids), len(case.token_ids) > 5) == (1, True),
        lambda plain: {"stop_token_ids": [plain.token_ids[0]]},
    ),
    "ignore_eos": Case(
        {"logit_bias": {EOS: 100.0}, "ignore_eos": True},
        lambda short, case: (short.token_ids, case.token_ids) == ([EOS], [EOS] * NUM_TOKENS),
        {"logit_bias": {EOS: 100.0}},
    ),
    "typical_p": Case({**HOT, "typical_p": 1e-6}, differ, HOT),
    "epsilon_cutoff": Case({**HOT, "epsilon_cutoff": 0.99}, differ, HOT),
    "eta_cutoff": Case({**HOT, "eta_cutoff": 0.99}, differ, HOT),
    "top_h": Case({**HOT, "top_h": 1e-6}, differ, HOT),
    "presence_penalty": Case(
        {**CLOSE, "presence_penalty": 2.0},
        lambda free, case: len(set(case.token_ids)) > len(set(free.token_ids)),
        CLOSE,
    ),
    "frequency_penalty": Case(
        {**CLOSE, "frequency_penalty": 2.0},
        lambda free, case: len(set(case.token_ids)) > len(set(free.token_ids)),
        CLOSE,
    ),
    "bad_words": Case(
        lambda plain: {"bad_words": [letter_of(plain)]},
        lambda plain, case: letter_of(plain) not in case.output.text,
    ),
    "bad_words_ids": Case(
        lambda plain: {"bad_words_ids": [plain.token_ids[:2]]},
        lambda plain, case: case.token_ids[0] == plain.token_ids[0] and case.token_ids[1] != plain.token_ids[1],
    ),
    "logit_bias": Case({"logit_bias": {9: 100.0}}, lambda plain, case: case.token_ids == [9] * NUM_TOKENS),
    "sequence_bias": Case(
        lambda plain: {"sequence_bias": [([plain.token_ids[0], 9], 100.0)]},
        lambda plain, case: case.token_ids[:2] == [plain.token_ids[0], 9],
    ),
    "suppress_tokens": Case(
        lambda plain: {"suppress_tokens": plain.token_ids},
        lambda plain, case: not set(plain.token_ids) & set(case.token_ids),
    ),
    "begin_suppress_tokens": Case(
        lambda plain: {"begin_suppress_tokens": [plain.token_ids[0]], "sequence_bias": [([plain.token_ids[0]], 50.0)]},
        lambda plain, case: case.token_ids[0] != plain.token_ids[0] == case.token_ids[1],
    ),
    "exponential_decay_length_penalty": Case(
        {"exponential_decay_length_penalty": (2, 10.0)},
        lambda plain, case: 3 < len(case.token_ids) < NUM_TOKENS and case.token_ids[-1] == EOS,
    ),
    "forced_bos_token_id": Case(
        {"forced_bos_token_id": 9},
        lambda free, case: (free.token_ids[0] != 9, case.token_ids[0]) == (True, 9),
        {"seed": 1},
        prompt=PROMPT[:1],
    ),
    "forced_eos_token_id": Case(
        {"forced_eos_token_id": 9}, lambda plain, case: case.token_ids == [*plain.token_ids[:-1], 9]
    ),
    "encoder_repetition_penalty": Case(
        {"encoder_repetition_penalty": 10.0},
        lambda plain, case: len(set(case.token_ids) - set(PROMPT)) < len(set(plain.token_ids) - set(PROMPT)),
    ),
    "encoder_no_repeat_ngram_size": Case(
        {"encoder_no_repeat_ngram_size": 1, "logit_bias": {PROMPT[3]: 50.0}},
        lambda biased, case: (PROMPT[3] in biased.token_ids, set(case.token_ids) & set(PROMPT)) == (True, set()),
        {"logit_bias": {PROMPT[3]: 50.0}},
    ),
    "structured_output": Case(
        {"structured_output": pb.StructuredOutput(regex="[0-9]{4}-(yes|no)")},
        lambda plain, case: re.fullmatch("[0-9]{4}-(yes|no)", case.output.text) is not None,
    ),
    "include_stop": Case(
        lambda plain: {"stop": [letter_of(plain)], "include_stop": True},
        lambda plain, case: case.output.text == "".join(plain.output.text.partition(letter_of(plain))[:2]),
    ),
    "best_of": Case(
        {**HOT, "best_of": 3, "ignore_eos": True},
        lambda hot, case: (
            (usage_of(case), case.finished is not None and case.finished.outputs[0].HasField("score"))
            == (3 * usage_of(hot), True)
        ),
        {**HOT, "ignore_eos": True},
    ),
    "top_logprobs": Case(
        {"logprobs": True, "top_logprobs": 2},
        lambda plain, case: [len(found) for found in case.output.alternatives] == [2] * NUM_TOKENS,
    ),
    "prompt_logprobs": Case(
        {"prompt_logprobs": 0},
        lambda plain, case: (len(plain.prompt_scores), len(case.prompt_scores[0].logprobs)) == (0, len(PROMPT) - 1),
    ),
    "echo": Case(
        {"echo": True},
        lambda plain, case: case.output.text.endswith(plain.output.text) and len(case.output.text) > len(PROMPT),
    ),
    "num_beams": Case(
        {"num_beams": 8},
        lambda plain, case: (
            differ(plain, case)
            and case.finished is not None
            and (case.finished.outputs[0].HasField("score"), usage_of(case)) == (True, 8 * NUM_TOKENS)
        ),
    ),
    "length_penalty": Case(
        {**ENDING_BEAMS, "length_penalty": -3.0},
        lambda searched, case: len(case.token_ids) < len(searched.token_ids),
        {**ENDING_BEAMS, "length_penalty": 3.0},
    ),
    "early_stopping": Case(
        {**ENDING_BEAMS, "early_stopping": True},
        lambda searched, case: usage_of(case) < usage_of(searched),
        {**ENDING_BEAMS, "early_stopping": "never"},
    ),
    "renormalize_logits": Case(
        {"num_beams": 2, "logit_bias": {9: 30.0}, "renormalize_logits": True},
        lambda raw, case: score_of(case) <= 0 < score_of(raw),
        {"num_beams": 2, "logit_bias": {9: 30.0}},
    ),
}
# What Accepted shows by another name.
SHOWN_AS = {"max_length": "max_tokens", "min_length": "min_tokens"}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", eos_token_id=EOS)
    with gateway_and_worker(tmp_path_factory.mktemp("system"), folder, MODEL) as system:
        yield system


async def run(client: AsyncClient, options: Options, prompt: Sequence[int] = PROMPT) -> Outcome:
    length = {} if "max_length" in options else {"max_tokens": NUM_TOKENS}
    config: Any = {"temperature": 0.0, **length, **options}
    return await Outcome(client.stream(list(prompt), model=MODEL, **config)).read()


def test_every_field_has_a_case() -> None:
    assert [
        descriptor.name for descriptor in pb.GenerationConfig.DESCRIPTOR.fields if descriptor.name not in CASES
    ] == []
    assert CASES.keys() <= {descriptor.name for descriptor in pb.GenerationConfig.DESCRIPTOR.fields}


async def test_a_config_that_forbids_every_token_fails_its_own_request_alone(system: System) -> None:
    async with system.client() as client:
        good = asyncio.create_task(run(client, {}))
        with pytest.raises(RelayError) as refused:
            await run(client, {"suppress_tokens": range(VOCAB_SIZE)})
        assert len((await good).token_ids) == NUM_TOKENS
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ALL_TOKENS_FORBIDDEN")


async def test_each_field_has_its_effect(system: System) -> None:
    """One batch of all cases; each must show its field in force, in Accepted and in what is generated."""
    async with system.client() as client:
        plain = await run(client, {})
        assert len(plain.token_ids) == NUM_TOKENS, "the plain output must not end by itself"

        async def try_case(name: str, case: Case) -> str | None:
            options, against = (
                choice(plain) if callable(choice) else choice for choice in (case.options, case.against)
            )
            assert name in options, "a case sets its field"
            found = await run(client, options, case.prompt)
            before = await run(client, against, case.prompt) if against else plain
            assert found.accepted is not None
            shown = {descriptor.name for descriptor, _ in found.accepted.config.ListFields()}
            if SHOWN_AS.get(name, name) not in shown:
                return f"{name}: not shown"
            return None if case.shows(before, found) else f"{name}: {before.token_ids} {found.token_ids}"

        failures = await asyncio.gather(*(try_case(name, case) for name, case in CASES.items()))
    assert [failure for failure in failures if failure is not None] == []
