"""Linear layers in fp8: rows in 8 bits, products near the exact ones, and models whose layers have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.builders_models import tiny_module
from tests.builders_triton import DEVICE, enlarge_tiles
from worker.engine import fuse_cuda
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.closeness import FP8_TOLERANCE
from worker.engine.fp8 import Fp8Linear
from worker.engine.kernels.triton import layers, rows, vector
from worker.engine.loadcheck import check_module
from worker.engine.quantize import narrow_weights, num_bytes, quantize

HALF_STEP = 2**-4  # half of the distance between two numbers of 3 bits, relative to the number
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 40}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_cuda, "_TEST_TOKENS", 2)  # each takes the interpreter long
    enlarge_tiles(monkeypatch)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, torch.bfloat16)


def widened(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.double() * scales.double()[:, None]


def is_rounded(actual: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether each number is within half a step of the format, which is even below the smallest normal one."""
    step = torch.maximum(exact.abs() * HALF_STEP, exact.abs().amax(-1, keepdim=True) / rows.LARGEST * 2**-10)
    return bool(((actual - exact).abs() <= step * 1.01).all())


class TestRows:
    @pytest.mark.parametrize("width", [16, 100, 1500])
    def test_each_has_a_scale_of_its_own(self, width: int) -> None:
        x = rand(1, 3, width) * torch.tensor([1e-3, 1.0, 3000.0], device=DEVICE, dtype=torch.bfloat16)[:, None]
        codes, scales = rows.quantize_rows(x)
        assert (codes.shape, codes.dtype, scales.dtype) == ((3, width), torch.float8_e4m3fn, torch.float32)
        assert torch.allclose(scales, x[0].float().abs().amax(-1) / 448)
        assert is_rounded(widened(codes, scales), x[0].double())

    def test_zeros_stay_zeros(self) -> None:
        codes, scales = rows.quantize_rows(torch.zeros(2, 32, device=DEVICE, dtype=torch.bfloat16))
        assert not codes.float().any()
        assert (scales > 0).all()

    def test_no_rows(self) -> None:
        codes, scales = rows.quantize_rows(rand(2, 32)[:0])
        assert (codes.shape, scales.shape) == ((0, 32), (0,))

    @pytest.mark.gpu
    @pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU: the interpreter's maximum is not a GPU's")
    def test_a_nan_stays_in_its_row(self) -> None:
        x = rand(2, 32)
        x[0, 5] = float("nan")
        codes, scales = rows.quantize_rows(x)
        assert not widened(codes, scales)[0].isfinite().all()
        assert is_rounded(widened(codes, scales)[1:], x[1:].double())

    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_normed(self, offset: float) -> None:
        x, weight = rand(3, 96) * 5, rand(96)
        exact = nn.functional.rms_norm(x.double(), (96,), weight.double() + offset, 1e-3)
        assert is_rounded(widened(*rows.quantize_rows(x, norm=vector.Norm(weight, 1e-3, offset))), exact)

    @pytest.mark.filterwarnings("ignore:overflow")
    @pytest.mark.parametrize("activation", [layers.SILU, layers.GELU_TANH])
    def test_gated(self, activation: int) -> None:
        x = rand(3, 2 * 72) * 4
        gate, up = x.double().chunk(2, -1)
        function: Any = nn.functional.silu if activation == layers.SILU else nn.GELU(approximate="tanh")
        assert is_rounded(widened(*rows.quantize_rows(x, activation=activation)), function(gate) * up)

    def test_of_a_strided_part(self) -> None:
        x = rand(4, 96)[:, :48]
        assert is_rounded(widened(*rows.quantize_rows(x)), x.double())


def made(num_outputs: int = 48, num_inputs: int = 64, *, bias: bool = False) -> tuple[Fp8Linear, torch.Tensor]:
    """A layer, and its weights as they are after rounding."""
    linear = nn.Linear(num_inputs, num_outputs, bias=bias, dtype=torch.bfloat16).to(DEVICE)
    layer = Fp8Linear.from_linear(linear)
    return layer, widened(layer.codes, layer.scales)


