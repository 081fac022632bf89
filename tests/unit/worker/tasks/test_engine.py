"""The engine of encoder models: the same answers in any company, and what becomes of what goes wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.generation import SamplingParams
from common.tasks import ClassifyTask, Embeddings, EmbedTask, EncodedText, Labels, RerankTask, Task, pack_ids
from tests.builders_tasks import ENCODERS, write_encoder
from worker.engine.model_files import ModelError
from worker.engine.runner import StepOutOfMemory
from worker.engine.settings import EngineSettings
from worker.engine.types import DuplicateRequest, GenerationRequest, RequestOutput
from worker.tasks.assembly import make_engine
from worker.tasks.engine import TaskEngine
from worker.tasks.facts import Head
from worker.tasks.loading import LoadedEncoder, find_head, load_encoder
from worker.tasks.runner import EncoderModule, Text, check_module

CPU = torch.device("cpu")


def load(folder: Path) -> LoadedEncoder:
    head = find_head(str(folder))
    assert head is not None
    return load_encoder(str(folder), head, torch.float32, CPU)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> LoadedEncoder:
    return load(write_encoder(tmp_path_factory.mktemp("bert"), "bert", "labels"))


def engine_of(loaded: LoadedEncoder, **values: Any) -> TaskEngine:
    return make_engine(loaded, EngineSettings(token_budget=values.pop("token_budget", 128), max_num_seqs=64), CPU)


def text(length: int, seed: int = 0) -> EncodedText:
    generator = random.Random(f"{length} {seed}")
    return EncodedText(pack_ids([generator.randrange(4, 200) for _ in range(length)]))


def request(name: str, task: Task | None, **values: Any) -> GenerationRequest:
    return GenerationRequest(name, (), SamplingParams(max_tokens=0), task=task, **values)


def run(engine: TaskEngine) -> dict[str, RequestOutput]:
    found: dict[str, RequestOutput] = {}
    for _ in range(1000):
        if not engine.has_work:
            return found
        for output in engine.step(0.0).outputs:
            assert output.request_id not in found
            found[output.request_id] = output
        engine.check_integrity()
    raise AssertionError("the engine does not end")


def reference(loaded: LoadedEncoder, one: EncodedText) -> np.ndarray[Any, Any]:
    """The class's own logits or mean hidden state of a text alone."""
    ids = torch.frombuffer(bytearray(one.token_ids), dtype=torch.int32)[None].long()
    with torch.no_grad():
        output = loaded.module.body(input_ids=ids)
    found = output.last_hidden_state.mean(1) if loaded.facts.head is Head.VECTOR else output.logits
    return np.asarray(found[0].numpy())


@pytest.mark.parametrize("family", ENCODERS)
def test_each_family_answers_in_any_company_as_alone(family: str, tmp_path: Path) -> None:
    for head in ("body", "labels"):
        loaded = load(write_encoder(tmp_path / head, family, head))
        texts = [text(length, seed) for seed, length in enumerate((1, 3, 60, 17, 90, 18, 16, 64, 33, 2))]
        engine = engine_of(loaded)
        make: Any = EmbedTask if head == "body" else ClassifyTask
        engine.add(request("all", make(tuple(texts[:6]))))
        for number, one in enumerate(texts[6:]):
            engine.add(request(f"r{number}", make((one,)), tenant=f"t{number}"))
        found = run(engine)
        results = [found[name].result for name in ("all", "r0", "r1", "r2", "r3")]
        for one, (result, index) in zip(
            texts, [(results[0], i) for i in range(6)] + [(r, 0) for r in results[1:]], strict=True
        ):
            expected = reference(loaded, one)
            if isinstance(result, Embeddings):
                assert np.allclose(np.frombuffer(result.vectors[index], "<f4"), expected, atol=1e-4)
            else:
                assert isinstance(result, Labels)
                probabilities = torch.tensor(expected).softmax(-1).numpy()
                by_label = {entry.label: entry.score for entry in result.texts[index]}
                assert np.allclose([by_label[name] for name in loaded.facts.labels], probabilities, atol=1e-4)
        assert found["all"].usage is not None
        assert found["all"].usage.prompt_tokens == sum(one.num_tokens for one in texts[:6])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_request_ends_exactly_once(bert: LoadedEncoder, data: st.DataObject) -> None:
    engine = engine_of(bert, token_budget=data.draw(st.sampled_from([64, 200])))
    expected: dict[str, int] = {}
    ended: set[str] = set()
    for number in range(data.draw(st.integers(1, 8))):
        lengths = data.draw(st.lists(st.integers(1, 96), min_size=1, max_size=5))
        name = f"r{number}"
        engine.add(request(name, ClassifyTask(tuple(map(text, lengths))), tenant=data.draw(st.sampled_from("abc"))))
        expected[name] = sum(lengths)
        if data.draw(st.booleans()):
            for output in engine.step(0.0).outputs:
                ended.add(output.request_id)
        if data.draw(st.integers(0, 4)) == 0:
            victim = data.draw(st.sampled_from(sorted(expected)))
            engine.abort(victim)
            if victim not in ended:
                del expected[victim]
        engine.check_integrity()
    assert ended | run(engine).keys() == expected.keys()
    assert engine.stats().held_request_ids == ()


