"""The layers of both towers in few kernels, for GPUs: Megatron's parameters, another forward pass.

Notable:
- they compute with the parameters of Megatron's Transformer Engine layers: checkpoints, optimizer and names stay the same;
- what stands between the matrix products (norms, rotation, residuals, activations) is compiled: one kernel each; the
  same few graphs serve all layers, and any number of tokens;
- attention is cuDNN's, over all samples or images at once, called without the layers of Transformer Engine that choose
  it: they cost the host 0.7 ms a call, and would fall back to a slow kernel without a word;
- products of the language model, in bf16 or FP8, add to the gradient buffer in place;
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

from llava_sft.model.attention import VisionSeqParams, rotate

with suppress(ImportError):  # a machine without them has Megatron's local layers
    import triton
    import triton.language as tl
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd, fused_attn_fwd


class CudnnAttention(torch.autograd.Function):
    """Scaled dot-product attention inside each segment: query [tokens, heads, head_dim], key and value with as many
    heads or fewer → [tokens, heads, head_dim]."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, segments: PackedSeqParams, causal: bool) -> Tensor:
        ends, longest = segments.cu_seqlens_q, segments.max_seqlen_q
        ctx.sizes = longest, longest, ends, ends
        ctx.kinds = {
            "cu_seqlens_q_padded": ends,
            "cu_seqlens_kv_padded": ends,
            "qkv_layout": "thd_thd_thd",
            "o_format": "thd",
            "attn_mask_type": "padding_causal" if causal else "padding",
            "window_size": (-1, 0) if causal else (-1, -1),
        }
        ctx.backend = FusedAttnBackend["F16_arbitrary_seqlen"]
        out, ctx.statistics = fused_attn_fwd(True, *ctx.sizes, query, key, value, query.dtype, ctx.backend, **ctx.kinds)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out = ctx.saved_tensors
        grads = fused_attn_bwd(
            *ctx.sizes,
            query,
            key,
            value,
            out,
            grad.contiguous(),
            grad.dtype,
            ctx.statistics,
            ctx.backend,
            do_format="thd",
            dqkv_layout="thd_thd_thd",
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **ctx.kinds,
        )
        return *grads[:3], None, None


# --- language model ------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def add_and_norm(hidden: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden = hidden + change
    return hidden, rms_norm(hidden, weight, eps)


