"""Hugging Face checkpoints, tensor by tensor: read lazily, written as a stream, so that memory holds one tensor.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, raw little-endian data).
"""

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from llava_sft.checkpoint.hf_folder import ADAPTER_WEIGHTS, INDEX, canonical, read_header, weight_files
from llava_sft.checkpoint.peft import Adapter
from llava_sft.checksums import HashingFile
from llava_sft.errors import CheckpointError, many, verb_of
from llava_sft.files import atomic_file, write_json

SHARD_BYTES = 5_000_000_000
# Buffers that older versions of transformers stored, and newer ones compute.
LEFTOVER = re.compile(r".*\.(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|embeddings\.position_ids)")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def old_name(name: str) -> str:
    """The older spelling of an in-memory name, which the published checkpoints have: the inverse of `canonical`."""
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


class SafetensorsReader:
    """The tensors of a Hugging Face folder under their in-memory names.

    Raises CheckpointError for a folder without weights, a missing shard or a damaged file.
    """

    def __init__(self, folder: Path):
        self._place: dict[str, tuple[Path, str, dict]] = {}  # file, name in it, and its entry in the header
        for path in weight_files(folder):
            for name, entry in read_header(path)[0].items():
                if LEFTOVER.fullmatch(name):
                    print(f"{path.name}: {name} is left out: older versions stored it, and it follows from config.json")
                    continue
                if canonical(name) in self._place:
                    problem = f"{path}: {name} is also in {self._place[canonical(name)][0].name}"
                    raise CheckpointError(problem, "keep the files of one checkpoint only")
                self._place[canonical(name)] = (path, name, entry)

    @classmethod
    def of_pairs(cls, adapter: Adapter) -> "SafetensorsReader":
        """Of a PEFT folder, by the names in `adapter.pairs`."""
        made = cls.__new__(cls)
        made._place = {name: (adapter.folder / ADAPTER_WEIGHTS, name, entry) for name, entry in adapter.pairs.items()}
        return made

    def names(self) -> set[str]:
        return set(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._place[name][2]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        path, stored, entry = self._place[name]
        for dtype, spelling in DTYPES.items():
            if spelling == entry["dtype"]:
                return dtype
        wanted = ", ".join(DTYPES.values())
        raise CheckpointError(f"{path}: {stored} is of type {entry['dtype']}", f"use weights of {wanted}")

    def read(self, name: str) -> Tensor:
        """Read, not mapped: pages of a mapped file would count as memory, and come in small pieces."""
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        with open(self._place[name][0], "rb", buffering=0) as file:
            file.seek(self._place[name][2]["start"])
            rest = tensor_bytes(tensor)
            while rest:
                if not (count := file.readinto(rest)):
                    raise CheckpointError(f"{self._place[name][0]}: cut off while it is read", "copy the file again")
                rest = rest[count:]
        return tensor


def write_safetensors(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    about: dict[str, str] | None = None,
) -> dict[str, list]:
    """Stream `tensors` into the folder, in the order of `shapes`, in shards of at most 5 GB with an index file.

    Args:
        about: what is noted in each file beside its tensors.

    Returns the size and xxh3_128 of each file of weights, by its name: taken while it is written.
    """
    noted: dict[str, list] = {}
    size = torch.empty((), dtype=dtype).element_size()
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        length = size * torch.Size(shape).numel()
        if shards[-1] and sum(shards[-1].values()) + length > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = length
    count = len(shards)
    file_names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        file_names = ["model.safetensors"]
    stream = iter(tensors)
    for file_name, shard in zip(file_names, shards, strict=True):
        header: dict = {"__metadata__": {"format": "pt"} | (about or {})}
        offset = 0
        for name, length in shard.items():
            place = [offset, offset + length]
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": place}
            offset += length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with atomic_file(folder / file_name) as stream_to:
            file = HashingFile(stream_to)
            file.write(struct.pack("<Q", len(text)) + text)
            for expected in shard:
                name, tensor = next(stream)
                if name != expected:
                    raise RuntimeError(f"tensor {name} came where {expected} was due")
                file.write(tensor_bytes(tensor.to(dtype)))
            noted[file_name] = file.noted()
    if count > 1:
        weight_map = {name: file_name for file_name, shard in zip(file_names, shards, strict=True) for name in shard}
        total = sum(sum(shard.values()) for shard in shards)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return noted


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise CheckpointError for a tensor with a value that is NaN or infinite: the least and the greatest are, if
    any value is."""
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise CheckpointError(
            f"{name}: {count:,} of {many(tensor.numel(), 'value')} {verb_of(count, 'are')} NaN or infinite",
            "use a checkpoint from before that happened",
        )
