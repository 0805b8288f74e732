"""What a training step costs, in FLOPs and bytes, as far as the architecture and the settings decide it.

Notable:
- `training_flops` is the basis of MFU: what a step has to do, whatever the program does; `step_flops` is what it does,
  recomputation included, the basis of preflight's time;
- images and the samples of a pack are segments: attention costs the square of a segment's length, not of a pack's.
No torch.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

from llava_sft.model.config import ModelConfig
from llava_sft.model.tensors import EMBEDDINGS, OUTPUT_LAYER, parameter_count, parameters_by_part, tensor_rows
from llava_sft.model.trained import SPARED, Trained
from llava_sft.settings.resolve import ResolvedSettings

FP8_COPIES = 1.52  # bytes a parameter, of FP8 weights and their transposes beside bf16 ones; measured on the 4B model

# Products of a pair wait for memory, and its frozen layer computes some things again: it takes as long as so many ranks more
# would by their FLOPs (4B and 8B on an H100 and an H200, benchmarks/lora.py). In FP8, of two runs: nothing of a pair is joined with its
# layer's product.
RANKS_MORE, RANKS_MORE_FP8 = 290, 450

# Seconds that a host takes to launch a layer's forward and backward pass where tensor-parallel ranks sum in it: GPUs that
# share 4,096 tokens are done sooner (4B, two H200s, benchmarks/scaling.py).
HOST_S_OF_SHARED_LAYER = 0.0036

PINNED = 1.35  # pinned memory is taken in powers of two, tensor by tensor: so much for 4B and 8B


class MicroBatch(NamedTuple):
    """What goes through the model at once; a mean may have fractions."""

    tokens: float  # padding included
    token_squares: float  # sum over segments of their tokens squared
    patches: float
    patch_squares: float  # sum over images of their patches squared
    segments: float = 0.0  # packed samples


class Stage(NamedTuple):
    """What the processes of one pipeline stage have of the model; without pipeline parallelism all of it.

    share: of the language model's layers. batches: micro-batches whose activations it holds at once.
    """

    share: float
    first: bool
    last: bool
    batches: int


def micro_batches(values: ResolvedSettings) -> int:
    """Of a step, that one replica of the model takes."""
    return values.global_batch_size // (values.micro_batch_size * values.data_parallel_size)


def stages(model: ModelConfig, values: ResolvedSettings) -> list[Stage]:
    """Megatron's 1F1B schedule: a stage has begun as many micro-batches as there are stages from it to the last."""
    count, layers = values.pipeline_model_parallel_size, model.language.num_layers
    first = values.first_stage_layers or layers / count
    shares = [first / layers] + [(layers - first) / layers / (count - 1)] * (count - 1) if count > 1 else [1.0]
    return [
        Stage(share, place == 0, place == count - 1, max(1, min(count - place, micro_batches(values))))
        for place, share in enumerate(shares)
    ]


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


class Work(NamedTuple):
    """FLOPs of one forward pass: matrix products of a part, and attention, whose backward pass costs differently. Without
    the output layer."""

    language: float
    language_attention: float
    vision: float
    vision_attention: float
    adapter: float


def forward_flops(
    model: ModelConfig, tokens: float, token_squares: float, patches: float, patch_squares: float
) -> Work:
    """A matrix product is 2 per weight and row. Attention is 4·n²·heads·head_dim a layer over a segment of n, half of it
    when causal."""
    language, _, vision, adapter = matmul_parameters(model)
    t, v = model.language, model.vision
    return Work(
        language=2 * language * tokens,
        language_attention=2 * t.num_layers * t.num_attention_heads * t.kv_channels * token_squares,
        vision=2 * vision * patches,
        vision_attention=4 * v.num_layers * v.hidden_size * patch_squares,
        adapter=2 * adapter * patches / v.spatial_merge_size**2,
    )


def pair_flops(model: ModelConfig, trained: Trained, tokens: float, patches: float) -> dict[str, float]:
    """FLOPs of LoRA's pairs in one forward pass, by part."""
    rows = {"language_model": tokens, "vision_model": patches, "adapter": patches / model.vision.spatial_merge_size**2}
    return (
        {part: 2 * trained.lora.parameters(model, part) * rows[part] for part in trained.by_pairs}
        if trained.lora
        else {}
    )


