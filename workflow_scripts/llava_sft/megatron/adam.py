"""Transformer Engine's Adam with both moments in bf16: rounded so that they follow the gradients, saved as they are kept.

Notable:
- bf16 has 8 bits: a change of the second moment by less than 0.2 % is rounded away, so with beta2 = 0.999 it never falls
  after one large gradient, and at 0.99 stays half as large again as it should (benchmarks/moments.py). Here it is rounded
  up as often as makes the mean exact, in the memory that it takes anyway;
- which way depends on seed, step and place alone: a resumed run rounds as the undisturbed one does. From step to step the
  threshold of an element moves by the golden ratio, which spreads evenly: independent ones leave 1.5 times the error.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements that a program does at a time
PROGRAMS = 512  # of a tensor, at most
GOLDEN = tl.constexpr(40503)  # 2^16 / golden ratio


@triton.jit(do_not_specialize=["lr", "correction1", "correction2", "step"])
def _step(
    tensors, lr, beta1, beta2, eps, decay, correction1, correction2, step,
    GRADIENT: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`tensors` [tensors, 7] int64: addresses of gradient, weight, remainder and both moments, number of elements, seed."""
    row = tensors + 7 * tl.program_id(1)
    gradient = tl.multiple_of(tl.load(row).to(tl.pointer_type(GRADIENT)), ALIGNMENT)
    weight = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int16)), ALIGNMENT)
    remainder = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.int16)), ALIGNMENT)
    moment1 = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.bfloat16)), ALIGNMENT)
    moment2 = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.int16)), ALIGNMENT)
    size, seed = tl.multiple_of(tl.load(row + 5), ALIGNMENT // 2), tl.load(row + 6).to(tl.uint32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < size
        # The float32 master weight: its upper 16 bits, rounded to the nearest, are the weight, its lower 16 the remainder.
        low = tl.load(remainder + at, inside, 0).to(tl.int32)
        high = tl.load(weight + at, inside, 0).to(tl.int32) - (low < 0)
        master = ((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)

        g = tl.load(gradient + at, inside, 0.0).to(tl.float32)
        m = beta1 * tl.load(moment1 + at, inside, 0.0).to(tl.float32) + (1 - beta1) * g
        v = (tl.load(moment2 + at, inside, 0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        v = beta2 * v + (1 - beta2) * g * g
        master -= lr * ((m / correction1) / (tl.sqrt(v / correction2) + eps) + decay * master)

        bits = master.to(tl.int32, bitcast=True)
        low = (bits << 16) >> 16
        tl.store(remainder + at, low.to(tl.int16), inside)
        tl.store(weight + at, ((bits >> 16) + (low < 0)).to(tl.int16), inside)
        tl.store(moment1 + at, m, inside)
        # Rounded up where the bits below bf16's, a fraction of the step between two values, pass the element's threshold.
        place = (at.to(tl.uint32) ^ seed) * 2654435761
        place = (place ^ (place >> 15)) * 2246822519
        threshold = ((place ^ (place >> 13)) + step.to(tl.uint32) * GOLDEN).to(tl.int32) & 0xFFFF
        tl.store(moment2 + at, ((v.to(tl.int32, bitcast=True) + threshold) >> 16).to(tl.int16), inside)


def adam_step(
    tensors: list[tuple[Tensor, ...]], seeds: list[int], lr: float, beta1: float, beta2: float, eps: float, step: int,
    decay: float, bias_correction: bool,
) -> None:  # fmt: skip
    """One step of AdamW, in place and in one launch: LoRA has hundreds of small tensors.

    `tensors`: gradient, weight, first and second moment and remainder, of one shape. Weight and moments are bf16; the
    remainder, int16, holds the 16 bits of the float32 master weight that the weight lacks, as Transformer Engine's
    `store_param_remainders` does (transformer_engine/common/multi_tensor/adam.cu). Gradients are bf16 or float32, all alike.
    `seeds`: one a tensor. `step` counts from 1. Decay is decoupled.
    """
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    rows = []
    for (gradient, weight, moment1, moment2, remainder), seed in zip(tensors, seeds, strict=True):
        addresses = [each.data_ptr() for each in (gradient, weight, remainder, moment1, moment2)]
        rows.append([*addresses, weight.numel(), seed])
    aligned = all(number % 16 == 0 for row in rows for number in row[:6])
    kind = tl.bfloat16 if gradient.dtype == torch.bfloat16 else tl.float32
    programs = min(PROGRAMS, triton.cdiv(max(row[5] for row in rows), BLOCK))
    _step[programs, len(rows)](
        torch.tensor(rows).to(gradient.device), lr, beta1, beta2, eps, decay, correction1, correction2, step,
        GRADIENT=kind, ALIGNMENT=16 if aligned else 2, BLOCK=BLOCK,
    )  # fmt: skip


class RoundedAdam:
    """Takes the place of Transformer Engine's `multi_tensor_adam_param_remainder` for lists of tensors."""

    def __init__(self, seed: int):
        self.seed, self.step, self.tensors = seed, 0, 0

    def __call__(
        self, chunk_size, overflow, lists, lr, beta1, beta2, eps, step, decoupled, bias_correction, decay
    ) -> None:
        if not decoupled:
            raise ValueError("weight decay is decoupled in Megatron's Adam")
        if step != self.step:
            self.step, self.tensors = step, 0
        first = self.seed * 1_000_003 + self.tensors * 65_537
        seeds = [(first + number * 65_537) & 0x7FFF_FFFF for number in range(len(lists[0]))]
        self.tensors += len(seeds)
        adam_step(list(zip(*lists, strict=True)), seeds, lr, beta1, beta2, eps, step, decay, bias_correction)


def round_evenly(adam: torch.optim.Optimizer, seed: int) -> None:
    """Have Transformer Engine's Adam update weights of bf16 with `adam_step`, where it keeps both moments in bf16."""
    if getattr(adam, "fuse_unscale", False) and adam.store_param_remainders:
        adam.multi_tensor_adam_param_remainder = RoundedAdam(seed)


def keep_precision(adam: torch.optim.Optimizer) -> None:
    """Checkpoints hold the moments in the precision they are kept in, and are loaded into the tensors that there are.

    Transformer Engine's Adam hands them out as float32 copies, all at once and on the GPU: 38 GB for bf16 moments of 4B.
    When it loads, it holds all state twice, and a part three times. An 80 GB GPU has room for neither.
    """
    if not hasattr(adam, "get_unscaled_state"):
        return
    unscaled, set_scaled = adam.get_unscaled_state, adam.set_scaled_state

    def get_state(param, name, skip_unscale=False):
        return unscaled(param, name, skip_unscale or adam.name_to_dtype_map[name] == torch.bfloat16)

    def set_state(param, name, state):
        set_scaled(param, name, state.float() if state.dtype == torch.bfloat16 else state)

    def take_state(state_dict):
        # Megatron made these tensors in their precision, or got them from this Adam; it reads the checkpoint into them.
        for group, saved in zip(adam.param_groups, state_dict["param_groups"], strict=True):
            for param, number in zip(group["params"], saved["params"], strict=True):
                adam.state[param] = state_dict["state"][number]
                adam._scales[param] = {name: torch.ones(1, device=param.device) for name in adam.state[param]}
            group.update({key: value for key, value in saved.items() if key != "params"})

    adam.get_unscaled_state, adam.set_scaled_state, adam.load_state_dict = get_state, set_state, take_state
