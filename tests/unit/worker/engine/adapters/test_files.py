"""An adapter is read as PEFT computes it, or refused by the name of what is not served."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders_adapters import write_adapter
from worker.engine.adapters.files import AdapterError, AdapterLimits, AdapterWeights, LinearShape, read_adapter

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {Q: LinearShape(12, 20), V: LinearShape(12, 8)}
LIMITS = AdapterLimits(max_rank=16, max_bytes=1 << 20)


def write(folder: Path, **fields: Any) -> Path:
    return write_adapter(folder / "one", SHAPES, **{"rank": 4, **fields})


def read(folder: Path, limits: AdapterLimits = LIMITS) -> AdapterWeights:
    return read_adapter(folder, SHAPES, limits)


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """By the end of their names, such as `q_proj.lora_A`; None takes one away."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for ending, value in changes.items():
        module, factor = ending.split("__")
        (name,) = [name for name in tensors if f"{module}.{factor}" in name]
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"alpha": 16}, 4.0),
        ({"alpha": 16, "use_rslora": True}, 8.0),
        ({"alpha": 16, "alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha": 16, "alpha_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 400}}, 0.5),
        ({"alpha": 16, "alpha_pattern": {"roj": 2}}, 4.0),  # no part of a name
    ],
)
def test_the_scale_is_in_the_second_factor(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    folder = write(tmp_path, dtype=torch.bfloat16, **config)
    stored = load_file(folder / "adapter_model.safetensors")
    weights = read(folder)
    assert weights.rank == 4
    assert torch.equal(weights.layers[Q].down, stored[f"base_model.model.{Q}.lora_A.weight"].float())
    assert torch.equal(weights.layers[Q].up, stored[f"base_model.model.{Q}.lora_B.weight"].float() * scale)
    assert weights.num_bytes == 4 * 4 * (12 + 20 + 12 + 8)


def test_ranks_may_differ_as_the_config_says(tmp_path: Path) -> None:
    folder = write(tmp_path, rank_pattern={"v_proj": 2})
    change_tensors(folder, v_proj__lora_A=torch.ones(2, 12), v_proj__lora_B=torch.ones(8, 2))
    weights = read(folder)
    assert {name: len(layer.down) for name, layer in weights.layers.items()} == {Q: 4, V: 2}
    assert weights.layers[V].up.unique().tolist() == [16 / 2]


def test_a_revision_is_what_the_files_hold(tmp_path: Path) -> None:
    first = read(write(tmp_path)).revision
    assert read(write(tmp_path)).revision == first
    assert read(write(tmp_path, seed=1)).revision != first
    assert read(write(tmp_path, alpha=17)).revision != first


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"a_later_field": 3}, "a_later_field"),
        ({"r": 0}, "r is not"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank 4; adapter_config.json says 8"),
        ({"alpha_pattern": {"(.*)*x": 1}}, "too much of an expression"),
        ({"target_modules": ["q_proj", "k_proj"]}, "k_proj"),
    ],
)
def test_what_the_config_asks_for_beyond_that_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    with pytest.raises(AdapterError, match=named.replace("(", r"\(")):
        read(write(tmp_path, **config))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"q_proj__lora_A": torch.ones(4, 13)}, "12 inputs and 20 outputs"),
        ({"q_proj__lora_B": torch.ones(21, 4)}, "12 inputs and 20 outputs"),
        ({"q_proj__lora_B": torch.ones(20, 5)}, r"lora_B \[20, 5\]"),
        ({"q_proj__lora_A": torch.ones(4)}, "no matrix"),
        ({"q_proj__lora_A": None}, "only one of"),
        ({"q_proj__lora_A": torch.ones(4, 12, dtype=torch.int8)}, "I8"),
        ({"q_proj__lora_A": torch.full((4, 12), math.inf)}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], named: str
) -> None:
    folder = write(tmp_path)
    change_tensors(folder, **changes)
    with pytest.raises(AdapterError, match=named):
        read(folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.0.mlp.gate.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.weight",
    ],
)
def test_tensors_of_other_layers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path)
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), name: torch.ones(4, 12)}, path)
    with pytest.raises(AdapterError, match=name.removeprefix("base_model.model.").split(".lora_A")[0]):
        read(folder)


def test_limits_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(AdapterError, match="rank 4; at most 3"):
        read(folder, AdapterLimits(3, 1 << 20))
    with pytest.raises(AdapterError, match="more than 100 bytes"):
        read(folder, AdapterLimits(16, 100))
    # Half the size on disk that it takes in memory.
    folder = write(tmp_path, rank=16, dtype=torch.bfloat16)
    size = (folder / "adapter_model.safetensors").stat().st_size
    with pytest.raises(AdapterError, match="take 3328 bytes"):
        read(folder, AdapterLimits(16, size))


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError):
        read(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_configs_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path)
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read(folder)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-1], whole + b"\0", struct.pack("<Q", 1 << 60) + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
            read(folder)
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: x"):
        read(folder)