def test_what_it_does_not_serve_or_cannot_read_ends_with_its_reason(bert: LoadedEncoder) -> None:
    engine = engine_of(bert)
    bad = EncodedText(pack_ids([5, 10_000]))
    for name, task in (
        ("TASK_NOT_SERVED", EmbedTask((text(3),))),
        ("TASK_NOT_SERVED ", None),
        ("EMPTY_PROMPT", ClassifyTask(())),
        ("PROMPT_TOO_LONG", ClassifyTask((text(97),))),
        ("PROMPT_TOO_LONG ", ClassifyTask((EncodedText(b""),))),
        ("INVALID_TOKEN_ID", ClassifyTask((text(3), bad))),
        ("TASK_NOT_SERVED  ", RerankTask((text(3),))),  # several labels
    ):
        engine.add(request(name, task))
    found = run(engine)
    assert len(found) == 7
    assert all(output.error == name.strip() for name, output in found.items())


def test_an_id_in_use_is_refused_until_its_end_was_reported(bert: LoadedEncoder) -> None:
    engine = engine_of(bert)
    engine.add(request("a", ClassifyTask((text(3),))))
    engine.add(request("bad", None))
    for name in ("a", "bad"):
        with pytest.raises(DuplicateRequest):
            engine.add(request(name, None))
    run(engine)
    engine.add(request("a", ClassifyTask((text(3),))))
    assert run(engine)["a"].result is not None


def test_what_is_late_is_computed_no_further(bert: LoadedEncoder) -> None:
    engine = engine_of(bert)
    engine.add(request("late", ClassifyTask((text(90),) * 5), deadline=1.0))
    engine.step(0.5)
    assert engine.has_work
    assert engine.step(1.0).outputs == ()
    assert not engine.has_work


class _Faulty(EncoderModule):
    """Fails for lack of memory above so many texts, and answers nothing finite to a marked one."""

    max_texts = 2

    def run(self, texts: Any) -> Any:
        if len(texts) > self.max_texts:
            raise StepOutOfMemory
        outputs = super().run(texts)
        return [output * np.nan if len(one) == 13 else output for one, output in zip(texts, outputs, strict=True)]


def faulty(loaded: LoadedEncoder, max_texts: int) -> TaskEngine:
    module = _Faulty(loaded.module.body, Head.LABELS)
    module.max_texts = max_texts
    return TaskEngine(module, loaded.facts, vocab_size=200, max_tokens=96, token_budget=1000, capacity=10_000)


def test_short_memory_halves_the_batch_and_ends_only_what_never_fits(bert: LoadedEncoder) -> None:
    engine = faulty(bert, 2)
    for number in range(9):
        engine.add(request(f"r{number}", ClassifyTask((text(10),))))
    assert all(output.error is None for output in run(engine).values())
    engine = faulty(bert, 0)
    engine.add(request("r", ClassifyTask((text(10), text(11)))))
    assert run(engine)["r"].error == "OUT_OF_MEMORY"


def test_answers_that_are_no_numbers_end_their_request_alone(bert: LoadedEncoder) -> None:
    engine = faulty(bert, 100)
    engine.add(request("bad", ClassifyTask((text(10), text(13)))))
    engine.add(request("good", ClassifyTask((text(12),))))
    found = run(engine)
    assert found["bad"].error == "NAN_LOGITS"
    assert found["good"].error is None


class _ReadsPadding(EncoderModule):
    """Does not leave padding out."""

    def run(self, texts: Any) -> Any:
        width = max(map(len, texts))
        return super().run([Text(np.pad(one.ids, (0, width - len(one)))) for one in texts])


def test_a_model_that_reads_padding_is_refused(bert: LoadedEncoder) -> None:
    with pytest.raises(ModelError, match="one padded batch"):
        check_module(_ReadsPadding(bert.module.body, Head.LABELS), 200, [3, 20])


def test_batches_are_of_similar_length_and_within_the_budget(bert: LoadedEncoder) -> None:
    seen: list[list[int]] = []

    class Watched(EncoderModule):
        def run(self, texts: Any) -> Any:
            seen.append([len(one) for one in texts])
            return super().run(texts)

    module = Watched(bert.module.body, Head.LABELS)
    engine = TaskEngine(module, bert.facts, vocab_size=200, max_tokens=96, token_budget=200, capacity=10_000)
    engine.add(request("r", ClassifyTask(tuple(text(n) for n in (90, 10, 88, 11, 10, 50, 96)))))
    engine.step(0.0)
    assert seen == [[90, 88], [11, 10]]
    run(engine)
    assert sum(map(len, seen)) == 7


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
