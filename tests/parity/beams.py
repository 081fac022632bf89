"""Holds beam search to `generate(num_beams=...)`: the same sequences in the same order, with the same scores.

Beams are decoded in batches with greedy and sampled requests, as they are in earnest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import msgspec
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from transformers import PreTrainedModel

from common.generation import EarlyStopping, SamplingParams
from tests.builders_engine import Driver
from tests.parity.cases import NUM_TOKENS, Case, alone, combinations
from tests.reference_sampling import options_of
from worker.engine.loop import Engine
from worker.engine.types import ALL_TOKENS_FORBIDDEN, GenerationRequest

NUM_BEAMS = (2, 3, 4, 8)
LENGTH_PENALTIES = (-1.0, 0.0, 1.0, 2.0)
TOLERANCE = 2e-4  # of a score; sums of float32 in another order
_FILL = 1  # no id of any case

Found = list[tuple[list[int], float | None]]  # token ids and score of each output


def searches(prompt: Sequence[int], vocab_size: int) -> list[Case]:
    """Every width, way to stop and length penalty, with numbers of outputs and of ends that vary."""
    rng = random.Random(len(prompt))
    cases = []
    for i, (num_beams, early_stopping, penalty) in enumerate(product(NUM_BEAMS, EarlyStopping, LENGTH_PENALTIES)):
        num_ends = (0, 1, 4, 20)[i % 4] * vocab_size // 288 or i % 2
        params = SamplingParams(
            max_tokens=1 if i % 12 == 11 else NUM_TOKENS,
            num_beams=num_beams,
            num_outputs=1 + i % num_beams,
            early_stopping=early_stopping,
            length_penalty=penalty,
            stop_token_ids=tuple(rng.sample(range(3, vocab_size), min(num_ends, 60))),
        )
        cases.append(Case(f"beams {num_beams} {early_stopping} {penalty}", tuple(prompt), params))
    return cases


def with_processors(prompt: Sequence[int], plain: Sequence[int]) -> list[Case]:
    """Each parameter that changes greedy output, by itself, with beams."""
    return [
        Case(
            f"beams, {case.name}",
            case.prompt,
            msgspec.structs.replace(
                case.params,
                num_beams=3,
                num_outputs=2,
                renormalize_logits=i % 2 == 1,
                sequence_bias=tuple(dict(case.params.sequence_bias).items()),  # each once, if `plain` repeats itself
            ),
        )
        for i, case in enumerate(alone(prompt, plain))
    ]


def mixed(vocab_size: int, num_requests: int = 16, longest: int = 40) -> st.SearchStrategy[list[Case]]:
    """Batches of requests with any of the parameters: half of them with beams, others greedy, and some sampled."""
    kinds = st.fixed_dictionaries(
        {
            "num_beams": st.sampled_from(NUM_BEAMS),
            "length_penalty": st.floats(-2, 2),
            "early_stopping": st.sampled_from(EarlyStopping),
            "renormalize_logits": st.booleans(),
        }
    )
    each = st.one_of(kinds, st.just({}), kinds, st.just({"temperature": 0.9, "seed": 5}))

    def combine(drawn: tuple[list[Case], list[dict[str, Any]]]) -> list[Case]:
        return [
            Case(f"{'beams, ' if 'num_beams' in kind else ''}{case.name}", case.prompt, _replaced(case.params, kind))
            for case, kind in zip(*drawn, strict=True)
        ]

    batches = combinations(vocab_size, num_requests, longest)
    return st.tuples(batches, st.lists(each, min_size=num_requests, max_size=num_requests)).map(combine)


def _replaced(params: SamplingParams, kind: dict[str, Any]) -> SamplingParams:
    num_beams = kind.get("num_beams", 1)
    return msgspec.structs.replace(params, **kind, num_outputs=1 + len(params.stop_token_ids) % num_beams)


@torch.inference_mode()
def expected(model: PreTrainedModel, case: Case, **more: Any) -> Found:
    """What `generate` gives for one request alone, each sequence without what fills it up."""
    params = case.params
    ids = torch.tensor([case.prompt])
    theirs: dict[EarlyStopping, bool | str] = {
        EarlyStopping.HEURISTIC: False, EarlyStopping.WHEN_FULL: True, EarlyStopping.NEVER: "never"
    }  # fmt: skip
    options = {
        **options_of(params, len(case.prompt)),
        "num_beams": params.num_beams,
        "num_return_sequences": params.num_outputs,
        "length_penalty": params.length_penalty,
        "early_stopping": theirs[params.early_stopping],
        "renormalize_logits": params.renormalize_logits,
        "pad_token_id": _FILL,
    }
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_scores=True, **options, **more
    )
    lengths = (output.beam_indices >= 0).sum(-1).tolist()
    rows = output.sequences[:, len(case.prompt) :].tolist()
    scores = output.sequences_scores.tolist()
    return [(row[:length], score) for row, length, score in zip(rows, lengths, scores, strict=True)]


def found(engine: Engine, cases: Sequence[Case]) -> list[tuple[Found, str | None]]:
    """Outputs and error of each case, decoded in one batch."""
    driver = Driver(engine)
    driver.add(*(GenerationRequest(str(i), case.prompt, case.params) for i, case in enumerate(cases)))
    scores: dict[tuple[str, int], float | None] = {}
    while engine.has_work:
        for output in driver.step().outputs:
            scores.update({(output.request_id, delta.output_index): delta.score for delta in output.deltas})
    return [
        ([(ids, scores.get((str(i), k))) for k, ids in enumerate(driver.results[str(i)].tokens)], result.error)
        for i, result in enumerate(driver.results[str(i)] for i in range(len(cases)))
    ]


@dataclass
class Beams:
    """Outcomes of the cases with beams. A near tie: other sequences with the same scores, place by place."""

    num_same: int = 0
    near_ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def compare(self, engine: Engine, model: PreTrainedModel, cases: Sequence[Case]) -> None:
        for case, (outputs, error) in zip(cases, found(engine, cases), strict=True):
            if case.params.num_beams > 1:
                self._compare(case, expected(model, case), outputs, error)

    def _compare(self, case: Case, wanted: Found, outputs: Found, error: str | None) -> None:
        # Copies that fill up, and sequences with what is forbidden: transformers has nothing better either.
        wanted = [(ids, score) for ids, score in wanted if score is not None and score > -1e8]
        outputs = [(ids, score) for ids, score in outputs if score is not None]
        ours, theirs = [ids for ids, _ in outputs], [ids for ids, _ in wanted]
        if error is not None and error != ALL_TOKENS_FORBIDDEN:
            self.wrong.append(f"{case.name}: {error}")
        elif len(ours) != len(theirs) or any(
            abs((one or 0.0) - (other or 0.0)) > TOLERANCE * max(1.0, abs(other or 0.0))
            for (_, one), (_, other) in zip(outputs, wanted, strict=True)
        ):
            self.wrong.append(f"{case.name}, prompt of {len(case.prompt)}: {outputs} instead of {wanted}")
        elif ours != theirs:
            self.near_ties.append(f"{case.name}: {outputs} instead of {wanted}")
        else:
            self.num_same += 1


def compare_beams(
    engine: Engine, model: PreTrainedModel, prompts: Sequence[Sequence[int]], plain: Sequence[Sequence[int]],
    num_batches: int, seed: int,
) -> Beams:  # fmt: skip
    """Searches of all kinds and all processors for some prompts, then random combinations in mixed batches.

    `plain` are the greedy outputs of the prompts.
    """
    vocab_size = min(model.config.vocab_size, 49_000)
    beams = Beams()
    for prompt, output in zip(prompts, plain, strict=True):
        greedy = Case("", tuple(prompt), SamplingParams(max_tokens=NUM_TOKENS))
        sampled = Case("", tuple(prompt), SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0))
        beams.compare(engine, model, [greedy, sampled, *searches(prompt, vocab_size), *with_processors(prompt, output)])

    @seeded(seed)
    @settings(
        max_examples=num_batches,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(batch=mixed(vocab_size))
    def compare_batch(batch: list[Case]) -> None:
        beams.compare(engine, model, batch)

    if num_batches:
        compare_batch()
    return beams