@pytest.mark.parametrize("num_rows", [1, 3])
class TestLayer:
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_the_product_of_what_was_rounded(self, num_rows: int, bias: bool) -> None:
        layer, weight = made(bias=bias)
        x = rand(1, num_rows, 64)
        exact = widened(*rows.quantize_rows(x)) @ weight.t()
        if layer.bias is not None:
            exact += layer.bias.double()
        output = layer(x)
        assert (output.shape, output.dtype) == ((1, num_rows, 48), torch.bfloat16)
        assert (output[0].double() - exact).norm() <= 1e-2 * exact.norm()

    @pytest.mark.parametrize("bias", [False, True])
    def test_adds_in_place(self, num_rows: int, bias: bool) -> None:
        layer, _ = made(bias=bias)
        x, total = rand(1, num_rows, 64), rand(1, num_rows, 48)
        exact = total.double() + layer(x).double()
        assert layer(x, into=total) is total
        assert (total.double() - exact).norm() <= 1e-2 * exact.norm()

    def test_norms_and_activates_first(self, num_rows: int) -> None:
        layer, weight = made()
        norm = vector.Norm(rand(64), 1e-5, 0.0)
        x, halves = rand(1, num_rows, 64), rand(1, num_rows, 128)
        for output, (codes, scales) in (
            (layer(x, norm=norm), rows.quantize_rows(x, norm=norm)),
            (layer(halves, activation=layers.SILU), rows.quantize_rows(halves, activation=layers.SILU)),
        ):
            exact = widened(codes, scales) @ weight.t()
            assert (output[0].double() - exact).norm() <= 1e-2 * exact.norm()


def test_weights_keep_three_bits_and_a_scale_per_output() -> None:
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16).to(DEVICE)
    layer = Fp8Linear.from_linear(linear)
    assert is_rounded(widened(layer.codes, layer.scales), linear.weight.detach().double())
    assert num_bytes(layer) == 48 * 64 + 48 * 4


@pytest.mark.parametrize("activation", [None, layers.SILU])
def test_one_row_alone_is_what_it_is_among_others(activation: int | None) -> None:
    """Two kernels: the inputs of both are rounded alike, or a stream that is taken over would go on otherwise."""
    layer, _ = made(64, 96)
    x = rand(5, 96 if activation is None else 192)
    together = layer(x, activation=activation)
    alone = torch.cat([layer(row[None], activation=activation) for row in x])
    assert (together.double() - alone.double()).norm() <= 1e-2 * together.double().norm()


class TestModels:
    def test_logits_stay_near_alone_and_together(self) -> None:
        module = tiny_module("llama", dtype=torch.bfloat16, **WIDE).to(DEVICE)
        assert "residual sums" in fuse_cuda.speed_up(module)
        before = num_bytes(module)
        closeness = narrow_weights(module, "fp8", "m")
        assert 0.01 < closeness.error < 0.3
        assert num_bytes(module) < 0.6 * before
        check_module(module, TorchAttention(16), FP8_TOLERANCE)  # packed, paged and in chunks as alone

    def test_norms_and_activations_are_part_of_what_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = tiny_module("llama", dtype=torch.bfloat16, **WIDE).to(DEVICE)
        fuse_cuda.speed_up(module)
        quantize(module, "fp8")
        seen: list[str] = []
        quantize_rows = rows.quantize_rows

        def note(x: torch.Tensor, *, norm: object = None, activation: int | None = None) -> Any:
            seen.append("normed" if norm is not None else "gated" if activation is not None else "plain")
            return quantize_rows(x, norm=norm, activation=activation)  # type: ignore[arg-type]

        monkeypatch.setattr(rows, "quantize_rows", note)
        tokens = torch.tensor([[3, 9, 27]], device=DEVICE)
        fused = module(input_ids=tokens, use_cache=False).logits
        assert seen == ["normed", "plain", "normed", "gated"] * 2
        inputs: list[torch.Tensor] = []
        for layer in module.model.layers:  # hooks, as adapters have them, are to see what enters a layer as it came
            layer.self_attn.q_proj.register_forward_hook(lambda _, args, output: inputs.append(args[0]))
            layer.mlp.down_proj.register_forward_hook(lambda _, args, output: inputs.append(args[0]))
        seen.clear()
        apart = module(input_ids=tokens, use_cache=False).logits
        assert seen == ["plain"] * 8
        assert [x.shape[-1] for x in inputs] == [128, 256] * 2
        assert (fused.float() - apart.float()).norm() <= 0.2 * apart.float().norm()
