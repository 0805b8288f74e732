"""Dropout before LoRA's pairs, without a state: a value is left out as its place, layer and pass of the model say.

The pass is named by the seed of PyTorch's generator, which `begin_pass` sets: Megatron's recomputation puts that back
before it goes through a layer again, and nothing else draws from the generator.
"""

import struct
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from llava_sft.model.kernels import leave_out, leave_out_on_cpu


class Dropout(NamedTuple):
    """`share` of the values is left out. With tensor parallelism a rank's input may be the columns from `first` on, of
    `columns`: what is left out is the same as without."""

    share: float
    layer: int  # a number of the layer's own: the seed that its A was drawn with
    first: int
    columns: int

    def key(self) -> int:
        """Of this layer in the present pass, 31 bits."""
        return zlib.crc32(struct.pack("<QQ", torch.initial_seed(), self.layer)) >> 1


def begin_pass(seed: int, step: int, replica: int, number: int) -> None:
    """The next forward pass of the model is that of the chunk `number` of a step, on a data-parallel rank."""
    low, high = (zlib.crc32(struct.pack("<QQQQ", seed, step, replica, number), start) for start in (0, 1))
    torch.manual_seed((high & 0x7FFF_FFFF) << 32 | low)


def leave_out_at(x: Tensor, dropout: Dropout, key: int) -> Tensor:
    """x [..., columns] without what is left out, the rest scaled so that the mean stays. Its gradient is made likewise."""
    place = leave_out if x.is_cuda else leave_out_on_cpu
    return place(x.contiguous(), dropout.share, key, dropout.first, dropout.columns)


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    return _LeaveOut.apply(x, dropout, dropout.key())


class _LeaveOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dropout: Dropout, key: int) -> Tensor:
        ctx.given = dropout, key
        return leave_out_at(x, dropout, key)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return leave_out_at(grad, *ctx.given), None, None
