"""What a training step costs, in FLOPs and bytes, as far as the architecture and the settings decide it.

Notable:
- `training_flops` is the basis of MFU: what a step has to do, whatever the program does; `step_flops` is what it does,
  recomputation included, the basis of preflight's time;
- images and the samples of a pack are segments: attention costs the square of a segment's length, not of a pack's.
`values` are resolved settings. No torch.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from llava_sft.model.config import ModelConfig
from llava_sft.model.lora import Lora
from llava_sft.model.tensors import EMBEDDINGS, OUTPUT_LAYER, PARTS, parameter_count, parameters_by_part, tensor_rows

FP8_COPIES = (
    1.52  # bytes a parameter, of FP8 weights and their transposes beside the bf16 ones; measured on the 4B model
)


class MicroBatch(NamedTuple):
    """What goes through the model at once; a mean may have fractions."""

    tokens: float  # padding included
    token_squares: float  # sum over segments of their tokens squared
    patches: float
    patch_squares: float  # sum over images of their patches squared
    segments: float = 0.0  # packed samples


# ------------------------------------------------------------------------------------------------------- FLOPs


@lru_cache(maxsize=4)
def matmul_parameters(model: ModelConfig) -> tuple[int, int, int, int]:
    """Weights that every token (language model), token of an answer (output layer), patch (vision model) and image
    token (adapter) is multiplied with."""
    sizes = {"language": 0, "output": 0, "vision": 0, "adapter": 0}
    for row in tensor_rows(model):
        if len(row.shape) > 1 and row.mcore.endswith("weight") and row.mcore != EMBEDDINGS:
            sizes["output" if row.mcore == OUTPUT_LAYER else row.part.removesuffix("_model")] += prod(row.shape)
    return sizes["language"], sizes["output"], sizes["vision"], sizes["adapter"]


def forward_flops(
    model: ModelConfig, tokens: float, token_squares: float, patches: float, patch_squares: float
) -> tuple[float, float, float]:
    """FLOPs of one forward pass: language model (without its output layer), vision tower, adapter.

    A matrix product is 2 per weight and row. Attention is 4·n²·heads·head_dim a layer over a segment of n, half of it when
    causal.
    """
    language, _, vision, adapter = matmul_parameters(model)
    t, v = model.language, model.vision
    llm = 2 * language * tokens + 2 * t.num_layers * t.num_attention_heads * t.kv_channels * token_squares
    vit = 2 * vision * patches + 4 * v.num_layers * v.hidden_size * patch_squares
    return llm, vit, 2 * adapter * patches / v.spatial_merge_size**2


def training_flops(
    model: ModelConfig, trained: Collection[str], lengths: list[int], grids: list[tuple[int, int]], answers: int,
    lora: Lora | None = None,
) -> float:  # fmt: skip
    """FLOPs that one micro-batch of samples needs: of `lengths` tokens (padding apart), `answers` of which are learned, and
    images of `grids` patches.

    The output layer counts for answers alone: no other token has a loss, so no other needs its 152k logits (a program that
    computes them all the same does not earn MFU by it). Backward is twice the forward where weights are trained, once where
    only the gradient passes through, nothing for a frozen vision tower. Recomputation and padding do not count
    (PaLM, arXiv:2204.02311, appendix B).
    """
    patches = [height * width for height, width in grids]
    squares = sum(n * n for n in lengths), sum(n * n for n in patches)
    llm, vit, merger = forward_flops(model, sum(lengths), squares[0], sum(patches), squares[1])
    llm += 2 * matmul_parameters(model)[1] * answers
    if lora:
        return _lora_flops(model, trained, lora, (llm, vit, merger), squares, (sum(lengths), sum(patches)))
    return (
        llm * (3 if "language_model" in trained else 2)
        + merger * (3 if "adapter" in trained else 2 if "vision_model" in trained else 1)
        + vit * (3 if "vision_model" in trained else 1)
    )


def _lora_flops(
    model: ModelConfig, trained: Collection[str], lora: Lora, forward: tuple[float, float, float],
    squares: tuple[int, int], rows: tuple[int, int],
) -> float:  # fmt: skip
    """A frozen product takes its forward pass twice, one of a pair three times; attention, which has no weights, three
    times."""
    t, v, (llm, vit, merger) = model.language, model.vision, forward
    attention = 2 * t.num_layers * t.num_attention_heads * t.kv_channels * squares[0]
    vit_attention = 4 * v.num_layers * v.hidden_size * squares[1]
    passes = {part: 2 if part in lora.parts else 3 if part in trained else 1 for part in PARTS}
    upstream = "vision_model" in trained
    passes["language_model"] = max(2, passes["language_model"])
    passes["adapter"] = max(1 + upstream, passes["adapter"])
    tokens = {
        "language_model": rows[0],
        "vision_model": rows[1],
        "adapter": rows[1] / v.spatial_merge_size**2,
    }
    pairs = sum(6 * lora.parameters(model, part) * tokens[part] for part in lora.parts)
    return (
        (llm - attention) * passes["language_model"] + 3 * attention
        + (vit - vit_attention) * passes["vision_model"] + (3 if upstream else 1) * vit_attention
        + merger * passes["adapter"] + pairs
    )  # fmt: skip


def step_flops(model: ModelConfig, values: Mapping[str, Any], batch: MicroBatch) -> tuple[float, float]:
    """FLOPs that one micro-batch makes a process do, for the language and the vision model, recomputation included.

    The output layer runs where an answer is: hardly ever. The adapter is counted with the vision tower.
    """
    trained = set(values["trainable_modules"])
    llm, vit, merger = forward_flops(model, *batch[:4])
    lora = Lora.of(values)
    weights = {part for part in trained if not (lora and part in lora.parts)}
    llm *= (3 if "language_model" in weights else 2) + (values["recompute_language"] == "full")
    if lora and "language_model" in lora.parts:
        llm += 6 * lora.parameters(model, "language_model") * batch.tokens
    vit = (vit + merger) * (3 + (values["recompute_vision"] == "full") if "vision_model" in trained else 1)
    split = values["tensor_model_parallel_size"] * values["pipeline_model_parallel_size"]
    return llm / split, vit / split


# ------------------------------------------------------------------------------------------------------- bytes


def trained_parameters(model: ModelConfig, values: Mapping[str, Any]) -> int:
    """Of the parts that are trained whole, and of LoRA's pairs."""
    counts, lora = parameters_by_part(model), Lora.of(values)
    whole = [part for part in values["trainable_modules"] if not (lora and part in lora.parts)]
    return sum(counts[part] for part in whole) + (lora.parameters(model) if lora else 0)


