"""Casts to FP8 with one scale a tensor (`fp8: tensorwise`), of tensors whose largest value is known from the kernel that wrote
them.

Notable:
- Transformer Engine reads a tensor twice, once for its largest value and once for the cast, in four launches; here it is read
  once, in one launch, which also finds the scale;
- scale and values are Transformer Engine's, bit for bit: 448 or 57,344 over the largest value, both divisions rounded to the
  nearest, and the hardware's saturating conversion.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from llava_sft.model.launches import Remembered

SLOTS = 64  # places for the largest value of a tensor: programs that write one place wait for each other
APART = 8  # float32 values from place to place: 32 bytes, what a cache moves
TENSORS = 1024  # whose places are filled with zeros at a time

_places: dict[torch.device, list] = {}  # device → [zeros, how many rows of it are taken]


def places(device: torch.device) -> Tensor:
    """Zeros that a kernel leaves the largest values of a tensor in: [SLOTS · APART] float32, of which every APART-th counts."""
    found = _places.setdefault(device, [None, TENSORS])
    if found[1] == TENSORS:
        found[:] = [torch.zeros(TENSORS, SLOTS * APART, dtype=torch.float32, device=device), 0]
    found[1] += 1
    return found[0][found[1] - 1]


@triton.jit
def note_largest(amax, program, values, SLOTS: tl.constexpr, APART: tl.constexpr):
    """The largest of `values`, as they were stored, goes to the program's place."""
    most = values
    for _ in tl.static_range(len(values.shape)):
        most = tl.max(most, 0)
    tl.atomic_max(amax + (program % SLOTS) * APART, most, sem="relaxed")


@Remembered
@triton.jit
def _cast(
    x, amax, rows_out, columns_out, scale_inv, rows, columns: tl.constexpr, largest: tl.constexpr,
    SLOTS: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = rows_out.dtype.element_ty
    most = tl.max(tl.load(amax + tl.arange(0, SLOTS) * APART), 0)
    scale = tl.div_rn(tl.full([], largest, tl.float32), tl.where(most > 0, most, 1.0))
    scale = tl.where(scale > 3.4028234663852886e38, 3.4028234663852886e38, scale)
    scale = tl.where((most > 0) & (most <= 3.4028234663852886e38), scale, 1.0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * columns + column[None, :], inside, 0.0).to(tl.float32)
    small = (value * scale).to(kind)
    tl.store(rows_out + row.to(tl.int64)[:, None] * columns + column[None, :], small, inside)
    turned = tl.trans(small)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(columns_out + column.to(tl.int64)[:, None] * rows + row[None, :], turned, inside)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(scale_inv, tl.div_rn(1.0, scale))


TILE = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}  # the fastest of five on an H200, for the shapes of 4B
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def cast(x: Tensor, amax: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, columns] bf16, whose largest values are in `amax` (`places`) → x · scale in FP8 of `kind`, the same transposed
    [columns, rows], and 1 / scale, [1] float32."""
    (rows, columns), tile = x.shape, TILE
    small, turned = x.new_empty(rows, columns, dtype=kind), x.new_empty(columns, rows, dtype=kind)
    scale_inv = torch.empty(1, dtype=torch.float32, device=x.device)
    grid = cdiv(columns, tile["COLUMNS"]), cdiv(rows, tile["ROWS"])
    _cast[grid](x, amax, small, turned, scale_inv, rows, columns, LARGEST[kind], SLOTS, APART, **tile)
    return small, turned, scale_inv


# --- what of a tensor is known -------------------------------------------------------------------------------------


class Handed:
    """The gradient that a layer hands to the one below it, and its largest values: autograd gives the layer below another
    tensor of the same memory. Held until then, so that nothing else can have that memory."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def over(self, tensor: Tensor) -> None:
        self.tensor = tensor if hasattr(tensor, "largest_values") else None

    def take(self, tensor: Tensor) -> None:
        """Notes the largest values of `tensor`, where it is what was handed over."""
        given, self.tensor = self.tensor, None
        if given is None or given._version != tensor._version:
            return
        if (given.data_ptr(), given.shape, given.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride()):
            tensor.largest_values = given.largest_values


def handed(segments: Any) -> Handed:
    """Of the pass over these segments: each has its own gradients."""
    if getattr(segments, "handed", None) is None:
        segments.handed = Handed()
    return segments.handed
