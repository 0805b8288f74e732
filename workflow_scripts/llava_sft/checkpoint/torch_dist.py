"""Megatron's `torch_dist` checkpoints (PyTorch distributed checkpoint files) without building a model.

Notable: both ways go tensor by tensor. Nothing here imports Megatron, which would take ten seconds.
"""

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from llava_sft.checkpoint.pickles import read_metadata
from llava_sft.checksums import HashingFile, note
from llava_sft.errors import CheckpointError, SftError


def write_for_older_torch() -> None:
    """Leave the strides out of what is written about a tensor: torch before 2.15 refuses a checkpoint that has them
    (seen: 2.11, which GPU machines bring), and newer ones read both."""
    full = TensorProperties.__getstate__
    if full.__module__ == "torch.distributed.checkpoint.metadata":
        TensorProperties.__getstate__ = lambda self: full(self)[:5]


class _Writer(FileSystemWriter):
    """Writes one file, item by item. The stock writer keeps every tensor that it has written until the end."""

    FILE = "__0_0.distcp"
    noted: list

    def write_data(self, plan, planner):
        results = []
        with open(self.path / self.FILE, "wb") as stream:
            file = HashingFile(stream)
            for item in plan.items:
                offset = file.size
                torch.save(planner.produce(item.index.fqn), file)
                length = file.size - offset
                results.append(WriteResult(item.index, length, _StorageInfo(self.FILE, offset, length)))
            stream.flush()
            os.fsync(stream.fileno())
        self.noted = file.noted()
        done = torch.futures.Future()
        done.set_result(results)
        return done


class _Planner(DefaultSavePlanner):
    """Plans with meta tensors; the writer asks for each real one when its turn has come."""

    def __init__(self, produce: Callable[[str], Tensor]):
        super().__init__()
        self.produce = produce


def write_torch_dist(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], produce: Callable[[str], Tensor]
) -> dict[str, list]:
    """Write one checkpoint folder (`release/`); `produce(key)` makes each tensor when it is needed.

    Returns size and checksum of each file by its name; those of the weights are taken while they are written.
    """
    writer = _Writer(folder)
    write_for_older_torch()
    plan = {key: torch.empty(shape, dtype=dtypes[key], device="meta") for key, shape in shapes.items()}
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # they would take longer than the disk; nothing reads them
    try:
        with warnings.catch_warnings(action="ignore"):  # that this is a single process
            dcp.save(plan, storage_writer=writer, planner=_Planner(produce), no_dist=True)
    except CheckpointException as error:  # around what `produce` raised
        for cause, _ in error.failures.values():
            if isinstance(cause, SftError):
                raise cause from None
        raise
    finally:
        torch.serialization.set_crc32_options(checksums)
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    small = [path for path in folder.iterdir() if path.name != writer.FILE]
    return note(folder, small) | {writer.FILE: writer.noted}


class TorchDistReader(FileSystemReader):
    """Reads single tensors out of a checkpoint folder, whatever parallel sizes wrote it."""

    def __init__(self, folder: Path):
        self.folder, self._metadata = folder, read_metadata(folder)
        super().__init__(folder)

    def read_metadata(self):
        return self._metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of every tensor by its key; optimizer state included."""
        return {k: v for k, v in self._metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    def read(self, key: str) -> Tensor:
        """The whole tensor. One that was stored in one piece is not copied, as `dcp.load` would."""
        stored = self.tensors()[key]
        whole = torch.empty(stored.size, dtype=stored.properties.dtype) if len(stored.chunks) > 1 else None
        for chunk in stored.chunks:
            place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            try:
                with open(self.folder / place.relative_path, "rb") as file:
                    piece = torch.load(self._slice_file(file, place), map_location="cpu", weights_only=True)
            except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                reason = (str(error).splitlines() or ["cut off"])[-1]
                raise CheckpointError(
                    f"{self.folder}: {key} cannot be read: {reason}", "use another iter_ folder"
                ) from error
            if whole is None:
                return piece
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece
        return whole
