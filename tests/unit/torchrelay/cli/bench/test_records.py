from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from tests.unit.torchrelay.cli.bench.builders import make_record
from torchrelay.cli.bench import records
from torchrelay.cli.bench.samples import Level
from torchrelay.cli.bench.slo import parse_slo


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
@pytest.mark.parametrize("levels", [(Level(1), Level(4)), (Level(0.5, is_open=True),)])
def test_a_run_comes_back_as_it_was(tmp_path: Path, name: str, levels: tuple[Level, ...]) -> None:
    record = make_record(random.Random(1), levels, num_failures=3, slo=parse_slo("ttft=100ms,e2e=1s"))
    record.runs[0].samples[0].queue_s = None
    records.write(tmp_path / name, record)
    found = records.read(tmp_path / name)
    assert (found.about, found.slo, found.target) == (record.about, record.slo, record.target)
    assert [run.level for run in found.runs] == list(levels)
    again = tmp_path / f"again-{name}"
    records.write(again, found)
    assert records.read(again) == found  # microseconds are kept
    for run, original in zip(found.runs, record.runs, strict=True):
        assert run.report()["itl_ms"] == pytest.approx(original.report()["itl_ms"], abs=0.011)
        assert [failure.reason for failure in run.failures] == ["QUEUE_FULL"] * 3
        assert run.failures[0].intended_s == pytest.approx(original.failures[0].intended_s, abs=1e-6)
        assert [sample.num_tokens for sample in run.samples] == [sample.num_tokens for sample in original.samples]
        assert [sample.total_s for sample in run.samples] == pytest.approx(
            [sample.total_s for sample in original.samples], abs=1e-6
        )


def test_a_compressed_run_is_small(tmp_path: Path) -> None:
    record = make_record(random.Random(1))
    for name in ("run.json", "run.json.gz"):
        records.write(tmp_path / name, record)
    assert (tmp_path / "run.json.gz").stat().st_size < (tmp_path / "run.json").stat().st_size / 2
    assert json.loads(gzip.decompress((tmp_path / "run.json.gz").read_bytes()))["schema"] == records.SCHEMA


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is no run"),
        ("{}", "is no run"),
        ('{"schema": "torchrelay.bench/2"}', "of schema torchrelay.bench/2"),
        ('{"schema": "torchrelay.bench/1"}', "is no run .*levels"),
        ('{"schema": "torchrelay.bench/1", "levels": [3], "slo": null, "target": 1}', "is no run"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        records.read(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json.gz"
    records.write(path, make_record(random.Random(1)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        records.read(path)
    with pytest.raises(ValueError, match="absent"):
        records.read(tmp_path / "absent")


def test_a_run_is_named_after_its_model() -> None:
    record = make_record(random.Random(1), num_requests=1)
    assert record.name == "tiny"


def test_runs_of_other_things_are_told_apart() -> None:
    about = {"model": {"name": "tiny", "revision": "a" * 64}, "command": ["torchrelay", "bench", "--output", "a.json"]}
    one = records.Record(about, [])
    assert list(records.what_differs(one, records.Record({**about, "command": ["torchrelay", "bench"]}, []))) == []
    other = records.Record(
        {
            "model": {"name": "tiny", "revision": "b" * 64, "num_workers": 2},
            "command": ["torchrelay", "bench", "--max-tokens", "9", "--output", "b.json"],
            "server_versions": ["1.2"],
        },
        [],
    )
    assert list(records.what_differs(one, other)) == [
        ("model", "tiny " + "a" * 12, "tiny " + "b" * 12),
        ("number of workers", "not known", "2"),
        ("workers' versions", "not known", "1.2"),
        ("command", "torchrelay bench", "torchrelay bench --max-tokens 9"),
    ]
