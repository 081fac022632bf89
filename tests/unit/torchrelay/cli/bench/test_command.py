"""`torchrelay bench`, `bench compare` and `bench plot`, run as a command."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.torchrelay.cli.bench.builders import make_record
from tests.unit.torchrelay.cli.conftest import Command
from tests.unit.torchrelay.toy import Break, Failure
from torchrelay.admin.v1beta1 import fleet_pb2
from torchrelay.cli.bench import records
from torchrelay.cli.bench.samples import Level
from torchrelay.cli.bench.slo import parse_slo

PERCENTILES = {"mean", "p50", "p90", "p95", "p99"}


def test_each_level_is_reported(run: Command) -> None:
    reports = run.objects("bench", "-c", "1,2", "-r", "2", "--json")
    assert [report["concurrency"] for report in reports] == [1, 2]
    assert [report["num_requests"] for report in reports] == [2, 4]
    for report in reports:
        assert (report["model"], report["mode"], report["rate"]) == ("tiny", "closed", None)
        assert report["num_errors"] == 0
        assert report["output_tokens"] == 5 * report["num_requests"]
        assert report["input_tokens"] == 3 * report["num_requests"]
        assert report["queue_ms"]["p50"] == 2
        for name in ("ttft_ms", "itl_ms", "tpot_ms", "message_gap_ms", "e2e_ms", "queue_ms"):
            assert set(report[name]) == PERCENTILES
        assert "goodput" not in report
    table = run("bench", "-c", "1", "-r", "1").stdout.splitlines()
    assert table[0].startswith("CALLERS")
    assert table[1].split()[:3] == ["1", "1", "0"]


def test_arrivals_are_reported_by_their_rate(run: Command) -> None:
    reports = run.objects("bench", "--rate", "50,200", "-r", "6", "--json", "--slo", "ttft=60s,e2e=90s")
    assert [(report["mode"], report["rate"], report["concurrency"]) for report in reports] == [
        ("open", 50, None),
        ("open", 200, None),
    ]
    for report in reports:
        assert report["num_requests"] == 6
        assert set(report["generator"]["late_send_ms"]) == PERCENTILES
        assert report["slo"] == {"ttft": 60_000, "e2e": 90_000}
        assert report["goodput"]["fraction"] == 1
    result = run("bench", "--rate", "100", "--duration", "100ms", "--slo", "ttft=60s")
    assert result.stdout.startswith("ARRIVALS")
    assert "100/s" in result.stdout
    assert "100.0%" in result.stdout
    assert "within ttft 60 s: 100 requests/s" in result.stderr


def test_nothing_within_the_objectives_is_said(run: Command) -> None:
    result = run("bench", "-c", "2", "-r", "1", "--slo", "ttft=1us")
    assert "99 % of requests within ttft 0.001 ms: none" in result.stderr


def test_errors_are_counted_and_fail(run: Command) -> None:
    run.toy.breaks = [Break(0, Failure(grpc.StatusCode.INTERNAL, "WORKER_FAILED"))]
    result = run("bench", "-c", "1", "-r", "2", "--json", status=1)
    report = json.loads(result.stdout)
    assert (report["num_requests"], report["num_errors"], report["errors"]) == (1, 1, {"WORKER_FAILED": 1})
    assert "1 requests ended with WORKER_FAILED" in result.stderr


def test_warm_up_is_sent_and_not_measured(run: Command) -> None:
    (report,) = run.objects("bench", "-c", "2", "-r", "1", "--warmup", "3", "--json")
    assert report["num_requests"] == 2
    assert len([request for request in run.toy.requests if hasattr(request, "config")]) == 5


def test_a_file_s_prompts_are_asked(run: Command, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one", "max_tokens": 3}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    run.objects("bench", "-c", "1", "-r", "3", "--prompts", str(path), "--max-tokens", "7", "--json")
    asked = [request for request in run.toy.requests if hasattr(request, "config")]
    assert [request.config.max_tokens for request in asked] == [3, 7, 3]
    assert asked[0].input.text == "one"
    assert asked[1].input.chat.messages[0].parts[0].text == "two"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-c", ""], "--concurrency"),
        (["-c", "0"], "--concurrency"),
        (["-c", "1,x"], "--concurrency"),
        (["-c", "-1"], "--concurrency"),
        (["-c", "1,,2"], "--concurrency"),
        (["--rate", "0"], "requests a second above 0"),
        (["--rate", "1,x"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--rate", "inf"], "--rate"),
        (["--rate", "1", "-c", "1"], "not together with --concurrency"),
        (["-r", "1", "--duration", "1s"], "not together with --requests"),
        (["--duration", "5"], "such as 500ms"),
        (["--prompt-words", "a"], "range such as 16-512"),
        (["--prompts", "/absent"], "cannot be read"),
        (["--prompts", "x", "--prompt-words", "3"], "not together with --prompts"),
        (["--prompts", "x", "--shared-prefix-words", "3"], "not together with --prompts"),
        (["--slo", "p99=1s"], "ttft=TIME"),
        (["-o", "/absent/run.json"], "is no folder"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_sent(
    run: Command, options: list[str], said: str
) -> None:
    shown = " ".join(run("bench", *options, status=2).stderr.replace("│", " ").split())
    assert said in shown
    assert run.toy.requests == []


def test_a_saved_run_says_what_it_is_and_keeps_no_credentials(run: Command, tmp_path: Path) -> None:
    run.toy.workers = [fleet_pb2.Worker(version="1.2.3"), fleet_pb2.Worker(version="1.2.3")]
    path = tmp_path / "run.json.gz"
    run("bench", "-c", "1,2", "-r", "2", "--ignore-eos", "--api-key", "tr_secret", "--slo", "ttft=60s", "-o", str(path))
    record = records.read(path)
    about = record.about
    assert about["command"][:7] == ["torchrelay", "bench", "--concurrency", "1,2", "--requests", "2", "--ignore-eos"]
    assert "tr_secret" not in json.dumps(about)
    assert (about["model"]["name"], about["model"]["revision"]) == ("tiny", "0123456789abcdef")
    assert about["server_versions"] == ["1.2.3"]
    assert about["time"].endswith("+00:00")
    assert about["client_version"]
    assert [(saved.level, len(saved.samples)) for saved in record.runs] == [(Level(1), 2), (Level(2), 4)]
    assert (record.slo, record.target) == (parse_slo("ttft=60s"), 0.99)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, str]:
    """Names of three runs: two alike, and one that is half as fast."""
    paths = {}
    for name, seed, slower in (("before", 1, 1.0), ("alike", 2, 1.0), ("slow", 3, 2.0)):
        paths[name] = str(tmp_path / f"{name}.json.gz")
        record = make_record(
            random.Random(seed), [Level(1)], num_requests=40, slower=slower, slo=parse_slo("ttft=200ms")
        )
        records.write(Path(paths[name]), record)
    return paths


def test_a_regression_is_told_from_noise(run: Command, saved: dict[str, str]) -> None:
    run("bench", "compare", saved["before"], saved["alike"], "--fail-above", "5%")
    result = run("bench", "compare", saved["before"], saved["slow"], "--fail-above", "5%", status=1)
    assert "worse" in result.stdout
    assert "ttft p50 ms at 1 is worse by +" in result.stderr
    run("bench", "compare", saved["before"], saved["slow"], "--fail-above", "900%")
    run("bench", "compare", saved["slow"], saved["before"], "--fail-above", "0%")
    run("bench", "compare", saved["before"], saved["slow"])
    found = run.objects("bench", "compare", saved["before"], saved["slow"], "--json", "--confidence", "0.9")
    first = found[0]
    assert (first["concurrency"], first["figure"], first["verdict"]) == (1, "ttft p50 ms", "worse")
    assert first["interval"][0] <= first["change"] <= first["interval"][1]
    assert run.toy.requests == []  # nothing is measured


def test_runs_of_two_commands_are_said_to_be(run: Command, tmp_path: Path) -> None:
    for name, tokens in (("a", "8"), ("b", "9")):
        run("bench", "-c", "1", "-r", "1", "--max-tokens", tokens, "-o", str(tmp_path / f"{name}.json"))
    result = run("bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert "differ in their command: torchrelay bench --concurrency 1 --requests 1 --max-tokens 8" in result.stderr
    assert "too few" in result.stdout


@pytest.mark.parametrize("value", ["5", "x%", "-1%", "%"])
def test_a_bound_is_a_percentage(run: Command, saved: dict[str, str], value: str) -> None:
    result = run("bench", "compare", saved["before"], saved["slow"], "--fail-above", value, status=2)
    assert "such as 5%" in result.stderr


def test_what_is_no_run_is_refused(run: Command, saved: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for verb in ("compare", "plot"):
        result: Any = run("bench", verb, saved["before"], str(tmp_path / "other.json"), status=2)
        assert "is no run" in " ".join(result.stderr.replace("│", " ").split())


def test_without_matplotlib_the_extra_is_named(
    run: Command, saved: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("bench", "plot", saved["before"], "-o", str(tmp_path / "pictures"), status=1)
    assert "pip install 'torchrelay-client[bench]'" in result.stderr
    assert not (tmp_path / "pictures").exists()


def test_pictures_are_drawn(run: Command, saved: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "pictures"
    shown = run("bench", "plot", saved["before"], saved["slow"], "-o", str(folder)).stdout.splitlines()
    names = ["ttft.png", "itl.png", "throughput.png", "goodput.png", "bench.png"]
    assert [Path(line).name for line in shown] == names
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size < 100_000


def test_no_goodput_is_drawn_without_objectives(run: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records.write(tmp_path / "a.json", make_record(random.Random(1)))
    shown = run("bench", "plot", str(tmp_path / "a.json"), "-o", str(tmp_path)).stdout
    assert [Path(line).name for line in shown.splitlines()] == ["ttft.png", "itl.png", "throughput.png", "bench.png"]


def test_callers_and_arrivals_are_not_drawn_on_one_axis(run: Command, saved: dict[str, str], tmp_path: Path) -> None:
    records.write(tmp_path / "rates.json", make_record(random.Random(1), [Level(1, is_open=True)]))
    result = run("bench", "plot", saved["before"], str(tmp_path / "rates.json"), "-o", str(tmp_path), status=2)
    assert "do not share an axis" in " ".join(result.stderr.replace("│", " ").split())
