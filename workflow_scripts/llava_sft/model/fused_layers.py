"""The layers of both towers for GPUs: Megatron's parameters, forward and backward written out.

Notable:
- they compute with the parameters of Megatron's Transformer Engine layers: checkpoints, optimizer and names stay the same;
- a layer is one autograd function: matrix products of cuBLAS, in bf16 or FP8, attention of cuDNN, and one kernel for all
  that stands between two of them (kernels.py, rotary.py, activations.py), with which residuals and the gradients of biases
  and norms go along;
- attention is over all samples or images at once, called without the layers of Transformer Engine that choose it: they
  cost the host 0.7 ms a call, and would fall back to a slow kernel without a word. Where cuDNN's cannot take segments
  (GPUs other than Hopper and Blackwell's data-centre ones), it is PyTorch's FlashAttention-2;
- tensor-parallel ranks have heads and columns of the MLP each, and sum what their halves of a layer add to the residual
  stream, and its gradient while that of the weight is computed;
- where weights are frozen, what is cheap to compute again is saved where a GPU has memory to spare, and else not (LoRA: 38 %
  of the activations).
Why: a layer of Megatron's costs the host 2.6 ms however small it is, q/k norms alone took 5 % of a step, and the rows of
the vision tower are so short that element-wise kernels took as long as products (docs/performance.md).
"""

from contextlib import suppress
from functools import cache, partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from llava_sft.model import flash4
from llava_sft.model.activations import gelu, gelu_backward, swiglu, swiglu_backward
from llava_sft.model.attention import VisionSeqParams
from llava_sft.model.casts import handed
from llava_sft.model.kernels import PartialSums, norm, norm_backward
from llava_sft.model.products import move_back, places, product, product_backward, room_beside, summed, trainable
from llava_sft.model.rotary import rope, rope_backward
from llava_sft.model.trained import SPARED

with suppress(ImportError):  # a machine without them has Megatron's local layers
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd, fused_attn_fwd


# --- attention -----------------------------------------------------------------------------------------------------


@cache
def has_cudnn_attention() -> bool:
    """Whether cuDNN's attention is right for segments on this GPU. Transformer Engine's own rule is compute capability 9.0
    and newer: below, gradients may be wrong without an error. On 12.0 it depends on cuDNN's version: not asked for."""
    return torch.cuda.get_device_capability() >= (9, 0) and torch.cuda.get_device_capability() < (12, 0)


def _cudnn(segments: PackedSeqParams, causal: bool) -> tuple[tuple, dict]:
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
    heads or fewer → [tokens, heads, head_dim], and statistics for the gradient. Of cuDNN, or PyTorch's FlashAttention-2."""
    if flash4.wanted(causal):
        try:
            return flash4.attend(query, key, value, segments, causal)
        except torch.OutOfMemoryError:  # says nothing about it
            raise
        except Exception as error:
            flash4.give_up(causal, error)
    sizes, kind = _cudnn(segments, causal)
    if has_cudnn_attention():
        backend = FusedAttnBackend["F16_arbitrary_seqlen"]
        return fused_attn_fwd(True, *sizes, query, key, value, query.dtype, backend, **kind)
    longest, _, *ends = sizes
    flash = torch.ops.aten._flash_attention_forward
    out, *statistics = flash(query, key, value, *ends, longest, longest, 0.0, causal, False)
    return out, statistics[:3]  # log-sum-exp, and the state of a dropout that there is none of


def attend_backward(
    grad: Tensor, inputs: tuple, out: Tensor, statistics: list, segments: PackedSeqParams, causal: bool
):
    """Gradients of query, key and value."""
    sizes, kind = _cudnn(segments, causal)
    grad = grad.view_as(out)
    if len(statistics) == 1:
        return flash4.attend_backward(grad, inputs, out, statistics, segments, causal)
    if has_cudnn_attention():
        backend, exact = FusedAttnBackend["F16_arbitrary_seqlen"], torch.are_deterministic_algorithms_enabled()
        given = *sizes, *inputs, out, grad, grad.dtype, statistics, backend
        return fused_attn_bwd(*given, do_format="thd", dqkv_layout="thd_thd_thd", deterministic=exact, **kind)[:3]
    longest, _, *ends = sizes
    sums, *state = statistics
    flash = torch.ops.aten._flash_attention_backward
    return flash(grad, *inputs, out, sums, *ends, longest, longest, 0.0, causal, *state)


# --- language model ------------------------------------------------------------------------------------------------


