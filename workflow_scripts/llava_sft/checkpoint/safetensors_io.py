"""Hugging Face checkpoints, tensor by tensor: read lazily, written as a stream, so that memory holds one tensor.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, raw little-endian data).
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_sft.errors import CheckpointError
from llava_sft.files import atomic_file, write_json

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def canonical(name: str) -> str:
    """The in-memory name of a tensor; older checkpoints spell the parts without `model.` in front."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return name.replace("model.", "model.language_model.", 1)
    return name


class SafetensorsReader:
    """The tensors of a Hugging Face folder under their in-memory names.

    Raises CheckpointError for a folder without weights, a missing shard or a damaged file.
    """

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        index = folder / INDEX
        if index.is_file():
            try:
                named = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index}: damaged or cut off ({error})", "copy the file again") from None
            missing = sorted(path.name for path in named if not path.is_file())
            if missing:
                raise CheckpointError(f"{folder}: {missing[0]} is missing, {INDEX} names it", "copy the folder again")
            files = sorted(named)
        if not files:
            raise CheckpointError(f"{folder}: no *.safetensors file in it", "name a complete Hugging Face folder")
        self._place: dict[str, tuple[Path, str]] = {}
        self._open = {}
        for path in files:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path}: damaged or cut off ({error})", "copy the file again") from None
            for name in self._open[path].keys():  # noqa: SIM118 (no dict)
                if canonical(name) in self._place:
                    other = self._place[canonical(name)][0]
                    raise CheckpointError(
                        f"{path}: {name} is also in {other.name}", "keep the files of one checkpoint only"
                    )
                self._place[canonical(name)] = (path, name)

    def names(self) -> set[str]:
        return set(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        path, stored = self._place[name]
        return tuple(self._open[path].get_slice(stored).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        path, stored = self._place[name]
        spelled = self._open[path].get_slice(stored).get_dtype()
        for dtype, spelling in DTYPES.items():
            if spelling == spelled:
                return dtype
        raise CheckpointError(f"{path}: {stored} is of type {spelled}", f"use weights of {', '.join(DTYPES.values())}")

    def read(self, name: str) -> Tensor:
        path, stored = self._place[name]
        return self._open[path].get_tensor(stored)


def write_safetensors(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Stream `tensors` into the folder, in the order of `shapes`, in shards of at most 5 GB with an index file."""
    size = torch.empty((), dtype=dtype).element_size()
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        length = size * torch.Size(shape).numel()
        if shards[-1] and sum(shards[-1].values()) + length > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = length
    single = len(shards) == 1
    file_names = (
        ["model.safetensors"]
        if single
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    stream = iter(tensors)
    for file_name, shard in zip(file_names, shards, strict=True):
        header: dict = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, length in shard.items():
            header[name] = {
                "dtype": DTYPES[dtype],
                "shape": list(shapes[name]),
                "data_offsets": [offset, offset + length],
            }
            offset += length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with atomic_file(folder / file_name) as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for expected in shard:
                name, tensor = next(stream)
                if name != expected:
                    raise RuntimeError(f"tensor {name} came where {expected} was due")
                file.write(tensor_bytes(tensor.to(dtype)))
    if not single:
        weight_map = {name: file_name for file_name, shard in zip(file_names, shards, strict=True) for name in shard}
        total = sum(sum(shard.values()) for shard in shards)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
