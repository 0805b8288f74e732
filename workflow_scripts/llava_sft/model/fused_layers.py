"""The layers of both towers for GPUs: Megatron's parameters, forward and backward written out.

Notable:
- they compute with the parameters of Megatron's Transformer Engine layers: checkpoints, optimizer and names stay the same;
- a layer is one autograd function: matrix products of cuBLAS, in bf16 or FP8, attention of cuDNN, and one kernel for all
  that stands between two of them (kernels.py), with which residuals and the gradients of biases and norms go along;
- attention is over all samples or images at once, called without the layers of Transformer Engine that choose it: they
  cost the host 0.7 ms a call, and would fall back to a slow kernel without a word;
- where weights are frozen, what is cheap to make again is not kept (LoRA: 38 % of the activations).
Why: a layer of Megatron's costs the host 2.6 ms however small it is, q/k norms alone took 5 % of a step, and the rows of
the vision tower are so short that element-wise kernels took as long as products (docs/performance.md).
"""

from contextlib import suppress

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from llava_sft.model.attention import VisionSeqParams
from llava_sft.model.kernels import (
    Sums,
    gelu,
    gelu_backward,
    norm,
    norm_backward,
    swiglu,
    swiglu_backward,
    turn,
    turn_backward,
)
from llava_sft.model.products import product, product_backward, trainable

with suppress(ImportError):  # a machine without them has Megatron's local layers
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd, fused_attn_fwd


# --- attention -----------------------------------------------------------------------------------------------------


def _kind(segments: PackedSeqParams, causal: bool) -> tuple[tuple, dict]:
    ends, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    return (longest, longest, ends, ends), {
        "cu_seqlens_q_padded": ends,
        "cu_seqlens_kv_padded": ends,
        "qkv_layout": "thd_thd_thd",
        "o_format": "thd",
        "attn_mask_type": "padding_causal" if causal else "padding",
        "window_size": (-1, 0) if causal else (-1, -1),
    }


def attend(query: Tensor, key: Tensor, value: Tensor, segments: PackedSeqParams, causal: bool) -> tuple[Tensor, list]:
    """Scaled dot-product attention inside each segment: query [tokens, heads, head_dim], key and value with as many
    heads or fewer → [tokens, heads, head_dim], and statistics for the gradient."""
    sizes, kind = _kind(segments, causal)
    backend = FusedAttnBackend["F16_arbitrary_seqlen"]
    return fused_attn_fwd(True, *sizes, query, key, value, query.dtype, backend, **kind)


def attend_backward(
    grad: Tensor, inputs: tuple, out: Tensor, statistics: list, segments: PackedSeqParams, causal: bool
):
    """Gradients of query, key and value."""
    sizes, kind = _kind(segments, causal)
    backend = FusedAttnBackend["F16_arbitrary_seqlen"]
    exact = torch.are_deterministic_algorithms_enabled()
    given = *sizes, *inputs, out, grad.view_as(out), grad.dtype, statistics, backend
    return fused_attn_bwd(*given, do_format="thd", dqkv_layout="thd_thd_thd", deterministic=exact, **kind)[:3]


# --- language model ------------------------------------------------------------------------------------------------


