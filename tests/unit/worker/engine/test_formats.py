"""Quantized checkpoints are loaded right, or refused with the format's name and what is missing."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders_models import tiny_module, write_tiny_model
from worker.engine import formats
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.formats import Quantization
from worker.engine.loadcheck import check_module
from worker.engine.model import LoadedModel, load_model
from worker.engine.model_files import ModelError

CPU = torch.device("cpu")
BLOCK = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(str(folder), torch.float32, CPU, cache_root=folder.parent / "cache", **options)


def declare(folder: Path, section: Any, key: str = "quantization_config") -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: section}))


@pytest.mark.parametrize(
    ("section", "name", "advice"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", "pip install gptqmodel optimum accelerate"),
        ({"quant_method": "awq", "bits": 4}, "awq", "pip install gptqmodel accelerate"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors",
            "pip install compressed-tensors accelerate",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "pip install bitsandbytes accelerate"),
        ({"load_in_8bit": True}, "bitsandbytes", "pip install bitsandbytes accelerate"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "pip install accelerate"),
        ({"quant_method": "mxfp4"}, "mxfp4", "pip install accelerate"),
    ],
)
@pytest.mark.usefixtures("nothing_installed")
def test_a_format_without_its_packages_is_named_with_what_to_install(
    folder: Path, section: dict[str, Any], name: str, advice: str
) -> None:
    declare(folder, section)
    with pytest.raises(ModelError) as refusal:
        load(folder)
    assert f"is quantized ({name})" in str(refusal.value)
    assert str(refusal.value).endswith(advice)


@pytest.mark.parametrize(
    ("section", "name"),
    [
        *(({"quant_method": name}, name) for name in ("hqq", "quanto", "aqlm", "torchao", "modelopt", "nvfp4", "new")),
        ({"bits": 4}, "unknown"),
        ("gptq", "unknown"),
    ],
)
@pytest.mark.parametrize("with_weights", [True, False])
def test_a_format_that_is_not_served_is_named(folder: Path, section: Any, name: str, with_weights: bool) -> None:
    declare(folder, section)
    with pytest.raises(ModelError, match=rf"quantized \({name}\), and this format is not served; those that are: awq"):
        load(folder, with_weights=with_weights)


def test_a_section_that_transformers_does_not_read_is_refused(folder: Path) -> None:
    declare(folder, {"quant_method": "compressed-tensors"}, key="compression_config")
    with pytest.raises(ModelError, match=r"quantized \(compressed-tensors\), and this format is not served"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "name"),
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")],
)
def test_a_format_that_stands_beside_the_configuration_is_named(folder: Path, file: str, name: str) -> None:
    (folder / file).write_text("{}")
    with pytest.raises(ModelError, match=rf"quantized \({name}, says {file}\)"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_narrow_weights_without_a_format_are_refused(folder: Path, dtype: torch.dtype) -> None:
    """transformers would take the numbers without their scales."""
    name = "model.layers.2.mlp.up_proj.weight"
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"holds {name} as (F8_E4M3|I8), but config\.json has no quantization_config"):
        load(folder)


def test_integer_buffers_are_no_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    mask = {"model.layers.0.self_attn.mask": torch.ones(4, 4, dtype=torch.uint8)}
    save_file({**weights, **mask}, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).weight_format == "float32"


class TestGguf:
    def test_a_folder_of_it(self, tmp_path: Path) -> None:
        (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
        with pytest.raises(ModelError, match=r"as GGUF \(model\.Q4_K_M\.gguf\), and this format is not served"):
            load(tmp_path)

    def test_a_folder_that_has_a_configuration_too(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model.gguf")
        with pytest.raises(ModelError, match=r"as GGUF \(model\.gguf\), and this format is not served"):
            load(folder)

    def test_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF")
        with pytest.raises(ModelError, match="is a GGUF file, and this format is not served"):
            load(path)


def write_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Make a tiny model's linear layers fp8 in blocks with a scale each; return what they stand for."""
    weights = load_file(folder / "model.safetensors")
    meant, written = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = blocks.abs().amax((1, 3)) / 448
            narrow = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            meant[name] = (narrow.float() * scales[:, None, :, None]).view(rows, columns)
            written[name] = narrow.view(rows, columns)
            written[f"{name}_scale_inv"] = scales
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    declare(folder, {**section, "modules_to_not_convert": ["lm_head"]})
    return meant


