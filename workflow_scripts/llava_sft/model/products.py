"""Matrix products of the fused layers: forward and backward, in bf16 or FP8, with LoRA's pair where a layer has one.

Notable:
- products add weights' gradients to Megatron's gradient buffer in place;
- Transformer Engine casts to FP8 and multiplies, without its modules around: they cost the host 0.3 ms each;
- a frozen weight keeps nothing but itself; its pair keeps A·x, of `rank` columns, and asks for x again.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_sft.model.lora_dropout import leave_out_at

with suppress(ImportError):  # a machine without them has Megatron's local layers
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.cpp_extensions import general_gemm


def weight_gradient(weight: Tensor, grad: Tensor, x: Tensor | None, scale: float = 1.0) -> Tensor | None:
    """scale · gradᵀ · x, added to `main_grad`, Megatron's buffer, where it is of the same precision. None of a frozen
    weight."""
    if not weight.requires_grad:
        return None
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != grad.dtype:
        gradient = grad.t() @ x
        return gradient if scale == 1 else scale * gradient
    buffer.addmm_(grad.t(), x, alpha=scale)
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


def product(x: Tensor, module: torch.nn.Module, recipe: str | None = None, bias: Tensor | None = None) -> tuple:
    """x [tokens, in] · weightᵀ + bias, LoRA's pair in the precision of x added; with what the gradients need."""
    if x.stride(0) > x.size(1):  # it has room for A·x
        return product_beside(x, module, bias)
    out, operands = weight_product(x, module, recipe, bias)
    if not hasattr(module, "lora_a"):
        return out, (operands, None, None)
    dropout, key = module.lora_dropout, None
    if dropout.share and module.training:
        key = dropout.key()
        x = leave_out_at(x, dropout, key)
    low = F.linear(x, module.lora_a)
    return out.addmm_(low, module.lora_b.t(), alpha=module.lora_scale), (operands, low, key)


def product_backward(
    grad: Tensor, operands: tuple, module: torch.nn.Module, x: Callable[[], Tensor], recipe: str | None = None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Gradient of x, and those of `trainable(module)`. A frozen weight keeps no x, which its pair asks for again."""
    for_weight, low, key = operands
    if for_weight is None:
        return product_beside_backward(grad, low, module, x)
    d_x, d_weight = weight_product_backward(grad, for_weight, module, recipe)
    if low is None:
        return d_x, (d_weight,)
    d_low, d_b = (
        module.lora_scale * (grad @ module.lora_b),
        weight_gradient(module.lora_b, grad, low, module.lora_scale),
    )
    if key is None:
        return d_x.addmm_(d_low, module.lora_a), (d_weight, weight_gradient(module.lora_a, d_low, x()), d_b)
    seen = leave_out_at(x(), module.lora_dropout, key)
    d_x += leave_out_at(d_low @ module.lora_a, module.lora_dropout, key)
    return d_x, (d_weight, weight_gradient(module.lora_a, d_low, seen), d_b)


# One product for both: [x, A·x] · [W, alpha/rank·B]ᵀ. A product of rank 32 alone waits for memory: it reads and writes all of
# the output, and another one reads all of its gradient.


def room_beside(module: torch.nn.Module, recipe: str | None) -> int:
    """Columns beside its input that `product` can use: of a rank that matrix units like, in bf16, without dropout."""
    if recipe or not hasattr(module, "lora_a") or module.lora_a.size(0) % 8 or module.lora_dropout.share:
        return 0
    if getattr(module, "trains_unpacked", False):
        return 0
    return module.lora_a.size(0)


def lay_beside(module: torch.nn.Module) -> None:
    """Move a frozen weight to where B has room beside it."""
    if not hasattr(module, "weight_and_b"):
        out, columns = module.weight.shape
        both = module.weight.new_empty(out, columns + module.lora_a.size(0))
        both[:, :columns] = module.weight.detach()
        module.weight.data, module.weight_and_b, module.b_is_current = both[:, :columns], both, False


def move_back(module: torch.nn.Module) -> None:
    """Lay a weight out as layers of Transformer Engine expect it: for good, where samples are trained unpacked."""
    module.trains_unpacked = module.training
    if hasattr(module, "weight_and_b"):
        module.weight.data = module.weight.detach().contiguous()
        del module.weight_and_b


def product_beside(x: Tensor, module: torch.nn.Module, bias: Tensor | None) -> tuple[Tensor, tuple]:
    """`product` of an x with room beside it. B is copied once a step: `is_first_microbatch` is Megatron's flag."""
    lay_beside(module)
    columns, low = x.size(1), F.linear(x, module.lora_a)
    both = x.as_strided((x.size(0), x.stride(0)), (x.stride(0), 1))
    both[:, columns:] = low
    if getattr(module, "is_first_microbatch", True) or not (module.b_is_current and module.training):
        module.weight_and_b[:, columns:] = module.lora_scale * module.lora_b.detach()
        module.b_is_current, module.is_first_microbatch = module.training, False
    return F.linear(both, module.weight_and_b, bias), (None, low, None)


def product_beside_backward(
    grad: Tensor, low: Tensor, module: torch.nn.Module, x: Callable[[], Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Its gradients; that of x has room beside it, too."""
    d_both, columns = grad @ module.weight_and_b, module.lora_a.size(1)
    d_x, d_low = d_both[:, :columns], d_both[:, columns:]
    d_b, d_a = weight_gradient(module.lora_b, grad, low, module.lora_scale), weight_gradient(module.lora_a, d_low, x())
    return d_x.addmm_(d_low, module.lora_a), (None, d_a, d_b)


def trainable(module: torch.nn.Module) -> tuple[Tensor, ...]:
    """The weight of a linear layer and LoRA's pair, where there is one."""
    return (module.weight, module.lora_a, module.lora_b) if hasattr(module, "lora_a") else (module.weight,)


def weight_product(
    x: Tensor, module: torch.nn.Module, recipe: str | None, bias: Tensor | None = None
) -> tuple[Tensor, tuple]:
    """x · weightᵀ + bias, in FP8 where there is a recipe (then without bias); and both operands, for the gradients: no x
    where the weight is frozen. A weight is cast once a step (`is_first_microbatch` is Megatron's flag), a frozen one once."""
    weight = module.weight
    trained = weight.requires_grad
    if not recipe:
        return F.linear(x, weight, bias), (x if trained else None, weight)
    cast_input, cast_weight, _ = quantizers(recipe)
    if (module.is_first_microbatch and trained) or not hasattr(module, "weight_in_fp8"):
        move_back(module)
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
    d_x = general_gemm(weight_operand, grad, layout="NN", **exact)[0]
    if not weight.requires_grad:
        return d_x, None
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return d_x, general_gemm(x, grad, layout="NT", **exact)[0]
    general_gemm(x, grad, layout="NT", out=buffer, accumulate=True, **exact | {"out_dtype": buffer.dtype})
    weight.grad_added_to_main_grad = True
    return d_x, torch.empty_like(weight)
