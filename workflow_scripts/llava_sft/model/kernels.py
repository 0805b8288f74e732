"""Triton kernels for what stands between the matrix products of a layer: each reads its inputs once and writes once.

Notable:
- a backward kernel goes over many tokens and keeps the sums over them, the gradients of norms' weights and of biases, in
  registers: rows of `PartialSums`, added up once a layer, in the same order in every run;
- a backward kernel has what the forward one gave at hand: where it was not saved, it is written in the gradient's place;
- everything is computed in float32 and stored in the tensors' own precision;
- torch.compile's for the same took half as long again (docs/performance.md).
With `TRITON_INTERPRET=1` they run on a CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv
from triton import next_power_of_2 as power_of_2

from llava_sft.model.casts import APART, SLOTS, note_largest
from llava_sft.model.launches import Remembered

WARPS = 4
TILE = 4096  # values of a tensor that a program of a backward kernel holds at a time
PROGRAMS = 4  # of a backward kernel, for each multiprocessor
# All three as measured on an H200, for the shapes of 4B.


class PartialSums:
    """Sums over tokens, of several kernels: [programs, columns] float32, of which each kernel fills its columns."""

    def __init__(self, columns: int, device: torch.device):
        of_gpu = device.type == "cuda" and torch.cuda.get_device_properties(device).multi_processor_count
        self.rows = torch.empty(PROGRAMS * of_gpu or 3, columns, dtype=torch.float32, device=device)
        self.columns, self.taken = columns, 0

    def take(self, columns: int) -> Tensor:
        self.taken += columns
        return self.rows[:, self.taken - columns :]

    def totals(self, sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The sums in the order in which they were taken."""
        out = torch.empty(self.columns, dtype=dtype, device=self.rows.device)
        _totals[cdiv(self.columns, 64),](self.rows, out, len(self.rows), self.columns, ROWS=64, BLOCK=64)
        return out.split(sizes)


@Remembered
@triton.jit
def _totals(rows, out, programs, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column, total = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (column < columns)[None, :]
        total += tl.load(rows + row[:, None] * columns + column[None, :], mask, 0.0)
    tl.store(out + column, tl.sum(total, 0), column < columns)


PLACES = {"SLOTS": SLOTS, "APART": APART}


def known(tensor: Tensor, amax: Tensor | None) -> Tensor:
    """The tensor, with where its largest values are."""
    if amax is not None:
        tensor.largest_values = amax
    return tensor


def with_room(like: Tensor, rows: int, columns: int, room: int) -> Tensor:
    """An empty [rows, columns] whose rows are `room` longer in memory."""
    return like.new_empty(rows, columns + room)[:, :columns]


@triton.jit
def load_halves(at, half, inside):
    return tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + half, inside, 0.0).to(tl.float32)


@triton.jit
def store_halves(at, half, inside, first, second):
    tl.store(at, first, inside)
    tl.store(at + half, second, inside)


# --- norms ---------------------------------------------------------------------------------------------------------


