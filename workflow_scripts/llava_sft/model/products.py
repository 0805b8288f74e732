"""Matrix products of the fused layers: forward and backward, in bf16 or FP8, with LoRA's pair where a layer has one.

Notable:
- products add weights' gradients to Megatron's gradient buffer in place;
- Transformer Engine multiplies in FP8, without its modules around: they cost the host 0.3 ms each. It casts what no kernel of
  ours has written (casts.py);
- a frozen weight keeps nothing but itself; its pair keeps A·x, of `rank` columns, and is given x again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from llava_sft.model import casts
from llava_sft.model.lora_dropout import leave_out_at

with suppress(ImportError):  # a machine without them has Megatron's local layers
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage


def weight_gradient(weight: Tensor, grad: Tensor, x: Tensor | None, scale: float = 1.0) -> Tensor | None:
    """scale · gradᵀ · x of a weight [out, in], from grad [tokens, out] and x [tokens, in], which a frozen weight does not need.

    Added to `main_grad`, Megatron's buffer, where it is of the same precision; what is returned then holds nothing. None for a
    frozen weight.
    """
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
    """x [tokens, in] · weightᵀ; the product that makes the weight's gradient adds it to Megatron's buffer. A frozen weight does
    not keep x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
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


@cache
def wants_columns(device: torch.device) -> bool:
    """Whether FP8 products here take operands transposed, which ours casts with them: Ada and Hopper. Newer ones do not."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) < (10, 0)


def places(recipe: str | bool | None, device: torch.device) -> Tensor | None:
    """Where a kernel leaves the largest values of what becomes an operand in FP8: None where nobody asks."""
    return casts.places(device) if recipe == "tensorwise" and wants_columns(device) else None


def in_fp8(x: Tensor, quantizer: Any, recipe: str) -> Any:
    """x in rows and in columns."""
    amax = getattr(x, "largest_values", None)
    if amax is None or recipe != "tensorwise" or not x.is_contiguous():
        return quantizer.quantize_impl(x)
    kind = torch.float8_e4m3fn if quantizer.dtype == DType.kFloat8E4M3 else torch.float8_e5m2
    rows, columns, scale_inv = casts.cast(x, amax, kind)
    return Float8TensorStorage(
        data=rows.view(torch.uint8), data_transpose=columns.view(torch.uint8), fp8_scale_inv=scale_inv,
        fp8_dtype=quantizer.dtype, fake_dtype=x.dtype, quantizer=None,
    )  # fmt: skip


def product(x: Tensor, module: torch.nn.Module, recipe: str | None = None, bias: Tensor | None = None) -> tuple:
    """x [tokens, in] · weightᵀ + bias, LoRA's pair in the precision of x added: [tokens, out].

    With what `product_backward` needs: operands of the weight's product (None where there is room beside x), A·x
    [tokens, rank] (None without a pair), and the key of the dropout (None without one).
    """
    if has_room(x):
        low = F.linear(x, module.lora_a)
        both, weight = whole_rows(x), joined(module)[: module.lora_b.size(0)]
        both[:, x.size(1) :] = low
        return F.linear(both, weight, bias), (None, low, None)
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
    grad: Tensor, operands: tuple, module: torch.nn.Module, before: Callable[[Tensor], Any], recipe: str | None = None,
    x: Tensor | None = None, group: ProcessGroup | None = None,
) -> tuple[Any, tuple[Tensor | None, ...]]:  # fmt: skip
    """What `before` makes of the gradient of x, and the gradients of `trainable(module)`.

    before: the backward pass of what x comes from. Of a frozen weight nothing keeps x, which the pair's gradient needs: it
    leaves x in the place of its gradient, unless `x` is given. group: tensor-parallel ranks of which each has some of the
    outputs, and so a part of the gradient of x; not with a pair.
    """
    for_weight, low, key = operands
    if low is None:
        d_x, d_weight = weight_product_backward(grad, for_weight, module, recipe, group)
        return before(d_x), (d_weight,)
    (out, rank), columns = module.lora_b.shape, module.lora_a.size(1)
    d_b = weight_gradient(module.lora_b, grad, low, module.lora_scale)
    if has_room(grad):
        both, weight = whole_rows(grad), joined(module)
        d_low = torch.mm(grad, weight[:out, columns:], out=both[:, out:])
        d_x = both @ weight[:, :columns]
    elif for_weight is None:
        d_x, d_low = (grad @ module.weight_and_pair[:out]).split([columns, rank], dim=1)
        d_x.addmm_(d_low, module.lora_a)
    else:
        d_x, _ = weight_product_backward(grad, for_weight, module, recipe)
        d_low = module.lora_scale * (grad @ module.lora_b)
        if key is None:
            d_x.addmm_(d_low, module.lora_a)
        else:
            d_x += leave_out_at(d_low @ module.lora_a, module.lora_dropout, key)
    earlier = before(d_x)
    x = d_x if x is None else x
    if key is not None:
        x = leave_out_at(x, module.lora_dropout, key)
    return earlier, (None, weight_gradient(module.lora_a, d_low, x), d_b)


# A product of rank 32 alone waits for memory: it reads and writes all of the output, and another one all of the gradient. With
# room beside x or the gradient there is one product for the weight and its pair: [x, A·x] · [W, s·B]ᵀ, and for the gradient
# of x [grad, s·grad·B] · [W; A]. Without room beside the gradient, grad · [W, s·B] gives that of A·x along.


def room_beside(module: torch.nn.Module, recipe: str | None) -> int:
    """Columns beside its input, and beside the gradient of its output, that `product` can use: of a rank that matrix units
    like, in bf16, without dropout."""
    if recipe or not hasattr(module, "lora_a") or module.lora_a.size(0) % 8 or module.lora_dropout.share:
        return 0
    if getattr(module, "trains_unpacked", False):
        return 0
    return module.lora_a.size(0)


def has_room(x: Tensor) -> bool:
    """Whether there are columns beside x. One row alone may have any stride."""
    return x.size(0) > 1 and x.stride(0) > x.size(1)


def whole_rows(x: Tensor) -> Tensor:
    """x with the room beside it."""
    return x.as_strided((x.size(0), x.stride(0)), (x.stride(0), 1))


def joined(module: torch.nn.Module) -> Tensor:
    """A frozen weight, moved to where its pair has room: [out + rank, in + rank], with scale · B to its right and A below it,
    in the precision of the weight. The pair is copied once a step: `is_first_microbatch` is Megatron's flag."""
    (out, columns), rank = module.weight.shape, module.lora_a.size(0)
    if not hasattr(module, "weight_and_pair"):
        module.weight_and_pair, module.pair_is_current = module.weight.new_empty(out + rank, columns + rank), False
        module.weight_and_pair[:out, :columns] = module.weight.detach()
        module.weight.data = module.weight_and_pair[:out, :columns]
    if getattr(module, "is_first_microbatch", True) or not (module.pair_is_current and module.training):
        module.weight_and_pair[:out, columns:] = module.lora_scale * module.lora_b.detach()
        module.weight_and_pair[out:, :columns] = module.lora_a.detach()
        module.pair_is_current, module.is_first_microbatch = module.training, False
    return module.weight_and_pair


