"""LoRA's pairs in Megatron's linear layers, and in the adapter's of PyTorch.

Notable:
- a pair is two parameters of the linear layer itself: names of weights, and so checkpoints, stay as they are;
- a forward hook adds the pair's product. The fused layers call no module: there `product` adds it (fused_layers.py);
- A is drawn from a generator of the layer's own: the same pair whatever tensor and pipeline parallel sizes;
- dropout draws from no generator's state: what is left out follows from seed, step, replica, chunk and layer
  (lora_dropout.py), so that recomputation and a resumed run leave out the same.
"""

import zlib

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from llava_sft.model.fused_layers import FusedLanguageLayer
from llava_sft.model.llava import LlavaOneVision
from llava_sft.model.lora import LINEARS, Lora
from llava_sft.model.lora_dropout import Dropout, dropped
from llava_sft.model.products import joined, room_beside


def attach(model: LlavaOneVision, lora: Lora, seed: int) -> None:
    """Freeze the parts that LoRA trains, and give their linear layers trainable pairs."""
    for part_name in lora.parts:
        part = getattr(model, part_name, None)
        if part is None:  # it lives in another pipeline stage
            continue
        part.requires_grad_(False)
        (model if part_name == "language_model" else part).begins_frozen = True
        layers = [(layer.layer_number, layer) for layer in part.modules() if isinstance(layer, TransformerLayer)]
        for number, layer in layers or [(0, part)]:
            for name, linear in layer.named_modules():
                if name.endswith(LINEARS):
                    _add_pair(linear, lora, seed ^ zlib.crc32(f"{part_name}.{number}.{name}".encode()))
    model.dropout_seed = seed if lora.dropout else None


def _add_pair(linear: nn.Module, lora: Lora, seed: int) -> None:
    weight = linear.weight
    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    split = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) and ranks > 1 else None
    out, width = weight.shape
    columns = width * ranks if split == 1 else width
    generator = torch.Generator().manual_seed(seed)
    a = (torch.rand(lora.rank, columns, generator=generator) * 2 - 1) / columns**0.5
    first = rank * width if split == 1 else 0
    linear.lora_a = nn.Parameter(a[:, first : first + width].contiguous().to(weight))
    linear.lora_b = nn.Parameter(torch.zeros(out, lora.rank).to(weight))
    if split is not None:
        set_tensor_model_parallel_attributes(linear.lora_b if split == 0 else linear.lora_a, True, split, 1)
    linear.lora_scale, linear.lora_split = lora.scale, split
    linear.lora_dropout = Dropout(lora.dropout, seed, first, columns)
    linear.register_forward_hook(_add_product)


def settle(model: LlavaOneVision) -> None:
    """Before a step: give the weights of the GPU's layers room for their pairs (products.py), where they have none yet,
    or a validation of unpacked samples has moved them back."""
    moved = False
    for layer in model.language_model.decoder.layers:
        if isinstance(layer, FusedLanguageLayer) and layer.takes_packs:
            attention, mlp = layer.self_attention, layer.mlp
            for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
                if room_beside(linear, layer.config.fp8) and not hasattr(linear, "weight_and_pair"):
                    joined(linear)
                    moved = True
    if moved:
        torch.cuda.empty_cache()  # holes where they lay


def _add_product(linear: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """out + alpha / rank · B·A·x. Megatron's linear layers answer with a bias beside the output, PyTorch's do not."""
    x = inputs[0]
    if hasattr(linear, "layer_norm_weight"):  # Transformer Engine's norms its input itself
        x = _normed(linear, x)
    if linear.training and linear.lora_dropout.share:
        x = dropped(x, linear.lora_dropout)
    low = F.linear(x, linear.lora_a)
    if linear.lora_split == 0:  # each rank has rows of B: their gradients of `low` are summed
        low = copy_to_tensor_model_parallel_region(low)
    elif linear.lora_split == 1:  # each rank has columns of A
        low = reduce_from_tensor_model_parallel_region(low)
    change = linear.lora_scale * F.linear(low, linear.lora_b)
    return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change


def _normed(linear: nn.Module, x: Tensor) -> Tensor:
    weight, bias, eps = linear.layer_norm_weight, getattr(linear, "layer_norm_bias", None), linear.eps
    shape = (x.size(-1),)
    return F.rms_norm(x, shape, weight, eps) if bias is None else F.layer_norm(x, shape, weight, bias, eps)
