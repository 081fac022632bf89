"""The GPU benchmark: what it says without a GPU, and a rehearsal of all its parts at a toy shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.benchmarks import gpu, gpu_checks, gpu_tasks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "_FAMILIES", ("llama", "gpt2"))
    monkeypatch.setattr(gpu_checks, "VARIANTS", (gpu_checks.VARIANTS[3], gpu_checks.VARIANTS[-1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.splitlines() == ["not run on a GPU", '{"gpu": null}']


def test_a_rehearsal_runs_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--rehearse"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(last)
    assert report["failures"] == {}
    assert report["kernels"] == {"smollm2": True, "narrow values float32": True}
    assert report["greedy"] == {"llama": True, "gpt2": True}
    assert len(report["tasks"]) == 16
    assert all(report["tasks"].values())
    assert list(report["decode"]) == ["1", "32", "128", "256"]
    assert all(figures["tok_s"] > 0 for figures in (*report["decode"].values(), *report["prefill"].values()))
    assert all(figures["bf16_tok_s"] > 0 for figures in report["shapes"].values())
    assert all(found.get("right", True) for found in report["narrow"].values())
    assert "not_run" in report["narrow"]["fp8"]
    assert "not_run" in report["engine_fp8"]
    assert all(figures["fp8_tok_s"] is None for figures in report["shapes"].values())
    assert report["gpu"] is None
    assert text[-2:] == ["greedy: 2 of 2 right", "tasks: 16 of 16 right"]
    assert any("rehearsal" in line for line in text)


def test_without_torchao_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "missing_package", lambda narrow: "torchao is not installed")
    assert [gpu_checks.why_not(narrow, CPU) for narrow in ("fp8", "int8", "int4")] == ["torchao is not installed"] * 3
    reason = {"not_run": "torchao is not installed"}
    figures = {"bf16_tok_s": 5.0, "fp8_tok_s": None, "tensorrt_llm_fp8_tok_s": 9305}
    report = {"gpu": "H100", "torch": "2", "failures": {}, "narrow": {"int8": reason}, "engine_fp8": reason}
    lines = gpu.table({**report, "shapes": {"2048/2048": figures}}).splitlines()
    assert "int8 weights: not run: torchao is not installed" in lines
    bf16, fp8 = (line for line in lines if "full load" in line)
    assert bf16.split()[-2:] == ["5.00", "tok/s"]
    assert fp8.endswith("not run: torchao is not installed; TensorRT-LLM, FP8, as published: 9,305")


def test_fp8_is_measured_beside_bf16_where_it_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(gpu_checks, "why_not", lambda narrow, device: None)
    monkeypatch.setattr(gpu, "quantize", lambda model, narrow: asked.append(narrow))
    names = [f"{prompt}/{output}" for prompt, output in gpu.TENSORRT_LLM]
    report: dict[str, Any] = {"shapes": {name: {"bf16_tok_s": 1.0, "fp8_tok_s": None} for name in names}}
    parts = gpu.Parts(100.0)
    gpu.measure_fp8(parts, report, gpu.make_model(gpu.REHEARSAL), gpu.REHEARSAL)
    assert (asked, parts.failures) == (["fp8"], {})
    assert all(figures["fp8_tok_s"] > 0 for figures in report["shapes"].values())


def test_wrong_narrow_weights_are_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"error": 1.2, "first_choice_kept": 0.01, "layers": 4, "right": False}
    monkeypatch.setattr(gpu_checks, "why_not", lambda narrow, device: None if narrow == "int8" else "no GPU")
    monkeypatch.setattr(gpu_checks, "check_narrow", lambda narrow, device: found)
    for part in ("check_kernels", "check_greedy"):
        monkeypatch.setattr(gpu_checks, part, lambda device: {"llama": True})
    monkeypatch.setattr(gpu_tasks, "check_tasks", lambda device: {"adapters": True})
    monkeypatch.setattr(gpu, "make_model", lambda scale: None)
    assert gpu.main(["--rehearse"]) == 1
    *text, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["wrong"] == ["int8"]
    assert "int8 weights: wrong, logits moved by 1.200 of their spread, first choice kept in 1%" in text


def test_a_wrong_kernel_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_checks, "check_kernels", lambda device: {"llama 8b": False})
    monkeypatch.setattr(gpu_checks, "missing_package", lambda narrow: "torchao is not installed")
    assert gpu.main(["--rehearse", "--seconds", "-1"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["wrong"] == ["kernels", "greedy", "tasks"]
    assert report["failures"]["greedy"] == "no time was left"


def test_a_kernel_that_ignores_sinks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class IgnoresSinks(gpu_checks.TorchAttention):
        def attend(self, query: Any, key: Any, value: Any, cache: Any, batch: Any, options: Any) -> torch.Tensor:
            plain = gpu_checks.AttentionOptions(options.scale, options.sliding_window, options.softcap)
            return super().attend(query, key, value, cache, batch, plain)

    monkeypatch.setattr(gpu_checks, "choose_backend", lambda device, dtype, block_size: IgnoresSinks(block_size))
    assert gpu_checks.check_kernels(CPU) == {"smollm2": True, "narrow values float32": False}


@pytest.mark.parametrize(("num_prompt", "num_output"), gpu.TENSORRT_LLM)
def test_a_full_load_begins_in_the_middle_of_its_life(num_prompt: int, num_output: int) -> None:
    """Prompts are computed in order, as many tokens a step as may be; each sequence goes on by a token a step."""
    most, budget = 256, 8192
    lengths = gpu.first_lengths(most, num_prompt, num_output, budget)
    computed_at = [sum(prompt for prompt, _ in lengths[: i + 1]) / budget for i in range(most)]
    ends = [start + output for start, (_, output) in zip(computed_at, lengths, strict=True)]
    filled, steps_apart = computed_at[-1], num_output / most
    assert min(ends) >= filled
    assert all(abs(end - (filled + i * steps_apart)) <= 2 for i, end in enumerate(ends))
    mean = sum(prompt for prompt, _ in lengths) / most
    assert mean == pytest.approx(num_prompt + num_output / 2, rel=0.02)


def test_targets_that_were_not_met_are_named() -> None:
    report = {"decode": {"1": {"bandwidth_share": 0.8}}, "batching": {"over_transformers": 1.6}}
    assert gpu.missed(report) == ["bandwidth_share"]
    assert gpu.missed({"decode": None, "batching": {}}) == []
