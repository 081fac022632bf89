"""A model directory as hostile input: every file is bounded, lies in the directory, and asks for nothing but data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.registry import MAX_FILE_BYTES, MAX_TEMPLATE_BYTES
from tests.builders_models import tiny_module, write_tiny_model, write_tokenizer
from worker.engine import model
from worker.engine import model_dir as limits
from worker.engine.model import ModelError, load_model
from worker.engine.model_files import read_text_files

CPU = torch.device("cpu")


@pytest.fixture
def folder(model_dir: Path) -> Path:
    return model_dir


def load(folder: Path, *, with_weights: bool = True) -> str:
    loaded = load_model(
        str(folder), torch.float32, CPU, cache_root=folder.parent / "cache", fast=False, with_weights=with_weights
    )
    return loaded.revision


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def grow(path: Path, size: int) -> None:
    """A file of that size, which takes no room."""
    with path.open("ab") as file:
        file.truncate(size)


def link_out(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def shards(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoTokenizer": ["evil.Slow", None]}
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "auto_map": (
        lambda f: change(f / "config.json", model_type="evil", auto_map=AUTO_MAP),
        r"config\.json asks for code .* key auto_map",
    ),
    "auto_map inside": (
        lambda f: change(f / "config.json", text_config={"sub": [{"auto_map": AUTO_MAP}]}),
        r"config\.json asks for code .* key auto_map",
    ),
    "trust_remote_code": (
        lambda f: change(f / "config.json", trust_remote_code=True),
        r"config\.json asks for code .* key trust_remote_code",
    ),
    "tokenizer's auto_map": (
        lambda f: (change(f / "tokenizer_config.json", auto_map=AUTO_MAP), (f / "tokenizer.json").unlink()),
        r"tokenizer_config\.json asks for code .* key auto_map",
    ),
    "tokenizer's trust_remote_code": (
        lambda f: change(f / "tokenizer_config.json", trust_remote_code=True),
        r"tokenizer_config\.json asks for code",
    ),
    "another configuration": (
        lambda f: change(f / "config.json", configuration_files=["config.4.0.0.json"]),
        r"config\.json names other files to load \(the key configuration_files\)",
    ),
    "other weights": (
        lambda f: change(f / "config.json", transformers_weights="../secret.safetensors"),
        r"config\.json names other files to load \(the key transformers_weights\)",
    ),
    "a vocabulary elsewhere": (
        lambda f: (
            (f / "tokenizer.json").unlink(),
            (f / "vocab.json").write_text("{}"),
            change(f / "tokenizer_config.json", vocab_file="/etc/passwd"),
        ),
        "names a file elsewhere, '/etc/passwd'; remove the key vocab_file",
    ),
    "weights of Keras": (
        lambda f: (f / "model.safetensors").rename(f / "tf_model.h5"),
        r"weights as tf_model\.h5: only safetensors are read; convert them",
    ),
    "weights of Flax": (
        lambda f: (f / "model.safetensors").rename(f / "flax_model.msgpack"),
        r"flax_model\.msgpack: only safetensors are read",
    ),
    "a shard that is a number": (lambda f: shards(f, {"a": 7}), "no file name for a"),
    "a shard that is a list": (lambda f: shards(f, {"a": ["model-1.safetensors"]}), "no file name for a"),
    "shards as a list": (lambda f: shards(f, ["model-1.safetensors"]), "has no weight_map"),
    "a shard with a zero byte": (lambda f: shards(f, {"a": "m\0.safetensors"}), "shards must be"),
    "a shard in a folder": (lambda f: shards(f, {"a": "sub/m.safetensors"}), "shards must be"),
    "a shard that leads out": (
        lambda f: (shards(f, {"a": "model-1.safetensors"}), link_out(f, "model-1.safetensors")),
        r"model-1\.safetensors is a link to .*, outside of the model's directory",
    ),
    "weights that lead out": (lambda f: link_out(f, "model.safetensors"), r"model\.safetensors is a link to"),
    "a tokenizer that leads out": (lambda f: link_out(f, "tokenizer.json"), r"tokenizer\.json is a link to"),
    "a template that leads out": (
        lambda f: ((f / "chat_template.jinja").unlink(), (f / "chat_template.jinja").symlink_to("/etc/passwd")),
        r"chat_template\.jinja is a link to /etc/passwd, outside",
    ),
    "a link to nothing": (
        lambda f: (f / "generation_config.json").unlink() or (f / "generation_config.json").symlink_to("gone"),
        r"generation_config\.json cannot be read",
    ),
    "a link to itself": (
        lambda f: (f / "vocab.json").symlink_to("vocab.json"),
        r"vocab\.json cannot be read",
    ),
    "a pipe": (
        lambda f: ((f / "generation_config.json").unlink(), os.mkfifo(f / "generation_config.json")),
        r"generation_config\.json is not a regular file",
    ),
    "a device": (lambda f: (f / "vocab.txt").symlink_to("/dev/zero"), r"vocab\.txt is not a regular file"),
    "a folder": (lambda f: (f / "added_tokens.json").mkdir(), r"added_tokens\.json is not a regular file"),
    "a large config": (lambda f: grow(f / "config.json", (4 << 20) + 1), r"config\.json has 4194305 bytes; at most"),
    "a large generation config": (lambda f: grow(f / "generation_config.json", 2 << 20), r"has 2097152 bytes"),
    "a large tokenizer config": (lambda f: grow(f / "tokenizer_config.json", 17 << 20), "at most 16777216"),
    "a large tokenizer": (lambda f: grow(f / "tokenizer.json", MAX_FILE_BYTES + 1), "at most 67108864"),
    "a large slow tokenizer": (lambda f: grow(f / "tokenizer.model", MAX_FILE_BYTES + 1), "at most 67108864"),
    "a large index": (lambda f: grow(f / "model.safetensors.index.json", (64 << 20) + 1), "at most 67108864"),
    "a large template": (lambda f: grow(f / "chat_template.jinja", MAX_TEMPLATE_BYTES + 1), "at most 262144"),
    "a large template in the config": (
        lambda f: (
            (f / "chat_template.jinja").unlink(),
            change(f / "tokenizer_config.json", chat_template="x" * (MAX_TEMPLATE_BYTES + 1)),
        ),
        "the chat template has over 262144 bytes",
    ),
    "a template that is no text": (
        lambda f: ((f / "chat_template.jinja").unlink(), change(f / "tokenizer_config.json", chat_template={"a": 1})),
        "the chat template is not a text",
    ),
    "a template that is not UTF-8": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        r"chat_template\.jinja cannot be read as UTF-8",
    ),
    "a deep config": (lambda f: change(f / "config.json", x=nested(40)), r"config\.json is nested over 32 deep"),
    "a very deep config": (
        lambda f: (f / "config.json").write_text("[" * 200_000 + "]" * 200_000),
        r"config\.json is nested too deeply",
    ),
    "a special token without text": (
        lambda f: change(f / "tokenizer_config.json", bos_token={"special": True}),
        "bos_token of the tokenizer's configuration is not a text",
    ),
    "half a character as special token": (
        lambda f: change(f / "tokenizer_config.json", bos_token="\ud800"),
        "bos_token of the tokenizer's configuration holds half a character",
    ),
    "half a character in the template": (
        lambda f: ((f / "chat_template.jinja").unlink(), change(f / "tokenizer_config.json", chat_template="\ud800")),
        "the chat template holds half a character",
    ),
    "a default template that is no text": (
        lambda f: (
            (f / "chat_template.jinja").unlink(),
            change(f / "tokenizer_config.json", chat_template=[{"name": "default", "template": []}]),
        ),
        "the chat template is not a text",
    ),
    "a model type as a list": (lambda f: change(f / "config.json", model_type=["llama"]), "model_type is not a text"),
    "a model type as a map": (lambda f: change(f / "config.json", model_type={}), "model_type is not a text"),
    "a vocabulary that is no number": (
        lambda f: change(f / "config.json", vocab_size=["1"]),
        "transformers (cannot build a model|does not accept)",
    ),
    "layers that are no number": (
        lambda f: change(f / "config.json", num_hidden_layers="2", layer_types=[["full_attention"]]),
        "transformers (cannot build a model|does not accept)",
    ),
    "a quantization by a list": (
        lambda f: change(f / "config.json", quantization_config={"quant_method": ["fp8"]}),
        "and this format is not served",
    ),
    "shards by numbers": (lambda f: shards(f, {"w": 1}), "has no file name for w"),
    "endless layers": (
        lambda f: change(f / "config.json", num_hidden_layers=10**12),
        r"config\.json names 1000000000000 layers \(num_hidden_layers\), but the files hold",
    ),
    "endless layers in a list": (
        lambda f: change(f / "config.json", attention_types=[[["global"], 10**12]]),
        r"layers \(attention_types\)",
    ),
    "endless experts": (lambda f: change(f / "config.json", num_local_experts=10**9), "names 1000000000 experts"),
    "a huge layer": (
        lambda f: change(f / "config.json", intermediate_size=10**9),
        r"config\.json describes \d+ parameters; the files hold \d+",
    ),
    "an impossible layer": (
        lambda f: change(f / "config.json", intermediate_size=10**18, hidden_size=10**18),
        r"transformers cannot build a model|transformers does not accept",
    ),
}


@pytest.mark.parametrize("with_weights", [True, False], ids=["load", "describe"])
@pytest.mark.parametrize(("forge", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_it_is_refused_in_words(
    folder: Path, forge: Callable[[Path], object], message: str, with_weights: bool
) -> None:
    forge(folder)
    with pytest.raises(ModelError, match=message) as refusal:
        load(folder, with_weights=with_weights)
    assert str(folder) in str(refusal.value)


def test_templates_by_names_that_are_no_texts_are_passed_over(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": [], "template": "a"}, 1, {"template": {}}, {"name": "default", "template": "b"}]
    change(folder / "tokenizer_config.json", chat_template=templates)
    assert read_text_files(folder).chat_template == "b"


MUTANTS: dict[str, tuple[str, str]] = {
    "remote code": ("refuse_remote_code", "auto_map"),
    "other files": ("refuse_other_files", "other weights"),
    "links": ("check_files", "weights that lead out"),
    "counts": ("check_counts", "endless layers in a list"),
}


@pytest.mark.parametrize(("guard", "case"), MUTANTS.values(), ids=MUTANTS.keys())
def test_without_the_guard_it_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch, guard: str, case: str) -> None:
    module = model if guard == "check_counts" else limits
    monkeypatch.setattr(module, guard, lambda *_, **__: None)
    forge, message = HOSTILE[case]
    forge(folder)
    try:
        load(folder)
    except ModelError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert not re.search(message, refusal)


def test_code_beside_the_model_never_runs(folder: Path) -> None:
    """Also where it is named, and what it would do is there without it: then the model loads."""
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for file in ("config.json", "tokenizer_config.json"):
        change(folder / file, auto_map=AUTO_MAP)
    load(folder)
    change(folder / "config.json", model_type="evil")
    with pytest.raises(ModelError, match="never run"):
        load(folder)
    assert not marker.exists()


def test_what_asks_for_no_code_loads(folder: Path) -> None:
    before = load(folder)
    change(folder / "tokenizer_config.json", auto_map=None, trust_remote_code=False)
    assert load(folder) == before


def test_the_weights_that_are_checked_are_those_that_are_loaded(folder: Path) -> None:
    """With both, transformers takes the single file, whatever the index says."""
    before = load(folder)
    tiny_module("llama", seed=1).save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = dict.fromkeys(tiny_module("llama").state_dict(), "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load(folder) == before


def hub_snapshot(folder: Path, cache: Path) -> Path:
    """The files as the Hub's cache keeps them: content in blobs/, names as links to it."""
    root = cache / "models--owner--name"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_links_of_the_hubs_cache_are_followed_and_no_others(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(folder, tmp_path / "hub")
    assert load(snapshot) == load(folder)
    other = hub_snapshot(folder, tmp_path / "hub" / "other")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(other.parent.parent / "blobs" / ("0" * 40))
    with pytest.raises(ModelError, match="outside of the model's directory"):
        load(snapshot)


def test_links_inside_the_directory_are_followed(folder: Path) -> None:
    """As Kubernetes mounts configuration: every file is a link into a folder beside it."""
    before = load(folder)
    (folder / "..data").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).rename(folder / "..data" / name)
        (folder / name).symlink_to(Path("..data") / name)
    assert load(folder) == before


