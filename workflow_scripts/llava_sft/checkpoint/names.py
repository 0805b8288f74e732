"""The one table of names between Hugging Face and Megatron-Core, used in both directions.

A row says: this Megatron tensor is joined from these Hugging Face tensors, and is split into them again. Rows differ
only in how they join: as it is, one below the other, interleaved by head, or flattened.
Megatron's names are those of `LlavaOneVision.sharded_state_dict()`: the Transformer Engine spelling, in which a
LayerNorm belongs to the linear layer behind it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava_sft.errors import CheckpointError
from llava_sft.model.config import ModelConfig

PADDED = {"language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"}  # may have more rows

Shapes = dict[str, tuple[int, ...]]
Join = Callable[[list[Tensor]], Tensor]
Split = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Row:
    mcore: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]  # of the Megatron tensor
    join: Join = lambda tensors: tensors[0]
    split: Split = lambda tensor: [tensor]

    @property
    def part(self) -> str:
        """The part of the model it belongs to: language_model, vision_model or adapter."""
        return self.mcore.split(".")[0]


def mapping(model: ModelConfig) -> Iterator[Row]:
    """All rows for a model of these sizes. Every tensor of either side stands in exactly one row."""
    hf_shapes = model.hf_tensor_shapes()

    def same(mcore: str, hf: str) -> Row:
        return Row(mcore, (hf,), hf_shapes[hf])

    def affine(mcore: str, hf: str, separator: str = ".") -> Iterator[Row]:
        for part in ("weight", "bias"):
            yield same(f"{mcore}{separator}{part}", f"{hf}.{part}")

    language, vision = model.language, model.vision
    llm, hf_llm = "language_model", "model.language_model"
    yield same(f"{llm}.embedding.word_embeddings.weight", f"{hf_llm}.embed_tokens.weight")
    for i in range(language.num_layers):
        layer, hf = f"{llm}.decoder.layers.{i}", f"{hf_llm}.layers.{i}"
        attention, mlp = f"{layer}.self_attention", f"{layer}.mlp"
        yield same(f"{attention}.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight")
        qkv = tuple(f"{hf}.self_attn.{x}_proj.weight" for x in "qkv")
        yield grouped_qkv(f"{attention}.linear_qkv.weight", qkv, hf_shapes, language.num_query_groups)
        yield same(f"{attention}.q_layernorm.weight", f"{hf}.self_attn.q_norm.weight")
        yield same(f"{attention}.k_layernorm.weight", f"{hf}.self_attn.k_norm.weight")
        yield same(f"{attention}.linear_proj.weight", f"{hf}.self_attn.o_proj.weight")
        yield same(f"{mlp}.linear_fc1.layer_norm_weight", f"{hf}.post_attention_layernorm.weight")
        yield stacked(f"{mlp}.linear_fc1.weight", (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"), hf_shapes)
        yield same(f"{mlp}.linear_fc2.weight", f"{hf}.mlp.down_proj.weight")
    yield same(f"{llm}.decoder.final_layernorm.weight", f"{hf_llm}.norm.weight")
    yield same(f"{llm}.output_layer.weight", "lm_head.weight")

    vit, hf_vit = "vision_model", "model.visual"
    yield same(f"{vit}.class_embedding", f"{hf_vit}.class_embedding")
    yield same(f"{vit}.class_pos_emb", f"{hf_vit}.class_pos_emb")
    yield flattened(f"{vit}.patch_embed.weight", f"{hf_vit}.patch_embed.proj.weight", hf_shapes)
    yield from affine(f"{vit}.pre_layernorm", f"{hf_vit}.pre_layernorm")
    for i in range(vision.num_layers):
        layer, hf = f"{vit}.decoder.layers.{i}", f"{hf_vit}.blocks.{i}"
        attention, heads = f"{layer}.self_attention", vision.num_attention_heads
        yield from affine(f"{attention}.linear_qkv.layer_norm", f"{hf}.norm1", "_")
        for part in ("weight", "bias"):
            yield interleaved_qkv(f"{attention}.linear_qkv.{part}", f"{hf}.attn.qkv.{part}", hf_shapes, heads)
        yield from affine(f"{attention}.linear_proj", f"{hf}.attn.proj")
        yield from affine(f"{layer}.mlp.linear_fc1.layer_norm", f"{hf}.norm2", "_")
        yield from affine(f"{layer}.mlp.linear_fc1", f"{hf}.mlp.fc1")
        yield from affine(f"{layer}.mlp.linear_fc2", f"{hf}.mlp.fc2")
    yield from affine("adapter.layernorm", f"{hf_vit}.merger.ln_q")
    yield from affine("adapter.linear_fc1", f"{hf_vit}.merger.mlp.0")
    yield from affine("adapter.linear_fc2", f"{hf_vit}.merger.mlp.2")


def check_tensors(found: Shapes, wanted: Shapes, source: Path) -> None:
    """Raise CheckpointError for the first tensor that is missing, left over or misshapen."""
    fix = "use a checkpoint of this model, or copy it again if it is damaged"
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(
            f"{source}: {len(missing)} tensors are missing, the first is {missing[0]} {wanted[missing[0]]}", fix
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{source}: {len(extra)} tensors are not part of the model, the first is {extra[0]} {found[extra[0]]}", fix
        )
    for name, shape in wanted.items():
        same = found[name] == shape or (name in PADDED and found[name][0] >= shape[0] and found[name][1:] == shape[1:])
        if not same:
            raise CheckpointError(f"{source}: {name} has shape {found[name]}, the model has {shape}", fix)


# ------------------------------------------------------------------------------------------ ways to join


def stacked(mcore: str, hf: tuple[str, ...], shapes: Shapes) -> Row:
    """Tensors one below the other (SwiGLU: gate, then up)."""
    rows = [shapes[name][0] for name in hf]
    return Row(mcore, hf, (sum(rows), *shapes[hf[0]][1:]), torch.cat, lambda tensor: list(tensor.split(rows)))


def grouped_qkv(mcore: str, hf: tuple[str, ...], shapes: Shapes, groups: int) -> Row:
    """q, k, v → for each key/value group its query heads, then its key, then its value."""
    rows = [shapes[name][0] // groups for name in hf]

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.unflatten(0, (groups, -1)) for t in tensors], dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        return [t.flatten(0, 1) for t in tensor.unflatten(0, (groups, -1)).split(rows, dim=1)]

    return Row(mcore, hf, (sum(rows) * groups, *shapes[hf[0]][1:]), join, split)


def interleaved_qkv(mcore: str, hf: str, shapes: Shapes, heads: int) -> Row:
    """One fused tensor of all q, all k, all v → for each head its q, k, v; weight or bias alike."""

    def join(tensors: list[Tensor]) -> Tensor:
        return tensors[0].unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)

    def split(tensor: Tensor) -> list[Tensor]:
        return [tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)]

    return Row(mcore, (hf,), shapes[hf], join, split)


def flattened(mcore: str, hf: str, shapes: Shapes) -> Row:
    """A convolution whose stride is its size → the linear layer over flattened patches."""
    shape = shapes[hf]
    flat = (shape[0], math.prod(shape[1:]))
    return Row(mcore, (hf,), flat, lambda tensors: tensors[0].flatten(1), lambda tensor: [tensor.view(shape)])
