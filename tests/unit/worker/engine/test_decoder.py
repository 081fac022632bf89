"""The compiled decoder gives the model's own logits, or is not used; and its rows do not depend on their batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders_models import RIGHT_FAMILIES, tiny_module, write_tiny_model
from worker.engine import loadcheck
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBatch, LayerCache
from worker.engine.batch import StepBatch
from worker.engine.decoder.compile import DecoderDiffers, compile_decoder
from worker.engine.decoder.layout import NotLlamaShaped, read_layout
from worker.engine.decoder.packing import Arena, LinearFormat, fits, pack, packed_bytes
from worker.engine.decoder.program import CompiledDecoder, DecoderTimes
from worker.engine.decoder.smoothing import observed_magnitudes
from worker.engine.kernels.build import supported_levels
from worker.engine.model import ModelError, load_model

CPU = torch.device("cpu")
NUM_POSITIONS = 256
COMPILED = {
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "granite"),
    *("smollm3", "ministral3", "seed_oss"),
}
BACKENDS: dict[str, CpuAttention] = {}


def backend(level: str | None = None) -> CpuAttention:
    level = level or supported_levels()[0]
    if level not in BACKENDS:
        BACKENDS[level] = CpuAttention(level)
    return BACKENDS[level]


def compiled(
    family: str = "llama", dtype: torch.dtype = torch.float32, level: str | None = None, *, int8: bool = False
) -> CompiledDecoder:
    return compile_decoder(tiny_module(family, dtype=dtype), backend(level), NUM_POSITIONS, int8=int8)


class Session:
    """Sequences of a decoder with their blocks."""

    def __init__(self, decoder: CompiledDecoder, lengths: list[int], attention: CpuAttention | None = None) -> None:
        self.decoder = decoder
        self.lengths = lengths
        self.layout = loadcheck._Layout(lengths, 16)
        generator = torch.Generator().manual_seed(3)
        self.tokens = [torch.randint(decoder.vocab_size, (n,), generator=generator) for n in lengths]
        attention = attention or backend()
        decoder.bind(
            {
                layer: attention.allocate(shape, self.layout.num_blocks, decoder.dtype, CPU)
                for layer, shape in decoder.layer_shapes.items()
            }
        )

    def step(self, *spans: tuple[int, int, int], rows: list[int] | None = None) -> torch.Tensor:
        """Compute tokens start:end of sequences; logits of all rows, or of these."""
        positions = torch.cat([torch.arange(start, end) for _, start, end in spans])[None]
        return self.decoder.forward(
            StepBatch(
                input_ids=torch.cat([self.tokens[i][start:end] for i, start, end in spans])[None],
                position_ids=positions,
                logit_rows=torch.arange(positions.shape[1]) if rows is None else torch.tensor(rows, dtype=torch.int64),
                attention=self.layout.batch(list(spans), CPU),
            )
        ).clone()


@pytest.fixture(autouse=True, scope="module")
def num_torch_threads() -> None:
    """All: the kernels divide their work among them."""


@pytest.mark.parametrize("family", sorted(RIGHT_FAMILIES))
def test_a_family_is_compiled_exactly_or_not_at_all(family: str) -> None:
    module = tiny_module(family)
    # Compiling compares logits with the plain model's to 1e-4; rounding is near 1e-6.
    if family in COMPILED:
        compile_decoder(module, backend(), NUM_POSITIONS)
    else:
        with pytest.raises((NotLlamaShaped, DecoderDiffers)):
            compile_decoder(module, backend(), NUM_POSITIONS)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_gives_the_model_s_logits(level: str, family: str, dtype: torch.dtype) -> None:
    compiled(family, dtype, level)


@pytest.mark.parametrize("level", supported_levels())
def test_int8_weights_keep_the_logits_near(level: str) -> None:
    assert compiled("qwen2", torch.float32, level, int8=True).vocab_size == 288


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_an_embedding_tied_to_the_head_is_the_table_bit_by_bit(precision: str) -> None:
    dtype, int8 = torch.float32 if precision == "float32" else torch.bfloat16, precision == "int8"
    logits, sizes = [], []
    for is_tied in (True, False):
        module: Any = tiny_module("llama", dtype=dtype, vocab_size=300, tie_word_embeddings=True)  # no whole panels
        if not is_tied:
            module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone())
        decoder = compile_decoder(module, backend(), NUM_POSITIONS, int8=int8)
        session = Session(decoder, [250])
        session.tokens[0] = torch.arange(299, 49, -1)
        logits.append(session.step((0, 0, 250)).clone())
        sizes.append(decoder.weight_bytes)
    assert torch.equal(*logits)
    # The head in 8 bits is not the embedding, which is then kept.
    assert sizes[1] - sizes[0] == (0 if int8 else 300 * 64 * dtype.itemsize + 64)


class TestARowDoesNotDependOnItsBatch:
    @pytest.fixture(params=["float32", "bfloat16", "int8"])
    def session(self, request: pytest.FixtureRequest) -> Session:
        dtype = torch.float32 if request.param == "float32" else torch.bfloat16
        return Session(compiled("qwen3", dtype, int8=request.param == "int8"), [50, 33, 7, 61])

    def test_alone_or_among_others(self, session: Session) -> None:
        together = session.step((0, 0, 50), (1, 0, 33), (2, 0, 7), (3, 0, 61))
        assert torch.equal(session.step((1, 0, 33)), together[50:83])
        assert torch.equal(session.step((2, 0, 7), (1, 0, 33))[:7], together[83:90])

    def test_however_its_prompt_is_cut(self, session: Session) -> None:
        whole = session.step((3, 0, 61))
        parts = [session.step((3, start, end)) for start, end in ((0, 1), (1, 30), (30, 31), (31, 61))]
        assert torch.equal(torch.cat(parts), whole)

    @pytest.mark.parametrize("num_threads", [1, 3])
    def test_on_any_number_of_threads(self, session: Session, num_threads: int) -> None:
        expected = session.step((0, 0, 50), (1, 0, 33))
        usual = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            assert torch.equal(session.step((0, 0, 50), (1, 0, 33)), expected)
        finally:
            torch.set_num_threads(usual)

    def test_whichever_rows_logits_are_wanted_of(self, session: Session) -> None:
        expected = session.step((0, 0, 50), (2, 0, 7))
        rows = [0, 17, 49, 56]
        assert torch.equal(session.step((0, 0, 50), (2, 0, 7), rows=rows), expected[rows])
        assert session.step((0, 0, 50), (2, 0, 7), rows=[]).shape == (0, 288)
        assert torch.equal(session.step((2, 6, 7)), expected[56:]), "a step without logits wrote keys and values too"

    def test_nor_on_a_nan_in_another(self, session: Session) -> None:
        expected = session.step((1, 0, 33))
        session.step((0, 0, 50))
        for cache in session.decoder._caches.values():
            for block in session.layout._tables[0]:
                cache.keys[block] = float("nan")
        poisoned = session.step((0, 49, 50), (1, 32, 33))
        assert poisoned[0].isnan().all()
        assert torch.equal(poisoned[1:], expected[32:])


def test_int8_loses_less_where_a_few_inputs_are_large() -> None:
    def error(*, smoothed: bool) -> float:
        module = tiny_module("llama")
        with torch.no_grad():
            for layer in module.model.layers:
                layer.input_layernorm.weight[[3, 40]] *= 60
                layer.post_attention_layernorm.weight[[7, 21]] *= 60
                for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    linear.weight[:, [3, 40]] /= 60
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[:, [7, 21]] /= 60
        with torch.inference_mode():
            layout = read_layout(module, loadcheck.probe_attention(module), NUM_POSITIONS)
            with observed_magnitudes(layout) as magnitudes:
                expected = loadcheck.plain_logits(module)
        found = magnitudes if smoothed else None
        decoder = CompiledDecoder(layout, torch.float32, backend().kernels, int8=True, magnitudes=found)
        return loadcheck.packed_error(decoder.bind, decoder.layer_shapes, torch.float32, backend(), expected)

    assert error(smoothed=True) < error(smoothed=False) / 3


def test_a_batch_that_names_what_does_not_exist_is_refused() -> None:
    session = Session(compiled(), [20])
    good = session.layout.batch([(0, 0, 20)], CPU)
    ids, positions = session.tokens[0][None], torch.arange(20)[None]

    def forward(**changes: Any) -> torch.Tensor:
        fields: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "logit_rows": torch.tensor([19])}
        fields["attention"] = good
        return session.decoder.forward(StepBatch(**(fields | changes)))

    forward()
    for changes in (
        {"input_ids": torch.full((1, 20), 288)},
        {"input_ids": torch.full((1, 20), -1)},
        {"position_ids": positions + NUM_POSITIONS - 19},
        {"logit_rows": torch.tensor([20])},
        {"logit_rows": torch.tensor([5, 5])},
    ):
        with pytest.raises(ValueError, match="token id, position, logit row"):
            forward(**changes)
    bad = AttentionBatch(good.slots + 1000, good.block_tables, good.query_starts, good.context_lens, 20, 20)
    with pytest.raises(ValueError, match="slot or a block table"):
        forward(attention=bad)
    with pytest.raises(ValueError, match="caches of"):
        session.decoder.bind(
            {0: LayerCache(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16))}
        )
    short = AttentionBatch(good.slots, good.block_tables[:, :1], good.query_starts, good.context_lens, 20, 20)
    with pytest.raises(ValueError, match="contradicts itself"):
        forward(attention=short)


def test_the_times_of_a_step_s_parts_are_added_up() -> None:
    session = Session(compiled(), [20])
    session.step((0, 0, 20))
    session.decoder.times = DecoderTimes()
    session.step((0, 0, 20))
    once = session.decoder.times.linears
    session.step((0, 0, 20))
    assert session.decoder.times.linears > once > 0
    assert session.decoder.times.attention > 0


class TestWhatIsNotLlamaShapedIsRefused:
    def test_a_part_that_is_not_known(self) -> None:
        module = tiny_module("llama")
        module.model.layers[2].adapter = nn.Linear(64, 64)
        with pytest.raises(NotLlamaShaped, match="'adapter'"):
            compile_decoder(module, backend(), NUM_POSITIONS)

    def test_a_linear_layer_of_another_class(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
                return super().forward(input) * 2

        module = tiny_module("llama")
        module.model.layers[1].mlp.down_proj = Scaled(96, 64, bias=False)
        with pytest.raises(NotLlamaShaped, match="Scaled"):
            compile_decoder(module, backend(), NUM_POSITIONS)

    def test_layers_that_share_weights(self) -> None:
        module = tiny_module("llama")
        module.model.layers[3].mlp.down_proj.weight = module.model.layers[0].mlp.down_proj.weight
        with pytest.raises(NotLlamaShaped, match="share their weights"):
            compile_decoder(module, backend(), NUM_POSITIONS)

    def test_a_model_that_is_refused_keeps_its_weights(self) -> None:
        module = tiny_module("llama")
        module.model.layers[3].mlp.act_fn = nn.ReLU()
        tokens = torch.arange(10)[None]
        with torch.inference_mode():
            before = module(input_ids=tokens, use_cache=False).logits
            with pytest.raises(NotLlamaShaped, match="activation"):
                compile_decoder(module, backend(), NUM_POSITIONS)
            assert torch.equal(module(input_ids=tokens, use_cache=False).logits, before)

    @pytest.mark.parametrize("fault", ["a hidden scale", "positions far out"])
    def test_what_structure_does_not_show_is_seen_in_the_logits(self, fault: str) -> None:
        module = tiny_module("llama")
        attention = module.model.layers[1].self_attn
        forward = attention.forward

        def faulty(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            output, weights = forward(hidden_states, **kwargs)
            is_far = (
                kwargs["position_ids"].max() > NUM_POSITIONS // 2 if kwargs.get("position_ids") is not None else False
            )
            return output * (1.5 if fault == "a hidden scale" or is_far else 1.0), weights

        attention.forward = faulty
        with pytest.raises(DecoderDiffers):
            compile_decoder(module, backend(), NUM_POSITIONS)


class TestLoading:
    def test_a_llama_is_compiled_and_gives_its_weights_up(self, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "m")
        loaded = load_model(str(folder), torch.float32, CPU, cache_root=tmp_path, compile_for=backend())
        assert loaded.decoder is not None
        assert all(p.ndim == 1 for p in loaded.module.parameters())
        assert sum(p.numel() for p in loaded.module.parameters()) < loaded.num_parameters / 100

    def test_another_family_is_loaded_as_before(self, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "m", "gpt2")
        assert load_model(str(folder), torch.float32, CPU, cache_root=tmp_path, compile_for=backend()).decoder is None

    def test_a_family_that_differs_gets_its_weights_back(self, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "m", "glm")
        loaded = load_model(str(folder), torch.float32, CPU, cache_root=tmp_path, compile_for=backend())
        assert loaded.decoder is None
        assert loadcheck.check_module(loaded.module, backend()) < 1e-4

    def test_int8_is_refused_by_name_where_it_cannot_be_had(self, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "m", "gpt2")
        with pytest.raises(ModelError, match="int8 weights are not for this model: GPT2"):
            load_model(str(folder), torch.float32, CPU, cache_root=tmp_path, compile_for=backend(), narrow="int8")
        with pytest.raises(ModelError, match="a compiled decoder has no fp8 weights; it has int8"):
            load_model(str(folder), torch.float32, CPU, cache_root=tmp_path, compile_for=backend(), narrow="fp8")


class TestPacking:
    def test_a_panel_holds_its_outputs_word_by_word(self) -> None:
        layer = nn.Linear(6, 40, bias=True)
        packed = pack((layer,), LinearFormat.BFLOAT16, Arena(1 << 16))
        assert packed.panels.shape == (2, 3, 32, 2)
        weight = layer.weight.detach().bfloat16()
        assert packed.panels[1, 2, 3].tolist() == weight[35, 4:6].tolist()
        assert not packed.panels[1, :, 8:].any()
        assert packed.bias is not None
        assert packed.bias.shape == (64,)

    def test_gates_and_ups_take_turns(self) -> None:
        gate, up = nn.Linear(4, 20, bias=False), nn.Linear(4, 20, bias=False)
        packed = pack((gate, up), LinearFormat.FLOAT32, Arena(1 << 16), gated=True)
        assert packed.outputs == 64
        assert packed.panels[0, :, :16, 0].T.tolist() == gate.weight[:16].tolist()
        assert packed.panels[0, :, 16:, 0].T.tolist() == up.weight[:16].tolist()
        assert packed.panels[1, :, 16:20, 0].T.tolist() == up.weight[16:].tolist()
        assert not packed.panels[1, :, 4:16].any()

    @pytest.mark.parametrize("linear_format", [LinearFormat.INT8, LinearFormat.INT8_WIDE])
    def test_int8_rounds_to_the_nearest_of_a_group_s_own_steps(self, linear_format: LinearFormat) -> None:
        layer = nn.Linear(80, 35, bias=False)  # three groups, the last half empty; two panels
        with torch.no_grad():
            layer.weight[1, 32:64] *= 100
            layer.weight[2] = 0
        panels = pack((layer,), linear_format, Arena(1 << 16)).panels
        weights = panels[:, :, :1024].view(2, 3, 8, 32, 4).permute(0, 3, 1, 2, 4).reshape(64, 3, 32).float() - 128
        words = panels[:, :, 1024:].contiguous().view(torch.bfloat16).view(2, 3, 16, 2)
        scales = words.permute(0, 3, 2, 1).reshape(64, 3, 1).float()
        expected = nn.functional.pad(layer.weight, (0, 16)).view(35, 3, 32)
        assert ((weights * scales)[:35] - expected).abs().le(scales[:35] / 2 * 1.0001).all()
        assert weights.abs().max() == 127  # steps as small as can be
        assert (
            (scales[:35] <= expected.abs().amax(-1, keepdim=True) / 127 * 1.01)
            .logical_or(expected.amax(-1, True) == 0)
            .all()
        )
        assert not weights[35:].any()

    def test_an_arena_that_is_too_small_says_so(self) -> None:
        size = packed_bytes(6, 40, LinearFormat.BFLOAT16)
        pack((nn.Linear(6, 40),), LinearFormat.BFLOAT16, Arena(size))
        with pytest.raises(MemoryError):
            pack((nn.Linear(6, 40),), LinearFormat.BFLOAT16, Arena(size - 1))

    def test_rows_must_be_whole_words(self) -> None:
        assert fits(6, LinearFormat.BFLOAT16)
        assert not fits(5, LinearFormat.BFLOAT16)
        assert fits(6, LinearFormat.INT8)  # groups are padded