def all_parameters(model: ModelConfig, values: Mapping[str, Any]) -> int:
    """Of the model and of LoRA's pairs."""
    lora = Lora.of(values)
    return parameter_count(model) + (lora.parameters(model) if lora else 0)


def expected_bytes(parameters: int, trained: int, values: Mapping[str, Any]) -> int:
    """Size of a checkpoint: the weights; of those trained also two moments and, where the weights are bf16, a float32 master
    copy or the 16 bits of it that bf16 lacks."""
    if not values["bf16"]:
        return parameters * 4 + trained * 8
    reduced = values["gpus_per_node"] and values["optimizer_precision"] == "bf16"
    return parameters * 2 + trained * (6 if reduced else 12)


def checkpoint_size(model: ModelConfig, values: Mapping[str, Any]) -> int:
    """Bytes of one checkpoint, with what the optimizer keeps of the parts that are trained; with LoRA of those alone."""
    trained = trained_parameters(model, values)
    return expected_bytes(trained if Lora.of(values) else parameter_count(model), trained, values)


def state_bytes(model: ModelConfig, values: Mapping[str, Any], replicas: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state of the fullest process. `replicas` of the model share the last."""
    total, trained = all_parameters(model, values), trained_parameters(model, values)
    weights: float = expected_bytes(total, 0, values)  # as in a checkpoint
    optimizer: float = expected_bytes(0, trained, values)
    gradients = 4 * trained
    if values["gpus_per_node"]:
        optimizer /= replicas
        weights += 0 if values["fp8"] == "none" else FP8_COPIES * total
        gradients = (4 if values["optimizer_precision"] == "fp32" else 2) * trained
    split = values["tensor_model_parallel_size"] * values["pipeline_model_parallel_size"]
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    return {name: size / split for name, size in parts.items()}


def activation_bytes(model: ModelConfig, values: Mapping[str, Any], batch: MicroBatch) -> dict[str, float]:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, counted in the tensors of a layer.

    With full recomputation a layer keeps its input, and one layer at a time all of it. Attention in plain PyTorch (CPU)
    keeps its scores too.
    """
    size, t, v = 2 if values["bf16"] else 4, model.language, model.vision
    heads = t.num_attention_heads + 2 * t.num_query_groups
    attention = (2 * heads + t.num_attention_heads) * t.kv_channels
    language = batch.tokens * (4 * t.hidden_size + attention + 3 * t.ffn_hidden_size)
    vision = batch.patches * (8 * v.hidden_size + 2 * v.ffn_hidden_size)
    if not values["gpus_per_node"]:
        language += batch.token_squares * t.num_attention_heads * (values["recompute_language"] == "none")
        vision += batch.patch_squares * v.num_attention_heads
    language = stored_activations(
        language, batch.tokens * t.hidden_size, t.num_layers, values["recompute_language"] == "full"
    )
    vision = stored_activations(
        vision, batch.patches * v.hidden_size, v.num_layers, values["recompute_vision"] == "full"
    )
    if "vision_model" not in values["trainable_modules"]:
        vision = 0.0
    # Layers of a later pipeline stage run while an earlier stage holds several micro-batches: as much as without one.
    split = values["tensor_model_parallel_size"]
    return {"language activations": size * language / split, "vision activations": size * vision / split}


def stored_activations(layer: float, layer_input: float, layers: int, recomputed: bool) -> float:
    return layers * layer_input + layer if recomputed else layers * layer