def split_and_turn(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, groups: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens, groups · (heads a group + 2) · head_dim] → normed, turned query and key, and value [tokens, heads, head_dim]."""
    tokens, head_dim = qkv.size(0), q_weight.size(0)
    parts = qkv.view(tokens, groups, -1, head_dim)  # group by group: its queries, its key, its value
    query = rotate(rms_norm(parts[:, :, :-2], q_weight, eps).reshape(tokens, -1, head_dim), cos, sin)
    key = rotate(rms_norm(parts[:, :, -2], k_weight, eps), cos, sin)
    return query, key, parts[:, :, -1].contiguous()


def swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@cache
def swiglu_backward():
    """The kernel; the compiler's reads all three inputs for each half of the output."""

    @triton.jit
    def swiglu_backward_row(gate_and_up, grad, out, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, at = column < width, row * 2 * width + column
        gate = tl.load(gate_and_up + at, inside).to(tl.float32)
        up = tl.load(gate_and_up + at + width, inside).to(tl.float32)
        change = tl.load(grad + row * width + column, inside).to(tl.float32)
        share = tl.sigmoid(gate)
        tl.store(out + at, change * up * share * (1 + gate * (1 - share)), inside)
        tl.store(out + at + width, change * gate * share, inside)

    return swiglu_backward_row


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up of [tokens, 2 · width], gate before up → [tokens, width]."""

    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return activation(gate_and_up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        out, (tokens, width) = torch.empty_like(gate_and_up), grad.shape
        grid = tokens, triton.cdiv(width, 1024)
        swiglu_backward()[grid](gate_and_up, grad.contiguous(), out, width, BLOCK=1024)
        return out


class AccumulatingLinear(torch.autograd.Function):
    """x [tokens, in] · weightᵀ; the product that makes the weight's gradient adds it to `main_grad`, Megatron's buffer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_grad = grad @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return x_grad, None
        buffer = getattr(weight, "main_grad", None)
        if buffer is None or buffer.dtype != grad.dtype:
            return x_grad, grad.t() @ x
        buffer.addmm_(grad.t(), x)
        weight.grad_added_to_main_grad = True
        return x_grad, torch.empty_like(weight)  # Megatron's hook waits for one, and does not look at it


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


class Float8Linear(torch.autograd.Function):
    """AccumulatingLinear with operands in FP8. A weight is cast once a step: `is_first_microbatch` is Megatron's flag."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, module: torch.nn.Module, recipe: str) -> Tensor:
        cast_input, cast_weight, ctx.cast_grad = quantizers(recipe)
        if module.is_first_microbatch or not hasattr(module, "weight_in_fp8"):
            module.weight_in_fp8 = cast_weight.quantize_impl(weight.detach())
            module.is_first_microbatch = False
        ctx.operands = cast_input.quantize_impl(x), module.weight_in_fp8
        ctx.weight, fast = weight, recipe == "tensorwise"
        out = general_gemm(*ctx.operands[::-1], out_dtype=x.dtype, use_split_accumulator=not fast)[0]
        ctx.operands[0].update_usage(rowwise_usage=False)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight_in_fp8), weight = ctx.operands, ctx.weight
        ctx.operands = None  # or all layers' inputs would live until the whole graph goes
        exact = {"out_dtype": grad.dtype, "use_split_accumulator": True, "grad": True}
        grad = ctx.cast_grad.quantize_impl(grad.contiguous())
        x_grad = general_gemm(weight_in_fp8, grad, layout="NN", **exact)[0] if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return x_grad, None, None, None
        buffer = getattr(weight, "main_grad", None)
        if buffer is None:
            return x_grad, general_gemm(x, grad, layout="NT", **exact)[0], None, None
        general_gemm(x, grad, layout="NT", out=buffer, accumulate=True, **exact | {"out_dtype": buffer.dtype})
        weight.grad_added_to_main_grad = True
        return x_grad, torch.empty_like(weight), None, None


# --- vision tower --------------------------------------------------------------------------------------------------


def before_attention(
    hidden: Tensor, norm: tuple[Tensor, Tensor], eps: float, qkv: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual stream [tokens, hidden] → turned query and key, and value, each [tokens, heads, head_dim]."""
    x = F.linear(F.layer_norm(hidden, hidden.shape[1:], *norm, eps), *qkv)
    query, key, value = x.view(x.size(0), -1, 3, cos.size(-1)).unbind(2)  # head by head: its q, k, v
    return rotate(query, cos, sin), rotate(key, cos, sin), value.contiguous()


def after_attention(
    attended: Tensor,
    hidden: Tensor,
    proj: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    eps: float,
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
) -> Tensor:
    """Attention's output and the residual stream, both [tokens, hidden] → the residual stream behind the MLP."""
    hidden = hidden + F.linear(attended, *proj)
    x = F.layer_norm(hidden, hidden.shape[1:], *norm, eps)
    return hidden + F.linear(F.gelu(F.linear(x, *fc1)), *fc2)


def compiled(function):
    """`function` compiled once for any number of tokens, which is the first size of its tensors that are no weights."""
    fast = torch.compile(function)

    def call(*args):
        for tensor in args:
            if isinstance(tensor, Tensor) and not isinstance(tensor, torch.nn.Parameter):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fast(*args)

    return call


norm, norm_after_change, turned, activation = (compiled(f) for f in (rms_norm, add_and_norm, split_and_turn, swiglu))
before, after = compiled(before_attention), compiled(after_attention)


class FusedLanguageLayer(TransformerLayer):
    """Megatron's layer of the language model; packed samples take the way described above, without tensor parallelism."""

    def forward(self, hidden_states: Tensor, packed_seq_params: PackedSeqParams | None = None, **named):
        """[tokens, 1, hidden] of the samples of a pack → the same, and None for cross attention's context."""
        attention, mlp, eps = self.self_attention, self.mlp, self.config.layernorm_epsilon
        if packed_seq_params is None or attention.checkpoint_core_attention:
            return super().forward(hidden_states=hidden_states, packed_seq_params=packed_seq_params, **named)
        if packed_seq_params.turn is None:  # the same for all layers
            angles = named["rotary_pos_emb"][packed_seq_params.positions, 0]  # [tokens, 1, head_dim]
            packed_seq_params.turn = angles.cos(), angles.sin()
        hidden, recipe = hidden_states.squeeze(1), self.config.fp8 and self.config.fp8_recipe

        def product(x, module):
            if recipe:
                return Float8Linear.apply(x, module.weight, module, recipe)
            return AccumulatingLinear.apply(x, module.weight)

        qkv = product(norm(hidden, attention.linear_qkv.layer_norm_weight, eps), attention.linear_qkv)
        weights = attention.q_layernorm.weight, attention.k_layernorm.weight
        query, key, value = turned(qkv, *weights, eps, self.config.num_query_groups, *packed_seq_params.turn)
        attended = CudnnAttention.apply(query, key, value, packed_seq_params, True)
        change = product(attended.view(hidden.size(0), -1), attention.linear_proj)
        hidden, x = norm_after_change(hidden, change, mlp.linear_fc1.layer_norm_weight, eps)
        hidden = hidden + product(SwiGLU.apply(product(x, mlp.linear_fc1)), mlp.linear_fc2)
        return hidden.unsqueeze(1), None


class FusedVisionLayer(TransformerLayer):
    """Megatron's layer of the vision tower; parameters without tensor parallelism."""

    def forward(self, hidden_states: Tensor, packed_seq_params: VisionSeqParams, **unused) -> tuple[Tensor, None]:
        """[tokens, 1, hidden] of all images → the same, and None for cross attention's context."""
        attention, qkv, fc1 = self.self_attention, self.self_attention.linear_qkv, self.mlp.linear_fc1
        hidden, eps = hidden_states.squeeze(1), self.config.layernorm_epsilon
        cos, sin = packed_seq_params.rotary_cos, packed_seq_params.rotary_sin
        qkv_norm = qkv.layer_norm_weight, qkv.layer_norm_bias
        query, key, value = before(hidden, qkv_norm, eps, (qkv.weight, qkv.bias), cos, sin)
        attended = CudnnAttention.apply(query, key, value, packed_seq_params, False)
        hidden = after(
            attended.view_as(hidden),
            hidden,
            (attention.linear_proj.weight, attention.linear_proj.bias),
            (fc1.layer_norm_weight, fc1.layer_norm_bias),
            eps,
            (fc1.weight, fc1.bias),
            (self.mlp.linear_fc2.weight, self.mlp.linear_fc2.bias),
        )
        return hidden.unsqueeze(1), None
