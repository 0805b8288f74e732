"""Attention of FlashAttention-4 (`flash-attn-4`, CuTe DSL) over segments on Hopper, for the fused layers.

Notable:
- its Python function picks a compiled kernel by some 80 properties of a call, which costs the host more than short attention
  costs the GPU: it is called once for each kind of call, and what it compiled is called directly from then on;
- nothing is filled with zeros but the sums of keys' and values' gradients over the heads of a group;
- on an H200 packs of 8,192 tokens take 5 % less time than with cuDNN's (docs/performance.md);
- its gradients of queries are sums in any order: deterministic runs keep cuDNN's.
Kernels are compiled at the first call, for some 10 s each, and kept in a folder of the machine.
"""

import logging
import math
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llava_sft.gpu_stack import flash4_trouble, flash4_version

LONG = 192  # tokens of the longest segment: below, kernels differ by it (of one tile, or of several)
MANY = 256  # segments: above, kernels want a table of them
# By `causal`: False is the vision tower, True the language model.
FASTER = {False, True}  # what `attention: auto` takes it for: on an H200 all shapes of 4B are, by 1.1 to 1.4
_chosen: set[bool] = set()
_failed: set[bool] = set()


def choose(attention: str) -> None:
    """What the setting says: `auto` (where it is faster and installed), `cudnn` or `flash4` (in both towers)."""
    _chosen.clear()
    _failed.clear()
    if attention == "flash4" or (attention == "auto" and flash4_version() and _is_hopper()):
        _chosen.update(FASTER if attention == "auto" else {False, True})
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def _is_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


def wanted(causal: bool) -> bool:
    """Whether attention of the language model (`causal`) or of the vision tower goes this way."""
    return causal in _chosen - _failed and not torch.are_deterministic_algorithms_enabled()


def tower(causal: bool) -> str:
    return "language model" if causal else "vision tower"


def give_up(causal: bool, error: BaseException) -> None:
    """From now on cuDNN's; says so once."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    logging.getLogger(__name__).warning(
        "FlashAttention-4 is not used in the %s, cuDNN's attention is: %s", tower(causal), reason
    )
    _failed.add(causal)


@cache
def _interface() -> Any:
    if trouble := flash4_trouble():
        raise ImportError(trouble.what)
    from flash_attn.cute import interface

    if torch.cuda.is_available() and not _is_hopper():
        raise ImportError("the GPU is no Hopper")
    return interface


class _Calls:
    """In the place of a cache of compiled kernels: also notes each kernel that is called, with its arguments."""

    def __init__(self, kept: Any, calls: list):
        self.kept, self.calls = kept, calls

    def __contains__(self, key) -> bool:
        return key in self.kept

    def __setitem__(self, key, kernel) -> None:
        self.kept[key] = kernel

    def __getitem__(self, key):
        kernel = self.kept[key]

        def call(*given):
            self.calls.append((kernel, given))
            return kernel(*given)

        return call


def _recorded(function: Any, *given, **named) -> list:
    """[(kernel, its arguments)] of a call of FlashAttention's."""
    found = _interface()
    calls: list[tuple] = []
    owners = (found._flash_attn_fwd, found._flash_attn_bwd, found._bwd_preprocess, found._bwd_postprocess_convert)
    kept = [owner.compile_cache for owner in owners]
    try:
        for owner, compiled in zip(owners, kept, strict=True):
            owner.compile_cache = _Calls(compiled, calls)
        function(*given, **named)
    finally:
        for owner, compiled in zip(owners, kept, strict=True):
            owner.compile_cache = compiled
    return calls


def _same(found: Any, ours: Any) -> bool:
    """Whether two arguments mean the same to a kernel; of its own working memory, shape and type must be ours."""
    if torch.is_tensor(ours) and torch.is_tensor(found):
        return found.shape == ours.shape and found.dtype == ours.dtype and found.stride() == ours.stride()
    if isinstance(ours, tuple) and isinstance(found, tuple):
        return all(map(_same, found, ours))
    return found == ours if isinstance(ours, float) else found is ours is None


def _checked(calls: list, ours: list[tuple]) -> tuple:
    """The kernels, if they were called with what we shall call them with."""
    if len(calls) != len(ours):
        raise RuntimeError(f"{len(calls)} kernels in the place of {len(ours)}")
    for number, ((_, found), given) in enumerate(zip(calls, ours, strict=True)):
        if len(found) != len(given) or not all(map(_same, found, given)):
            raise RuntimeError(f"kernel {number} takes other arguments than expected")
    return tuple(kernel for kernel, _ in calls)


