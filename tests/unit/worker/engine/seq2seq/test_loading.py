"""Which encoder-decoder models are loaded, what is told of them, and what keeps one from being served."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from common.generation import EarlyStopping
from tests.builders_models import write_tokenizer
from tests.builders_seq2seq import EOS, FAMILIES, START, tiny_seq2seq, write_tiny_seq2seq
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBackend, AttentionBatch, AttentionOptions, LayerCache
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.loadcheck import UnsupportedFamilyError, check_model, check_module
from worker.engine.memory import _warm_up
from worker.engine.model import LoadedModel, ModelError, load_model
from worker.engine.seq2seq import bridge
from worker.engine.seq2seq.model import PagedSeq2Seq, install
from worker.engine.settings import EngineSettings

CPU = torch.device("cpu")


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(str(folder), torch.float32, CPU, cache_root=folder.parent, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_loaded_made_faster_and_passes_the_check(family: str, tmp_path: Path) -> None:
    loaded = load(write_tiny_seq2seq(tmp_path / "model", family), compile_for=CpuAttention())
    length = 512 if family == "t5" else 256
    assert loaded.is_encoder_decoder
    assert (loaded.context_length, loaded.max_source_tokens) == (length, length)
    assert (loaded.decoder_start_token_id, loaded.eos_token_ids) == (START, (EOS,))
    assert loaded.has_fixed_context == (family != "t5")
    assert loaded.not_compiled == f"the family {family} has an encoder"
    assert not loaded.linear_layers  # to which adapters could add
    check_model(loaded, CpuAttention(), tmp_path)


def test_without_weights_a_model_is_described_as_well(tmp_path: Path) -> None:
    loaded = load(write_tiny_seq2seq(tmp_path / "model", "marian"), with_weights=False)
    assert (loaded.is_encoder_decoder, loaded.max_source_tokens, loaded.decoder_start_token_id) == (True, 256, START)


def test_a_length_that_t5_names_counts(tmp_path: Path) -> None:
    loaded = load(write_tiny_seq2seq(tmp_path / "model", "t5", n_positions=96))
    assert (loaded.context_length, loaded.max_source_tokens) == (96, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [CpuAttention(), TorchAttention(4)], ids=lambda backend: backend.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_passes_the_check_on_each_back_end(
    family: str, backend: AttentionBackend, dtype: torch.dtype
) -> None:
    check_module(tiny_seq2seq(family, dtype=dtype), backend)


# -- what the check finds ------------------------------------------------------------------------------------------


class Faulty:
    """A back-end with a fault across, or within."""

    def __init__(self, backend: AttentionBackend, spoil: Callable[[AttentionBatch, AttentionOptions], Any]) -> None:
        self._backend, self._spoil = backend, spoil
        self.name, self.block_size, self.allocate = backend.name, backend.block_size, backend.allocate

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        return self._backend.attend(query, key, value, cache, *self._spoil(batch, options))


def is_across(batch: AttentionBatch) -> bool:
    return not batch.slots.any()


def sources_mixed_up(batch: AttentionBatch, options: AttentionOptions) -> Any:
    if not is_across(batch):
        return batch, options
    return replace(batch, block_tables=batch.block_tables.roll(1, 0), context_lens=batch.context_lens.roll(1)), options


def end_of_a_source_unread(batch: AttentionBatch, options: AttentionOptions) -> Any:
    if is_across(batch):
        batch = replace(batch, context_lens=(batch.context_lens - 1).clamp(min=1))
    return batch, options


def bias_of_other_distances(batch: AttentionBatch, options: AttentionOptions) -> Any:
    bias = options.distance_bias
    return batch, options if bias is None else replace(options, distance_bias=bias.roll(1, 1).contiguous())


def no_bias(batch: AttentionBatch, options: AttentionOptions) -> Any:
    return batch, replace(options, distance_bias=None)


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        *((family, fault) for family in FAMILIES for fault in (sources_mixed_up, end_of_a_source_unread)),
        *(("t5", fault) for fault in (bias_of_other_distances, no_bias)),
    ],
)
def test_a_fault_of_attention_is_found(family: str, fault: Callable[..., Any]) -> None:
    with pytest.raises(
        UnsupportedFamilyError, match=f"the family {family} cannot be served: .*other logits than alone"
    ):
        check_module(tiny_seq2seq(family), Faulty(TorchAttention(4), fault))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_positions_that_count_from_the_beginning_of_the_batch_are_found(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "_POSITIONS", {family: lambda positions, model: type(positions).forward})
    with pytest.raises(UnsupportedFamilyError, match="other logits than alone"):
        check_module(tiny_seq2seq(family), TorchAttention(4))


def test_keys_and_values_of_what_the_encoder_did_not_make_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagedSeq2Seq, "_read", lambda self, source: None)
    with pytest.raises(UnsupportedFamilyError, match="other logits than alone"):
        check_module(tiny_seq2seq("mbart"), TorchAttention(4))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_another_family_with_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    common = {key: FAMILIES["bart"][key] for key in FAMILIES["bart"] if key != "tie_word_embeddings"}
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("pegasus", **common)).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"pegasus has an encoder; of such, bart, m2m_100, marian, mbart, t5 are served"
    ):
        load(tmp_path / "model")


@pytest.mark.parametrize("narrow", ["int8", "fp8"])
def test_narrow_weights_are_refused(narrow: Any, tmp_path: Path) -> None:
    folder = write_tiny_seq2seq(tmp_path / "model", "bart")
    with pytest.raises(ModelError, match=f"bart has an encoder, and is served with plain weights alone, not {narrow}"):
        load(folder, narrow=narrow)


def test_quantized_files_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_seq2seq(tmp_path / "model", "t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="t5 has an encoder, and is served with plain weights alone, not fp8"):
        load(folder, with_weights=False)


# -- defaults ------------------------------------------------------------------------------------------


def test_what_a_translation_model_sets_are_its_defaults(tmp_path: Path) -> None:
    folder = write_tiny_seq2seq(tmp_path / "model", "m2m_100")
    generation = {
        "num_beams": 5,
        "max_length": 200,
        "early_stopping": True,
        "length_penalty": 0.8,
        "decoder_start_token_id": 9,
        "forced_bos_token_id": 77,
        "forced_eos_token_id": 2,
        "no_repeat_ngram_size": 3,
        "eos_token_id": 2,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    loaded = load(folder)
    assert loaded.decoder_start_token_id == 9
    assert dict(loaded.generation_defaults) == {
        "num_beams": 5,
        "max_tokens": 199,
        "early_stopping": EarlyStopping.WHEN_FULL,
        "length_penalty": 0.8,
        "forced_bos_token_id": 77,
        "forced_eos_token_id": 2,
        "no_repeat_ngram_size": 3,
        "temperature": 0.0,
    }


def test_older_files_have_the_defaults_in_the_configuration_itself(tmp_path: Path) -> None:
    folder = write_tiny_seq2seq(tmp_path / "model", "marian")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config.update({"num_beams": 6, "max_length": 512, "bad_words_ids": [[0]], "forced_eos_token_id": 2})
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(folder)
    assert loaded.decoder_start_token_id == START
    assert dict(loaded.generation_defaults) == {
        "num_beams": 6,
        "max_tokens": 511,
        "bad_words_ids": ((0,),),
        "forced_eos_token_id": 2,
        "temperature": 0.0,
    }


# -- the largest step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_of_the_largest_step_can_be_measured(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here, that such a step runs at all."""
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    module = tiny_seq2seq(family)
    install(module)
    assert _warm_up(module, EngineSettings(token_budget=64, max_num_seqs=8)) == 0