def test_files_that_nobody_reads_may_be_anything(folder: Path) -> None:
    (folder / "README.md").symlink_to("/etc/passwd")
    (folder / "original").symlink_to("/")
    grow(folder / "training_args.bin", 1 << 30)
    os.mkfifo(folder / "notes.txt")
    load(folder)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "mixtral", "gpt_oss", "gemma3_text", "deepseek_v3"])
def test_families_with_other_names_for_their_sizes_pass(tmp_path: Path, family: str) -> None:
    load(write_tiny_model(tmp_path / family, family), with_weights=False)


COMMANDS = """
import sys, typer
from worker.command import models, worker
app = typer.Typer()
app.command("worker")(worker)
app.add_typer(models, name="models")
for command in (["worker", "--model"], ["models", "check"], ["models", "register", "--model"]):
    try:
        app([*command, sys.argv[1]])
    except SystemExit as end:
        print("status", end.code, flush=True)
"""


def test_the_commands_say_it_in_one_line(folder: Path) -> None:
    change(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stdout  # of each command one, and its status
    assert all("(the key auto_map), and such code is never run" in line for line in lines[::2])
    assert all(line.startswith("status ") and line not in ("status 0", "status None") for line in lines[1::2])


def test_a_model_without_a_slow_tokenizers_file_elsewhere_still_converts(tmp_path: Path) -> None:
    """`tokenizer_file` of the machine that saved it is a common leftover beside a tokenizer.json, and is not read."""
    folder = write_tiny_model(tmp_path / "model")
    write_tokenizer(folder)
    change(folder / "tokenizer_config.json", tokenizer_file="/home/someone/tokenizer.json")
    load(folder)