def write_compressed(folder: Path) -> dict[str, torch.Tensor]:
    """Make a tiny model's linear layers int8 with one scale per output, as compressed-tensors writes them."""
    weights = load_file(folder / "model.safetensors")
    meant, written = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            scales = weight.abs().amax(1, keepdim=True) / 127
            narrow = (weight / scales).round().to(torch.int8)
            meant[name] = narrow * scales
            written[name] = narrow
            written[f"{name}_scale"] = scales
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    section = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    declare(folder, {**section, "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None})
    return meant


@pytest.mark.filterwarnings("ignore")  # those of other packages
class TestLoaded:
    """Where the packages are installed, the numbers that a checkpoint stands for are those that are served."""

    @pytest.mark.parametrize(
        ("package", "write", "name"),
        [("accelerate", write_fp8, "fp8"), ("compressed_tensors", write_compressed, "compressed-tensors")],
    )
    def test_what_is_undone(self, folder: Path, package: str, write: Any, name: str) -> None:
        pytest.importorskip(package)
        pytest.importorskip("accelerate")
        meant = write(folder)
        loaded = load(folder, fast=False)
        assert (loaded.quantization, loaded.weight_format) == (name, "float32")
        assert loaded.num_parameters == sum(p.numel() for p in tiny_module("llama").parameters())
        for parameter, weight in loaded.module.state_dict().items():
            assert torch.allclose(weight, meant[parameter], rtol=1e-5, atol=1e-6), parameter
        backend = CpuAttention()
        assert check_module(loaded.module, backend) < 1e-5
        assert load(folder, compile_for=backend).decoder is not None

    def test_a_scale_that_finds_no_weight_is_noticed(self, folder: Path) -> None:
        pytest.importorskip("accelerate")
        write_fp8(folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.gate_proj.scale_of_another_format"] = torch.ones(2, 3)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"unexpected_keys .*gate_proj\.scale_of_another_format"):
            load(folder)

    def test_bitsandbytes_stays_packed_and_passes_the_check(self, tmp_path: Path) -> None:
        pytest.importorskip("bitsandbytes")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        sizes = {"intermediate_size": 128}  # whole blocks of 64
        folder = write_tiny_model(tmp_path / "model", **sizes)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        packed.save_pretrained(folder)
        backend = CpuAttention()
        loaded = load(folder, compile_for=backend)
        assert (loaded.quantization, loaded.weight_format) == ("bitsandbytes", "bitsandbytes")
        assert loaded.decoder is None
        assert loaded.not_compiled == "a linear layer is a Linear4bit"
        plain = tiny_module("llama", **sizes)
        assert loaded.num_parameters == sum(p.numel() for p in plain.parameters())
        assert loaded.weight_bytes < sum(p.numel() * p.element_size() for p in plain.parameters())
        assert check_module(loaded.module, backend) < 1e-5


def test_weights_that_were_not_undone_are_noticed() -> None:
    module = tiny_module("llama")
    weight = module.model.layers[1].mlp.up_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"did not undo the quantization \(x\) of model\.layers\.1\.mlp\.up_proj"):
        formats.check_loaded(module, Quantization("x", (), is_undone=True), torch.float32)


def test_a_model_that_computes_in_another_format_is_refused() -> None:
    with pytest.raises(ModelError, match=r"quantized with x computes in float32 here, not in bfloat16"):
        formats.check_loaded(tiny_module("llama"), Quantization("x", (), is_undone=False), torch.bfloat16)
