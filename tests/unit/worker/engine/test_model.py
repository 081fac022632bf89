"""Loading a model: what is read from its configuration, and what is refused, with words that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders_models import VOCAB_SIZE, tiny_module, write_tokenizer
from worker.engine.model import LoadedModel, ModelError, load_model

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32, *, fast: bool = True) -> LoadedModel:
    return load_model(str(folder), dtype, CPU, cache_root=folder.parent / "cache", fast=fast)


def change_json(path: Path, **changes: Any) -> None:
    value = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not None}))


def test_a_directory_becomes_a_model_with_everything_the_engine_asks(model_dir: Path) -> None:
    loaded = load(model_dir)
    assert loaded.family == "llama"
    assert loaded.context_length == 256
    assert loaded.vocab_size == VOCAB_SIZE
    assert loaded.eos_token_ids == (2,)
    assert loaded.generation_defaults == {"temperature": 0.0}
    assert loaded.num_parameters == sum(p.numel() for p in tiny_module("llama").parameters())
    assert loaded.text.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    assert loaded.text.chat_template == "{{ messages[0].content }}"
    assert loaded.text.tokenizer.decode(loaded.text.tokenizer.encode("Grüße, 你好!").ids) == "Grüße, 你好!"
    assert not loaded.module.training


def test_weights_are_those_of_the_files_in_the_format_asked_for(model_dir: Path) -> None:
    expected = tiny_module("llama").state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load(model_dir, dtype, fast=False)
        assert loaded.dtype is dtype
        for name, weight in loaded.module.state_dict().items():
            assert torch.equal(weight, expected[name].to(dtype))


class TestRevision:
    def test_it_is_the_same_for_the_same_content_elsewhere_and_in_another_format(
        self, model_dir: Path, tiny_model: Path
    ) -> None:
        assert load(model_dir).revision == load(tiny_model).revision == load(model_dir, torch.bfloat16).revision

    @pytest.mark.parametrize("file", ["config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"])
    def test_it_changes_with_every_file_that_decides_an_answer(self, model_dir: Path, file: str) -> None:
        before = load(model_dir).revision
        path = model_dir / file
        path.write_text(path.read_text() + "\n")
        assert load(model_dir).revision != before

    def test_it_changes_with_the_weights_though_size_and_name_stay(self, model_dir: Path) -> None:
        before = load(model_dir).revision
        tiny_module("llama", seed=1).save_pretrained(model_dir)
        assert load(model_dir).revision != before


class TestDefaults:
    def test_generation_config_wins_over_config(self, model_dir: Path) -> None:
        change_json(model_dir / "generation_config.json", eos_token_id=[2, 7, 2])
        assert load(model_dir).eos_token_ids == (2, 7)

    def test_without_generation_config_config_names_the_end(self, model_dir: Path) -> None:
        (model_dir / "generation_config.json").unlink()
        assert load(model_dir).eos_token_ids == (2,)

    def test_as_a_last_resort_the_tokenizer_names_the_end(self, model_dir: Path) -> None:
        change_json(model_dir / "generation_config.json", eos_token_id=None)
        config = json.loads((model_dir / "config.json").read_text())
        (model_dir / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
        assert load(model_dir).eos_token_ids == (2,)

    def test_an_end_that_is_no_token_id_is_refused(self, model_dir: Path) -> None:
        (model_dir / "generation_config.json").write_text('{"eos_token_id": ["<eos>"]}')
        with pytest.raises(ModelError, match=r'eos_token_id is \["<eos>"\]'):
            load(model_dir)

    def test_sampling_defaults_are_taken_as_far_as_they_make_sense(self, model_dir: Path) -> None:
        settings = {"do_sample": True, "top_p": 0.9, "top_k": 40, "max_new_tokens": 128, "min_p": 7.0, "max_length": 20}
        change_json(model_dir / "generation_config.json", **settings)
        expected = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "max_tokens": 128}
        assert load(model_dir).generation_defaults == expected

    def test_a_temperature_without_do_sample_means_nothing_as_in_transformers(self, model_dir: Path) -> None:
        (model_dir / "generation_config.json").write_text('{"temperature": 0.7, "repetition_penalty": 1.1}')
        assert load(model_dir).generation_defaults == {"temperature": 0.0, "repetition_penalty": 1.1}


class TestTokenizer:
    def test_truncation_and_padding_left_over_from_training_are_switched_off(self, model_dir: Path) -> None:
        tokenizer = load(model_dir).text.tokenizer
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=64)
        tokenizer.save(str(model_dir / "tokenizer.json"))
        text = load(model_dir).text
        assert len(text.tokenizer.encode("0123456789").ids) == 10
        assert json.loads(text.tokenizer_json)["truncation"] is None

    def test_without_a_fast_tokenizer_one_is_made(self, model_dir: Path) -> None:
        fast = load(model_dir).text
        vocab = json.loads(fast.tokenizer_json)["model"]["vocab"]
        (model_dir / "tokenizer.json").unlink()
        (model_dir / "vocab.json").write_text(json.dumps(vocab))
        (model_dir / "merges.txt").write_text("#version: 0.2\n")
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>", "pad_token": "<pad>"}
        (model_dir / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **tokens}))
        made = load(model_dir).text
        for text in ("Hello, world", "a  b\n\n1234", "naïve 你好"):
            assert made.tokenizer.encode(text).ids == fast.tokenizer.encode(text).ids

    def test_without_any_tokenizer_the_error_says_how_to_make_one(self, model_dir: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model_dir / name).unlink()
        with pytest.raises(ModelError, match=r"no tokenizer\.json.*save_pretrained"):
            load(model_dir)

    def test_a_damaged_tokenizer_is_named(self, model_dir: Path) -> None:
        (model_dir / "tokenizer.json").write_text('{"version": "1.0"}')
        with pytest.raises(ModelError, match=r"tokenizer\.json cannot be loaded"):
            load(model_dir)

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ("plain", "plain"),
            ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
            (None, None),
        ],
    )
    def test_the_chat_template_of_older_models_stands_in_the_tokenizer_config(
        self, model_dir: Path, template: Any, expected: str | None
    ) -> None:
        (model_dir / "chat_template.jinja").unlink()
        change_json(model_dir / "tokenizer_config.json", chat_template=template)
        assert load(model_dir).text.chat_template == expected


class TestRefusals:
    """Nothing that could run code, read a foreign file, or answer from random weights is loaded."""

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "a.pickle", "model.ckpt"]
    )
    def test_a_pickle(self, model_dir: Path, name: str) -> None:
        (model_dir / "model.safetensors").rename(model_dir / name)
        with pytest.raises(ModelError, match=rf"{name}: loading a pickle can run code"):
            load(model_dir)

    def test_no_weights(self, model_dir: Path) -> None:
        (model_dir / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
            load(model_dir)

    @pytest.mark.parametrize(
        "name", ["../secret.safetensors", "/etc/secret.safetensors", "..", "a\\b.safetensors", "x.bin"]
    )
    def test_an_index_that_leaves_its_directory(self, model_dir: Path, name: str) -> None:
        (model_dir / "model.safetensors").rename(model_dir.parent / "secret.safetensors")
        change_json(model_dir / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
        with pytest.raises(ModelError, match="shards must be safetensors files in the same directory"):
            load(model_dir)

    def test_a_missing_shard(self, model_dir: Path) -> None:
        (model_dir / "model.safetensors").unlink()
        change_json(model_dir / "model.safetensors.index.json", weight_map={"a": "model-1.safetensors"})
        with pytest.raises(ModelError, match=r"names model-1\.safetensors, which is missing"):
            load(model_dir)

    @pytest.mark.parametrize("damage", ["cut", "header length", "no JSON"])
    def test_a_damaged_file(self, model_dir: Path, damage: str) -> None:
        path = model_dir / "model.safetensors"
        content = path.read_bytes()
        match damage:
            case "cut":
                path.write_bytes(content[:-100])
            case "header length":
                path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
            case "no JSON":
                path.write_bytes(content[:8] + b"x" + content[9:])
        with pytest.raises(ModelError, match="not a sound safetensors file"):
            load(model_dir)

    def test_weights_of_another_shape(self, model_dir: Path) -> None:
        change_json(model_dir / "config.json", vocab_size=300)
        with pytest.raises(ModelError, match=r"do not fit the model: mismatched_keys .*embed_tokens\.weight"):
            load(model_dir)

    def test_weights_that_lack_a_layer(self, model_dir: Path) -> None:
        change_json(model_dir / "config.json", num_hidden_layers=5)
        with pytest.raises(ModelError, match=r"missing_keys \['model\.layers\.4\..*9 in all"):
            load(model_dir)

    def test_code_that_comes_with_the_model_is_not_run(self, model_dir: Path) -> None:
        marker = model_dir / "ran"
        (model_dir / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
        change_json(model_dir / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
        with pytest.raises(ModelError, match=r"config\.json asks for code .*auto_map.* is never run"):
            load(model_dir)
        assert not marker.exists()

    def test_an_adapter(self, model_dir: Path) -> None:
        (model_dir / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match="an adapter"):
            load(model_dir)

    def test_a_family_that_would_answer_wrongly(self, tmp_path: Path) -> None:
        for family, reason in (("mamba", "layers of type linear_attention"), ("bloom", "attention interface")):
            folder = tmp_path / family
            tiny_module(family).save_pretrained(folder)
            write_tokenizer(folder)
            with pytest.raises(ModelError, match=rf"the family {family} .*{reason}"):
                load(folder)

    def test_a_directory_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="there is no directory"):
            load(tmp_path / "nothing")

    def test_a_file(self, model_dir: Path) -> None:
        with pytest.raises(ModelError, match="is a file; name the directory"):
            load(model_dir / "model.safetensors")

    @pytest.mark.parametrize("source", ["", "a/b/c", "https://example.com/model", "name with spaces", "../not/a/model"])
    def test_a_name_that_cannot_be_one(self, source: str) -> None:
        with pytest.raises(ModelError, match="there is no directory"):
            load_model(source, torch.float32, CPU)

    @pytest.mark.parametrize("content", ["[1]", "{", "\xff"])
    def test_a_config_that_is_no_json_object(self, model_dir: Path, content: str) -> None:
        (model_dir / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ModelError, match=r"config\.json (does not hold|cannot be read)"):
            load(model_dir)


def test_a_hub_model_that_is_neither_here_nor_reachable_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not on this machine and the Hub cannot be reached"):
        load_model("nobody/no-such-model", torch.float32, CPU)


def test_a_sharded_model_loads(model_dir: Path) -> None:
    single = load(model_dir, fast=False)
    (model_dir / "model.safetensors").unlink()
    tiny_module("llama").save_pretrained(model_dir, max_shard_size="100KB")
    assert len(list(model_dir.glob("model-*.safetensors"))) > 1
    sharded = load(model_dir, fast=False)
    assert sharded.revision != single.revision
    for name, weight in sharded.module.state_dict().items():
        assert torch.equal(weight, single.module.state_dict()[name])
