"""Every tensor of LLaVA-OneVision-1.5, once: its names in Megatron-Core and Hugging Face, its shape, the part it belongs to.

A row says: this Megatron tensor is joined from these Hugging Face tensors, and is split into them again. Rows differ
only in how they join: as it is, one below the other, interleaved by head, or flattened.
Megatron's names are those of `LlavaOneVision.sharded_state_dict()`: the Transformer Engine spelling, in which a
LayerNorm belongs to the linear layer behind it. Hugging Face's are those in memory (`model.visual.…`).
No torch before tensors are joined or split: planning and preflight read names and shapes alone.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from llava_sft.errors import CheckpointError, many
from llava_sft.model.config import LanguageConfig, ModelConfig, VisionConfig
from llava_sft.model.processing import CHANNELS

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["language_model", "vision_model", "adapter"]
PARTS = get_args(Part)
HF_EMBEDDINGS, HF_OUTPUT_LAYER = "model.language_model.embed_tokens.weight", "lm_head.weight"
EMBEDDINGS, OUTPUT_LAYER = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
PADDED = {EMBEDDINGS, OUTPUT_LAYER}  # may have more rows: Megatron pads the vocabulary

Shape = tuple[int, ...]
Join = Callable[[list["Tensor"]], "Tensor"]
Split = Callable[["Tensor"], list["Tensor"]]


@dataclass(frozen=True)
class Row:
    mcore: str
    hf: Mapping[str, Shape]  # name -> shape, in the order in which they are joined
    shape: Shape  # of the Megatron tensor
    join: Join = lambda tensors: tensors[0]
    split: Split = lambda tensor: [tensor]

    @property
    def part(self) -> str:
        """The one of `PARTS` that it belongs to."""
        return self.mcore.split(".")[0]


@lru_cache(maxsize=16)
def tensor_rows(model: ModelConfig) -> tuple[Row, ...]:
    """All rows for a model of these sizes. Every tensor of either side stands in exactly one row."""
    return (*_language_model(model.language), *_vision_model(model.vision), *_adapter(model))


@lru_cache(maxsize=16)
def hf_shapes(model: ModelConfig) -> Mapping[str, Shape]:
    """Name -> shape of every tensor of the Hugging Face checkpoint."""
    return {name: shape for row in tensor_rows(model) for name, shape in row.hf.items()}


@lru_cache(maxsize=16)
def parameters_by_part(model: ModelConfig) -> Mapping[str, int]:
    """Number of values in each of `PARTS`, class token and its rotary vector included."""
    counts = dict.fromkeys(PARTS, 0)
    for row in tensor_rows(model):
        counts[row.part] += math.prod(row.shape)
    return counts


def parameter_count(model: ModelConfig) -> int:
    return sum(parameters_by_part(model).values())


# ------------------------------------------------------------------------------------------ the table


def _language_model(sizes: LanguageConfig) -> Iterator[Row]:
    hidden, ffn, head = sizes.hidden_size, sizes.ffn_hidden_size, sizes.kv_channels
    q, kv = sizes.num_attention_heads * head, sizes.num_query_groups * head
    yield same(EMBEDDINGS, HF_EMBEDDINGS, sizes.vocab_size, hidden)
    for i in range(sizes.num_layers):
        layer, hf = f"language_model.decoder.layers.{i}", f"model.language_model.layers.{i}"
        qkv = {f"{hf}.self_attn.{name}_proj.weight": (rows, hidden) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        gate_up = {f"{hf}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        yield same(f"{layer}.self_attention.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight", hidden)
        yield grouped_qkv(f"{layer}.self_attention.linear_qkv.weight", qkv, sizes.num_query_groups)
        yield same(f"{layer}.self_attention.q_layernorm.weight", f"{hf}.self_attn.q_norm.weight", head)
        yield same(f"{layer}.self_attention.k_layernorm.weight", f"{hf}.self_attn.k_norm.weight", head)
        yield same(f"{layer}.self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight", hidden, q)
        yield same(f"{layer}.mlp.linear_fc1.layer_norm_weight", f"{hf}.post_attention_layernorm.weight", hidden)
        yield stacked(f"{layer}.mlp.linear_fc1.weight", gate_up)
        yield same(f"{layer}.mlp.linear_fc2.weight", f"{hf}.mlp.down_proj.weight", hidden, ffn)
    yield same("language_model.decoder.final_layernorm.weight", "model.language_model.norm.weight", hidden)
    yield same(OUTPUT_LAYER, HF_OUTPUT_LAYER, sizes.vocab_size, hidden)


def _vision_model(sizes: VisionConfig) -> Iterator[Row]:
    hidden, ffn, heads, patch = sizes.hidden_size, sizes.ffn_hidden_size, sizes.num_attention_heads, sizes.patch_size
    convolution = (hidden, CHANNELS, patch, patch)
    yield same("vision_model.class_embedding", "model.visual.class_embedding", hidden)
    yield same("vision_model.class_pos_emb", "model.visual.class_pos_emb", 1, sizes.kv_channels // 2)
    yield flattened("vision_model.patch_embed.weight", "model.visual.patch_embed.proj.weight", convolution)
    yield from affine("vision_model.pre_layernorm", "model.visual.pre_layernorm", hidden)
    for i in range(sizes.num_layers):
        layer, hf = f"vision_model.decoder.layers.{i}", f"model.visual.blocks.{i}"
        qkv, hf_qkv = f"{layer}.self_attention.linear_qkv", f"{hf}.attn.qkv"
        yield from affine(f"{qkv}.layer_norm", f"{hf}.norm1", hidden, separator="_")
        yield interleaved_qkv(f"{qkv}.weight", f"{hf_qkv}.weight", (3 * hidden, hidden), heads)
        yield interleaved_qkv(f"{qkv}.bias", f"{hf_qkv}.bias", (3 * hidden,), heads)
        yield from affine(f"{layer}.self_attention.linear_proj", f"{hf}.attn.proj", hidden, hidden)
        yield from affine(f"{layer}.mlp.linear_fc1.layer_norm", f"{hf}.norm2", hidden, separator="_")
        yield from affine(f"{layer}.mlp.linear_fc1", f"{hf}.mlp.fc1", ffn, hidden)
        yield from affine(f"{layer}.mlp.linear_fc2", f"{hf}.mlp.fc2", hidden, ffn)


def _adapter(model: ModelConfig) -> Iterator[Row]:
    joined = model.vision.hidden_size * model.vision.spatial_merge_size**2  # a merge block of patches side by side
    yield from affine("adapter.layernorm", "model.visual.merger.ln_q", model.vision.hidden_size)
    yield from affine("adapter.linear_fc1", "model.visual.merger.mlp.0", joined, joined)
    yield from affine("adapter.linear_fc2", "model.visual.merger.mlp.2", model.language.hidden_size, joined)


# ------------------------------------------------------------------------------------------ the vision tower alone

# transformers' MLCD class, in which RICE-ViT is published: what stands in our names → what in its, `layrnorm` included.
_MLCD = {
    "model.visual.class_embedding": "vision_model.embeddings.class_embedding",
    "model.visual.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "model.visual.pre_layernorm.": "vision_model.pre_layrnorm.",
    "model.visual.blocks.": "vision_model.encoder.layers.",
    "model.visual.": "vision_model.",
    ".norm": ".layer_norm",
    ".attn.proj.": ".self_attn.out_proj.",
    ".attn.qkv.": ".self_attn.{}_proj.",
}
# Of its pooled output; here no LayerNorm follows the blocks.
MLCD_UNUSED = {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}


def is_mlcd(names: Collection[str]) -> bool:
    return "vision_model.embeddings.class_embedding" in names


def as_mlcd(row: Row) -> Row:
    """The same Megatron tensor from MLCD's tensors, which keep q, k and v apart."""
    ((name, shape),) = row.hf.items()
    for ours, theirs in _MLCD.items():
        name = name.replace(ours, theirs)
    if "{}" not in name:
        return replace(row, hf={name: shape})

    def join(tensors: list["Tensor"]) -> "Tensor":
        import torch

        return row.join([torch.cat(tensors)])

    def split(tensor: "Tensor") -> list["Tensor"]:
        return list(row.split(tensor)[0].chunk(3))

    return replace(row, hf={name.format(each): (shape[0] // 3, *shape[1:]) for each in "qkv"}, join=join, split=split)


# ------------------------------------------------------------------------------------------ ways to join


def same(mcore: str, hf: str, *shape: int) -> Row:
    return Row(mcore, {hf: shape}, shape)


def affine(mcore: str, hf: str, *weight_shape: int, separator: str = ".") -> Iterator[Row]:
    """Weight and bias of a Linear [out, in] or a LayerNorm [hidden]."""
    yield same(f"{mcore}{separator}weight", f"{hf}.weight", *weight_shape)
    yield same(f"{mcore}{separator}bias", f"{hf}.bias", weight_shape[0])


def stacked(mcore: str, hf: Mapping[str, Shape]) -> Row:
    """Tensors one below the other (SwiGLU: gate, then up)."""
    rows = [shape[0] for shape in hf.values()]
    columns = next(iter(hf.values()))[1]

    def join(tensors: list["Tensor"]) -> "Tensor":
        import torch

        return torch.cat(tensors)

    return Row(mcore, hf, (sum(rows), columns), join, lambda tensor: list(tensor.split(rows)))


def grouped_qkv(mcore: str, hf: Mapping[str, Shape], groups: int) -> Row:
    """q, k, v → for each key/value group its query heads, then its key, then its value."""
    rows = [shape[0] // groups for shape in hf.values()]
    columns = next(iter(hf.values()))[1]

    def join(tensors: list["Tensor"]) -> "Tensor":
        import torch

        return torch.cat([t.unflatten(0, (groups, -1)) for t in tensors], dim=1).flatten(0, 1)

    def split(tensor: "Tensor") -> list["Tensor"]:
        return [t.flatten(0, 1) for t in tensor.unflatten(0, (groups, -1)).split(rows, dim=1)]

    return Row(mcore, hf, (sum(rows) * groups, columns), join, split)


def interleaved_qkv(mcore: str, hf: str, shape: Shape, heads: int) -> Row:
    """One fused tensor of all q, all k, all v → for each head its q, k, v; weight or bias alike."""

    def join(tensors: list["Tensor"]) -> "Tensor":
        return tensors[0].unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)

    def split(tensor: "Tensor") -> list["Tensor"]:
        return [tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)]

    return Row(mcore, {hf: shape}, shape, join, split)


def flattened(mcore: str, hf: str, shape: Shape) -> Row:
    """A convolution whose stride is its size → the linear layer over flattened patches."""
    flat = (shape[0], math.prod(shape[1:]))
    return Row(mcore, {hf: shape}, flat, lambda tensors: tensors[0].flatten(1), lambda tensor: [tensor.view(shape)])


# ------------------------------------------------------------------------------------------ what a checkpoint holds


def check_tensors(found: Mapping[str, Shape], wanted: Mapping[str, Shape], source: Path) -> None:
    """Raise CheckpointError for the first tensor that is missing, left over or misshapen."""
    fix = "use a checkpoint of this model, or copy it again if it is damaged"
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(
            f"{source}: {many(len(missing), 'tensor', 'are')} missing, the first is {missing[0]} {wanted[missing[0]]}",
            fix,
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{source}: {many(len(extra), 'tensor', 'are')} not part of the model, the first is {extra[0]} {found[extra[0]]}",
            fix,
        )
    for name, shape in wanted.items():
        fits = found[name] == shape or (name in PADDED and found[name][0] >= shape[0] and found[name][1:] == shape[1:])
        if not fits:
            raise CheckpointError(f"{source}: {name} has shape {found[name]}, the model has {shape}", fix)
