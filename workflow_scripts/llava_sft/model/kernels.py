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


# --- norms ---------------------------------------------------------------------------------------------------------


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


# --- queries, keys and values --------------------------------------------------------------------------------------
# The product lays them out group by group: the queries of a group, its key, its value; in the vision tower, where each
# head has a key of its own, head by head. A head is two halves, which form the pairs that are rotated.


@triton.jit
def _load_halves(at, half, inside):
    return tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + half, inside, 0.0).to(tl.float32)


@triton.jit
def _store_halves(at, half, inside, first, second):
    tl.store(at, first, inside)
    tl.store(at + half, second, inside)


@triton.jit
def _norm_factor(first, second, half, eps):
    return 1 / tl.sqrt(tl.sum(first * first + second * second, 2) / (2 * half) + eps)[:, :, None]


@triton.jit
def _head_offsets(
    start, tokens, heads: tl.constexpr, groups: tl.constexpr, half: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Offsets of the first halves, [tokens, heads or groups, half]: of the angles, queries and keys as laid out by the
    product and alone; and which of them there are."""
    token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    channel, head = tl.arange(0, HALF)[None, None, :], tl.arange(0, HEADS)[None, :, None]
    group, each, head_dim = tl.arange(0, GROUPS)[None, :, None], heads // groups, 2 * half
    valid, row = (token < tokens) & (channel < half), token * (heads + 2 * groups)
    q = (row + head // each * (each + 2) + head % each) * head_dim + channel
    k = (row + group * (each + 2) + each) * head_dim + channel
    q_alone, k_alone = (token * heads + head) * head_dim + channel, (token * groups + group) * head_dim + channel
    return token * head_dim + channel, q, k, q_alone, k_alone, valid, valid & (head < heads), valid & (group < groups)


@triton.jit(do_not_specialize=["tokens"])
def _rope(
    qkv, q_out, k_out, v_out, q_weight, k_weight, cos, sin, tokens, eps, NORM: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, half: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    angle, q, k, q_alone, k_alone, valid, is_q, is_k = _head_offsets(
        tl.program_id(0) * TOKENS, tokens, heads, groups, half, TOKENS, HEADS, GROUPS, HALF
    )
    c, s = tl.load(cos + angle, valid, 0.0), tl.load(sin + angle, valid, 0.0)
    q1, q2 = _load_halves(qkv + q, half, is_q)
    k1, k2 = _load_halves(qkv + k, half, is_k)
    v1, v2 = _load_halves(qkv + k + 2 * half, half, is_k)
    if NORM:  # what it gives is rounded to the tensors' precision, as where one is done after the other
        channel = tl.arange(0, HALF)[None, None, :]
        kind: tl.constexpr = q_out.dtype.element_ty
        w1, w2 = _load_halves(q_weight + channel, half, channel < half)
        factor = _norm_factor(q1, q2, half, eps)
        q1, q2 = (q1 * factor * w1).to(kind).to(tl.float32), (q2 * factor * w2).to(kind).to(tl.float32)
        w1, w2 = _load_halves(k_weight + channel, half, channel < half)
        factor = _norm_factor(k1, k2, half, eps)
        k1, k2 = (k1 * factor * w1).to(kind).to(tl.float32), (k2 * factor * w2).to(kind).to(tl.float32)
    _store_halves(q_out + q_alone, half, is_q, q1 * c - q2 * s, q2 * c + q1 * s)
    _store_halves(k_out + k_alone, half, is_k, k1 * c - k2 * s, k2 * c + k1 * s)
    _store_halves(v_out + k_alone, half, is_k, v1, v2)


@triton.jit
def _norm_gradient(g1, g2, x1, x2, weight, half, eps, HALF: tl.constexpr):
    """Gradients of both halves of normed heads, and what each value adds to the weight's."""
    channel = tl.arange(0, HALF)[None, None, :]
    w1, w2 = _load_halves(weight + channel, half, channel < half)
    factor = _norm_factor(x1, x2, half, eps)
    x1 *= factor
    x2 *= factor
    d_w1, d_w2 = g1 * x1, g2 * x2
    along = tl.sum(d_w1 * w1 + d_w2 * w2, 2)[:, :, None] / (2 * half)
    return (g1 * w1 - x1 * along) * factor, (g2 * w2 - x2 * along) * factor, d_w1, d_w2


@triton.jit(do_not_specialize=["tokens"])
def _rope_backward(
    q_grad, k_grad, v_grad, qkv, out, q_weight, k_weight, cos, sin, sums, amax, tokens, columns, eps, NORM: tl.constexpr,
    SLOTS: tl.constexpr, APART: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, half: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program, step = tl.program_id(0), tl.num_programs(0) * TOKENS
    sum_q1, sum_k1 = tl.zeros([TOKENS, HEADS, HALF], tl.float32), tl.zeros([TOKENS, GROUPS, HALF], tl.float32)
    sum_q2, sum_k2, sum_v1, sum_v2 = sum_q1, sum_k1, sum_k1, sum_k1
    most = tl.zeros([HALF], tl.float32)
    for start in range(program * TOKENS, tokens, step):
        angle, q, k, q_alone, k_alone, valid, is_q, is_k = _head_offsets(
            start, tokens, heads, groups, half, TOKENS, HEADS, GROUPS, HALF
        )
        c, s = tl.load(cos + angle, valid, 0.0), tl.load(sin + angle, valid, 0.0)
        a1, a2 = _load_halves(q_grad + q_alone, half, is_q)
        b1, b2 = _load_halves(k_grad + k_alone, half, is_k)
        v1, v2 = _load_halves(v_grad + k_alone, half, is_k)
        if NORM:
            x1, x2 = _load_halves(qkv + q, half, is_q)
            y1, y2 = _load_halves(qkv + k, half, is_k)
        q1, q2 = a1 * c + a2 * s, a2 * c - a1 * s
        k1, k2 = b1 * c + b2 * s, b2 * c - b1 * s
        if NORM:
            q1, q2, w1, w2 = _norm_gradient(q1, q2, x1, x2, q_weight, half, eps, HALF)
            sum_q1 += w1
            sum_q2 += w2
            k1, k2, w1, w2 = _norm_gradient(k1, k2, y1, y2, k_weight, half, eps, HALF)
            sum_k1 += w1
            sum_k2 += w2
        else:
            sum_q1 += q1
            sum_q2 += q2
            sum_k1 += k1
            sum_k2 += k2
            sum_v1 += v1
            sum_v2 += v2
        _store_halves(out + q, half, is_q, q1, q2)
        _store_halves(out + k, half, is_k, k1, k2)
        _store_halves(out + k + 2 * half, half, is_k, v1, v2)
        if amax is not None:
            kind: tl.constexpr = out.dtype.element_ty
            largest_q = tl.where(is_q, tl.maximum(tl.abs(q1), tl.abs(q2)), 0.0)
            largest_k = tl.maximum(tl.maximum(tl.abs(k1), tl.abs(k2)), tl.maximum(tl.abs(v1), tl.abs(v2)))
            largest_k = tl.where(is_k, largest_k, 0.0)
            most = tl.maximum(most, tl.max(tl.max(largest_q, 0), 0).to(kind).to(tl.float32))
            most = tl.maximum(most, tl.max(tl.max(largest_k, 0), 0).to(kind).to(tl.float32))
    if amax is not None:
        note_largest(amax, program, most, SLOTS, APART)
    sums += program.to(tl.int64) * columns
    channel = tl.arange(0, HALF)
    if NORM:  # one weight for all heads
        sum_q1, sum_q2, sum_k1, sum_k2 = tl.sum(sum_q1, 0), tl.sum(sum_q2, 0), tl.sum(sum_k1, 0), tl.sum(sum_k2, 0)
        _store_halves(sums + channel, half, channel < half, tl.sum(sum_q1, 0), tl.sum(sum_q2, 0))
        _store_halves(sums + 2 * half + channel, half, channel < half, tl.sum(sum_k1, 0), tl.sum(sum_k2, 0))
    else:  # a bias for every column, in the product's layout; there are as many heads as groups
        head = tl.arange(0, HEADS)[:, None]
        at, inside = sums + head * 6 * half + channel[None, :], (head < heads) & (channel < half)[None, :]
        _store_halves(at, half, inside, tl.sum(sum_q1, 0), tl.sum(sum_q2, 0))
        _store_halves(at + 2 * half, half, inside, tl.sum(sum_k1, 0), tl.sum(sum_k2, 0))
        _store_halves(at + 4 * half, half, inside, tl.sum(sum_v1, 0), tl.sum(sum_v2, 0))


def _shape(heads: int, groups: int, head_dim: int, most: int) -> dict:
    """Sizes that the kernels are compiled for; `most` values of queries, keys and values at a time, or one token's."""
    values = power_of_2(heads + 2 * groups) * power_of_2(head_dim)
    return {
        "heads": heads, "groups": groups, "half": head_dim // 2, "TOKENS": max(1, most // values),
        "HEADS": power_of_2(heads), "GROUPS": power_of_2(groups), "HALF": power_of_2(head_dim // 2),
    }  # fmt: skip


def rope(
    qkv: Tensor, groups: int, cos: Tensor, sin: Tensor, weights: tuple[Tensor, Tensor] | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a product [tokens, groups · (heads a group + 2) · head_dim]: the first two normed, where
    there are weights (RMSNorm of each head), and rotated by the angles of `cos` and `sin` [tokens, 1, head_dim] float32.
    Returns [tokens, heads, head_dim], and [tokens, groups, head_dim] twice."""
    tokens, head_dim = qkv.size(0), cos.size(-1)
    heads = qkv.size(1) // head_dim - 2 * groups
    shape = _shape(heads, groups, head_dim, 2 * TILE)
    q, k, v = (qkv.new_empty(tokens, number, head_dim) for number in (heads, groups, groups))
    q_weight, k_weight = weights or (None, None)
    grid = (cdiv(tokens, shape["TOKENS"]),)
    _rope[grid](qkv, q, k, v, q_weight, k_weight, cos, sin, tokens, eps, weights is not None, **shape, num_warps=WARPS)
    return q, k, v


def rope_backward(
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor | None, cos: Tensor, sin: Tensor, sums: PartialSums,
    weights: tuple[Tensor, Tensor] | None = None, eps: float = 0.0, amax: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of `qkv`, which the norms need. Sums taken: both norms' weights; without norms, the product's bias."""
    (tokens, heads, head_dim), groups = grads[0].shape, grads[1].size(1)
    shape = _shape(heads, groups, head_dim, 4 * TILE)
    width = (heads + 2 * groups) * head_dim
    out = grads[0].new_empty(tokens, width)
    q_weight, k_weight = weights or (None, None)
    partial = sums.take(2 * head_dim if weights else width)
    _rope_backward[len(partial),](
        *grads, qkv, out, q_weight, k_weight, cos, sin, partial, amax, tokens, sums.columns, eps, weights is not None, **shape,
        **PLACES, num_warps=WARPS,
    )  # fmt: skip
    return known(out, amax)


# --- activations ---------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu(
    gate_and_up, out, amax, width: tl.constexpr, pitch: tl.constexpr, SLOTS: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, row * 2 * width + column
    gate, up = _load_halves(gate_and_up + at, width, inside)
    # Two steps, as in Megatron: the first is rounded too.
    opened = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    value = (opened * up).to(out.dtype.element_ty)
    tl.store(out + row * pitch + column, value, inside)
    if amax is not None:
        note_largest(amax, row + tl.program_id(1), tl.where(inside, tl.abs(value.to(tl.float32)), 0.0), SLOTS, APART)


@triton.jit
def _swiglu_backward(
    gate_and_up, grad, out, amax, width: tl.constexpr, pitch: tl.constexpr, AGAIN: tl.constexpr,
    SLOTS: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, row * 2 * width + column
    gate, up = _load_halves(gate_and_up + at, width, inside)
    d_x = tl.load(grad + row * pitch + column, inside, 0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    if AGAIN:
        opened = (gate * share).to(out.dtype.element_ty).to(tl.float32)
        tl.store(grad + row * pitch + column, opened * up, inside)
    d_gate, d_up = d_x * up * share * (1 + gate * (1 - share)), d_x * gate * share
    _store_halves(out + at, width, inside, d_gate, d_up)
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


@triton.jit
def _gelu(x, out, amax, size, SLOTS: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < size, 0.0).to(tl.float32)
    below, _ = _normal(value)
    value = (value * below).to(out.dtype.element_ty)
    tl.store(out + at, value, at < size)
    if amax is not None:
        note_largest(amax, tl.program_id(0), tl.abs(value.to(tl.float32)), SLOTS, APART)


@triton.jit(do_not_specialize=["tokens"])
def _gelu_backward(
    grad,
    x,
    out,
    sums,
    amax,
    tokens,
    columns,
    width: tl.constexpr,
    AGAIN: tl.constexpr,
    SLOTS: tl.constexpr,
    APART: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, total = column < width, tl.zeros([ROWS, BLOCK], tl.float32)
    most = total
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
        d_x = d_x.to(out.dtype.element_ty)
        tl.store(out + at, d_x, mask)
        if amax is not None:
            most = tl.maximum(most, tl.where(mask, tl.abs(d_x.to(tl.float32)), 0.0))
    if amax is not None:
        note_largest(amax, tl.program_id(0) + tl.program_id(1), most, SLOTS, APART)
    tl.store(sums + tl.program_id(0).to(tl.int64) * columns + column, tl.sum(total, 0), inside)


def gelu(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """The exact GELU, of any shape."""
    out = torch.empty_like(x)
    _gelu[cdiv(x.numel(), 2048),](x, out, amax, x.numel(), **PLACES, BLOCK=2048, num_warps=WARPS)
    return known(out, amax)


def gelu_backward(
    grad: Tensor, x: Tensor, sums: PartialSums, again: bool = False, amax: Tensor | None = None
) -> Tensor:
    """Gradient of x [tokens, width]. Sums taken: that gradient, of the bias before it. `again`: gelu(x) takes the place of
    `grad`."""
    (tokens, width), out = x.shape, torch.empty_like(x)
    partial, block = sums.take(width), min(1024, power_of_2(width))
    grid = (len(partial), cdiv(width, block))
    _gelu_backward[grid](
        grad, x, out, partial, amax, tokens, sums.columns, width, again, **PLACES, ROWS=TILE // 2 // block, BLOCK=block,
        num_warps=WARPS,
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