class LanguageLayer(torch.autograd.Function):
    """Residual stream [tokens, hidden] → the same. Megatron's layer has the parameters; autograd wants to see them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, layer: TransformerLayer, segments: PackedSeqParams, *parameters: Tensor) -> Tensor:
        attention, mlp, config = layer.self_attention, layer.mlp, layer.config
        recipe, eps = config.fp8 and config.fp8_recipe, config.layernorm_epsilon
        head_norms = attention.q_layernorm.weight, attention.k_layernorm.weight
        room = room_beside(attention.linear_qkv, recipe)
        amax = partial(places, recipe, hidden.device)
        qkv_norm = attention.linear_qkv.layer_norm_weight
        _, for_heads, _, first_scale = norm(hidden, qkv_norm, None, eps, room=room, amax=amax())
        qkv, for_qkv = product(for_heads, attention.linear_qkv, recipe)
        cos, sin = segments.rope
        groups, ranks = attention.num_query_groups_per_partition, attention.pg_collection.tp
        inputs = rope(qkv, groups, cos, sin, head_norms, eps)
        attended, statistics = attend(*inputs, segments, True)
        branch, for_proj = product(attended.flatten(1), attention.linear_proj, recipe)
        fc1_norm, branch = mlp.linear_fc1.layer_norm_weight, summed(branch, ranks)
        middle, x, _, second_scale = norm(hidden, fc1_norm, None, eps, branch, room, amax())
        gate_and_up, for_fc1 = product(x, mlp.linear_fc1, recipe)
        opened = swiglu(gate_and_up, room, amax())
        branch, for_fc2 = product(opened, mlp.linear_fc2, recipe)
        ctx.constants = layer, segments, recipe, eps, head_norms, room
        ctx.saved = hidden, first_scale, qkv, attended, statistics, middle, second_scale, gate_and_up
        ctx.inputs = inputs if attention.linear_qkv.weight.requires_grad or segments.keeps_inputs else None
        pairs = segments.keeps_inputs and hasattr(mlp.linear_fc1, "lora_a")
        ctx.kept = (for_heads, x, opened) if pairs else None
        ctx.operands = for_qkv, for_proj, for_fc1, for_fc2
        return middle + summed(branch, ranks)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, segments, recipe, eps, head_norms, room = ctx.constants
        hidden, first_scale, qkv, attended, statistics, middle, second_scale, gate_and_up = ctx.saved
        inputs, (for_qkv, for_proj, for_fc1, for_fc2) = ctx.inputs, ctx.operands
        x_of_qkv, x_of_fc1, x_of_fc2 = ctx.kept or (None, None, None)
        again = hasattr(layer.mlp.linear_fc1, "lora_a") and not ctx.kept  # x is written in the place of its gradient
        ctx.saved = ctx.inputs = ctx.kept = ctx.operands = None  # or they would live until the whole graph goes
        attention, mlp = layer.self_attention, layer.mlp
        width, head_dim = hidden.size(1), head_norms[0].numel()
        if grad.stride() != (width + room, 1):  # it comes from another kind of layer
            grad = grad.contiguous()
        handed(segments).take(grad)
        amax = partial(places, recipe, hidden.device)
        sums = PartialSums(2 * (width + head_dim), hidden.device)
        qkv_norm, fc1_norm = attention.linear_qkv.layer_norm_weight, mlp.linear_fc1.layer_norm_weight
        through_swiglu = partial(swiglu_backward, gate_and_up=gate_and_up, again=again, amax=amax())
        through_norm = partial(norm_backward, bias=None, mean=None, sums=sums, room=room, again=again)
        d_x, d_fc2 = product_backward(grad, for_fc2, mlp.linear_fc2, through_swiglu, recipe, x_of_fc2)
        before = partial(through_norm, x=middle, weight=fc1_norm, scale=second_scale, residual=grad, amax=amax())
        groups, ranks = attention.num_query_groups_per_partition, attention.pg_collection.tp
        grad, d_fc1 = product_backward(d_x, for_fc1, mlp.linear_fc1, before, recipe, x_of_fc1, ranks)
        cos, sin = segments.rope
        inputs = inputs or rope(qkv, groups, cos, sin, head_norms, eps)
        given = {"inputs": inputs, "out": attended, "statistics": statistics, "segments": segments}
        before, x = partial(attend_backward, **given, causal=True), attended.flatten(1)
        d_inputs, d_proj = product_backward(grad, for_proj, attention.linear_proj, before, recipe, x)
        d_x = rope_backward(d_inputs, qkv, cos, sin, sums, head_norms, eps, amax())
        before = partial(through_norm, x=hidden, weight=qkv_norm, scale=first_scale, residual=grad, amax=amax())
        grad, d_qkv = product_backward(d_x, for_qkv, attention.linear_qkv, before, recipe, x_of_qkv, ranks)
        handed(segments).over(grad)
        norms_learn = any(ctx.needs_input_grad[3:7])
        d_norms = sums.totals([width, head_dim, head_dim, width], hidden.dtype) if norms_learn else (None,) * 4
        return grad, None, None, *d_norms, *d_qkv, *d_proj, *d_fc1, *d_fc2


def has_memory_for_inputs(layer: TransformerLayer, tokens: int) -> bool:
    """Whether all layers of a frozen language model can keep queries, keys and values of so many tokens, and what pairs are
    multiplied with, and leave a part of the GPU, or of what PyTorch may take of it, free (`SPARED`). Preflight asks the same
    of its prediction (cost.py)."""
    attention, mlp = layer.self_attention, layer.mlp
    qkv = attention.linear_qkv.weight
    if qkv.requires_grad or not qkv.is_cuda:
        return False
    fc1, pairs = mlp.linear_fc1.weight, hasattr(mlp.linear_fc1, "lora_a")
    values = 2 * qkv.size(1) + 2 * qkv.size(0) + attention.linear_proj.weight.size(1) + fc1.size(0)
    values += pairs * (2 * qkv.size(1) + fc1.size(0) // 2)
    kept = layer.config.num_layers * tokens * values * qkv.element_size()
    free, total = torch.cuda.mem_get_info()
    most = torch.cuda.get_per_process_memory_fraction() * total
    reserved, taken = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    return min(free, most - reserved) + reserved - taken - kept >= SPARED * most


class FusedLanguageLayer(TransformerLayer):
    """Megatron's layer of the language model; packed samples take the way described above, but not with both LoRA and tensor
    parallelism: the ranks would have to sum A·x and its gradient, too."""

    @property
    def takes_packs(self) -> bool:
        return self.self_attention.pg_collection.tp.size() == 1 or not hasattr(self.mlp.linear_fc1, "lora_a")

    def forward(self, hidden_states: Tensor, packed_seq_params: PackedSeqParams | None = None, **named):
        """[tokens, 1, hidden] of the samples of a pack → the same, and None for cross attention's context."""
        attention, mlp = self.self_attention, self.mlp
        if packed_seq_params is None or not self.takes_packs:
            for module in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
                move_back(module)
            return super().forward(hidden_states=hidden_states, packed_seq_params=packed_seq_params, **named)
        if packed_seq_params.rope is None:  # the same for all layers
            angles = named["rotary_pos_emb"][packed_seq_params.positions, 0]  # [tokens, 1, head_dim]
            packed_seq_params.rope = angles.cos(), angles.sin()
            packed_seq_params.keeps_inputs = has_memory_for_inputs(self, len(hidden_states))
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
        inputs = rope(qkv, layer.config.num_query_groups, *angles)
        attended, statistics = attend(*inputs, segments, False)
        branch, for_proj = product(attended.flatten(1), proj, bias=proj.bias)
        middle, x, *second_norm = norm(hidden, fc1.layer_norm_weight, fc1.layer_norm_bias, eps, branch)
        before, for_fc1 = product(x, fc1, bias=fc1.bias)
        branch, for_fc2 = product(gelu(before), fc2, bias=fc2.bias)
        ctx.constants = layer, segments, angles
        ctx.saved = hidden, first_norm, inputs, attended, statistics, middle, second_norm, before
        ctx.operands = for_qkv, for_proj, for_fc1, for_fc2
        return middle + branch

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, segments, (cos, sin) = ctx.constants
        hidden, first_norm, inputs, attended, statistics, middle, second_norm, before = ctx.saved
        for_qkv, for_proj, for_fc1, for_fc2 = ctx.operands
        ctx.saved = ctx.operands = None
        attention, fc1, fc2, grad = layer.self_attention, layer.mlp.linear_fc1, layer.mlp.linear_fc2, grad.contiguous()
        qkv, proj = attention.linear_qkv, attention.linear_proj
        width, inner, again = hidden.size(1), before.size(1), hasattr(fc1, "lora_a")
        sums = PartialSums(9 * width + inner, hidden.device)

        def through_norm(linear: torch.nn.Module, x: Tensor, of_tokens: list, biases: bool) -> partial:
            weight, bias, (mean, scale) = linear.layer_norm_weight, linear.layer_norm_bias, of_tokens
            of_norm = {"weight": weight, "bias": bias, "mean": mean, "scale": scale}
            return partial(norm_backward, x=x, residual=grad, sums=sums, biases=biases, again=again, **of_norm)

        through_gelu = partial(gelu_backward, x=before, sums=sums, again=again)
        d_x, d_fc2 = product_backward(grad, for_fc2, fc2, through_gelu)
        grad, d_fc1 = product_backward(d_x, for_fc1, fc1, through_norm(fc1, middle, second_norm, True))
        given = {"inputs": inputs, "out": attended, "statistics": statistics, "segments": segments}
        through_attention, x = partial(attend_backward, **given, causal=False), attended.flatten(1)
        d_inputs, d_proj = product_backward(grad, for_proj, proj, through_attention, x=x)
        d_x = rope_backward(d_inputs, None, cos, sin, sums)
        grad, d_qkv = product_backward(d_x, for_qkv, qkv, through_norm(qkv, hidden, first_norm, False))
        totals = sums.totals([inner, width, width, width, width, 3 * width, width, width], hidden.dtype)
        return grad, None, None, *totals, *d_qkv, *d_proj, *d_fc1, *d_fc2


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
