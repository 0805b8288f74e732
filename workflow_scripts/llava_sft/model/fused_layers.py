"""The layers of both towers for GPUs: Megatron's parameters, forward and backward written out.

Notable:
- they compute with the parameters of Megatron's Transformer Engine layers: checkpoints, optimizer and names stay the same;
- a layer is one autograd function: matrix products of cuBLAS, in bf16 or FP8, attention of cuDNN, and one kernel for all
  that stands between two of them (kernels.py), with which residuals and the gradients of biases and norms go along;
- products add weights' gradients to Megatron's gradient buffer in place;
- attention is over all samples or images at once, called without the layers of Transformer Engine that choose it: they
  cost the host 0.7 ms a call, and would fall back to a slow kernel without a word;
- Transformer Engine casts to FP8 and multiplies, without its modules around: they cost the host 0.3 ms each.
Why: a layer of Megatron's costs the host 2.6 ms however small it is, q/k norms alone took 5 % of a step, and the rows of
the vision tower are so short that element-wise kernels took as long as products (docs/performance.md).
"""

from contextlib import suppress
from functools import cache

import torch
import torch.nn.functional as F
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

with suppress(ImportError):  # a machine without them has Megatron's local layers
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.cpp_extensions import general_gemm
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


# --- matrix products -----------------------------------------------------------------------------------------------


def weight_gradient(weight: Tensor, grad: Tensor, x: Tensor | None) -> Tensor | None:
    """gradᵀ · x, added to `main_grad`, Megatron's buffer, where it is of the same precision. None of a frozen weight."""
    if not weight.requires_grad:
        return None
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != grad.dtype:
        return grad.t() @ x
    buffer.addmm_(grad.t(), x)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)  # Megatron's hook waits for one, and does not look at it


class AccumulatingLinear(torch.autograd.Function):
    """x [tokens, in] · weightᵀ; the product that makes the weight's gradient adds it to Megatron's buffer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # itself: recomputation hands back a copy without the buffer
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        return grad @ weight if ctx.needs_input_grad[0] else None, weight_gradient(weight, grad, x)


@cache
def quantizers(recipe: str) -> tuple:
    """What casts inputs, weights and gradients to FP8, each once in rows and once in columns."""

    def quantizer(kind, block_dimensions):
        if recipe == "tensorwise":
            found = Float8CurrentScalingQuantizer(kind, device="cuda")
        else:
            found = Float8BlockQuantizer(kind, rowwise=True, columnwise=True, block_scaling_dim=block_dimensions)
        found.internal = True
        return found

    kinds = DType.kFloat8E4M3, DType.kFloat8E5M2
    return quantizer(kinds[0], 1), quantizer(kinds[0], 2), quantizer(kinds[1], 1)


def product(x: Tensor, module: torch.nn.Module, recipe: str | None) -> tuple[Tensor, tuple]:
    """The weight's product, and that of LoRA's pair, in the precision of x; with what the gradients need."""
    out, operands = weight_product(x, module, recipe)
    if not hasattr(module, "lora_a"):
        return out, (operands, None)
    low = module.lora_scale * F.linear(x, module.lora_a)
    return out.addmm_(low, module.lora_b.t()), (operands, (x, low))


def product_backward(
    grad: Tensor, operands: tuple, module: torch.nn.Module, recipe: str | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Gradient of x, and those of `trainable(module)`."""
    of_weight, of_pair = operands
    x_grad, weight_grad = weight_product_backward(grad, of_weight, module, recipe)
    if of_pair is None:
        return x_grad, (weight_grad,)
    x, low = of_pair
    of_low = module.lora_scale * (grad @ module.lora_b)
    grads = weight_grad, weight_gradient(module.lora_a, of_low, x), weight_gradient(module.lora_b, grad, low)
    return x_grad.addmm_(of_low, module.lora_a), grads


def trainable(module: torch.nn.Module) -> tuple[Tensor, ...]:
    """The weight of a linear layer and LoRA's pair, where there is one."""
    return (module.weight, module.lora_a, module.lora_b) if hasattr(module, "lora_a") else (module.weight,)


def weight_product(x: Tensor, module: torch.nn.Module, recipe: str | None) -> tuple[Tensor, tuple]:
    """x [tokens, in] · weightᵀ, in FP8 where there is a recipe; and both operands, for the gradients (no x where the weight
    is frozen). A weight is cast once a step: `is_first_microbatch` is Megatron's flag."""
    weight = module.weight
    trained = weight.requires_grad
    if not recipe:
        return F.linear(x, weight), (x if trained else None, weight)
    cast_input, cast_weight, _ = quantizers(recipe)
    if module.is_first_microbatch or not hasattr(module, "weight_in_fp8"):
        module.weight_in_fp8 = cast_weight.quantize_impl(weight.detach())
        module.is_first_microbatch = False
    x_in_fp8, fast = cast_input.quantize_impl(x), recipe == "tensorwise"
    out = general_gemm(module.weight_in_fp8, x_in_fp8, out_dtype=x.dtype, use_split_accumulator=not fast)[0]
    x_in_fp8.update_usage(rowwise_usage=False)
    return out, (x_in_fp8 if trained else None, module.weight_in_fp8)