def training_flops(
    model: ModelConfig, trained: Trained, lengths: list[int], grids: list[tuple[int, int]], answers: int
) -> float:
    """FLOPs that one micro-batch of samples needs: of `lengths` tokens (padding apart), `answers` of which are learned, and
    images of `grids` patches.

    The output layer counts for answers alone: no other token has a loss, so no other needs its 152k logits (a program that
    computes them all the same does not earn MFU by it). `Trained.passes` says what the backward pass takes: nothing for a
    frozen vision tower. Recomputation and padding do not count (PaLM, arXiv:2204.02311, appendix B).
    """
    patches = [height * width for height, width in grids]
    squares = sum(n * n for n in lengths), sum(n * n for n in patches)
    work = forward_flops(model, sum(lengths), squares[0], sum(patches), squares[1])
    output = 2 * matmul_parameters(model)[1] * answers
    pairs = pair_flops(model, trained, sum(lengths), sum(patches))
    language, vision, adapter = (trained.passes(part) for part in ("language_model", "vision_model", "adapter"))
    return (
        (work.language + output) * language[0] + work.language_attention * language[1]
        + work.vision * vision[0] + work.vision_attention * vision[1]
        + work.adapter * adapter[0] + 3 * sum(pairs.values())
    )  # fmt: skip


def step_flops(
    model: ModelConfig, values: ResolvedSettings, batch: MicroBatch, stage: Stage
) -> tuple[float, float, float]:
    """FLOPs that one micro-batch makes a process of a stage do, recomputation included: of the language model, of LoRA's
    pairs in it (never in FP8), of the vision model.

    The output layer runs where an answer is: hardly ever. The adapter is counted with the vision tower.
    """
    trained = values.trained
    work = forward_flops(model, *batch[:4])
    pairs = pair_flops(model, trained, batch.tokens, batch.patches)
    more = RANKS_MORE if values.fp8 == "none" else RANKS_MORE_FP8
    pairs = {part: flops * (1 + more / trained.lora.rank) for part, flops in pairs.items() if trained.lora}
    again = values.recompute_language == "full"
    products, attention = (passes + again for passes in trained.passes("language_model"))
    llm = products * work.language + attention * work.language_attention
    in_llm = (3 + again) * pairs.get("language_model", 0.0)
    again = values.recompute_vision == "full" and trained.reaches("vision_model")
    products, attention = (passes + again for passes in trained.passes("vision_model"))
    vit = products * work.vision + attention * work.vision_attention + (3 + again) * pairs.get("vision_model", 0)
    vit += (trained.passes("adapter")[0] + again) * work.adapter + (3 + again) * pairs.get("adapter", 0)
    tp = values.tensor_model_parallel_size
    return stage.share * llm / tp, stage.share * in_llm / tp, stage.first * vit / tp


def layer_calls(model: ModelConfig, values: ResolvedSettings, batch: MicroBatch, stage: Stage) -> float:
    """How often a micro-batch goes through a layer of a stage: in chunks, once for each."""
    layers = stage.share * model.language.num_layers + stage.first * model.vision.num_layers
    return max(1.0, batch.tokens / values.chunk_tokens) * layers


def shares_layers(values: ResolvedSettings) -> bool:
    """Whether GPUs have a part of each layer."""
    return values.on_gpu and values.tensor_model_parallel_size > 1


def host_seconds(model: ModelConfig, values: ResolvedSettings, batch: MicroBatch, stage: Stage) -> float:
    """What a step takes the host of a process of this stage, however fast its GPU is; 0 where that is not known to matter."""
    calls = micro_batches(values) * layer_calls(model, values, batch, stage)
    return HOST_S_OF_SHARED_LAYER * shares_layers(values) * calls


def summed_bytes(model: ModelConfig, values: ResolvedSettings, batch: MicroBatch, stage: Stage) -> float:
    """What tensor-parallel ranks sum in the forward pass of a micro-batch, and wait for: twice a layer, in bf16."""
    return (
        2
        * 2
        * shares_layers(values)
        * stage.share
        * model.language.num_layers
        * batch.tokens
        * model.language.hidden_size
    )


# ------------------------------------------------------------------------------------------------------- bytes


def expected_bytes(parameters: float, trained: float, values: ResolvedSettings) -> float:
    """Size of a checkpoint: the weights; of those trained also two moments and, where the weights are bf16, a float32 master
    copy or the 16 bits of it that bf16 lacks."""
    if not values.bf16:
        return parameters * 4 + trained * 8
    return parameters * 2 + trained * (6 if values.reduces_in_bf16 else 12)


def checkpoint_size(model: ModelConfig, values: ResolvedSettings) -> int:
    """Bytes of one checkpoint, with what the optimizer keeps of the parts that are trained; with LoRA of those alone. On GPUs
    each tensor-parallel rank writes its own of the parts that see images, which it has all of."""
    trained = values.trained.parameters(model)
    weights = trained if values.trained.lora else parameter_count(model)
    copies = (values.tensor_model_parallel_size - 1) * values.on_gpu
    again = copies * (trained - values.trained.parameters(model, ("language_model",)))
    return int(expected_bytes(weights, trained + again, values))


