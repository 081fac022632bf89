"""Holds an engine to `generate`: token by token where it is greedy, by its distribution where it samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from transformers import PreTrainedModel

from common.generation import SamplingParams
from tests.builders_engine import Driver
from tests.parity.cases import Case
from tests.reference_sampling import options_of, processors_of
from worker.engine.batch import TokensInFlight
from worker.engine.loop import Engine
from worker.engine.scheduler import Plan
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.types import ALL_TOKENS_FORBIDDEN, GenerationRequest


@torch.inference_mode()
def reference_tokens(model: PreTrainedModel, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """Greedy output of `generate` for one request alone."""
    ids = torch.tensor([list(prompt)])
    options = {"pad_token_id": 0, **options_of(params, len(prompt))}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return [int(token) for token in output[0, len(prompt) :]]


@torch.inference_mode()
def processed(model: PreTrainedModel, tokens: Sequence[int], num_prompt: int, params: SamplingParams) -> torch.Tensor:
    """Scores [vocab_size] of the token behind `tokens`, after transformers' processors."""
    logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[:, -1].float()
    return processors_of(params, list(tokens[:num_prompt]))(torch.tensor([list(tokens)]), logits)[0]


def run_together(engine: Engine, cases: Iterable[Case]) -> list[tuple[list[int], str | None]]:
    """Tokens and error of each case, decoded in one batch."""
    driver = Driver(engine)
    requests = [GenerationRequest(str(i), case.prompt, case.params) for i, case in enumerate(cases)]
    driver.add(*requests)
    results = driver.run()
    return [(results[r.request_id].tokens[0], results[r.request_id].error) for r in requests]


@dataclass
class Greedy:
    """Outcomes of the greedy cases. A near tie: the two best processed scores are nearer than four times the largest
    difference between the two implementations' logits.
    """

    logit_difference: float
    num_same: int = 0
    near_ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def compare(self, engine: Engine, model: PreTrainedModel, cases: Sequence[Case]) -> None:
        for case, (found, error) in zip(cases, run_together(engine, cases), strict=True):
            if error is not None:
                tokens = [*case.prompt, *found]
                is_right = error == ALL_TOKENS_FORBIDDEN and not bool(
                    processed(model, tokens, len(case.prompt), case.params).isfinite().any()
                )
                self._note(case, f"token {len(found)}: {error}", is_same=is_right)
                continue
            expected = reference_tokens(model, case.prompt, case.params)
            self._compare(model, case, expected, found)

    def _compare(self, model: PreTrainedModel, case: Case, expected: list[int], found: list[int]) -> None:
        if expected == found:
            self._note(case, "", is_same=True)
            return
        index = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
        if index is None:
            self._note(case, f"{len(found)} tokens instead of {len(expected)}")
            return
        scores = processed(model, [*case.prompt, *expected[:index]], len(case.prompt), case.params)
        best, second = scores.topk(2).values.tolist()
        text = f"token {index}: {expected[index]} became {found[index]}, gap {best - second:.1e}"
        if best - second < 4 * self.logit_difference:
            self.near_ties.append(f"{case.name}: {text}")
        else:
            self._note(case, text)

    def _note(self, case: Case, text: str, *, is_same: bool = False) -> None:
        if is_same:
            self.num_same += 1
        else:
            self.wrong.append(f"{case.name}, prompt of {len(case.prompt)}: {text}")


@torch.inference_mode()
def logit_difference(engine: Engine, model: PreTrainedModel, prompts: Iterable[Sequence[int]]) -> float:
    """Largest difference of the engine's logits from the plain model's, over prompts and five more tokens each."""
    runner = engine._runner
    execute = runner.execute
    rows: list[tuple[list[int], torch.Tensor]] = []

    def recording(plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        logits = execute(plan, in_flight)
        for row, scores in zip(plan.logit_rows, logits, strict=True):
            if isinstance(row, EngineSequence):
                if row.num_pending and in_flight is not None:
                    row.token_ids[-1] = int(in_flight.token_ids[in_flight.rows[row]])
                rows.append((row.token_ids.tolist(), scores.float().cpu().clone()))
        return logits

    runner.execute = recording  # type: ignore[method-assign]
    try:
        run_together(engine, [Case("", tuple(prompt), SamplingParams(max_tokens=5)) for prompt in prompts])
    finally:
        runner.execute = execute  # type: ignore[method-assign]
    plain = [model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1] for tokens, _ in rows]
    return max(float((ours - theirs).abs().max()) for (_, ours), theirs in zip(rows, plain, strict=True))


def chi_square_p(
    engine: Engine, model: PreTrainedModel, prompt: Sequence[int], params: SamplingParams, num_draws: int, seed: int
) -> float:
    """Probability of draws at least as far from the distribution after transformers' processors as the engine's.

    One request for each draw, seeds from `seed` on. 0 if a token is drawn that has no probability. Tokens that are
    expected fewer than five times count as one.
    """
    one = msgspec.structs.replace(params, max_tokens=1)
    requests = [Case("", tuple(prompt), msgspec.structs.replace(one, seed=seed + i)) for i in range(num_draws)]
    drawn = Counter(tokens[0] for tokens, _ in run_together(engine, requests))
    expected = processed(model, prompt, len(prompt), one).double().softmax(-1) * num_draws
    counts = torch.tensor([float(drawn.get(token, 0)) for token in range(len(expected))], dtype=torch.float64)
    if float(counts[expected == 0].sum()) > 0:
        return 0.0
    often = expected >= 5
    cells = [(counts[often], expected[often])]
    if float(expected[~often].sum()) > 0:
        cells.append((counts[~often].sum()[None], expected[~often].sum()[None]))
    found, wanted = (torch.cat(parts) for parts in zip(*cells, strict=True))
    if len(wanted) < 2:
        return 1.0
    statistic = ((found - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64), statistic / 2))
