"""Triton kernels between the product that makes queries, keys and values and attention: norms of heads, and the rotation.

The product lays them out group by group: the queries of a group, its key, its value; in the vision tower, where each head has
a key of its own, head by head. A head is two halves, which form the pairs that are rotated.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv
from triton import next_power_of_2 as power_of_2

from llava_sft.model.casts import note_largest
from llava_sft.model.kernels import PLACES, TILE, WARPS, PartialSums, known, load_halves, store_halves
from llava_sft.model.launches import Remembered


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


@Remembered
@triton.jit(do_not_specialize=["tokens"])
def _rope(
    qkv, q_out, k_out, v_out, q_weight, k_weight, cos, sin, tokens, eps, NORM: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, half: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    angle, q, k, q_alone, k_alone, valid, is_q, is_k = _head_offsets(
        tl.program_id(0) * TOKENS, tokens, heads, groups, half, TOKENS, HEADS, GROUPS, HALF
    )
    c, s = tl.load(cos + angle, valid, 0.0), tl.load(sin + angle, valid, 0.0)
    q1, q2 = load_halves(qkv + q, half, is_q)
    k1, k2 = load_halves(qkv + k, half, is_k)
    v1, v2 = load_halves(qkv + k + 2 * half, half, is_k)
    if NORM:  # what it gives is rounded to the tensors' precision, as where one is done after the other
        channel = tl.arange(0, HALF)[None, None, :]
        kind: tl.constexpr = q_out.dtype.element_ty
        w1, w2 = load_halves(q_weight + channel, half, channel < half)
        factor = _norm_factor(q1, q2, half, eps)
        q1, q2 = (q1 * factor * w1).to(kind).to(tl.float32), (q2 * factor * w2).to(kind).to(tl.float32)
        w1, w2 = load_halves(k_weight + channel, half, channel < half)
        factor = _norm_factor(k1, k2, half, eps)
        k1, k2 = (k1 * factor * w1).to(kind).to(tl.float32), (k2 * factor * w2).to(kind).to(tl.float32)
    store_halves(q_out + q_alone, half, is_q, q1 * c - q2 * s, q2 * c + q1 * s)
    store_halves(k_out + k_alone, half, is_k, k1 * c - k2 * s, k2 * c + k1 * s)
    store_halves(v_out + k_alone, half, is_k, v1, v2)


@triton.jit
def _norm_gradient(g1, g2, x1, x2, weight, half, eps, HALF: tl.constexpr):
    """Gradients of both halves of normed heads, and what each value adds to the weight's."""
    channel = tl.arange(0, HALF)[None, None, :]
    w1, w2 = load_halves(weight + channel, half, channel < half)
    factor = _norm_factor(x1, x2, half, eps)
    x1 *= factor
    x2 *= factor
    d_w1, d_w2 = g1 * x1, g2 * x2
    along = tl.sum(d_w1 * w1 + d_w2 * w2, 2)[:, :, None] / (2 * half)
    return (g1 * w1 - x1 * along) * factor, (g2 * w2 - x2 * along) * factor, d_w1, d_w2


@Remembered
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
        a1, a2 = load_halves(q_grad + q_alone, half, is_q)
        b1, b2 = load_halves(k_grad + k_alone, half, is_k)
        v1, v2 = load_halves(v_grad + k_alone, half, is_k)
        if NORM:
            x1, x2 = load_halves(qkv + q, half, is_q)
            y1, y2 = load_halves(qkv + k, half, is_k)
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
        store_halves(out + q, half, is_q, q1, q2)
        store_halves(out + k, half, is_k, k1, k2)
        store_halves(out + k + 2 * half, half, is_k, v1, v2)
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
        store_halves(sums + channel, half, channel < half, tl.sum(sum_q1, 0), tl.sum(sum_q2, 0))
        store_halves(sums + 2 * half + channel, half, channel < half, tl.sum(sum_k1, 0), tl.sum(sum_k2, 0))
    else:  # a bias for every column, in the product's layout; there are as many heads as groups
        head = tl.arange(0, HEADS)[:, None]
        at, inside = sums + head * 6 * half + channel[None, :], (head < heads) & (channel < half)[None, :]
        store_halves(at, half, inside, tl.sum(sum_q1, 0), tl.sum(sum_q2, 0))
        store_halves(at + 2 * half, half, inside, tl.sum(sum_k1, 0), tl.sum(sum_k2, 0))
        store_halves(at + 4 * half, half, inside, tl.sum(sum_v1, 0), tl.sum(sum_v2, 0))


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
