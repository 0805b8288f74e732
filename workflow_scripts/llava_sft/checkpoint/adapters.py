"""LoRA's pairs of a checkpoint as a PEFT folder."""

from pathlib import Path

from torch import Tensor

from llava_sft.checkpoint.base import lora_of, name_of_base
from llava_sft.checkpoint.pickles import check_pickles
from llava_sft.checkpoint.safetensors_io import write_safetensors
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.checkpoint.verify import require_whole
from llava_sft.errors import CheckpointError
from llava_sft.files import atomic_dir, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.model.lora import pair

PEFT_PREFIX = "base_model.model."


def write_peft(source: Path, target: Path, model: ModelConfig) -> None:
    """The pairs of a checkpoint folder as `peft` loads them onto the base.

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
    modules = {name.removesuffix(".weight") for row in lora.rows(model) for name in row.hf}
    if lora.parts == ("language_model",):  # elsewhere the last words are those of other modules too
        modules = {name.rsplit(".", 1)[1] for name in modules}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "base_model_name_or_path": name_of_base(source),
        "inference_mode": True,
    }
    with atomic_dir(target) as folder:
        write_json(folder / "adapter_config.json", config)
        write_safetensors(folder, shapes, dtype, iter(tensors.items()))
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
