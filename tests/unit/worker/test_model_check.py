"""What `torchrelay models check` finds out about a model, and how it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.startup import CANNOT_START
from tests.builders_models import VOCAB_SIZE, tiny_module, write_tiny_model
from worker.engine.model_files import ModelError
from worker.engine.settings import EngineSettings
from worker.model_check import ModelReport, check, describe
from worker.settings import WorkerSettings


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A passed check is not to be remembered between tests; the kernels are built once for all, and have one thread."""
    kernels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchrelay" / "kernels"
    cache = tmp_path / "cache" / "torchrelay"
    cache.mkdir(parents=True)
    if kernels.is_dir():
        (cache / "kernels").symlink_to(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHRELAY_WORKER_NUM_THREADS", "1")


def report_of(folder: Path, dtype: str = "float32") -> ModelReport:
    return check(WorkerSettings(model=str(folder), dtype=dtype, device="cpu"), EngineSettings())


def test_a_llama_shaped_model(tmp_path: Path) -> None:
    report = report_of(write_tiny_model(tmp_path / "m"))
    parameters = tiny_module("llama").num_parameters()
    assert (report.family, report.num_parameters, report.quantization) == ("llama", parameters, None)
    assert (report.weight_format, report.dtype, report.device) == ("float32", "float32", "cpu")
    assert parameters * 4 <= report.weight_bytes < parameters * 6  # the packed copy is padded
    assert (report.context_tokens, report.context_limited_by) == (256, None)
    assert report.layers == {"full": 4}
    assert report.attention == "cpu_ext"
    assert report.is_compiled
    assert 0 < report.load_check_error < report.load_check_tolerance == 1e-4
    assert report.int8.is_possible
    assert report.int8.error is not None
    assert 1e-4 < report.int8.error < 0.5 == report.int8.tolerance
    assert (report.vocab_size, report.tokenizer_size, report.has_chat_template) == (VOCAB_SIZE, 259, True)
    lines = describe(report)
    assert "4 x full" in lines
    assert "\n  compiled      yes\n" in lines
    assert "\n  int8          possible; " in lines


def test_a_model_that_is_not_compiled_says_why(tmp_path: Path) -> None:
    report = report_of(write_tiny_model(tmp_path / "m", "gpt2"), "bfloat16")
    assert not report.is_compiled
    assert report.not_compiled_because == "GPT2Model has a part 'wte'"
    assert report.int8.reason == report.not_compiled_because
    assert not report.int8.is_possible
    assert report.dtype == "bfloat16"
    assert 0 < report.load_check_error < report.load_check_tolerance == 0.15
    assert "no: GPT2Model has a part 'wte'" in describe(report)


def test_sliding_windows_are_counted_as_attention_is_asked_for_them(tmp_path: Path) -> None:
    for family, compiled in (("gemma2", True), ("gpt_oss", False)):
        report = report_of(write_tiny_model(tmp_path / family, family))
        assert report.is_compiled is compiled
        assert report.layers == {"sliding window 8": 2, "full": 2}


def test_a_context_that_rope_limits_says_so(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0}
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    changes: dict[str, Any] = {"original_max_position_embeddings": 64, "rope_parameters": {**rope, **factors}}
    report = report_of(write_tiny_model(tmp_path / "m", "phi3", **changes))
    assert report.context_tokens == 64
    assert report.context_limited_by == "RoPE of type longrope changes beyond 64 tokens, and 256 are named"
    assert "64 tokens; limited: RoPE of type longrope" in describe(report)


def test_a_family_that_would_answer_wrongly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the family bloom cannot be served"):
        report_of(write_tiny_model(tmp_path / "m", "bloom"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from torchrelay.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "models", "check", *arguments, "--device", "cpu", "--dtype", "float32"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class TestTheCommand:
    def test_what_can_be_served(self, tmp_path: Path) -> None:
        done = run(str(write_tiny_model(tmp_path / "m")), "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["can_be_served"] is True
        assert (found["family"], found["is_compiled"], found["int8"]["is_possible"]) == ("llama", True, True)

    def test_what_cannot(self, tmp_path: Path) -> None:
        folder = str(write_tiny_model(tmp_path / "m", "bloom"))
        done = run(folder, "--json")
        assert done.returncode == CANNOT_START
        found = json.loads(done.stdout)
        assert (found["can_be_served"], found["source"]) == (False, folder)
        assert "the family bloom cannot be served" in found["reason"]
