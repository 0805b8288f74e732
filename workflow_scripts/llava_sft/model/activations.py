"""Triton kernels of activations: SwiGLU of the language model, GELU of the vision tower, and their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv
from triton import next_power_of_2 as power_of_2

from llava_sft.model.casts import note_largest
from llava_sft.model.kernels import PLACES, TILE, WARPS, PartialSums, known, load_halves, store_halves, with_room
from llava_sft.model.launches import Remembered


@Remembered
@triton.jit
def _swiglu(
    gate_and_up, out, amax, width: tl.constexpr, pitch: tl.constexpr, SLOTS: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, row * 2 * width + column
    gate, up = load_halves(gate_and_up + at, width, inside)
    # Two steps, as in Megatron: the first is rounded too.
    opened = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    value = (opened * up).to(out.dtype.element_ty)
    tl.store(out + row * pitch + column, value, inside)
    if amax is not None:
        note_largest(amax, row + tl.program_id(1), tl.where(inside, tl.abs(value.to(tl.float32)), 0.0), SLOTS, APART)


@Remembered
@triton.jit
def _swiglu_backward(
    gate_and_up, grad, out, amax, width: tl.constexpr, pitch: tl.constexpr, AGAIN: tl.constexpr,
    SLOTS: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, row * 2 * width + column
    gate, up = load_halves(gate_and_up + at, width, inside)
    d_x = tl.load(grad + row * pitch + column, inside, 0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    if AGAIN:
        opened = (gate * share).to(out.dtype.element_ty).to(tl.float32)
        tl.store(grad + row * pitch + column, opened * up, inside)
    d_gate, d_up = d_x * up * share * (1 + gate * (1 - share)), d_x * gate * share
    store_halves(out + at, width, inside, d_gate, d_up)
    if amax is not None:
        most = tl.maximum(tl.abs(d_gate), tl.abs(d_up)).to(out.dtype.element_ty).to(tl.float32)
        note_largest(amax, row + tl.program_id(1), tl.where(inside, most, 0.0), SLOTS, APART)


def swiglu(gate_and_up: Tensor, room: int = 0, amax: Tensor | None = None) -> Tensor:
    """silu(gate) · up of [tokens, 2 · width], gate before up → [tokens, width], with `room` columns beside it."""
    tokens, width = gate_and_up.size(0), gate_and_up.size(1) // 2
    out = with_room(gate_and_up, tokens, width, room)
    _swiglu[tokens, cdiv(width, 1024)](gate_and_up, out, amax, width, width + room, **PLACES, BLOCK=1024)
    return known(out, amax)


def swiglu_backward(grad: Tensor, gate_and_up: Tensor, again: bool = False, amax: Tensor | None = None) -> Tensor:
    """Gradient of `gate_and_up`. `again`: swiglu(gate_and_up) takes the place of `grad`."""
    out, (tokens, width) = torch.empty_like(gate_and_up), grad.shape
    _swiglu_backward[tokens, cdiv(width, 1024)](
        gate_and_up, grad, out, amax, width, grad.stride(0), again, **PLACES, BLOCK=1024
    )
    return known(out, amax)


@triton.jit
def _normal(x):
    """Cumulative distribution and density of the normal distribution: erf by Abramowitz and Stegun, Handbook of
    Mathematical Functions, 7.1.26 (within 1.5e-7), which shares its exponential with the density."""
    bell = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.2316418882 * tl.abs(x))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * bell
    return tl.where(x > 0, 1 - tail, tail), bell * 0.3989422804


@Remembered
@triton.jit
def _gelu(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < size, 0.0).to(tl.float32)
    below, _ = _normal(value)
    tl.store(out + at, value * below, at < size)


@Remembered
@triton.jit(do_not_specialize=["tokens"])
def _gelu_backward(
    grad,
    x,
    out,
    sums,
    tokens,
    columns,
    width: tl.constexpr,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, total = column < width, tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < tokens)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(x + at, mask, 0.0).to(tl.float32)
        d_x = tl.load(grad + at, mask, 0.0).to(tl.float32)
        below, density = _normal(value)
        if AGAIN:
            tl.store(grad + at, value * below, mask)
        d_x *= below + value * density
        total += d_x
        tl.store(out + at, d_x, mask)
    tl.store(sums + tl.program_id(0).to(tl.int64) * columns + column, tl.sum(total, 0), inside)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, of any shape."""
    out = torch.empty_like(x)
    _gelu[cdiv(x.numel(), 2048),](x, out, x.numel(), BLOCK=2048, num_warps=WARPS)
    return out


def gelu_backward(grad: Tensor, x: Tensor, sums: PartialSums, again: bool = False) -> Tensor:
    """Gradient of x [tokens, width]. Sums taken: that gradient, of the bias before it. `again`: gelu(x) takes the place of
    `grad`."""
    (tokens, width), out = x.shape, torch.empty_like(x)
    partial, block = sums.take(width), min(1024, power_of_2(width))
    grid = (len(partial), cdiv(width, block))
    _gelu_backward[grid](
        grad, x, out, partial, tokens, sums.columns, width, again, ROWS=TILE // 2 // block, BLOCK=block, num_warps=WARPS
    )
    return out