def checkpoints_kept(values: ResolvedSettings) -> int:
    """How many checkpoints lie on the disk when all steps are done."""
    count = -(-values.train_iters // values.save_interval)
    return min(count, values.keep_last or count)


def host_bytes_for_save(model: ModelConfig, values: ResolvedSettings) -> float:
    """Bytes of a node's memory that a save copies the GPUs' state to, and that stay taken."""
    return values.on_gpu * PINNED * checkpoint_size(model, values) / values.nodes


def stage_parameters(model: ModelConfig, values: ResolvedSettings, stage: Stage) -> tuple[float, float]:
    """Values that a process of a stage has, LoRA's pairs with them, and how many of them are trained. Tensor-parallel ranks
    share the language model, and have all of the other parts."""
    counts = parameters_by_part(model)
    ends = prod(tensor_rows(model)[0].shape)  # embeddings; the output layer has as many
    layers = counts["language_model"] - 2 * ends
    tp = values.tensor_model_parallel_size
    held = {"language_model": (stage.share * layers + ends * (stage.first + stage.last)) / tp}
    held |= {part: stage.first * counts[part] for part in ("vision_model", "adapter")}
    trained = sum(held[part] for part in values.trained.whole)
    if pairs := values.trained.lora:
        shares = {"language_model": stage.share / tp, "vision_model": stage.first, "adapter": stage.first}
        added = sum(shares[part] * pairs.parameters(model, part) for part in pairs.parts)
        return sum(held.values()) + added, trained + added
    return sum(held.values()), trained


def state_bytes(model: ModelConfig, values: ResolvedSettings, stage: Stage | None = None) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state of a process of this stage, or of the fullest. On GPUs all replicas
    share the last."""
    if stage is None:
        each = [state_bytes(model, values, stage) for stage in stages(model, values)]
        return max(each, key=lambda parts: sum(parts.values()))
    total, trained = stage_parameters(model, values, stage)
    weights = expected_bytes(total, 0, values)  # as in a checkpoint
    optimizer = expected_bytes(0, trained, values)
    gradients = 4 * trained
    if values.on_gpu:
        optimizer /= values.data_parallel_size
        weights += 0 if values.fp8 == "none" else FP8_COPIES * total
        gradients = (4 if values.optimizer_precision == "fp32" else 2) * trained
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def activation_bytes(
    model: ModelConfig, values: ResolvedSettings, batch: MicroBatch, memory: float, stage: Stage
) -> dict[str, float]:
    """Bytes that a stage keeps for the backward passes of the micro-batches that it holds, counted in the tensors of a layer.

    With frozen weights the layers for GPUs keep queries, keys and values, and what pairs are multiplied with, only where the
    device's `memory`, in bytes, holds them with a part to spare (model/fused_layers.py). With full recomputation a layer
    keeps its input, and one layer at a time all of it. Attention in plain PyTorch (CPU) keeps its scores too.
    """
    size, t, v = 2 if values.bf16 else 4, model.language, model.vision
    heads = t.num_attention_heads + 2 * t.num_query_groups
    language_whole, vision_whole = (
        not values.on_gpu or part in values.trained.whole for part in ("language_model", "vision_model")
    )
    attention = ((1 + language_whole) * heads + t.num_attention_heads) * t.kv_channels
    ranks = values.tensor_model_parallel_size
    split = (attention + (2 + language_whole) * t.ffn_hidden_size) / ranks
    language = batch.tokens * ((2 + 2 * language_whole) * t.hidden_size + split)
    vision = batch.patches * ((6 + 2 * vision_whole) * v.hidden_size + (1 + vision_whole) * v.ffn_hidden_size)
    if not values.on_gpu:
        vision += batch.patch_squares * v.num_attention_heads
    vision = stored_activations(vision, batch.patches * v.hidden_size, v.num_layers, values.recompute_vision == "full")
    vision *= (values.trained.reaches("vision_model") and stage.first) / ranks  # each rank sees some of the images
    layers = stage.share * t.num_layers
    if not values.on_gpu:
        language += batch.token_squares * t.num_attention_heads * (values.recompute_language == "none")
    elif not language_whole and values.recompute_language == "none" and (ranks == 1 or not values.trained.by_pairs):
        of_pairs = "language_model" in values.trained.by_pairs and 2 * t.hidden_size + t.ffn_hidden_size
        all_of_it = language + batch.tokens * (heads * t.kv_channels / ranks + of_pairs)
        kept = size * stage.batches * (vision + layers * all_of_it)
        if (1 - SPARED) * memory >= sum(state_bytes(model, values, stage).values()) + kept:
            language = all_of_it
    language = stored_activations(language, batch.tokens * t.hidden_size, layers, values.recompute_language == "full")
    held = size * stage.batches
    return {"language activations": held * language, "vision activations": held * vision}


def stored_activations(layer: float, layer_input: float, layers: float, recomputed: bool) -> float:
    return layers * layer_input + layer if recomputed else layers * layer
