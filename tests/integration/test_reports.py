"""What is reported of tokens and outputs, over gRPC: alternatives, ranks, the prompt's scores, the best of several."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from tests import reference
from tests.builders_calls import Outcome, alternatives_of, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
PROMPT = [3 + (7 * i) % 250 for i in range(21)]
LONG_PROMPT = [3 + (11 * i) % 250 for i in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=1024, eos_token_id=None)


@pytest.fixture(scope="module")
def plain(folder: Path) -> PreTrainedModel:
    return reference.load_reference(folder)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        system.add_worker(folder, MODEL)
        yield system


async def run(client: AsyncClient, **options: Any) -> Outcome:
    """Run one request to its end, 20 tokens at temperature 1 unless told otherwise."""
    prompt = options.pop("prompt", PROMPT)
    return await Outcome(client.stream(prompt, model=MODEL, **{"max_tokens": 20, "temperature": 1.0, **options})).read()


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Of each token but the first, all tokens' in its place: [len(token_ids) - 1, vocab_size]."""
    return model(input_ids=torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)


def check_places(
    expected: torch.Tensor,
    token_ids: list[int],
    logprobs: list[float],
    ranks: list[int],
    alternatives: list[list[tuple[int, float]]],
    num_alternatives: int,
) -> None:
    """Hold what was reported of these places to the reference's log-probabilities [num_places, vocab_size]."""
    assert len(logprobs) == len(ranks) == len(alternatives) == len(token_ids) == len(expected)
    assert logprobs == pytest.approx(expected.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist(), abs=1e-4)
    for row, token_id, rank, found in zip(expected, token_ids, ranks, alternatives, strict=True):
        top = row.topk(num_alternatives)
        assert [logprob for _, logprob in found] == pytest.approx(top.values.tolist(), abs=1e-4)
        for place, (alternative, logprob) in enumerate(found):
            assert logprob == pytest.approx(float(row[alternative]), abs=1e-4)
            assert alternative != token_id or rank == place + 1
        near = int((row > row[token_id] + 1e-4).sum()), int((row > row[token_id] - 1e-4).sum())
        assert near[0] + 1 <= rank <= near[1]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 8, "temperature": 1.4, "repetition_penalty": 1.3}])
async def test_alternatives_are_the_reference_s_most_probable_tokens(
    system: System, plain: PreTrainedModel, options: dict[str, Any]
) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        outcome = await run(client, logprobs=True, top_logprobs=5, num_outputs=2, **options)
        whole = await client.get(outcome.generation_id)
        plainer = await run(client, logprobs=True, num_outputs=2, **options)
    for output, stored, other in zip(outcome.outputs, whole.outputs, plainer.outputs, strict=True):
        expected = log_probabilities(plain, [*PROMPT, *output.token_ids])[len(PROMPT) - 1 :]
        check_places(expected, output.token_ids, output.logprobs, output.ranks, output.alternatives, 5)
        assert [alternatives_of(found) for found in stored.top_logprobs] == output.alternatives
        assert list(stored.ranks) == output.ranks
        assert (other.token_ids, other.ranks, other.alternatives) == (output.token_ids, [], [])


@pytest.mark.parametrize("max_tokens", [0, 5])
async def test_the_prompt_s_scores_are_the_reference_s(system: System, plain: PreTrainedModel, max_tokens: int) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        before = await run(client, prompt=LONG_PROMPT, max_tokens=1)  # its blocks are in the prefix cache now
        outcome = await run(client, prompt=LONG_PROMPT, prompt_logprobs=3, max_tokens=max_tokens, num_outputs=2)
        whole = await client.get(outcome.generation_id)
    expected = log_probabilities(plain, LONG_PROMPT)
    parts = outcome.prompt_scores
    assert parts[0].first_token_index == 1
    together = pb.PromptScores(first_token_index=1)
    for part in parts:
        assert part.first_token_index == 1 + len(together.logprobs)
        together.logprobs.extend(part.logprobs)
        together.ranks.extend(part.ranks)
        together.top_logprobs.extend(part.top_logprobs)
    assert whole.prompt_scores == together
    alternatives = [alternatives_of(found) for found in together.top_logprobs]
    check_places(expected, LONG_PROMPT[1:], list(together.logprobs), list(together.ranks), alternatives, 3)
    assert [len(output.token_ids) for output in outcome.outputs] == [max_tokens] * 2
    assert {output.finish_reason for output in outcome.outputs} == {pb.FINISH_REASON_LENGTH}
    assert outcome.finished is not None
    assert outcome.finished.usage.completion_tokens == 2 * max_tokens
    assert outcome.finished.usage.cached_prompt_tokens == 0
    assert before.prompt_scores == []


