"""Every greedy output is what transformers gives the request alone, whatever else the worker decodes beside it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from common.generation import SamplingParams
from tests import reference
from tests.builders_calls import Outcome, idle_fleet
from tests.builders_engine import TokenNames
from tests.builders_models import write_tiny_model, write_tokenizer
from tests.builders_system import System
from tests.recorded import Recorded
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb
from worker.assembly import choose_backend
from worker.engine.batch import TokensInFlight
from worker.engine.demo import demo_model_dir
from worker.engine.loop import Engine
from worker.engine.model import load_model
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import Plan
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
WIDE_GPT2 = "gpt2-wide"
NO_REPEAT = {"no_repeat_ngram_size": 2}


@dataclass(frozen=True)
class Case:
    """One request, and after how many tokens its caller leaves (None: stays to the end)."""

    prompt: tuple[int, ...]
    options: dict[str, int] = field(default_factory=dict)
    leaves_after: int | None = None


class Crowd:
    """Runs cases as streams that join and leave: a wave begins when 10 more tokens have come, whoever's they are."""

    def __init__(self, client: AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self._num_open = 0
        self._num_tokens = 0
        self._has_news = asyncio.Event()
        self.most_open = 0

    async def run(self, waves: Sequence[Sequence[Case]]) -> list[Outcome]:
        tasks: list[asyncio.Task[Outcome]] = []
        async with asyncio.TaskGroup() as group:
            for number, wave in enumerate(waves):
                while self._num_tokens < 10 * number:
                    self._has_news.clear()
                    await self._has_news.wait()
                tasks += [group.create_task(self._run(case)) for case in wave]
        return [task.result() for task in tasks]

    async def _run(self, case: Case) -> Outcome:
        outcome = Outcome(self._client.stream(case.prompt, model=self._model, temperature=0, **case.options))
        self._num_open += 1
        self.most_open = max(self.most_open, self._num_open)
        num_before = 0

        def leaves(outcome: Outcome) -> bool:
            nonlocal num_before
            self._num_tokens += len(outcome.token_ids) - num_before
            num_before = len(outcome.token_ids)
            self._has_news.set()
            return case.leaves_after is not None and num_before >= case.leaves_after

        await outcome.read(until=leaves)
        if outcome.finished is None:
            await self._client.cancel(outcome.generation_id)
        self._num_open -= 1
        return outcome


class RecordingRunner(ModelRunner):
    """Keeps the logits that it computes, [num_sampled, vocab_size] of each step."""

    recorded: list[torch.Tensor]

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        logits = super().execute(plan, in_flight)
        self.recorded.append(logits.clone())
        return logits


@torch.inference_mode()
def logit_difference(folder: Path, plain: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> float:
    """Largest difference of the engine's logits from the plain model's on the same tokens: prompts and 8 more."""
    loaded = load_model(str(folder), torch.float32, torch.device("cpu"))
    settings = EngineSettings(num_blocks=64, max_model_len=512, speculation=False)  # one row of logits a token
    runner = RecordingRunner(loaded.module, choose_backend(loaded.device, loaded.dtype, settings.block_size), settings)
    engine = Engine(runner, settings, TokenNames)
    largest = 0.0
    for number, prompt in enumerate(prompts):
        runner.recorded = []
        engine.add(GenerationRequest(str(number), tuple(prompt), SamplingParams(max_tokens=8)))
        tokens = list(prompt)
        while engine.has_work:
            tokens += [
                token for output in engine.step(0.0).outputs for delta in output.deltas for token in delta.token_ids
            ]
        ours = torch.cat([logits for logits in runner.recorded if len(logits)])
        theirs = plain(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        assert ours.shape == theirs.shape
        largest = max(largest, float((ours - theirs).abs().max()))
    return largest


def compare(
    name: str,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    eos_token_ids: Sequence[int],
    cases: Sequence[Case],
    outcomes: Sequence[Outcome],
    difference: float,
) -> None:
    """Hold every outcome to the reference, of which the named file has records: ids, text, and how it ended."""
    comparison = reference.Comparison(difference)
    expected = Recorded(name, model, eos_token_ids).outputs([(case.prompt, case.options) for case in cases])
    for case, outcome, ids in zip(cases, outcomes, expected, strict=True):
        output = outcome.output
        if outcome.finished is None:
            comparison.add(model, case.prompt, ids[: len(output.token_ids)], output.token_ids)
            continue
        comparison.add(model, case.prompt, ids, output.token_ids)
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)
        ended_by_id = output.token_ids[-1] in eos_token_ids
        assert output.finish_reason == (pb.FINISH_REASON_STOP if ended_by_id else pb.FINISH_REASON_LENGTH)
        assert outcome.finished.usage.prompt_tokens == len(case.prompt)
        assert outcome.finished.usage.completion_tokens == len(output.token_ids)
    print(f"{comparison.num_outputs} outputs, largest logit difference {difference:.1e}")  # noqa: T201
    comparison.check()


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    # Leases of the usual length: both cores are at work, and no worker dies here.
    with System(tmp_path) as system:
        yield system


# -- SmolLM2 ----------------------------------------------------------------------------------------------------------

SENTENCES = [
    "The ferry to the island leaves every morning at seven, unless the fog is too thick.",
    "A compiler turns a program that people can read into one that a machine can run.",
    "She wrote down the names of all the birds that came to the feeder that winter.",
    "In 1969 the first message over the network was cut off after two letters.",
    "Bread needs only flour, water, salt and time; most recipes hurry the last of these.",
    "The museum keeps its oldest maps in a room without windows.",
    "When the river rises, the lower road is closed and the buses go over the hill.",
    "He asked three questions and did not like any of the answers.",
    "Glass is made of sand, and sand is made of mountains.",
    "The committee will meet again on Thursday to decide what to do about the bridge.",
]


def prose(seed: int, num_sentences: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(SENTENCES) for _ in range(num_sentences))


def smollm2_waves(tokenizer: Tokenizer) -> list[list[Case]]:
    """64 requests of 1 to 2,000 tokens, and 6 whose callers leave; long outputs first, so that all are open at once."""

    def prompt(text: str, num_tokens: int) -> tuple[int, ...]:
        ids = tuple(tokenizer.encode(text).ids[:num_tokens])
        assert len(ids) == num_tokens
        return ids

    long = prose(1, 140)
    shared = prose(2, 20)
    grow = [{"max_tokens": 40}, {"max_tokens": 34}, {"max_tokens": 38, **NO_REPEAT}, {"max_tokens": 36}]
    short = [{"max_tokens": 1}, {"max_tokens": 8}, {"max_tokens": 3}, {"max_tokens": 12, **NO_REPEAT}]
    # 20 that begin with two blocks each and grow to five beside one that takes most of the cache: more than it holds.
    large = Case(prompt(long, 1400), {"max_tokens": 400})  # many: where guesses pay, it is fast
    first = [Case(prompt(f"{i + 3}. {prose(i, 4)}", 31 + i % 2), grow[i % 4]) for i in range(20)]
    second = [Case(prompt(shared + prose(30 + i, 4), 120 + 3 * i), short[i % 4]) for i in range(18)]
    third = [Case((token,), {"max_length": 12}) for token in tokenizer.encode("The I A When She 1 My Why").ids[:8]]
    third += [Case(prompt(long, n), {"max_tokens": 6}) for n in (2000, 600)]
    fourth = [Case(prompt(prose(60 + i, 9), 100), {"max_length": 104 + 2 * i, **NO_REPEAT}) for i in range(5)]
    fourth += [Case(prompt(prose(70 + i, 4), 2 + 3 * i), short[i % 4]) for i in range(10)]
    leaving = [Case(case.prompt, case.options, leaves_after=3 + i) for i, case in enumerate(first[:6])]
    return [[large], [*first, *leaving[:3]], [*second, *leaving[3:]], third, fourth]


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_smollm2_answers_64_streams_as_one_at_a_time(system: System) -> None:
    folder = demo_model_dir()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    waves = smollm2_waves(tokenizer)
    cases = [case for wave in waves for case in wave]
    assert len(cases) == 64 + 6
    system.add_gateway()
    system.add_worker("demo", "smollm2", TORCHRELAY_WORKER_NUM_THREADS="2", TORCHRELAY_ENGINE_NUM_BLOCKS="128")
    await system.ready("smollm2")
    async with system.client() as client:
        crowd = Crowd(client, "smollm2")
        outcomes = await crowd.run(waves)
    num_tokens = sum(len(outcome.token_ids) for outcome in outcomes)
    (worker,) = await idle_fleet(system, num_tokens)
    for worker_process in system.workers:
        worker_process.stop()
    assert crowd.most_open >= 64, "the streams were not concurrent"
    assert worker.num_preemptions > 0, "the cache was not small enough for this test"
    assert worker.cached_prompt_tokens > 0, "nothing hit the prefix cache"
    assert worker.num_free_blocks == worker.num_blocks
    plain = reference.load_reference(folder)
    assert len({tuple(outcome.token_ids) for outcome in outcomes if len(outcome.token_ids) > 8}) > 30, "degenerate"
    difference = logit_difference(folder, plain, [case.prompt for case in waves[1][:3]])
    compare("smollm2", plain, tokenizer, [2], cases, outcomes, difference)


# -- every family -----------------------------------------------------------------------------------------------------


def random_waves(vocab_size: int, longest: int, most_new: int) -> list[list[Case]]:
    """12 requests of 1 to `longest` tokens, half of them with a common beginning, and one whose caller leaves.

    The shorter the prompt, the longer the output, up to `most_new` tokens: small ones grow until the cache is full.
    """
    rng = random.Random(0)
    common = rng.choices(range(3, vocab_size), k=longest)
    waves: list[list[Case]] = [[], [], []]
    for i, part in enumerate([0.0, 0.05, 0.1, 0.2, 0.3, 0.6, 0.4, 0.5, 1.0, 0.9, 0.7, 0.8]):
        length = max(1, int(longest * part))
        prompt = tuple(common[:length] if i % 2 else rng.choices(range(3, vocab_size), k=length))
        num_new = max(16, int(most_new * (1 - part)))
        options = {"max_length": length + num_new} if i % 3 else {"max_tokens": num_new}
        waves[i // 4].append(Case(prompt, options | (NO_REPEAT if i % 4 < 2 else {})))
    leaver = waves[1][0]
    waves[1].append(Case(leaver.prompt, leaver.options, leaves_after=4))
    return waves


def write_family(folder: Path, family: str) -> Path:
    """Save a random model: the family at 4 layers, or GPT-2 as wide as it is, 3 of its 12 layers."""
    if family != WIDE_GPT2:
        return write_tiny_model(folder, family)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("families", [FAMILIES[:4], FAMILIES[4:8], [*FAMILIES[8:], WIDE_GPT2]], ids="+".join)
async def test_every_family_answers_a_crowd_as_one_at_a_time(
    system: System, tmp_path: Path, families: list[str]
) -> None:
    folders = {family: write_family(tmp_path / family, family) for family in families}
    waves = {
        family: random_waves(50_000, 320, 96) if family == WIDE_GPT2 else random_waves(288, 210, 150)
        for family in families
    }
    system.add_gateway()
    for family, folder in folders.items():
        num_blocks = "22" if family == WIDE_GPT2 else "18"
        system.add_worker(folder, family, TORCHRELAY_ENGINE_NUM_BLOCKS=num_blocks)
    await system.ready(*families)
    async with system.client() as client, asyncio.TaskGroup() as group:
        running = {family: group.create_task(Crowd(client, family).run(waves[family])) for family in families}
    outcomes = {family: task.result() for family, task in running.items()}
    num_tokens = sum(len(outcome.token_ids) for family in families for outcome in outcomes[family])
    fleet = {worker.model: worker for worker in await idle_fleet(system, num_tokens)}
    for worker in system.workers:
        worker.stop()
    for family in families:
        assert fleet[family].num_preemptions > 0, f"{family}: the cache was not small enough for this test"
        assert fleet[family].cached_prompt_tokens > 0, f"{family}: nothing hit the prefix cache"
        cases = [case for wave in waves[family] for case in wave]
        assert len({tuple(outcome.token_ids) for outcome in outcomes[family]}) >= len(cases) - 1, "degenerate weights"
        plain = reference.load_reference(folders[family])
        tokenizer = Tokenizer.from_file(str(folders[family] / "tokenizer.json"))
        eos = [50256] if family == WIDE_GPT2 else [2]
        difference = logit_difference(folders[family], plain, [case.prompt for case in waves[family][2]])
        compare(family, plain, tokenizer, eos, cases, outcomes[family], difference)
