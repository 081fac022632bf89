"""The workload: the same requests everywhere, prompts that nothing caches, a clear error without texts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.benchmarks.workload import (
    MAX_RUNNING,
    NAMES,
    NUM_VARIANTS,
    Cutter,
    TextsMissing,
    Workload,
    build,
    log_spread,
    read_texts,
)

TEXTS = [" ".join(f"w{random.Random(i).randrange(5000)}x{j}" for j in range(4000)) for i in range(3)]


def encode(text: str) -> list[int]:
    """Ids of a text: one per word, by its hash of bytes."""
    return [sum(ord(c) * 31**i for i, c in enumerate(word)) % 50_000 for word in text.split()]


@pytest.fixture(scope="module")
def workload() -> Workload:
    return build(TEXTS, encode)


def test_same_texts_give_the_same_digest_and_other_seeds_another(workload: Workload) -> None:
    assert build(TEXTS, encode).sha256 == workload.sha256
    assert build(TEXTS, encode, seed=1).sha256 != workload.sha256


def test_workloads_have_the_published_shapes(workload: Workload) -> None:
    assert list(workload.runs) == list(NAMES)
    assert all(len(variants) == NUM_VARIANTS for variants in workload.runs.values())
    for w1, (w2,), (w3,), w4 in zip(*workload.runs.values(), strict=True):
        assert len(w1) == 64
        assert sum(len(request.prompt) for request in w1) == 9167
        assert sum(request.max_tokens for request in w1) == 5543
        assert (len(w2.prompt), w2.max_tokens) == (128, 128)
        assert (len(w3.prompt), w3.max_tokens) == (2048, 1)
        assert len(w4) == MAX_RUNNING
        assert len({tuple(request.prompt[:1024]) for request in w4}) == 1
        assert len({tuple(request.prompt[1024:]) for request in w4}) == len(w4)
        assert {(len(request.prompt), request.max_tokens) for request in w4} == {(1056, 32)}


def test_variants_differ_in_text_but_not_in_lengths(workload: Workload) -> None:
    first, second = workload.runs["W1"][:2]
    assert [(len(r.prompt), r.max_tokens) for r in first] == [(len(r.prompt), r.max_tokens) for r in second]
    starts = [tuple(r.prompt[:16]) for variants in workload.runs.values() for v in variants for r in v]
    of_w4 = (len(workload.runs["W4"][0]) - 1) * NUM_VARIANTS  # these share their prefix on purpose
    assert len(set(starts)) == len(starts) - of_w4


def test_workload_survives_its_file(workload: Workload) -> None:
    assert Workload.parse(workload.dump()) == workload


def test_windows_are_one_text_in_order(workload: Workload) -> None:
    windows = build(TEXTS, encode, num_windows=3, window_length=100).windows
    assert [token_id for window in windows for token_id in window] == encode(" ".join(TEXTS))[:300]


def test_log_spread_reaches_both_ends() -> None:
    numbers = log_spread(64, 16, 512, random.Random(0))
    assert (min(numbers), max(numbers), len(numbers)) == (16, 512, 64)
    assert 80 <= sorted(numbers)[32] <= 100  # the geometric middle is 90.5


def test_cutter_never_repeats_a_start() -> None:
    cutter = Cutter(list(range(60)), random.Random(0))
    starts = [cutter.cut(20)[0] for _ in range(30)]
    assert len(set(starts)) == 30


def test_missing_texts_are_named(tmp_path: Path) -> None:
    (tmp_path / "GPL-3").write_text("text")
    with pytest.raises(TextsMissing, match=r"lacks the licence texts Apache-2\.0.*base-files"):
        read_texts(tmp_path)
