"""How many floating-point operations a training step has to do, the basis of MFU."""

from collections.abc import Collection
from functools import lru_cache
from math import prod

from llava_sft.model.config import ModelConfig
from llava_sft.model.tensors import EMBEDDINGS, OUTPUT_LAYER, tensor_rows


@lru_cache(maxsize=4)
def matmul_parameters(model: ModelConfig) -> tuple[int, int, int, int]:
    """Weights that every token (language model), token of an answer (output layer), patch (vision model) and image
    token (adapter) is multiplied with."""
    sizes = {"language": 0, "output": 0, "vision": 0, "adapter": 0}
    for row in tensor_rows(model):
        if len(row.shape) > 1 and row.mcore.endswith("weight") and row.mcore != EMBEDDINGS:
            sizes["output" if row.mcore == OUTPUT_LAYER else row.part.removesuffix("_model")] += prod(row.shape)
    return tuple(sizes.values())


def training_flops(
    model: ModelConfig, trained: Collection[str], lengths: list[int], grids: list[tuple[int, int]], answers: int
) -> float:
    """FLOPs of one micro-batch of samples with `lengths` tokens (padding apart), `answers` of which are learned, and
    images of `grids` patches.

    A matrix product is 2 per weight and row. The output layer counts for answers alone: no other token has a loss, so
    no other needs its 152k logits (a program that computes them all the same does not earn MFU by it). Attention is 4·n²·heads·head_dim a layer over a segment of n, half of it
    when causal; samples of a pack and images are segments of their own. Backward is twice the forward where weights are trained, once where
    only the gradient passes through, nothing for a frozen vision tower. Recomputation and padding do not count
    (PaLM, arXiv:2204.02311, appendix B).
    """
    language, output, vision, adapter = matmul_parameters(model)
    t, v = model.language, model.vision
    patches = [height * width for height, width in grids]
    attention = 2 * t.num_layers * t.num_attention_heads * t.kv_channels * sum(n * n for n in lengths)
    llm = 2 * language * sum(lengths) + 2 * output * answers + attention
    vit = 2 * vision * sum(patches) + 4 * v.num_layers * v.hidden_size * sum(n * n for n in patches)
    merger = 2 * adapter * sum(patches) / v.spatial_merge_size**2
    return (
        llm * (3 if "language_model" in trained else 2)
        + merger * (3 if "adapter" in trained else 2 if "vision_model" in trained else 1)
        + vit * (3 if "vision_model" in trained else 1)
    )
