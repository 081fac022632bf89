"""Lanes: every text once and in its order, threads that are given out and no more, errors that end the batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.builders_tasks import ENCODERS, write_encoder
from worker.engine.runner import StepOutOfMemory
from worker.tasks.facts import Head
from worker.tasks.lanes import Lanes, pieces
from worker.tasks.loading import find_head, load_encoder
from worker.tasks.runner import EncoderModule, Text

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave torch as it was for the tests behind."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def texts_of(lengths: Sequence[int]) -> list[Text]:
    return [Text(np.arange(length, dtype=np.int32) % 200 + index % 7) for index, length in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 12))
def test_pieces_are_all_texts_in_their_order(lengths: list[int], count: int) -> None:
    texts = texts_of(lengths)
    found = pieces(texts, count)
    assert [text for piece in found for text in piece] == texts
    assert 0 < len(found) <= count
    assert all(found)


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 12))
def test_pieces_of_equal_texts_are_as_equal_as_they_can_be(length: int, num_texts: int, count: int) -> None:
    sizes = [len(piece) for piece in pieces(texts_of([length] * num_texts), count)]
    assert len(sizes) == min(count, num_texts)
    assert max(sizes) - min(sizes) <= 1


@given(LENGTHS)
def test_outputs_keep_the_order_of_their_texts(lengths: list[int]) -> None:
    texts = texts_of(lengths)
    assert Lanes(3, min_tokens=16).run(lambda piece: list(map(len, piece)), texts) == lengths


def calls_of(lanes: Lanes, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Run a batch; return the texts of each call and the threads that its operators would use."""
    calls: list[tuple[int, int]] = []

    def compute(piece: Sequence[Text]) -> list[None]:
        calls.append((len(piece), torch.get_num_threads()))
        return [None] * len(piece)

    lanes.run(compute, texts_of(lengths))
    return sorted(calls)


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        pytest.param([10] * 3, [(3, 4)], id="too little for two lanes"),
        pytest.param([200], [(1, 4)], id="one text"),
        pytest.param([20] * 2, [(1, 2), (1, 2)], id="two lanes of half the threads"),
        pytest.param([20] * 8, [(2, 1)] * 4, id="a lane for each thread"),
        pytest.param([512] * 8, [(1, 1)] * 8, id="two pieces a lane"),
        pytest.param([2000] * 3, [(1, 1)] * 3, id="as many lanes as texts"),
    ],
)
def test_lanes_share_the_threads(lengths: list[int], calls: list[tuple[int, int]]) -> None:
    assert calls_of(Lanes(4, min_tokens=20), lengths) == calls


def test_a_whole_batch_has_all_threads_behind_lanes_that_had_fewer() -> None:
    lanes, found = Lanes(2, min_tokens=20), []

    def run() -> None:  # a thread that has not computed before, as the engine's
        found.append(calls_of(lanes, [30] * 4))
        found.append(calls_of(lanes, [10]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[(2, 1), (2, 1)], [(1, 2)]]


def test_lanes_run_side_by_side() -> None:
    together = threading.Barrier(2, timeout=10)
    assert (
        Lanes(2, min_tokens=1).run(lambda piece: [together.wait() >= 0 for _ in piece], texts_of([5, 5])) == [True] * 2
    )


def test_the_first_error_is_raised_when_no_lane_computes_any_more() -> None:
    others_may_end, ended = threading.Event(), []

    def compute(piece: Sequence[Text]) -> list[None]:
        if len(piece[0]) == 5:
            threading.Timer(0.1, others_may_end.set).start()
            raise StepOutOfMemory("of the first")
        assert others_may_end.wait(10)
        ended.append(piece)
        return [None]

    with pytest.raises(StepOutOfMemory, match="of the first"):
        Lanes(2, min_tokens=1).run(compute, texts_of([5, 6]))
    assert len(ended) == 1


@pytest.mark.parametrize("family", ENCODERS)
def test_each_family_gives_the_same_in_lanes(family: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", family, "tokens")
    head = find_head(str(folder))
    assert head is Head.TOKEN_LABELS
    loaded = load_encoder(str(folder), head, torch.float32, torch.device("cpu"))
    texts = texts_of([48, 40, 40, 33, 32, 32, 31, 20])
    in_lanes = EncoderModule(loaded.module.body, head, lanes=Lanes(4, min_tokens=32))
    run: Callable[[Sequence[Text]], list[np.ndarray]] = in_lanes.run  # type: ignore[type-arg]
    for _ in range(3):
        for found, text in zip(run(texts), texts, strict=True):
            alone = EncoderModule(loaded.module.body, head).run([text])[0]
            np.testing.assert_allclose(found, alone, atol=1e-4)
