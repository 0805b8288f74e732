"""The small checkpoint of the tests, and the tensors of the published ones."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers import ROOT
from llava_sft.model.config import ModelConfig
from llava_sft.model.tiny import write_tiny_checkpoint

TEXTS = [f"Which digit is this? It is {i % 10}. The larger of the two digits is {i % 7}." for i in range(50)]
MIN_PIXELS, MAX_PIXELS = 3136, 50_000


def write_noisy_checkpoint(folder: Path, model: ModelConfig) -> Path:
    """A Hugging Face folder of random weights whose norms and biases are random too, so that none can be forgotten."""
    write_tiny_checkpoint(folder, TEXTS, model, 1, MIN_PIXELS, MAX_PIXELS)
    generator = torch.Generator().manual_seed(2)
    weights = load_file(folder / "model.safetensors")
    weights = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def published_names(size: str) -> dict[str, tuple[int, ...]]:
    lines = (ROOT / f"tests/data/names_{size}.txt").read_text().splitlines()
    return {name: tuple(map(int, shape.split(","))) for name, shape in (line.split("\t") for line in lines)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(weights(folder)), folder / "model.safetensors", metadata={"format": "pt"})


def old_spelling(name: str) -> str:
    """As transformers 4.53 writes it."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
