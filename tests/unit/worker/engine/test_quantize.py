"""Narrow weights: refused in words, after merging, of the right layers; with torchao, near and small.

No kernel of a GPU is run here. torchao computes int8 on a CPU as well; of int4 its packing and its product are replaced
by ones for a CPU, so that what torchao fits and how it is read are tested, and the kernel is not. fp8 is in
`test_fp8.py`.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from tests.builders_models import VOCAB_SIZE, tiny_module, write_tiny_model
from worker.assembly import assemble, check_narrow
from worker.engine import fuse_cuda, model, quantize
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.device import DeviceError
from worker.engine.loadcheck import check_module
from worker.engine.model import load_model
from worker.engine.model_files import ModelError
from worker.engine.quantize import Narrow, check_device, missing_package, narrow_weights, num_bytes
from worker.engine.settings import EngineSettings
from worker.registration import make_card
from worker.settings import WorkerSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = CUDA if torch.cuda.is_available() else CPU
NARROW: tuple[Narrow, ...] = ("fp8", "int8", "int4")
TORCHAO: tuple[Narrow, ...] = ("int8", "int4")  # made by it
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with such a GPU, as far as is asked of it, and torchao."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(metadata, "version", lambda name: "0.18.0+cu130")


class TestRefusals:
    def test_settings_name_the_formats(self) -> None:
        for narrow in NARROW:
            assert WorkerSettings(quantization=narrow).quantization == narrow
        with pytest.raises(ValidationError, match="'none', 'fp8', 'int8' or 'int4'"):
            WorkerSettings(quantization="int3")

    @pytest.mark.parametrize("narrow", ["fp8", "int4"])
    def test_a_worker_on_a_cpu_refuses_them_before_it_loads_anything(self, narrow: Narrow) -> None:
        settings = WorkerSettings(device="cpu", quantization=narrow, model="/nowhere")
        with pytest.raises(
            DeviceError, match=f"^{narrow} weights need an NVIDIA GPU; on a CPU there are int8 and none$"
        ):
            assemble(settings, EngineSettings())

    def test_int8_on_a_cpu_needs_the_kernels(self) -> None:
        with pytest.raises(DeviceError, match=r"^int8 weights need the compiled kernels on a CPU"):
            check_narrow("int8", CPU, torch.float32, TorchAttention(16))

    @pytest.mark.usefixtures("hopper")
    def test_a_gpu_that_has_everything_takes_all(self) -> None:
        for narrow in NARROW:
            check_device(narrow, CUDA, torch.bfloat16)
        check_device("int8", CUDA, torch.float32)

    @pytest.mark.usefixtures("hopper")
    @pytest.mark.parametrize("narrow", ["fp8", "int4"])
    def test_two_of_them_go_with_bfloat16_alone(self, narrow: Narrow) -> None:
        with pytest.raises(DeviceError, match=f"^{narrow} weights go with bfloat16, not float32$"):
            check_device(narrow, CUDA, torch.float32)

    @pytest.mark.usefixtures("hopper")
    @pytest.mark.parametrize(("narrow", "found", "needed"), [("fp8", (8, 6), "8.9"), ("int4", (7, 5), "8.0")])
    def test_an_older_gpu(
        self, narrow: Narrow, found: tuple[int, int], needed: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
        with pytest.raises(DeviceError) as refusal:
            check_device(narrow, CUDA, torch.bfloat16)
        has = ".".join(map(str, found))
        assert str(refusal.value) == (
            f"{narrow} weights need a GPU of compute capability {needed} or higher; NVIDIA H100 has {has}"
        )

    @pytest.mark.usefixtures("hopper")
    @pytest.mark.parametrize("narrow", TORCHAO)
    def test_without_torchao_the_extra_is_named(self, narrow: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
        def version(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", version)
        with pytest.raises(DeviceError) as refusal:
            check_device(narrow, CUDA, torch.bfloat16)
        assert str(refusal.value) == (
            f"{narrow} weights on a GPU need torchao, and torchao is not installed: pip install 'torchrelay[torchao]'"
        )
        check_device("fp8", CUDA, torch.bfloat16)  # is not torchao's

    @pytest.mark.parametrize("version", ["0.17.0", "0.9.0", "unknown"])
    def test_an_older_torchao_is_named(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metadata, "version", lambda name: version)
        assert missing_package("int8") == missing_package("int4") == f"torchao {version} is not 0.18"

    @pytest.mark.parametrize("narrow", NARROW)
    def test_a_checkpoint_that_is_quantized_already(self, narrow: Narrow, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "tiny")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            ModelError, match=rf"is quantized already \(gptq\); {narrow} weights are made of plain ones"
        ):
            load_model(str(folder), torch.bfloat16, CPU, cache_root=tmp_path, narrow=narrow)


@functools.cache
def merged() -> PreTrainedModel:
    """A model with the layers that it has on a GPU; made once, since the interpreter takes long for it: copy it."""
    pytest.importorskip("triton")
    module = tiny_module("llama", dtype=torch.bfloat16, vocab_size=40, **WIDE).to(HERE)
    assert "residual sums" in fuse_cuda.speed_up(module)
    return module


def layer_names(num_layers: int = 2) -> list[str]:
    parts = ("self_attn.q_proj.product.linear", "self_attn.o_proj.linear", "mlp.gate_up_proj", "mlp.down_proj.linear")
    return [f"model.layers.{i}.{part}" for i in range(num_layers) for part in parts]


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_cuda, "_TEST_TOKENS", 2)  # each takes the interpreter long
    if find_spec("triton") is not None:
        from tests.builders_triton import enlarge_tiles  # would skip this module without

        enlarge_tiles(monkeypatch)


class TestSelection:
    """With something in torchao's place that quantizes nothing."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        made: list[Any] = []

        def quantize_(module: nn.Module, config: Any, filter_fn: Callable[[nn.Module, str], bool]) -> None:
            made.append(config)
            made.extend(name for name, layer in module.named_modules() if filter_fn(layer, name))

        def settings(name: str) -> Callable[..., Any]:
            return lambda **values: (name, values)

        classes = ("Int8WeightOnlyConfig", "Int4WeightOnlyConfig")
        stand_in = SimpleNamespace(
            quantize_=quantize_, PerRow=lambda: "row", **{name: settings(name) for name in classes}
        )
        monkeypatch.setitem(sys.modules, "torchao.quantization", stand_in)
        return made

    @pytest.mark.parametrize("narrow", TORCHAO)
    def test_merged_products_are_single_layers_and_the_head_stays(self, narrow: Narrow, calls: list[Any]) -> None:
        done = quantize.quantize(copy.deepcopy(merged()), narrow)
        assert sorted(calls[1:]) == sorted(done.layers) == sorted(layer_names())
        assert done.left == ()

    def test_in_fp8_they_are_replaced(self) -> None:
        module = copy.deepcopy(merged())
        done = quantize.quantize(module, "fp8")
        replaced = [name for name, layer in module.named_modules() if type(layer).__name__ == "Fp8Linear"]
        assert sorted(replaced) == sorted(done.layers) == sorted(layer_names())
        assert done.left == ()

    def test_a_table_that_is_the_head_too_stays(self, calls: list[Any]) -> None:
        done = quantize.quantize(tiny_module("llama", tie_word_embeddings=True), "int8")
        assert "lm_head" not in done.layers
        assert calls[1:] == list(done.layers)

    def test_shapes_that_a_kernel_does_not_take_are_left(self, calls: list[Any]) -> None:
        module = tiny_module("llama", **{**WIDE, "intermediate_size": 200})
        narrow = {kind: quantize.quantize(module, kind) for kind in reversed(NARROW)}  # torchao's change nothing here
        assert narrow["int8"].left == ()
        assert {name.split(".")[-1] for name in narrow["fp8"].left} == {"gate_proj", "up_proj", "down_proj"}
        assert {name.split(".")[-1] for name in narrow["int4"].left} == {"down_proj"}  # 200 inputs, no groups of 128

    def test_torchao_is_told_what_is_documented_here(self, calls: list[Any]) -> None:
        module = tiny_module("llama", **WIDE)
        for narrow in TORCHAO:
            quantize.quantize(module, narrow)
        assert [call for call in calls if isinstance(call, tuple)] == [
            ("Int8WeightOnlyConfig", {"granularity": "row", "set_inductor_config": False}),
            (
                "Int4WeightOnlyConfig",
                {
                    "group_size": 128,
                    "int4_packing_format": "tile_packed_to_4d",
                    "int4_choose_qparams_algorithm": "hqq",
                    "set_inductor_config": False,
                },
            ),
        ]

    @pytest.mark.usefixtures("calls")
    def test_a_model_without_such_layers_is_refused(self) -> None:
        with pytest.raises(
            ModelError, match=r"^gpt: int8 weights are not for this model: none of its layers takes them"
        ):
            narrow_weights(tiny_module("gpt2"), "int8", "gpt")  # its products are Conv1D

    def test_layers_are_merged_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        monkeypatch.setattr(model, "_is_replaceable", lambda *_: True)  # as on a GPU
        monkeypatch.setattr(model, "speed_up_for_device", lambda module: order.append("merged"))
        monkeypatch.setattr(quantize, "narrow_weights", lambda module, narrow, source: order.append(narrow))
        load_model(str(write_tiny_model(tmp_path / "m")), torch.bfloat16, CPU, cache_root=tmp_path, narrow="int4")
        assert order == ["merged", "int4"]


