"""LoRA: which linear layers get a low-rank pair beside their frozen weights, and the pair's names and shapes.

Notable:
- a pair is `lora_a` [rank, in] and `lora_b` [out, rank]: out = W·x + alpha / rank · B·A·x; A random, B zero at the start
  (LoRA, arXiv:2106.09685);
- rows of the table in tensors.py say which layers there are: a fused layer (q, k and v; gate and up) has one A for all of
  it, and a B that the row splits as it splits the weight, which gives the pairs of PEFT.
No torch: planning and preflight count parameters alone.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from llava_sft.model.config import ModelConfig
from llava_sft.model.tensors import Row, Shape, tensor_rows

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
A, B = "lora_a", "lora_b"


class Lora(NamedTuple):
    """`parts` of the model (tensors.PARTS) that are trained by pairs in place of their weights."""

    rank: int
    alpha: float
    parts: tuple[str, ...]
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def rows(self, model: ModelConfig) -> tuple[Row, ...]:
        """The weights that get a pair."""
        return _rows(model, self.parts)

    def shapes(self, row: Row) -> dict[str, Shape]:
        """Megatron's name of each of the pair, and its shape."""
        (out, columns), (a, b) = row.shape, pair(row.mcore)
        return {a: (self.rank, columns), b: (out, self.rank)}

    def parameters(self, model: ModelConfig, part: str | None = None) -> int:
        """Values in all pairs, or in those of one part."""
        shapes = (self.shapes(row) for row in self.rows(model) if part in (None, row.part))
        return sum(math.prod(shape) for each in shapes for shape in each.values())


def pair(mcore: str) -> tuple[str, str]:
    """`….linear_qkv.weight` → `….linear_qkv.lora_a`, `….linear_qkv.lora_b`."""
    layer = mcore.removesuffix(".weight")
    return f"{layer}.{A}", f"{layer}.{B}"


@lru_cache(maxsize=16)
def _rows(model: ModelConfig, parts: tuple[str, ...]) -> tuple[Row, ...]:
    def found() -> Iterator[Row]:
        for row in tensor_rows(model):
            layer, _, what = row.mcore.rpartition(".")
            if row.part in parts and what == "weight" and layer.endswith(LINEARS):
                yield row

    return tuple(found())
