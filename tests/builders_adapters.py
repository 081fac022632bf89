"""Random adapters in PEFT's files, and what they come to: the model with their products added to its weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ALL_LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_layers(module: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a model's linear layers, by path; the head is none of them."""
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Linear) and "lm_head" not in name:
            found[name] = (child.in_features, child.out_features)
        elif isinstance(child, Conv1D):
            found[name] = (child.weight.shape[0], child.weight.shape[1])
    return found


def write_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 8,
    targets: Iterable[str] = ALL_LINEAR,
    alpha: float = 16,
    seed: int = 0,
    std: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write an adapter of layers whose paths end with a target, as PEFT saves it; return the folder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    targets = [name for name in targets if any(path.endswith(f".{name}") for path in shapes)]
    for path, (inputs, outputs) in shapes.items():
        if path.rsplit(".", 1)[-1] in targets:
            for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                name = f"base_model.model.{path}.lora_{factor}.weight"
                tensors[name] = (torch.randn(shape, generator=generator) * std).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.1,
        "bias": "none",
        "target_modules": targets,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merged(module: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of a model with the adapter's products in its weights: W + scale * B A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    result = copy.deepcopy(module)
    for name, down in tensors.items():
        if ".lora_A." not in name:
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer = result.get_submodule(path)
        rank = len(down)
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        delta = scale * (tensors[name.replace("lora_A", "lora_B")].float() @ down.float())
        weight = layer.get_parameter("weight")
        with torch.no_grad():
            weight += (delta.t() if isinstance(layer, Conv1D) else delta).to(weight.dtype)
    return result
