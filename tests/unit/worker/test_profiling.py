"""The profile of some steps: what is counted, what the table says, and that the trace can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from common.generation import SamplingParams
from tests.builders_models import tiny_module
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.decoder.compile import compile_decoder
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest, Part
from worker.profiling import StepProfiler, table

CPU = torch.device("cpu")
WARM_UP = 8
STEP: tuple[Part, ...] = ("plan", "batch", "forward", "sample", "update", "end")


class Clock:
    """Each look at it is a second later."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1.0
        return self.seconds


class Silent:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def names_in(trace: Path) -> list[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


@pytest.fixture
def written() -> list[str]:
    return []


def steps(profiler: StepProfiler, number: int) -> None:
    for _ in range(number):
        for part in STEP:
            profiler.on_part(part)


def test_so_many_steps_are_profiled_once_the_engine_is_warm(tmp_path: Path, written: list[str]) -> None:
    path = tmp_path / "trace.json"
    profiler = StepProfiler(3, path, CPU, clock=Clock(), write=written.append)
    steps(profiler, WARM_UP + 2)
    assert not written
    steps(profiler, 5)
    (text,) = written
    assert text.startswith("profile of 3 steps\n")
    names = names_in(path)
    assert {name: names.count(name) for name in STEP[:-1]} == dict.fromkeys(STEP[:-1], 3)


def test_what_runs_before_the_first_step_and_steps_without_a_forward_pass_do_not_count(
    tmp_path: Path, written: list[str]
) -> None:
    profiler = StepProfiler(1, tmp_path / "trace.json", CPU, clock=Clock(), write=written.append)
    for _ in range(20):  # the engine measures what steps cost
        profiler.on_part("batch")
        profiler.on_part("forward")
    for _ in range(20):  # only reports an end
        profiler.on_part("plan")
        profiler.on_part("end")
    steps(profiler, WARM_UP)
    assert not written
    steps(profiler, 1)
    assert len(written) == 1


def test_a_trace_that_cannot_be_written_is_logged_and_nothing_else(tmp_path: Path, written: list[str]) -> None:
    profiler = StepProfiler(1, tmp_path / "missing" / "trace.json", CPU, write=written.append)
    with capture_logs() as logs:
        steps(profiler, WARM_UP + 3)
    assert [entry["event"] for entry in logs] == ["profile.not_written"]
    assert len(written) == 1


def test_the_table_adds_up() -> None:
    seconds = {"plan": 0.001, "forward": 0.008, "between steps": 0.001}
    assert table(seconds, {"linears": 0.005, "head": 0.002}, 2).splitlines() == [
        "profile of 2 steps",
        "part               ms/step   share",
        "plan                 0.500   10.0%",
        "forward              4.000   80.0%",
        "  linears            2.500   50.0%",
        "  head               1.000   20.0%",
        "  rest               0.500   10.0%",
        "between steps        0.500   10.0%",
        "all                  5.000  100.0%",
    ]


def test_an_engine_s_steps_with_the_compiled_decoder_s_own_times(tmp_path: Path, written: list[str]) -> None:
    module, backend = tiny_module("llama"), CpuAttention()
    decoder = compile_decoder(module, backend, 256)
    path = tmp_path / "trace.json"
    profiler = StepProfiler(4, path, CPU, decoder, write=written.append)
    settings = EngineSettings(num_blocks=8, speculation=False)
    runner = ModelRunner(module, backend, settings, decoder, profiler.on_part)
    engine = Engine(runner, settings, Silent, on_part=profiler.on_part)
    engine.add(GenerationRequest("a", tuple(range(3, 20)), SamplingParams(max_tokens=30)))
    while engine.has_work:
        engine.step(0.0)
    (text,) = written
    assert "\n  linears " in text
    assert decoder.times is None  # it costs nothing from then on
    assert names_in(path).count("forward") == 4
    shares = {line[:16].strip(): float(line.split()[-2]) for line in text.splitlines()[2:]}
    assert shares["linears"] > 0
    assert shares["rest"] > 0
    assert sum(shares[name] for name in (*STEP[:-1], "between steps")) == pytest.approx(shares["all"], abs=0.01)