def weight_product_backward(
    grad: Tensor, operands: tuple, module: torch.nn.Module, recipe: str | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the weight."""
    (x, weight_operand), weight = operands, module.weight
    if not recipe:
        return grad @ weight, weight_gradient(weight, grad, x)
    exact = {"out_dtype": grad.dtype, "use_split_accumulator": True, "grad": True}
    grad = quantizers(recipe)[2].quantize_impl(grad)
    x_grad = general_gemm(weight_operand, grad, layout="NN", **exact)[0]
    if not weight.requires_grad:
        return x_grad, None
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return x_grad, general_gemm(x, grad, layout="NT", **exact)[0]
    general_gemm(x, grad, layout="NT", out=buffer, accumulate=True, **exact | {"out_dtype": buffer.dtype})
    weight.grad_added_to_main_grad = True
    return x_grad, torch.empty_like(weight)


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
        ctx.kept = hidden, first_scale, qkv, inputs, attended, statistics, middle, second_scale, gate_and_up
        ctx.operands = for_qkv, for_proj, for_fc1, for_fc2
        return middle + change

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, segments, recipe, eps, head_norms = ctx.given
        hidden, first_scale, qkv, inputs, attended, statistics, middle, second_scale, gate_and_up = ctx.kept
        for_qkv, for_proj, for_fc1, for_fc2 = ctx.operands
        ctx.kept = ctx.operands = None  # or the inputs of all layers would live until the whole graph goes
        attention, mlp, grad = layer.self_attention, layer.mlp, grad.contiguous()
        width, head_dim = hidden.size(1), head_norms[0].numel()
        sums = Sums(2 * (width + head_dim), hidden.device)
        change, of_fc2 = product_backward(grad, for_fc2, mlp.linear_fc2, recipe)
        change, of_fc1 = product_backward(swiglu_backward(gate_and_up, change), for_fc1, mlp.linear_fc1, recipe)
        weight = mlp.linear_fc1.layer_norm_weight
        grad = norm_backward(change, middle, weight, None, second_scale, grad, sums)
        change, of_proj = product_backward(grad, for_proj, attention.linear_proj, recipe)
        changes = attend_backward(change, inputs, attended, statistics, segments, True)
        cos, sin = segments.turn
        change = turn_backward(changes, qkv, cos, sin, sums, head_norms, eps)
        change, of_qkv = product_backward(change, for_qkv, attention.linear_qkv, recipe)
        weight = attention.linear_qkv.layer_norm_weight
        grad = norm_backward(change, hidden, weight, None, first_scale, grad, sums)
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
        _, first, *first_norm = norm(hidden, linear_qkv.layer_norm_weight, linear_qkv.layer_norm_bias, eps)
        inputs = turn(F.linear(first, linear_qkv.weight, linear_qkv.bias), layer.config.num_query_groups, *angles)
        attended, statistics = attend(*inputs, segments, False)
        change = F.linear(attended.flatten(1), proj.weight, proj.bias)
        middle, second, *second_norm = norm(hidden, fc1.layer_norm_weight, fc1.layer_norm_bias, eps, change)
        before = F.linear(second, fc1.weight, fc1.bias)
        active = gelu(before)
        ctx.given = layer, segments, angles
        ctx.kept = hidden, first, first_norm, inputs, attended, statistics, middle, second, second_norm, before, active
        return middle + F.linear(active, fc2.weight, fc2.bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, segments, angles = ctx.given
        hidden, first, first_norm, inputs, attended, statistics, middle, second, second_norm, before, active = ctx.kept
        ctx.kept, grad = None, grad.contiguous()
        attention, fc1, fc2 = layer.self_attention, layer.mlp.linear_fc1, layer.mlp.linear_fc2
        linear_qkv, proj = attention.linear_qkv, attention.linear_proj
        width, inner = hidden.size(1), before.size(1)
        sums = Sums(9 * width + inner, hidden.device)
        of_fc2 = weight_gradient(fc2.weight, grad, active)
        change = gelu_backward(grad @ fc2.weight, before, sums)
        of_fc1 = weight_gradient(fc1.weight, change, second)
        mean, scale = second_norm
        grad = norm_backward(change @ fc1.weight, middle, fc1.layer_norm_weight, mean, scale, grad, sums, biases=True)
        of_proj = weight_gradient(proj.weight, grad, attended.flatten(1))
        changes = attend_backward(grad @ proj.weight, inputs, attended, statistics, segments, False)
        cos, sin = angles
        change = turn_backward(changes, None, cos, sin, sums)
        of_qkv = weight_gradient(linear_qkv.weight, change, first)
        mean, scale = first_norm
        grad = norm_backward(change @ linear_qkv.weight, hidden, linear_qkv.layer_norm_weight, mean, scale, grad, sums)
        totals = sums.totals([inner, width, width, width, width, 3 * width, width, width], hidden.dtype)
        return grad, None, None, *totals, of_qkv, of_proj, of_fc1, of_fc2


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
        weights = qkv.weight, proj.weight, fc1.weight, fc2.weight
        hidden = VisionLayer.apply(hidden_states.squeeze(1), self, packed_seq_params, *small, *weights)
        return hidden.unsqueeze(1), None
