"""Hugging Face ↔ Megatron-Core, both ways through the table in names.py, one tensor in memory at a time.

A converted folder looks like one that Megatron wrote: `latest_checkpointed_iteration.txt`, `release/…`; beside them
`huggingface/` keeps all that is not a weight (config, tokenizer, preprocessor, chat template), and `converted.json`
is the marker that stands only when all is there.
"""

import shutil
from functools import reduce
from pathlib import Path

import torch
import xxhash

from llava_sft.checkpoint.names import mapping
from llava_sft.checkpoint.safetensors_io import SafetensorsReader, tensor_bytes, write_safetensors
from llava_sft.checkpoint.start import MARKER, SIDECARS, TRACKER, read_hf_config
from llava_sft.checkpoint.torch_dist import TorchDistReader, write_torch_dist
from llava_sft.errors import CheckpointError
from llava_sft.files import atomic_dir, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.model.export_files import write_hf_sidecars

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def hf2mcore(source: Path, target: Path, model: ModelConfig) -> dict:
    """Convert a Hugging Face folder into a Megatron folder; returns the content of its marker.

    Raises CheckpointError when a tensor is missing, left over, or of another shape than `model` has.
    """
    config = read_hf_config(source)
    check_same_architecture(model, ModelConfig.from_hf_config(config), source)
    reader = SafetensorsReader(source)
    rows = {row.mcore: row for row in mapping(model)}
    check_tensors({name: reader.shape(name) for name in reader.names()}, model.hf_tensor_shapes(), source)

    digest = xxhash.xxh3_128()

    def produce(key: str) -> torch.Tensor:
        row = rows[key]
        tensor = row.join([reader.read(name) for name in row.hf]).to(dtype).contiguous()
        digest.update(key.encode())
        digest.update(tensor_bytes(tensor))
        return tensor

    # One for all, and where a folder mixes them the one that holds every value exactly.
    dtype = reduce(torch.promote_types, map(reader.dtype, reader.names()))
    with atomic_dir(target) as folder:
        shapes = {key: row.shape for key, row in rows.items()}
        write_torch_dist(folder / "release", shapes, dict.fromkeys(shapes, dtype), produce)
        (folder / TRACKER).write_text("release\n")
        copy_sidecars(source, folder / SIDECARS)
        marker = {
            "source": str(source),
            "tensors": len(model.hf_tensor_shapes()),
            "parameters": model.parameter_count(),
            "dtype": str(dtype).removeprefix("torch."),
            "fingerprint": digest.hexdigest(),
            "untrained": bool(config.get("untrained")),
        }
        write_json(folder / MARKER, marker)
    return marker


def mcore2hf(source: Path, target: Path, sidecars: Path, model: ModelConfig, min_pixels: int, max_pixels: int) -> dict:
    """Write the weights of one checkpoint folder (`iter_0000400/`, `release/`) as a Hugging Face folder.

    Args:
        sidecars: folder with config, tokenizer and the like that training started from.
        min_pixels, max_pixels: image limits of the training, written where inference will read them.
    """
    reader = TorchDistReader(source)
    rows = list(mapping(model))
    stored = reader.tensors()
    check_tensors(
        {row.mcore: tuple(stored[row.mcore].size) for row in rows if row.mcore in stored},
        {row.mcore: row.shape for row in rows},
        source,
        padded={"language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"},
    )
    shapes = model.hf_tensor_shapes()
    order = {name: shapes[name] for row in rows for name in row.hf}

    def tensors():
        for row in rows:
            tensor = reader.read(row.mcore)[: row.shape[0]]  # vocabulary padding is cut off
            yield from zip(row.hf, row.split(tensor), strict=True)

    dtype = stored[rows[0].mcore].properties.dtype
    marker = {
        "source": str(source),
        "tensors": len(shapes),
        "parameters": model.parameter_count(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    with atomic_dir(target) as folder:
        write_hf_sidecars(folder, sidecars, model, min_pixels, max_pixels, marker["dtype"])
        write_safetensors(folder, order, dtype, tensors())
        write_json(folder / MARKER, marker)
    return marker


def copy_sidecars(source: Path, target: Path) -> None:
    """All files of a Hugging Face folder but its weights."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, target / path.name)


def check_same_architecture(wanted: ModelConfig, found: ModelConfig, source: Path) -> None:
    """Raise CheckpointError, naming the first difference, unless both describe the same sizes."""
    for part in ("language", "vision"):
        ours, theirs = getattr(wanted, part).model_dump(), getattr(found, part).model_dump()
        for key, value in ours.items():
            if theirs[key] != value and key != "max_position_embeddings":
                raise CheckpointError(
                    f"{source}: {part} {key} is {theirs[key]}, config/models/{wanted.name}.yaml has {value}",
                    "choose the `model` that fits this checkpoint, or another checkpoint",
                )


def check_tensors(
    found: dict[str, tuple[int, ...]],
    wanted: dict[str, tuple[int, ...]],
    source: Path,
    padded: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Raise CheckpointError for the first tensor that is missing, left over or misshapen. `padded` may have more rows."""
    fix = "use a checkpoint of this model, or copy it again if it is damaged"
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(
            f"{source}: {len(missing)} tensors are missing, the first is {missing[0]} {wanted[missing[0]]}", fix
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{source}: {len(extra)} tensors are not part of the model, the first is {extra[0]} {found[extra[0]]}", fix
        )
    for name, shape in wanted.items():
        same = found[name] == shape or (name in padded and found[name][0] >= shape[0] and found[name][1:] == shape[1:])
        if not same:
            raise CheckpointError(f"{source}: {name} has shape {found[name]}, the model has {shape}", fix)
