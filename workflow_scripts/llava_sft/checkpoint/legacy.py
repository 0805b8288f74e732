"""The original project's checkpoints: Megatron's `torch` format, a pickle per model-parallel rank, at any TP and PP.

Notable:
- nothing in the files is executed: only what rebuilds tensors is real, every other object is an inert stand-in, and a
  file that names anything outside the listed packages is refused;
- tensors are mapped, not read, so that merging the ranks holds one whole tensor in memory;
- ranks that are damaged (CRC32), or of different trainings, are refused: what stands in all of them must be equal.
Layout: `release/` or `iter_0000400/` with `mp_rank_00/` (PP 1) or `mp_rank_00_000/`, in each `model_optim_rng.pt`.
"""

import pickle
import re
from collections.abc import Iterable
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_sft.checkpoint.hf_folder import names_in
from llava_sft.checkpoint.pickles import (
    HARMLESS_BUILTINS,
    StandIn,
    check_archive_members,
    check_crc,
    damaged,
    python3_name,
)
from llava_sft.errors import CheckpointError, shown
from llava_sft.model.hf_config import Parts
from llava_sft.model.tensors import Row, check_tensors

FILE = "model_optim_rng.pt"
REBUILDS_TENSORS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"),
}
# Where the arguments, random states and counters of a training come from; none of them is wanted.
IGNORED_PACKAGES = {
    "_codecs", "_io", "aiak_accelerator", "aiak_megatron", "aiak_training_llm", "argparse", "datetime", "enum", "io",
    "megatron", "numpy", "pathlib", "signal", "torch", "transformer_engine", "types",
}  # fmt: skip
IGNORED_BUILTINS = {("builtins", name) for name in HARMLESS_BUILTINS.split()} | {("copyreg", "_reconstructor")}
ROW_SPLIT = ("linear_proj.weight", "linear_fc2.weight")
COLUMN_SPLIT = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "word_embeddings.weight", "output_layer.weight")  # fmt: skip
RENAMED = {"vision_model.patch_embed.proj.weight": "vision_model.patch_embed.weight"}


class _SafePickle:
    """What `torch.load` takes for the pickle module."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            wanted = python3_name(module, name)
            if wanted in REBUILDS_TENSORS:
                found = super().find_class(*wanted)
                return lambda *args: found(*args)  # a pickle may change attributes of what it gets
            if wanted[0].split(".")[0] in IGNORED_PACKAGES or wanted in IGNORED_BUILTINS:
                return StandIn
            raise CheckpointError(f"it asks for {module}.{name}, which no checkpoint needs", "do not use this file")


class LegacySource:
    """One checkpoint folder, its ranks merged, as a source of Megatron tensors. Raises CheckpointError, naming the file."""

    config: dict[str, Any] = {}

    def __init__(self, folder: Path):
        self.folder = folder
        ranks = {}
        for name in names_in(folder):
            if match := re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", name):
                ranks[int(match[1]), int(match[2] or 0)] = folder / name / FILE
        tp, pp = (1 + max((rank[i] for rank in ranks), default=-1) for i in (0, 1))
        missing = [rank for rank in product(range(tp), range(pp)) if rank not in ranks or not ranks[rank].is_file()]
        if missing or not ranks:
            which = "tensor rank {}, pipeline rank {}".format(*missing[0]) if missing else "any rank"
            raise CheckpointError(f"{folder}: no {FILE} of {which}", "copy the folder again")
        self._parts: dict[str, list[Tensor]] = {}  # by key, one tensor per tensor-parallel rank
        layers = 0
        for stage in range(pp):
            files = [ranks[rank, stage] for rank in range(tp)]
            states = [self._load(path) for path in files]
            check_same_keys(states, files)
            numbers = [0]
            for key in states[0]:
                if match := re.match(r"language_model\.decoder\.layers\.(\d+)\.", key):
                    numbers.append(int(match[1]) + 1)
                    whole = f"language_model.decoder.layers.{int(match[1]) + layers}.{key[match.end() :]}"
                else:
                    whole = RENAMED.get(key, key)
                self._parts[whole] = [state[key] for state in states]
            layers += max(numbers)

    def _load(self, path: Path) -> dict[str, Tensor]:
        """The model's tensors of one rank, mapped from the file, which must be of the same step as the others."""
        model, iteration = load_rank(path)
        first, known = self._iteration = getattr(self, "_iteration", (path, iteration))
        if iteration != known:
            raise CheckpointError(
                f"{path} is of iteration {shown(iteration)}, {first} of {shown(known)}",
                "copy all ranks of one checkpoint",
            )
        return model

    def says(self, parts: list[str], alone: bool) -> Parts:
        """Nothing that is read: its arguments are a pickle of many classes."""
        return {}

    def check(self, rows: list[Row], alone: bool) -> list[str]:
        """Raise CheckpointError unless it holds the tensors of `rows`; if `alone`, exactly those."""
        wanted = {row.mcore: row.shape for row in rows}
        kept = {key: each for key, each in self._parts.items() if alone or key in wanted}
        found = {key: tuple(_merge(key, [part.to("meta") for part in each]).shape) for key, each in kept.items()}
        check_tensors(found, wanted, self.folder)
        return []

    def dtype(self, rows: Iterable[Row]) -> torch.dtype:
        return reduce(torch.promote_types, {self._parts[row.mcore][0].dtype for row in rows})

    def read(self, row: Row) -> Tensor:
        return _merge(row.mcore, self._parts[row.mcore])[: row.shape[0]]  # vocabulary padding is cut off


