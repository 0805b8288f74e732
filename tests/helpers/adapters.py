"""LoRA adapters in PEFT's form, made without PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llava_sft.model.config import ModelConfig
from llava_sft.model.lora import Lora

LANGUAGE = ("language_model",)


def write_adapter(
    folder: Path, base: object, model: ModelConfig, seed: int = 0, shared: bool = False, rank: int = 4,
    parts: tuple[str, ...] = LANGUAGE, size: float = 0.1, **config: Any,
) -> Path:  # fmt: skip
    """Random pairs beside all linear layers of `parts`; `shared`: q, k and v (gate and up) have the same A, as here.

    size: of the values in B; config: more keys of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for row in Lora(rank, 1, parts).rows(model):
        for name, (out, columns) in row.hf.items():
            if not shared or name == next(iter(row.hf)):
                a = torch.randn(rank, columns, generator=generator) / columns**0.5
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = a.clone()
            tensors[f"{layer}.lora_B.weight"] = size * torch.randn(out, rank, generator=generator)
    modules = sorted({name.split(".")[-3] for name in tensors})
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    said |= {"bias": "none", "base_model_name_or_path": str(base), "lora_dropout": 0.05, "init_lora_weights": True}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def pairs(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rewrite_pairs(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """None takes a tensor out."""
    tensors = {name: tensor for name, tensor in (pairs(folder) | changes).items() if tensor is not None}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def added(weights: Mapping[str, torch.Tensor], folder: Path, number: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights with the adapter's products, each `number` times, as PEFT adds them."""
    config, found, made = json.loads((folder / "adapter_config.json").read_text()), pairs(folder), dict(weights)
    for name in weights:
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in found:
            a, b = (found[f"{layer}.lora_{letter}.weight"].float() for letter in "AB")
            made[name] = weights[name] + (b @ a) * (number * config["lora_alpha"] / config["r"])
    return made