class TestFaults:
    @pytest.mark.parametrize("factor", [0.0, float("nan")])
    def test_logits_that_are_others_refuse_the_model(self, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
        def spoil(module: PreTrainedModel, narrow: Narrow) -> quantize.Quantized:
            with torch.no_grad():
                module.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(factor)
                module.get_parameter("model.norm.weight").mul_(factor)
            return quantize.Quantized(("a",), ())

        monkeypatch.setattr(quantize, "quantize", spoil)
        with pytest.raises(ModelError, match=r"^m: int8 weights are not for this model: they move its logits by"):
            narrow_weights(tiny_module("llama"), "int8", "m")

    def test_a_model_that_fails_with_them_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(module: PreTrainedModel, narrow: Narrow) -> quantize.Quantized:
            raise NotImplementedError("no such product")

        monkeypatch.setattr(quantize, "quantize", fail)
        with pytest.raises(ModelError, match=r"^m: fp8 weights are not for this model: no such product$"):
            narrow_weights(tiny_module("llama"), "fp8", "m")


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torchao, with what it needs a GPU for replaced where there is none."""
    if missing_package("int8") is not None:
        pytest.skip(f"{missing_package('int8')}")
    import torchao.quantization as ao

    if torch.cuda.is_available():
        yield ao
        return
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_convert_weight_to_int4pack", pack_int4, "CPU")
        library.impl("_weight_int4pack_mm", multiply_int4, "CPU")
        yield ao


def pack_int4(pairs: torch.Tensor, inner_k_tiles: int) -> torch.Tensor:
    """In the shape of the GPU's packing, in the order of the input: two of [outputs, inputs] in a byte."""
    num_outputs, num_inputs = pairs.shape[0], 2 * pairs.shape[1]
    shape = (num_outputs // 8, num_inputs // (inner_k_tiles * 16), 32, inner_k_tiles // 2)
    return pairs.contiguous().view(torch.int32).reshape(shape)


def multiply_int4(x: torch.Tensor, packed: torch.Tensor, group: int, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """(q - 8) * scale + zero, as torch's kernel reads them: [inputs / group, outputs, 2]."""
    pairs = packed.reshape(packed.shape[0] * 8, -1).view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1).float() - 8
    scale, zero = scales_and_zeros.float().transpose(0, 1).repeat_interleave(group, dim=1).unbind(-1)
    return (x.float() @ (codes * scale + zero).t()).to(x.dtype)


def packed_bytes(narrow: Narrow, num_outputs: int, num_inputs: int) -> int:
    """What torchao keeps of a layer: weights, and scales in float32; of int8 zero points too, though all are zero."""
    if narrow == "int4":  # inputs are filled up to 1,024; scale and zero point of a group are bfloat16
        num_inputs = -(-num_inputs // 1024) * 1024
        return num_outputs * (num_inputs // 2 + num_inputs // 128 * 4)
    return num_outputs * (num_inputs + 5)


class TestWithTorchao:
    @pytest.mark.usefixtures("torchao")
    @pytest.mark.parametrize(("narrow", "least", "most"), [("int8", 0.001, 0.1), ("int4", 0.03, 0.7)])
    def test_logits_stay_near_and_bytes_are_what_is_kept(self, narrow: Narrow, least: float, most: float) -> None:
        module = merged(num_hidden_layers=1 if narrow == "int4" else 2)  # HQQ takes its time on a CPU
        before = num_bytes(module)
        linears = [layer for _, layer in quantize._linear_layers(module)]
        shapes = [tuple(layer.weight.shape) for layer in linears]
        closeness = narrow_weights(module, narrow, "m")
        assert least < closeness.error < most
        assert num_bytes(module) == before + sum(
            packed_bytes(narrow, *shape) - 2 * math.prod(shape) for shape in shapes
        )
        assert all(type(layer.weight).__module__.startswith("torchao") for layer in linears)
        assert type(module.get_parameter("lm_head.weight")) is nn.Parameter
        assert type(module.get_parameter("model.embed_tokens.weight")) is nn.Parameter
        check_module(module, TorchAttention(16))  # packed, paged and in chunks as alone

    @pytest.mark.usefixtures("torchao")
    def test_a_sum_that_its_product_cannot_do_is_done_apart(self) -> None:
        linear = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
        holder = nn.Sequential(linear)
        holder.get_output_embeddings = lambda: None
        holder.get_input_embeddings = lambda: SimpleNamespace(weight=None)
        adding = fuse_cuda.AddingLinear(linear)
        x, into = torch.randn(1, 3, 128).bfloat16(), torch.randn(1, 3, 64).bfloat16()
        expected = into.float() + linear(x).float()
        quantize.quantize(holder, "int8")  # type: ignore[arg-type]
        adding.into = into.clone()
        with torch.inference_mode():
            output = adding(x)
        assert adding.into is None
        assert torch.allclose(output.float(), expected, atol=0.05)

    @pytest.mark.usefixtures("torchao")
    def test_a_loaded_model_says_what_its_weights_are(self, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "m", tie_word_embeddings=False)
        loaded = load_model(str(folder), torch.bfloat16, CPU, cache_root=tmp_path, narrow="int8")
        plain = load_model(str(folder), torch.bfloat16, CPU, cache_root=tmp_path)
        card, _ = make_card(loaded, name="m", context_tokens=64, block_tokens=16, kv_tokens=64)
        shapes = [layer.weight.shape for layer in tiny_module("llama").modules() if type(layer) is nn.Linear]
        shapes.remove(torch.Size([VOCAB_SIZE, 64]))
        saved = sum(2 * math.prod(shape) - packed_bytes("int8", *shape) for shape in shapes)
        assert (card.weight_format, card.dtype) == ("int8", "bfloat16")
        assert card.weight_bytes == plain.weight_bytes - saved
        assert card.num_parameters == plain.num_parameters
