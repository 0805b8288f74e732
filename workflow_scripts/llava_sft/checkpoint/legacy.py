"""The original project's checkpoints: Megatron's `torch` format, a pickle per model-parallel rank, at any TP and PP.

Notable:
- nothing in the files is executed: only what rebuilds tensors is real, every other object is an inert stand-in, and a
  file that names anything outside the listed packages is refused;
- tensors are mapped, not read, so that merging the ranks holds one whole tensor in memory.
Layout: `release/` or `iter_0000400/` with `mp_rank_00/` (PP 1) or `mp_rank_00_000/`, in each `model_optim_rng.pt`.
"""

import pickle
import re
from collections.abc import Iterable
from functools import reduce
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from llava_sft.checkpoint.names import Row, check_tensors
from llava_sft.errors import CheckpointError

FILE = "model_optim_rng.pt"
REBUILDS_TENSORS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"),
}
# Where the arguments, random states and counters of a training come from; none of them is wanted.
IGNORED_PACKAGES = {
    "_codecs", "_io", "aiak_accelerator", "aiak_megatron", "aiak_training_llm", "argparse", "datetime", "enum", "io",
    "megatron", "numpy", "pathlib", "torch", "transformer_engine", "types",
}  # fmt: skip
ROW_SPLIT = ("linear_proj.weight", "linear_fc2.weight")
COLUMN_SPLIT = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "word_embeddings.weight", "output_layer.weight")  # fmt: skip
RENAMED = {"vision_model.patch_embed.proj.weight": "vision_model.patch_embed.weight"}


class _Inert:
    """Any object that is no tensor: made, filled and called without effect."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _ignore(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = __call__ = append = extend = add = _ignore


class _SafePickle:
    """What `torch.load` takes for the pickle module."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if (module, name) in REBUILDS_TENSORS:
                return super().find_class(module, name)
            if module.split(".")[0] in IGNORED_PACKAGES:
                return _Inert
            raise CheckpointError(f"it asks for {module}.{name}, which no checkpoint needs", "do not use this file")


class LegacySource:
    """One checkpoint folder, its ranks merged, as a source of Megatron tensors. Raises CheckpointError, naming the file."""

    config, old_names = {}, False

    def __init__(self, folder: Path):
        self.folder = folder
        ranks = {}
        for path in folder.glob("mp_rank_*"):
            if match := re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.name):
                ranks[int(match[1]), int(match[2] or 0)] = path / FILE
        tp, pp = (1 + max((rank[i] for rank in ranks), default=-1) for i in (0, 1))
        missing = [rank for rank in product(range(tp), range(pp)) if rank not in ranks or not ranks[rank].is_file()]
        if missing or not ranks:
            which = "tensor rank {}, pipeline rank {}".format(*missing[0]) if missing else "any rank"
            raise CheckpointError(f"{folder}: no {FILE} of {which}", "copy the folder again")
        self._parts: dict[str, list[Tensor]] = {}  # by key, one tensor per tensor-parallel rank
        layers = 0
        for stage in range(pp):
            states = [_load(ranks[rank, stage]) for rank in range(tp)]
            numbers = [0]
            for key in states[0]:
                if match := re.match(r"language_model\.decoder\.layers\.(\d+)\.", key):
                    numbers.append(int(match[1]) + 1)
                    whole = f"language_model.decoder.layers.{int(match[1]) + layers}.{key[match.end() :]}"
                else:
                    whole = RENAMED.get(key, key)
                if lacking := [rank for rank in range(tp) if key not in states[rank]]:
                    raise CheckpointError(f"{ranks[lacking[0], stage]}: {key} is missing", "copy the folder again")
                self._parts[whole] = [state[key] for state in states]
            layers += max(numbers)

    def check(self, parts: list[str], rows: list[Row], alone: bool) -> None:
        wanted = {row.mcore: row.shape for row in rows}
        kept = {key: each for key, each in self._parts.items() if alone or key in wanted}
        found = {key: tuple(_merge(key, [part.to("meta") for part in each]).shape) for key, each in kept.items()}
        check_tensors(found, wanted, self.folder)

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


def _load(path: Path) -> dict[str, Tensor]:
    """The model's tensors of one rank, mapped from the file."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_SafePickle)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.problem}", error.fix) from None
    except Exception as error:  # unpickling damaged bytes raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged or cut off ({reason})", "copy the file again") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        virtual = isinstance(content, dict) and "model0" in content
        reason = "virtual pipeline stages (model0, model1 …) are not supported" if virtual else "no `model` in it"
        raise CheckpointError(
            f"{path}: {reason}", "use a checkpoint of the original project without virtual pipelining"
        )
    model = {key: value for key, value in content["model"].items() if not key.endswith("_extra_state")}
    for key, value in model.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key} is no tensor", "use another checkpoint")
    return {key: value.detach() for key, value in model.items()}