class LanguageLayer(torch.autograd.Function):
    """Residual stream [tokens, hidden] → the same. Megatron's layer has the parameters; autograd wants to see them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, layer: TransformerLayer, segments: PackedSeqParams, *parameters: Tensor) -> Tensor:
        attention, mlp, config = layer.self_attention, layer.mlp, layer.config
        recipe, eps = config.fp8 and config.fp8_recipe, config.layernorm_epsilon
        head_norms = attention.q_layernorm.weight, attention.k_layernorm.weight
        _, x, _, first_scale = norm(hidden, attention.linear_qkv.layer_norm_weight, None, eps)
        qkv, for_qkv = product(x, attention.linear_qkv, recipe)
        cos, sin = segments.turn
        inputs = turn(qkv, config.num_query_groups, cos, sin, head_norms, eps)
        attended, statistics = attend(*inputs, segments, True)
        change, for_proj = product(attended.flatten(1), attention.linear_proj, recipe)
        middle, x, _, second_scale = norm(hidden, mlp.linear_fc1.layer_norm_weight, None, eps, change)
        gate_and_up, for_fc1 = product(x, mlp.linear_fc1, recipe)
        change, for_fc2 = product(swiglu(gate_and_up), mlp.linear_fc2, recipe)
        ctx.given = layer, segments, recipe, eps, head_norms
        ctx.kept = hidden, first_scale, qkv, attended, statistics, middle, second_scale, gate_and_up
        ctx.inputs = inputs if attention.linear_qkv.weight.requires_grad else None
        ctx.operands = for_qkv, for_proj, for_fc1, for_fc2
        return middle + change

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, segments, recipe, eps, head_norms = ctx.given
        hidden, first_scale, qkv, attended, statistics, middle, second_scale, gate_and_up = ctx.kept
        inputs, (for_qkv, for_proj, for_fc1, for_fc2) = ctx.inputs, ctx.operands
        ctx.kept = ctx.inputs = ctx.operands = None  # or the inputs of all layers would live until the whole graph goes
        attention, mlp, grad = layer.self_attention, layer.mlp, grad.contiguous()
        width, head_dim = hidden.size(1), head_norms[0].numel()
        sums = Sums(2 * (width + head_dim), hidden.device)
        first_norm, second_norm = attention.linear_qkv.layer_norm_weight, mlp.linear_fc1.layer_norm_weight
        change, of_fc2 = product_backward(grad, for_fc2, mlp.linear_fc2, lambda: swiglu(gate_and_up), recipe)
        change, of_fc1 = product_backward(
            swiglu_backward(gate_and_up, change), for_fc1, mlp.linear_fc1,
            lambda: norm(middle, second_norm, None, eps)[1], recipe,
        )  # fmt: skip
        grad = norm_backward(change, middle, second_norm, None, second_scale, grad, sums)
        change, of_proj = product_backward(grad, for_proj, attention.linear_proj, lambda: attended.flatten(1), recipe)
        cos, sin = segments.turn
        inputs = inputs or turn(qkv, layer.config.num_query_groups, cos, sin, head_norms, eps)
        changes = attend_backward(change, inputs, attended, statistics, segments, True)
        change = turn_backward(changes, qkv, cos, sin, sums, head_norms, eps)
        change, of_qkv = product_backward(
            change, for_qkv, attention.linear_qkv, lambda: norm(hidden, first_norm, None, eps)[1], recipe
        )
        grad = norm_backward(change, hidden, first_norm, None, first_scale, grad, sums)
        of_norms = sums.totals([width, head_dim, head_dim, width], hidden.dtype)
        return grad, None, None, *of_norms, *of_qkv, *of_proj, *of_fc1, *of_fc2


class FusedLanguageLayer(TransformerLayer):
    """Megatron's layer of the language model; packed samples take the way described above, without tensor parallelism."""

    def forward(self, hidden_states: Tensor, packed_seq_params: PackedSeqParams | None = None, **named):
        """[tokens, 1, hidden] of the samples of a pack → the same, and None for cross attention's context."""
        attention, mlp = self.self_attention, self.mlp
        if packed_seq_params is None or attention.checkpoint_core_attention:
            return super().forward(hidden_states=hidden_states, packed_seq_params=packed_seq_params, **named)
        if packed_seq_params.turn is None:  # the same for all layers
            angles = named["rotary_pos_emb"][packed_seq_params.positions, 0]  # [tokens, 1, head_dim]
            packed_seq_params.turn = angles.cos(), angles.sin()
        parameters = (
            mlp.linear_fc1.layer_norm_weight,
            attention.q_layernorm.weight,
            attention.k_layernorm.weight,
            attention.linear_qkv.layer_norm_weight,
            *trainable(attention.linear_qkv),
            *trainable(attention.linear_proj),
            *trainable(mlp.linear_fc1),
            *trainable(mlp.linear_fc2),
        )
        hidden = LanguageLayer.apply(hidden_states.squeeze(1), self, packed_seq_params, *parameters)
        return hidden.unsqueeze(1), None


# --- vision tower --------------------------------------------------------------------------------------------------