@Remembered
@triton.jit
def _norm(
    x, branch, weight, bias, total, out, mean, scale, amax, eps,
    width: tl.constexpr, pitch: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr,
    SLOTS: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = column < width, row * width + column
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        stored = (value + tl.load(branch + at, inside, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, stored, inside)
        value = stored.to(tl.float32)
    if CENTER:
        middle = tl.sum(value, 0) / width
        tl.store(mean + row, middle)
        value = tl.where(inside, value - middle, 0.0)
    factor = 1 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(scale + row, factor)
    value = value * factor * tl.load(weight + column, inside, 0.0).to(tl.float32)
    if CENTER:
        value += tl.load(bias + column, inside, 0.0).to(tl.float32)
    value = value.to(out.dtype.element_ty)
    tl.store(out + row * pitch + column, value, inside)
    if amax is not None:
        note_largest(amax, row, tl.abs(value.to(tl.float32)), SLOTS, APART)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, branch: Tensor | None = None, room: int = 0,
    amax: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """RMSNorm, or LayerNorm where there is a bias, of x + branch, both [tokens, width] → x + branch, the normed [tokens,
    width], with `room` columns beside it, and what the gradient needs: mean (None without bias) and reciprocal deviation,
    [tokens] float32. `amax`: where the largest values of what is normed go (casts.places), here and below."""
    (tokens, width), center = x.shape, bias is not None
    total, out = x if branch is None else torch.empty_like(x), with_room(x, tokens, width, room)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(scale) if center else None
    switches = {"ADD": branch is not None, "CENTER": center, "BLOCK": power_of_2(width)}
    _norm[tokens,](
        x, branch, weight, bias, total, out, mean, scale, amax, eps, width, width + room, **switches, **PLACES,
        num_warps=WARPS,
    )  # fmt: skip
    return total, known(out, amax), mean, scale


@Remembered
@triton.jit(do_not_specialize=["tokens"])
def _norm_backward(
    grad, x, weight, bias, mean, scale, residual, out, sums, amax, tokens, columns,
    width: tl.constexpr, grad_pitch: tl.constexpr, residual_pitch: tl.constexpr, out_pitch: tl.constexpr,
    CENTER: tl.constexpr, BIASES: tl.constexpr, AGAIN: tl.constexpr, SLOTS: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, step = tl.program_id(0), tl.num_programs(0) * ROWS
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(weight + column, inside, 0.0).to(tl.float32)[None, :]
    if AGAIN and CENTER:
        shift = tl.load(bias + column, inside, 0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias, sum_residual, sum_out = d_weight, d_weight, d_weight
    most = tl.zeros([ROWS], tl.float32) if BIASES else d_weight  # with biases registers are short
    for start in range(program * ROWS, tokens, step):
        row = start + tl.arange(0, ROWS)
        mask = (row < tokens)[:, None] & inside[None, :]
        first, along_row = row.to(tl.int64)[:, None], column[None, :]
        d_x = tl.load(grad + first * grad_pitch + along_row, mask, 0.0).to(tl.float32)
        value = tl.load(x + first * width + along_row, mask, 0.0).to(tl.float32)
        before = tl.load(residual + first * residual_pitch + along_row, mask, 0.0).to(tl.float32)
        factor = tl.load(scale + row, row < tokens, 0.0)[:, None]
        if CENTER:
            value -= tl.load(mean + row, row < tokens, 0.0)[:, None]
            d_bias += d_x
        value *= factor
        d_weight += d_x * value
        if AGAIN:
            normed = value * gain
            if CENTER:
                normed += shift
            tl.store(grad + first * grad_pitch + along_row, normed, mask)
        d_x *= gain
        along = tl.sum(d_x * value, 1)[:, None] / width
        if CENTER:
            d_x -= tl.sum(d_x, 1)[:, None] / width
        d_x = (d_x - value * along) * factor + before
        if BIASES:
            sum_residual += before
            sum_out += tl.where(mask, d_x, 0.0)
        d_x = d_x.to(out.dtype.element_ty)
        tl.store(out + first * out_pitch + along_row, d_x, mask)
        if amax is not None:
            size = tl.where(mask, tl.abs(d_x.to(tl.float32)), 0.0)
            most = tl.maximum(most, tl.max(size, 1) if BIASES else size)
    if amax is not None:
        note_largest(amax, program, most, SLOTS, APART)
    sums += program.to(tl.int64) * columns + column
    tl.store(sums, tl.sum(d_weight, 0), inside)
    if CENTER:
        tl.store(sums + width, tl.sum(d_bias, 0), inside)
    if BIASES:
        tl.store(sums + 2 * width, tl.sum(sum_residual, 0), inside)
        tl.store(sums + 3 * width, tl.sum(sum_out, 0), inside)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, scale: Tensor, residual: Tensor,
    sums: PartialSums, biases: bool = False, room: int = 0, again: bool = False, amax: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of x [tokens, width], `residual` (its gradient along the other way) added, with `room` columns beside it.
    Sums taken: weight; bias, with a mean; `residual` and the result itself, with `biases`: the gradients of the biases of
    the products around. `again`: what the norm gave takes the place of `grad`."""
    tokens, width = x.shape
    out, block = with_room(x, tokens, width, room), power_of_2(width)
    partial = sums.take(width * (1 + (mean is not None) + 2 * biases))
    pitches = grad.stride(0), residual.stride(0), out.stride(0)
    switches = {
        "CENTER": mean is not None,
        "BIASES": biases,
        "AGAIN": again,
        "ROWS": max(1, TILE // block),
        "BLOCK": block,
    }
    _norm_backward[len(partial),](
        grad, x, weight, bias, mean, scale, residual, out, partial, amax, tokens, sums.columns, width, *pitches, **switches,
        **PLACES, num_warps=WARPS,
    )  # fmt: skip
    return known(out, amax)


# --- dropout -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["size", "key", "first", "limit"])
def _leave_out(x, out, size, key, first, columns, limit, gain, width: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = ((at // width) * columns + first + at % width).to(tl.uint32) ^ key.to(tl.uint32)
    place *= 2654435761
    place = (place ^ (place >> 15)) * 2246822519
    place ^= place >> 13
    value = tl.load(x + at, at < size, 0.0).to(tl.float32) * gain
    tl.store(out + at, tl.where((place >> 8).to(tl.int32) < limit, 0.0, value), at < size)


def leave_out(x: Tensor, share: float, key: int, first: int, columns: int) -> Tensor:
    """x [..., width] with a share of its values 0 and the others scaled: by `key`, row, and column, of which x has those from
    `first` on, of `columns`."""
    out = torch.empty_like(x)
    limit, gain = round(share * 2**24), 1 / (1 - share)
    _leave_out[cdiv(x.numel(), 2048),](
        x, out, x.numel(), key, first, columns, limit, gain, x.size(-1), BLOCK=2048, num_warps=WARPS
    )
    return out


def leave_out_on_cpu(x: Tensor, share: float, key: int, first: int, columns: int) -> Tensor:
    """The same in PyTorch."""
    rows, width = x.numel() // x.size(-1), x.size(-1)
    place = torch.arange(rows).unsqueeze(1) * columns + torch.arange(first, first + width)
    place = (((place ^ key) & 0xFFFF_FFFF) * 2654435761) & 0xFFFF_FFFF
    place = ((place ^ (place >> 15)) * 2246822519) & 0xFFFF_FFFF
    place ^= place >> 13
    return x * ((place >> 8) >= round(share * 2**24)).view_as(x).to(x.dtype) / (1 - share)


# --- gradients -----------------------------------------------------------------------------------------------------


@triton.jit
def _scale(x, factor, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, at < size, 0.0).to(tl.float32) * tl.load(factor), at < size)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x · factor in place: [1] float32, on the same device. PyTorch's runs at a quarter of the memory's speed, and rounds
    the factor to x's precision."""
    _scale[cdiv(x.numel(), 4096),](x, factor, x.numel(), BLOCK=4096, num_warps=WARPS)