def move_back(module: torch.nn.Module) -> None:
    """Lay a weight out as layers of Transformer Engine expect it: for good, where samples are trained unpacked."""
    module.trains_unpacked = module.training
    if hasattr(module, "weight_and_pair"):
        module.weight.data = module.weight.detach().contiguous()
        del module.weight_and_pair


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
    x_in_fp8, fast = in_fp8(x, cast_input, recipe), recipe == "tensorwise"
    out = general_gemm(module.weight_in_fp8, x_in_fp8, out_dtype=x.dtype, use_split_accumulator=not fast)[0]
    x_in_fp8.update_usage(rowwise_usage=False)
    return out, (x_in_fp8 if trained else None, module.weight_in_fp8)


def weight_product_backward(
    grad: Tensor, operands: tuple, module: torch.nn.Module, recipe: str | None, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, summed over the ranks of `group` while that of the weight is computed, and of the weight."""
    (x, weight_operand), weight = operands, module.weight
    if not recipe:
        d_x = grad @ weight
        with being_summed(d_x, group):
            return d_x, weight_gradient(weight, grad, x)
    exact = {"out_dtype": grad.dtype, "use_split_accumulator": True, "grad": True}
    grad = in_fp8(grad, quantizers(recipe)[2], recipe)
    d_x = general_gemm(weight_operand, grad, layout="NN", **exact)[0]
    with being_summed(d_x, group):
        if not weight.requires_grad:
            return d_x, None
        buffer = getattr(weight, "main_grad", None)
        if buffer is None:
            return d_x, general_gemm(x, grad, layout="NT", **exact)[0]
        general_gemm(x, grad, layout="NT", out=buffer, accumulate=True, **exact | {"out_dtype": buffer.dtype})
        weight.grad_added_to_main_grad = True
        return d_x, torch.empty_like(weight)


@contextmanager
def being_summed(partial: Tensor, group: ProcessGroup | None) -> Iterator[None]:
    """Sum `partial` over the ranks of `group` in place, beside what is computed meanwhile."""
    work = torch.distributed.all_reduce(partial, group=group, async_op=True) if group and group.size() > 1 else None
    yield
    if work:
        work.wait()


def summed(partial: Tensor, group: ProcessGroup) -> Tensor:
    """What each rank of `group` has a part of: the sum, in the place of `partial`."""
    with being_summed(partial, group):
        return partial
