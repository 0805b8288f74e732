"""Megatron's `torch_dist` checkpoints (PyTorch distributed checkpoint files) without building a model.

Notable: both ways go tensor by tensor. Nothing here imports Megatron, which would take ten seconds.
"""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llava_sft.errors import CheckpointError


class _LazyPlanner(DefaultSavePlanner):
    """Plans with meta tensors, and asks for each real one when its turn to be written has come."""

    def __init__(self, produce: Callable[[str], Tensor]):
        super().__init__()
        self.produce = produce

    def resolve_data(self, write_item):
        return self.produce(write_item.index.fqn)


def write_torch_dist(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], produce: Callable[[str], Tensor]
) -> None:
    """Write one checkpoint folder (`release/`); `produce(key)` makes each tensor when it is needed."""
    plan = {key: torch.empty(shape, dtype=dtypes[key], device="meta") for key, shape in shapes.items()}
    dcp.save(plan, storage_writer=FileSystemWriter(folder, thread_count=1), planner=_LazyPlanner(produce), no_dist=True)
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


class TorchDistReader(FileSystemReader):
    """Reads single tensors out of a checkpoint folder, whatever parallel sizes wrote it."""

    def __init__(self, folder: Path):
        if not (folder / ".metadata").is_file():
            raise CheckpointError(
                f"{folder}: no .metadata file: not a whole torch_dist checkpoint", "use another iter_ folder"
            )
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self):
        return self._metadata

    @cached_property
    def _metadata(self):
        return super().read_metadata()

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of every tensor by its key; optimizer state included."""
        return {k: v for k, v in self._metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    def read(self, key: str) -> Tensor:
        stored = self.tensors()[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        try:
            dcp.load({key: tensor}, storage_reader=self, no_dist=True)
        except (EOFError, OSError, RuntimeError, dcp.api.CheckpointException) as error:
            reason = str(error).splitlines()[-1]
            raise CheckpointError(
                f"{self.folder}: {key} can not be read: {reason}", "use another iter_ folder"
            ) from error
        return tensor
