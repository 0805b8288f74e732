"""The one entrance for everyone who reads the weights of a checkpoint in our own format.

A checkpoint of LoRA holds what is trained alone, and `lora.json`, which names the base that it stands beside: it is read as
if the weights had been trained.
"""

from pathlib import Path

from torch import Tensor

from llava_sft.checkpoint.base import lora_of
from llava_sft.checkpoint.pickles import check_pickles
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.checkpoint.verify import require_whole
from llava_sft.model.lora import Lora, pair


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
    """The weights of one checkpoint folder (`iter_0000400/`, `release/`) by their Megatron keys, LoRA's pairs merged.

    Nothing is compared with checksums here, but the base of pairs: `verify.require_whole` does that. Raises
    CheckpointError.
    """
    found = lora_of(folder)
    return MergedReader(folder, *found) if found else TorchDistReader(folder)
