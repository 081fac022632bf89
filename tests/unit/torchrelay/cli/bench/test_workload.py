from __future__ import annotations

import math
import random
from itertools import islice, pairwise, takewhile
from pathlib import Path
from statistics import fmean, median, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.cli.bench.workload import (
    FilePrompts,
    LogNormal,
    RandomWords,
    Request,
    Uniform,
    parse_lengths,
    poisson_arrivals,
    read_prompts,
)


@pytest.mark.parametrize("seed", ["1/0.5", "1/2", "7/100"])
def test_gaps_between_arrivals_are_exponential_by_kolmogorov_and_smirnov(seed: str) -> None:
    rate = float(seed.split("/")[1])
    times = [0.0, *islice(poisson_arrivals(rate, seed), 4000)]
    gaps = sorted(after - before for before, after in pairwise(times))
    distance = max(
        max(abs(1 - math.exp(-rate * gap) - index / 4000), abs(1 - math.exp(-rate * gap) - (index + 1) / 4000))
        for index, gap in enumerate(gaps)
    )
    assert distance < 1.95 / math.sqrt(4000)  # a fair one is above it once in a thousand


def test_as_many_arrive_in_a_second_as_poisson_s_law_says() -> None:
    arrivals = list(takewhile(lambda at: at < 2000, poisson_arrivals(5, "x")))
    counts = [0] * 2000
    for at in arrivals:
        counts[int(at)] += 1
    assert fmean(counts) == pytest.approx(5, abs=3.3 * math.sqrt(5 / 2000))
    assert pvariance(counts) / fmean(counts) == pytest.approx(1, abs=0.11)


@given(st.floats(0.01, 1000), st.text(max_size=5))
def test_arrivals_are_the_same_for_the_same_seed_and_in_order(rate: float, seed: str) -> None:
    first = list(islice(poisson_arrivals(rate, seed), 20))
    assert first == list(islice(poisson_arrivals(rate, seed), 20))
    assert first == sorted(first)
    assert first[0] > 0


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("64", Uniform(64, 64)),
        ("16-512", Uniform(16, 512)),
        ("lognormal:128,0.8", LogNormal(128, 0.8)),
        ("lognormal:1,0", LogNormal(1, 0)),
    ],
)
def test_lengths_are_read(text: str, lengths: object) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "5-4", "0-4", "1.5", "a-b", "normal:3,4", "lognormal:128", "lognormal:0.5,1", "lognormal:9,6"],
)
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="range such as 16-512"):
        parse_lengths(text)


def test_lengths_have_their_distribution() -> None:
    rng = random.Random(1)
    drawn = [Uniform(3, 5).draw(rng) for _ in range(3000)]
    assert {drawn.count(length) > 900 for length in (3, 4, 5)} == {True}
    assert set(drawn) == {3, 4, 5}
    long = [LogNormal(100, 0.5).draw(rng) for _ in range(3000)]
    assert median(long) == pytest.approx(100, rel=0.05)
    assert fmean(long) == pytest.approx(100 * math.exp(0.125), rel=0.05)
    assert min(LogNormal(1, 3).draw(rng) for _ in range(300)) == 1


def test_prompts_share_the_words_that_they_are_to_and_no_others() -> None:
    workload = RandomWords(Uniform(20, 20), 7, num_shared_words=10)
    first, second = islice(workload.requests("s"), 2)
    words = [str(request.prompt).split() for request in (first, second)]
    assert [len(each) for each in words] == [30, 30]
    assert words[0][:10] == words[1][:10]
    assert words[0][10:] != words[1][10:]
    assert first.max_tokens == 7
    assert next(workload.requests("s")) == first
    assert next(workload.requests("t")) != first
    alone = next(RandomWords(Uniform(4, 4), 7).requests("s"))
    assert alone.prompt == " ".join(str(alone.prompt).split())


def test_a_file_s_requests_come_in_order_over_and_over(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}], "max_tokens": 3}\n')
    found = read_prompts(path, 9)
    assert found == FilePrompts([Request("a", 9), Request([{"role": "user", "content": "b"}], 3)])
    assert [request.max_tokens for request in islice(found.requests("any"), 3)] == [9, 3, 9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no request"),
        ("{", ":1: is no JSON"),
        ("3", "is no JSON object"),
        ('{"prompt": "a"}\n{}', ":2: wants either"),
        ('{"prompt": "a", "messages": []}', "wants either"),
        ('{"prompt": ""}', "prompt is a text"),
        ('{"prompt": [1]}', "prompt is a text"),
        ('{"messages": []}', "messages is a list"),
        ('{"messages": ["hi"]}', "role and content"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens is"),
        ('{"prompt": "a", "temperature": 1}', "temperature is not known"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_prompts(path, 9)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        read_prompts(tmp_path / "absent", 9)