class VisionLayer(torch.autograd.Function):
    """Residual stream of all images [tokens, hidden] → the same."""

    @staticmethod
    def forward(ctx, hidden: Tensor, layer: TransformerLayer, segments: VisionSeqParams, *parameters: Tensor) -> Tensor:
        attention, fc1, fc2 = layer.self_attention, layer.mlp.linear_fc1, layer.mlp.linear_fc2
        linear_qkv, proj, eps = attention.linear_qkv, attention.linear_proj, layer.config.layernorm_epsilon
        angles = segments.rotary_cos, segments.rotary_sin
        _, x, *first_norm = norm(hidden, linear_qkv.layer_norm_weight, linear_qkv.layer_norm_bias, eps)
        qkv, for_qkv = product(x, linear_qkv, bias=linear_qkv.bias)
        inputs = turn(qkv, layer.config.num_query_groups, *angles)
        attended, statistics = attend(*inputs, segments, False)
        change, for_proj = product(attended.flatten(1), proj, bias=proj.bias)
        middle, x, *second_norm = norm(hidden, fc1.layer_norm_weight, fc1.layer_norm_bias, eps, change)
        before, for_fc1 = product(x, fc1, bias=fc1.bias)
        change, for_fc2 = product(gelu(before), fc2, bias=fc2.bias)
        ctx.given = layer, segments, angles, eps
        ctx.kept = hidden, first_norm, inputs, attended, statistics, middle, second_norm, before
        ctx.operands = for_qkv, for_proj, for_fc1, for_fc2
        return middle + change

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, segments, (cos, sin), eps = ctx.given
        hidden, first_norm, inputs, attended, statistics, middle, second_norm, before = ctx.kept
        for_qkv, for_proj, for_fc1, for_fc2 = ctx.operands
        ctx.kept = ctx.operands = None
        attention, fc1, fc2, grad = layer.self_attention, layer.mlp.linear_fc1, layer.mlp.linear_fc2, grad.contiguous()
        qkv, proj = attention.linear_qkv, attention.linear_proj

        def normed(x: Tensor, linear: torch.nn.Module) -> Tensor:
            return norm(x, linear.layer_norm_weight, linear.layer_norm_bias, eps)[1]

        width, inner = hidden.size(1), before.size(1)
        sums = Sums(9 * width + inner, hidden.device)
        change, of_fc2 = product_backward(grad, for_fc2, fc2, lambda: gelu(before))
        change, of_fc1 = product_backward(
            gelu_backward(change, before, sums), for_fc1, fc1, lambda: normed(middle, fc1)
        )
        mean, scale = second_norm
        grad = norm_backward(change, middle, fc1.layer_norm_weight, mean, scale, grad, sums, biases=True)
        change, of_proj = product_backward(grad, for_proj, proj, lambda: attended.flatten(1))
        changes = attend_backward(change, inputs, attended, statistics, segments, False)
        change = turn_backward(changes, None, cos, sin, sums)
        change, of_qkv = product_backward(change, for_qkv, qkv, lambda: normed(hidden, qkv))
        mean, scale = first_norm
        grad = norm_backward(change, hidden, qkv.layer_norm_weight, mean, scale, grad, sums)
        totals = sums.totals([inner, width, width, width, width, 3 * width, width, width], hidden.dtype)
        return grad, None, None, *totals, *of_qkv, *of_proj, *of_fc1, *of_fc2


class FusedVisionLayer(TransformerLayer):
    """Megatron's layer of the vision tower; parameters without tensor parallelism."""

    def forward(self, hidden_states: Tensor, packed_seq_params: VisionSeqParams, **unused) -> tuple[Tensor, None]:
        """[tokens, 1, hidden] of all images → the same, and None for cross attention's context."""
        qkv, proj = self.self_attention.linear_qkv, self.self_attention.linear_proj
        fc1, fc2 = self.mlp.linear_fc1, self.mlp.linear_fc2
        small = (
            fc1.bias,
            fc1.layer_norm_weight,
            fc1.layer_norm_bias,
            fc2.bias,
            proj.bias,
            qkv.bias,
            qkv.layer_norm_weight,
            qkv.layer_norm_bias,
        )
        linears = (each for module in (qkv, proj, fc1, fc2) for each in trainable(module))
        hidden = VisionLayer.apply(hidden_states.squeeze(1), self, packed_seq_params, *small, *linears)
        return hidden.unsqueeze(1), None