_kernels: dict[tuple, tuple] = {}  # (backward, heads, groups, head_dim, causal) → compiled kernels


def _ordinary(segments: Any) -> bool:
    return segments.max_seqlen_q > LONG and len(segments.cu_seqlens_q) - 1 <= MANY


def _named(segments: Any, causal: bool) -> dict:
    ends, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    return {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "causal": causal,
    }


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Any, causal: bool) -> tuple[Tensor, list]:
    """As fused_layers.attend; what the gradient needs is the log-sum-exp, [heads, tokens] float32."""
    (tokens, heads, head_dim), groups = query.shape, key.size(1)
    found, out = _interface(), torch.empty_like(query)
    sums = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    if not _ordinary(segments):
        found._flash_attn_fwd(query, key, value, out=out, lse=sums, **_named(segments, causal))
        return out, [sums]
    ends, scale = segments.cu_seqlens_q, 1.0 / math.sqrt(head_dim)
    given = (query, key, value, out, sums, scale, ends, ends, *(None,) * 7, found.AuxData(None, None), None, None)
    kind = (False, heads, groups, head_dim, causal)
    if kind in _kernels:
        _kernels[kind][0](*given)
    else:
        calls = _recorded(found._flash_attn_fwd, query, key, value, out=out, lse=sums, **_named(segments, causal))
        _kernels[kind] = _checked(calls, [given])
        attend_backward(torch.zeros_like(out), (query, key, value), out, [sums], segments, causal)  # or it fails here
        if os.environ.get("RANK", "0") == "0":
            print(f"attention of the {tower(causal)}: FlashAttention-4, {flash4_version()}")
    return out, [sums]


def attend_backward(grad: Tensor, inputs: tuple, out: Tensor, statistics: list, segments: Any, causal: bool) -> tuple:
    """Gradients of query, key and value, as fused_layers.attend_backward."""
    (query, key, value), (sums,), found = inputs, statistics, _interface()
    gradients = tuple(map(torch.empty_like, inputs))
    named = _named(segments, causal) | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    if not _ordinary(segments):
        found._flash_attn_bwd(query, key, value, out, grad, sums, **named)
        return gradients
    given = _backward_arguments(grad, inputs, out, sums, segments.cu_seqlens_q, causal, gradients)
    kind = (True, query.size(1), key.size(1), query.size(2), causal)
    if kind not in _kernels:
        calls = _recorded(found._flash_attn_bwd, query, key, value, out, grad, sums, **named)
        _kernels[kind] = _checked(calls, given)
        return gradients
    for kernel, arguments in zip(_kernels[kind], given, strict=True):
        kernel(*arguments)
    return gradients


def _backward_arguments(
    grad: Tensor, inputs: tuple, out: Tensor, sums: Tensor, ends: Tensor, causal: bool, gradients: tuple
) -> list[tuple]:
    """What the kernels are called with: one before, the main one, and one for each gradient that is summed in float32."""
    found, (query, key, value) = _interface(), inputs
    (tokens, heads, head_dim), groups, scale = query.shape, key.size(1), 1.0 / math.sqrt(query.size(2))
    tiles = found._tile_size_bwd_sm90(head_dim, head_dim, causal, False)
    even = 64 if tiles.dKV_swapAB else 32
    width = -(-head_dim // even) * even

    def padded(tile: int) -> int:  # every segment begins a tile of its own
        return (tokens + len(ends) * tile - 1) // tile * tile

    rows, float32 = padded(tiles.m_block_size), {"dtype": torch.float32, "device": query.device}
    d_query = torch.empty(heads, rows * width, **float32)
    products, logarithms = torch.empty(2, heads, rows, **float32).unbind()
    in_place = gradients[1:]
    if heads != groups:
        in_place = torch.zeros(2, groups, padded(tiles.n_block_size) * width, **float32).unbind()
    nothing = found.AuxData(None, None)
    before = (out, grad, products, sums, logarithms, d_query, ends, None, None, None, None, 1.0, None, None)
    main = (query, key, value, grad, logarithms, products, d_query, *in_place, scale, ends, ends)
    calls = [before, (*main, *(None,) * 7, nothing, None, None), (d_query, gradients[0], scale, ends, None, None, None)]
    if heads != groups:
        for summed, gradient, factor in zip(in_place, gradients[1:], (scale, 1.0), strict=True):
            calls.append((summed, gradient, factor, ends, None, None, None))
    return calls