async def test_the_prompt_s_scores_need_no_alternatives(system: System) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        outcome = await run(client, prompt_logprobs=0, max_tokens=0)
        with refused() as refusal:
            await run(client, max_tokens=0)
    (scores,) = outcome.prompt_scores
    assert len(scores.logprobs) == len(scores.ranks) == len(PROMPT) - 1
    assert len(scores.top_logprobs) == 0
    assert refusal.fields == ["config.max_tokens"]


async def test_an_included_stop_string_ends_the_text(system: System) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        free = await run(client, seed=18, max_tokens=200)
        text = free.output.text
        at = next(i for i in range(40, len(text)) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i)
        stop = text[at : at + 3]
        cut, kept = await asyncio.gather(
            run(client, seed=18, max_tokens=200, stop=[stop]),
            run(client, seed=18, max_tokens=200, stop=[stop], include_stop=True),
        )
    assert cut.output.text == text[:at]
    assert kept.output.text == text[: at + 3]
    assert kept.token_ids == cut.token_ids
    assert kept.output.end is not None
    assert kept.output.end.stop == stop


async def test_an_echo_stands_before_the_text_of_each_output(system: System, folder: Path) -> None:
    await system.ready(MODEL)
    prompt = "Où est-ce que <eos> va ?"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    async with system.client() as client:
        silent = await run(client, prompt=prompt, seed=3, num_outputs=3)
        echoed = await run(client, prompt=prompt, seed=3, num_outputs=3, echo=True)
        of_ids = await run(client, seed=3, echo=True)
        plain_ids = await run(client, seed=3)
        alone = await run(client, prompt=prompt, max_tokens=0, echo=True, num_outputs=2)
        whole = await client.get(alone.generation_id)
        chat = [{"role": "user", "content": "hello"}]
        with refused() as refusal:
            await run(client, prompt=chat, echo=True, temperature=5.0)
    assert [output.text for output in echoed.outputs] == [prompt + output.text for output in silent.outputs]
    assert [output.token_ids for output in echoed.outputs] == [output.token_ids for output in silent.outputs]
    assert of_ids.output.text == tokenizer.decode(PROMPT) + plain_ids.output.text
    assert [output.text for output in alone.outputs] == [output.text for output in whole.outputs] == [prompt] * 2
    assert alone.outputs[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert refusal.fields == ["config.temperature", "config.echo"]


async def test_the_best_outputs_are_returned_at_the_end_by_their_scores(system: System) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        every = await run(client, seed=21, num_outputs=6, logprobs=True)
        best = await run(client, seed=21, best_of=6, num_outputs=2, logprobs=True, top_logprobs=2)
        silent = await run(client, seed=21, best_of=6)
        whole = await client.get(best.generation_id)
        with refused() as refusal:
            await run(client, best_of=2, num_outputs=3)
    mean = {i: sum(output.logprobs) / len(output.logprobs) for i, output in enumerate(every.outputs)}
    order = sorted(mean, key=lambda i: -mean[i])
    assert order[:2] != [0, 1]
    assert [output.token_ids for output in best.outputs] == [every.outputs[i].token_ids for i in order[:2]]
    assert [output.text for output in best.outputs] == [every.outputs[i].text for i in order[:2]]
    assert best.outputs[0].logprobs == pytest.approx(every.outputs[order[0]].logprobs, abs=1e-4)
    assert len(best.outputs[0].ranks) == 20
    assert [output.end and output.end.score for output in best.outputs] == pytest.approx(
        [mean[i] for i in order[:2]], abs=1e-4
    )
    assert (silent.token_ids, silent.output.logprobs) == (best.outputs[0].token_ids, [])
    for outcome in (best, silent):
        assert outcome.finished is not None
        assert outcome.finished.usage.completion_tokens == 6 * 20
    assert [output.text for output in whole.outputs] == [output.text for output in best.outputs]
    assert whole.outputs[0].end == best.outputs[0].end
    assert not every.outputs[0].end or not every.outputs[0].end.HasField("score")
    assert refusal.fields == ["config.best_of"]