def _merge(key: str, parts: list[Tensor]) -> Tensor:
    """The whole tensor from those of the tensor-parallel ranks."""
    if key == "vision_model.patch_embed.weight":
        return parts[0].flatten(1)
    if len(parts) == 1 or key.startswith("adapter."):
        return parts[0]
    if key.startswith("language_model.") and key.endswith("linear_fc1.weight"):  # SwiGLU: [gate, up] in each rank
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    if key.endswith(COLUMN_SPLIT):
        return torch.cat(parts)
    return torch.cat(parts, dim=1) if key.endswith(ROW_SPLIT) else parts[0]


def check_same_keys(states: list[dict[str, Tensor]], files: list[Path]) -> None:
    """Raise CheckpointError unless the tensor-parallel ranks hold the same keys, and the same values where none is split."""
    for state, path in zip(states[1:], files[1:], strict=True):
        for one, other, lacking in ((states[0], state, path), (state, states[0], files[0])):
            if missing := sorted(one.keys() - other.keys()):
                raise CheckpointError(
                    f"{lacking}: {missing[0]} is missing, another rank has it", "copy the folder again"
                )
        for key, tensor in state.items():
            if not is_split(key) and not torch.equal(tensor, states[0][key]):
                raise CheckpointError(
                    f"{path}: {key} is not that of {files[0]}: ranks of different checkpoints",
                    "copy all ranks of one checkpoint",
                )


def is_split(key: str) -> bool:
    """Whether each tensor-parallel rank holds a part of its own of this tensor."""
    return not key.startswith("adapter.") and key.endswith((*COLUMN_SPLIT, *ROW_SPLIT))


def load_rank(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The model's tensors of one rank, mapped from the file, and the training step that it says it is of."""
    check_archive_members(path, path)
    check_crc(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_SafePickle)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.problem}", error.fix) from None
    except Exception as error:  # unpickling damaged bytes raises almost anything
        raise damaged(path, error) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        virtual = isinstance(content, dict) and "model0" in content
        reason = "virtual pipeline stages (model0, model1 …) are not supported" if virtual else "no `model` in it"
        raise CheckpointError(
            f"{path}: {reason}", "use a checkpoint of the original project without virtual pipelining"
        )
    model = {key: value for key, value in content["model"].items() if not str(key).endswith("_extra_state")}
    for key, value in model.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {shown(key)} is no tensor", "use another checkpoint")
    return {key: value.detach() for key, value in model.items()}, content.get("iteration")
