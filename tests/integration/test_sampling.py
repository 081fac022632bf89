"""Sampled output over gRPC: reproducible by its seed, told apart by its outputs, cut where it is asked to end."""

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
from tests.builders_calls import Outcome
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
PROMPT = [3 + (7 * i) % 250 for i in range(21)]


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
    """Run one request to its end, 40 tokens at temperature 1 unless told otherwise."""
    prompt = options.pop("prompt", PROMPT)
    return await Outcome(client.stream(prompt, model=MODEL, **{"max_tokens": 40, "temperature": 1.0, **options})).read()


async def test_seed_gives_the_same_tokens_alone_and_in_a_batch(system: System) -> None:
    await system.ready(MODEL)
    wanted: dict[str, Any] = {"seed": 4711, "temperature": 0.9, "top_p": 0.95, "max_tokens": 120}
    async with system.client() as client:
        alone = await run(client, **wanted)
        others = [
            run(client, prompt=PROMPT[: 3 + i], seed=i, temperature=0.5 + i / 10, max_tokens=20 + 9 * i)
            for i in range(12)
        ]
        same = [run(client, **wanted) for _ in range(3)]
        *_, first, second, third = await asyncio.gather(*others, *same)
    assert len(alone.token_ids) == 120
    assert first.token_ids == second.token_ids == third.token_ids == alone.token_ids
    assert first.output.text == alone.output.text


async def test_seed_gives_the_same_tokens_after_a_takeover(tmp_path: Path, system: System, folder: Path) -> None:
    wanted: dict[str, Any] = {"seed": 99, "max_tokens": 600, "num_outputs": 2, "logprobs": True}
    await system.ready(MODEL)
    async with system.client() as client:
        alone = await run(client, **wanted)
        # A second worker; whichever begins is killed.
        second = system.add_worker(folder, MODEL)
        await system.ready(MODEL, num_workers=2)
        stream = client.stream(PROMPT, model=MODEL, temperature=1.0, **wanted)
        taken_over = Outcome(stream)
        reading = asyncio.create_task(taken_over.read())
        while len(taken_over.outputs) < 2 or len(taken_over.outputs[0].token_ids) < 30:
            await asyncio.sleep(0.01)
            assert not reading.done(), "too fast to be killed midway"
        (await system.worker_of(taken_over.generation_id)).kill()
        await asyncio.wait_for(reading, 60)
    assert second.is_running or system.workers[0].is_running
    assert taken_over.finished is not None
    assert taken_over.finished.timings.num_takeovers == 1
    for before, after in zip(alone.outputs, taken_over.outputs, strict=True):
        assert after.token_ids == before.token_ids
        assert after.text == before.text
        assert after.logprobs == pytest.approx(before.logprobs, abs=1e-4)


async def test_unseeded_runs_differ_and_the_reported_seed_repeats_each(system: System) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        runs = await asyncio.gather(*(run(client, max_tokens=16) for _ in range(20)))
        seeds = [outcome.accepted.config.seed for outcome in runs if outcome.accepted is not None]
        assert len(set(seeds)) == 20
        repeated = await asyncio.gather(*(run(client, max_tokens=16, seed=seed) for seed in seeds))
    assert len({outcome.output.text for outcome in runs}) >= 2
    assert [outcome.token_ids for outcome in repeated] == [outcome.token_ids for outcome in runs]
    assert [outcome.output.text for outcome in repeated] == [outcome.output.text for outcome in runs]


async def test_outputs_of_one_request_differ_and_repeat(system: System) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        several, again, single = await asyncio.gather(
            run(client, seed=5, num_outputs=4), run(client, seed=5, num_outputs=4), run(client, seed=5)
        )
        whole = await client.get(several.generation_id)
    ids = [output.token_ids for output in several.outputs]
    assert len({tuple(output) for output in ids}) == 4
    assert [output.token_ids for output in again.outputs] == ids
    assert ids[0] == single.token_ids, "the first output is the one that a request for one gets"
    assert [list(output.token_ids) for output in whole.outputs] == ids
    assert [output.text for output in whole.outputs] == [output.text for output in several.outputs]
    assert several.finished is not None
    assert several.finished.usage.completion_tokens == sum(map(len, ids))
    assert several.finished.usage.prompt_tokens == len(PROMPT), "the prompt counts once"


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"seed": 8, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3}],
    ids=["greedy", "sampled"],
)
async def test_logprobs_are_those_of_the_reference_before_temperature_and_filters(
    system: System, plain: PreTrainedModel, options: dict[str, Any]
) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        outcome = await run(client, logprobs=True, **options)
        whole = await client.get(outcome.generation_id)
        silent = await run(client, **options)
    ids = outcome.token_ids
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert outcome.output.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert list(whole.outputs[0].logprobs) == outcome.output.logprobs
    assert silent.token_ids == ids
    assert silent.output.logprobs == []


async def test_stop_string_cuts_the_text_and_not_the_ids(system: System, folder: Path) -> None:
    await system.ready(MODEL)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    async with system.client() as client:
        free = await run(client, seed=18, max_tokens=200)
        text = free.output.text
        # Three plain characters in a row, each a token of its own, so that the match spans tokens.
        at = next(i for i in range(40, len(text)) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i)
        stop = text[at : at + 3]
        num_ids = next(n for n in range(1, 201) if stop in tokenizer.decode(free.token_ids[:n]))
        stopped = await run(client, seed=18, max_tokens=200, stop=["never there", stop])
        whole = await client.get(stopped.generation_id)
    assert stopped.output.text == text[:at]
    assert stopped.token_ids == free.token_ids[:num_ids]
    assert stopped.output.finish_reason == pb.FINISH_REASON_STOP
    assert stopped.output.end is not None
    assert stopped.output.end.stop == stop
    assert whole.outputs[0].text == text[:at]
    assert stopped.finished is not None
    assert stopped.finished.usage.completion_tokens == num_ids


async def test_stop_id_ends_the_output_and_is_its_last_id(system: System, folder: Path) -> None:
    await system.ready(MODEL)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    async with system.client() as client:
        free = await run(client, seed=2)
        stop_id = free.token_ids[25]
        at = free.token_ids.index(stop_id)
        stopped = await run(client, seed=2, stop_token_ids=[stop_id])
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert stopped.output.text == tokenizer.decode(free.token_ids[:at])
    assert stopped.output.finish_reason == pb.FINISH_REASON_STOP
    assert stopped.output.end is not None
    assert stopped.output.end.stop_token_id == stop_id


async def test_narrowest_filters_leave_the_greedy_output(system: System) -> None:
    await system.ready(MODEL)
    async with system.client() as client:
        greedy, top_k, top_p, min_p = await asyncio.gather(
            run(client, temperature=0.0),
            run(client, top_k=1),
            run(client, top_p=1e-9),
            run(client, min_p=0.999999),
        )
    assert top_k.token_ids == top_p.token_ids == min_p.token_ids == greedy.token_ids
