"""Checkpoints of LoRA: what is trained alone, beside a base that is named and not copied; merged, or as a PEFT folder.

A checkpoint folder of such a run holds `lora.json`; its weights are those of the base with those trained in their place.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from llava_sft.checkpoint.pickles import check_pickles
from llava_sft.checkpoint.safetensors_io import write_safetensors
from llava_sft.checkpoint.start import Start, content_of
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.checkpoint.verify import require_whole
from llava_sft.errors import CheckpointError
from llava_sft.files import atomic_dir, read_object, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.model.lora import Lora, pair
from llava_sft.run.layout import LORA

PEFT_PREFIX = "base_model.model."


def note_base(folder: Path, lora: Lora, start: Start) -> None:
    """Write what a checkpoint folder is without meaning, beside its weights."""
    base = {"folder": str(start.folder), "fingerprint": start.fingerprint, "load": start.load}
    write_json(folder / LORA, {"lora": lora._asdict(), "base": base}, sealed=True)


def lora_of(folder: Path) -> tuple[Lora, Path] | None:
    """The pairs that a checkpoint folder holds, and the folder of their base; None for a checkpoint of all weights."""
    noted: dict[str, Any] = read_object(folder / LORA, {})
    if not noted:
        return None
    base = Path(noted["base"]["folder"])
    if not base.is_dir():
        raise CheckpointError(
            f"{folder}: the base of its LoRA is gone: {base}", f"make it again from {noted['base']['load']}"
        )
    if content_of(base)[0] != noted["base"]["fingerprint"]:
        raise CheckpointError(
            f"{folder}: its LoRA stands beside other weights than {base} holds now",
            f"make {base.parent} again from {noted['base']['load']} as it was",
        )
    return Lora(**noted["lora"] | {"parts": tuple(noted["lora"]["parts"])}), base


class MergedReader(TorchDistReader):
    """A checkpoint of LoRA read as if all weights had been trained: W + alpha / rank · B·A, in float32 and rounded once."""

    def __init__(self, folder: Path, lora: Lora, base: Path):
        super().__init__(folder)
        check_pickles(base)
        require_whole(base)
        self.lora, self.base = lora, TorchDistReader(base)

    def tensors(self) -> dict:
        return self.base.tensors() | super().tensors()

    def read(self, key: str) -> Tensor:
        own, (a, b) = super().tensors(), pair(key)
        if key in own:
            return super().read(key)
        weight = self.base.read(key)
        if b not in own or not key.endswith(".weight"):
            return weight
        change = super().read(b).float() @ super().read(a).float()
        return (weight.float() + self.lora.scale * change).to(weight.dtype)


def open_weights(folder: Path) -> TorchDistReader:
    """A checkpoint folder's weights, LoRA merged."""
    found = lora_of(folder)
    return MergedReader(folder, *found) if found else TorchDistReader(folder)


def write_peft(source: Path, target: Path, model: ModelConfig, base_name: str) -> None:
    """The pairs of a checkpoint folder as `peft` loads them onto the base.

    Args:
        base_name: the Hugging Face folder or hub id of the base, written into adapter_config.json.

    Raises CheckpointError for a checkpoint of another kind, or with weights that an adapter does not hold.
    """
    found = lora_of(source)
    if found is None:
        raise CheckpointError(f"{source}: not a checkpoint of LoRA", "export it whole: mcore2hf")
    check_pickles(source)
    require_whole(source, full=True)
    lora, reader = found[0], TorchDistReader(source)
    whole = [key for key in reader.tensors() if not key.startswith("optimizer") and "lora_" not in key]
    if whole:
        raise CheckpointError(
            f"{source}: {len(whole)} tensors were trained whole, the first is {whole[0]}: an adapter does not hold them",
            "export it merged: mcore2hf",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for row in lora.rows(model):
        a, b = (reader.read(name) for name in pair(row.mcore))
        for name, piece in zip(row.hf, row.split(b), strict=True):
            layer = PEFT_PREFIX + name.removesuffix(".weight")
            tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": piece.contiguous()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    modules = sorted({name.removesuffix(".weight").rsplit(".", 1)[1] for row in lora.rows(model) for name in row.hf})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "bias": "none",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
    }
    with atomic_dir(target) as folder:
        write_json(folder / "adapter_config.json", config)
        write_safetensors(folder, shapes, dtype, iter(tensors.items()))
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
