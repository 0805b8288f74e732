"""Attention over segments: many sequences or images in one call, none of which sees another.

Notable:
- `SegmentAttention` is Megatron's core attention for machines without Transformer Engine: PyTorch's SDPA, causal or
  full, over a padded batch or over packed segments. Runs of segments of one length go through as one batch.
- `VisionAttention` wraps either core attention and rotates queries and keys by the 2-D rotary angles of the patches.
  Megatron's own rotary embedding would count positions in one dimension, and read lengths back from the GPU.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


def packed_seq_params(lengths: list[int], device: torch.device, cls=PackedSeqParams, **extra) -> PackedSeqParams:
    """Megatron's description of segments of `lengths` tokens that lie one behind another ("thd" layout)."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    params = cls(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        **extra,
    )
    params.lengths = lengths  # the host's copy: reading `cu_seqlens_q` back would stall a GPU
    if cls is PackedSeqParams:  # for the fused layers of the language model: what the first finds out for all of them
        positions = torch.cat([torch.arange(length) for length in lengths])
        params.positions = positions.to(device, non_blocking=True)
        params.rope, params.keeps_inputs = None, False  # cosine and sine; has_memory_for_inputs
    return params


@dataclass
class VisionSeqParams(PackedSeqParams):
    """Segments = images, with the cosine and sine of every token's rotary angles, [tokens, 1, head_dim]."""

    rotary_cos: Tensor = None
    rotary_sin: Tensor = None


class SegmentAttention(MegatronModule):
    """Scaled dot-product attention of Megatron's local layer spec.

    Query [tokens, batch, heads, head_dim], key and value with `num_query_groups` heads; with `packed_seq_params`
    the batch dimension is absent and the segments stand one behind another. Returns [tokens, batch, heads·head_dim]
    (packed: [tokens, heads·head_dim]). Padding must stand behind the text: causality keeps it invisible.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **kwargs):
        super().__init__(config=config)
        if config.attention_dropout:
            raise ValueError(f"attention_dropout is {config.attention_dropout}: SegmentAttention has no dropout")
        self.causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [batch, heads, tokens, head_dim]
            return self._sdpa(q, k, v).permute(2, 0, 1, 3).flatten(2)
        outputs, start = [], 0
        for length, run in groupby(packed_seq_params.lengths):
            count = len(list(run))
            stop = start + count * length
            # [segments, heads, length, head_dim]
            q, k, v = (x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
            outputs.append(self._sdpa(q, k, v).transpose(1, 2).flatten(0, 1))
            start = stop
        return torch.cat(outputs).flatten(1)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=self.softmax_scale, enable_gqa=q.size(1) != k.size(1)
        )

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [tokens, heads, head_dim] by angles in float32; the two halves of head_dim form the pairs ("rotate half")."""
    x32 = x.float()
    first, second = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def vision_attention(core_attention: type) -> type:
    """`core_attention` (this file's, or Transformer Engine's) with the patches' rotary angles applied before it."""

    class VisionAttention(core_attention):
        def forward(self, query, key, value, *args, packed_seq_params: VisionSeqParams, **kwargs):
            cos, sin = packed_seq_params.rotary_cos, packed_seq_params.rotary_sin
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)

    return VisionAttention
