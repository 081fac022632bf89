"""Quality against fp32: agreement of the best tokens and change of NLL, position by position."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.benchmarks.contestants.engine import InProcessEngine
from tests.benchmarks.quality import compare
from tests.benchmarks.scoring import score_windows
from tests.builders_models import write_tiny_model
from worker.assembly import assemble
from worker.engine.loop import Engine
from worker.engine.settings import EngineSettings
from worker.settings import WorkerSettings


def test_agreement_and_change_of_nll() -> None:
    reference = [{"logprobs": [-1.0, -2.0], "best": [5, 6]}, {"logprobs": [-3.0, -4.0], "best": [7, 8]}]
    worse = [{"logprobs": [-1.5, -2.5], "best": [5, 6]}, {"logprobs": [-3.5, -4.5], "best": [7, 9]}]
    found = compare(worse, reference)
    assert (found.num_tokens, found.same_best, found.nll) == (4, 0.75, 3.0)
    assert (found.nll_change, found.nll_change_error) == pytest.approx((0.5, 0.0))


def test_other_positions_than_the_reference_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        compare([{"logprobs": [-1.0], "best": [1]}], [{"logprobs": [-1.0, -1.0], "best": [1, 1]}])


class Tiny(InProcessEngine):
    """With an engine that is there already."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._num_requests = 0


def test_our_engine_s_predictions_of_a_text_are_the_model_s(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    settings = WorkerSettings(model=str(folder), dtype="float32", device="cpu", num_threads=1)
    engine = assemble(settings, EngineSettings(num_blocks=64, speculation=False)).engine
    assert isinstance(engine, Engine)
    rng = random.Random(7)
    windows = [[rng.randrange(3, 250) for _ in range(length)] for length in (12, 31, 20)]
    model = reference.load_reference(folder)
    for window, score in zip(windows, score_windows(Tiny(engine), windows), strict=True):
        first = len(window) // 2 + 1
        with torch.inference_mode():
            expected = model(torch.tensor([window])).logits[0, first - 1 : -1].double().log_softmax(1)
        assert score.best == expected.argmax(1).tolist()
        assert score.logprobs == pytest.approx(expected[range(len(window) - first), window[first:]].tolist(), abs=1e-4)
