"""What preflight says beside its prediction: settings that would fit where a run does not, and a faster way to share a model
between the same GPUs. No torch."""

import math
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from llava_sft.preflight.cost import MicroBatch
from llava_sft.preflight.predict import (
    Calibration,
    Case,
    Prediction,
    calibration_for,
    equally_slow_stages,
    fits,
    predict,
)
from llava_sft.run.remedies import in_yaml, less_memory, with_lora
from llava_sft.settings.resolve import ResolvedSettings

BatchesOf = Callable[..., tuple[MicroBatch, MicroBatch]]
Proposal = tuple[dict[str, Any], Prediction]  # changed settings, and what is predicted of them

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
OTHER_BATCHES = ("micro_batch_size", "pack_chunk_tokens", PIPELINE)  # a pipeline takes whole packs
WORTH_SAYING = 1.03  # times as fast: less is within the prediction's error


class Forecast(NamedTuple):
    """The prediction of a case, the fit behind it, and the changed settings that would fit where it does not."""

    case: Case
    prediction: Prediction
    calibration: Calibration
    would_fit: list[Proposal]


def forecast_of(case: Case, batches_of: BatchesOf | None = None, cut: bool = False) -> Forecast:
    """`cut`: the settings leave to preflight how the model is cut into pipeline stages. `batches_of`: mean and largest
    micro-batch with other values of `OTHER_BATCHES` (its arguments); estimated without."""
    calibration, batches_of = calibration_for(case.machine.device), batches_of and cache(batches_of)
    if cut:
        case = case._replace(values=equally_slow_stages(case, calibration))
    prediction = predict(case, calibration)
    near = [] if fits(prediction, case.machine) else proposals(case, calibration, batches_of)
    return Forecast(case, prediction, calibration, near)


def proposals(case: Case, calibration: Calibration, batches_of: BatchesOf | None = None) -> list[Proposal]:
    """Changed settings that would fit, the fastest first; those that train the same before LoRA, and those that keep
    seq_length before those that do not, and without more tensor parallelism before with it: its sums were measured over
    NVLink alone. A pipeline, which answers no held-out samples during training, has to be worth it; it is tried with the
    batches as they are, as each has dozens of cuts."""
    values = case.values
    smaller = less_memory(values, values.seq_length)
    groups = case.model.language.num_query_groups
    smaller[TENSOR] = [size for size in smaller[TENSOR] if not groups % size]
    trainings = [{}, lora] if (lora := with_lora(values)) else [{}]
    changes = [one | training for training, one in product(trainings, combinations(values, smaller))]
    recomputed = combinations(values, {name: ["full"] for name in smaller if name.startswith("recompute_")})
    changes += [shared | more for shared, more in product(shared_otherwise(case), recomputed) if PIPELINE in shared]
    tried = ((changed, predicted(case, calibration, changed, batches_of)) for changed in changes if changed)
    found = [(changed, what) for changed, what in tried if what and fits(what, case.machine)]
    found.sort(key=order_of_proposals)
    needless = [a for a, _ in found if any(b.items() < a.items() for b, _ in found)]  # less of a change would do
    return [each for each in found if each[0] not in needless]


def order_of_proposals(proposal: Proposal) -> tuple:
    changed, prediction = proposal
    later = (name in changed for name in ("seq_length", "lora_rank", TENSOR))
    worth = prediction.tokens_per_s / (WORTH_SAYING if changed.get(PIPELINE, 1) > 1 else 1)
    return *later, -worth, len(changed)


def combinations(values: ResolvedSettings, others: dict[str, list]) -> list[dict[str, Any]]:
    """Every choice of the settings as they are or as one of the `others`: what is changed by it."""
    options = [
        [{}, *({name: value} for value in found if value != getattr(values, name))] for name, found in others.items()
    ]
    return [{name: value for part in picked for name, value in part.items()} for picked in product(*options)]


def shared_otherwise(case: Case) -> Iterator[dict[str, Any]]:
    """Other tensor- and pipeline-parallel sizes with as many GPUs, which divide the model and lie within a node; and a smaller
    micro_batch_size where more replicas share the global batch."""
    values, language = case.values, case.model.language
    if not values.on_gpu:
        return
    sizes = range(1, values.nproc_per_node + 1)
    for tensor, pipeline in product(sizes, sizes):
        whole = (
            values.nproc_per_node % (tensor * pipeline),
            language.num_query_groups % tensor,
            language.num_layers % pipeline,
        )
        if any(whole) or (
            tensor > 1 and values.trained.by_pairs
        ):  # LoRA's pairs take slower layers then, of no known speed
            continue
        share, left = divmod(values.global_batch_size, values.nodes * values.nproc_per_node // (tensor * pipeline))
        sizes_of = {TENSOR: tensor, PIPELINE: pipeline, "micro_batch_size": math.gcd(share, values.micro_batch_size)}
        changed = {name: size for name, size in sizes_of.items() if size != getattr(values, name)}
        if changed.keys() & {TENSOR, PIPELINE} and not left:
            yield changed


def predicted(
    case: Case, calibration: Calibration, changed: dict[str, Any], batches_of: BatchesOf | None
) -> Prediction | None:
    """Of changed settings, cut into the fastest pipeline stages; None where the GPUs or the global batch cannot be shared so."""
    tried = case.values.model_copy(update=changed)
    if tried.nproc_per_node % tried.model_parallel_size:
        return None
    if tried.global_batch_size % (tried.micro_batch_size * tried.data_parallel_size):
        return None
    known = batches_of if tried.seq_length == case.values.seq_length else None
    other = {name: changed[name] for name in OTHER_BATCHES if name in changed}
    mean, largest = known(**other) if known else estimated_batches(case, tried)
    case = case._replace(values=tried, mean=mean, largest=largest)
    return predict(
        case._replace(values=equally_slow_stages(case, calibration)) if PIPELINE in changed else case, calibration
    )


def estimated_batches(case: Case, tried: ResolvedSettings) -> tuple[MicroBatch, MicroBatch]:
    """Mean and largest micro-batch of changed settings, from those of the case."""
    of_sample = case.mean.token_squares / max(1.0, case.mean.tokens)

    def piece(values: ResolvedSettings) -> float:  # chunks are cut between samples: one is longer by about a sample
        return min(values.seq_length, values.chunk_tokens + of_sample * (values.chunk_tokens < values.seq_length))

    rows, grown = tried.micro_batch_size / case.values.micro_batch_size, piece(tried) / piece(case.values)
    if tried.chunk_tokens <= case.values.chunk_tokens:
        grown = min(1.0, grown)
    longer = tried.seq_length / case.values.seq_length, grown
    mean, largest = (
        MicroBatch(*(rows * scale * each for each in batch))
        for scale, batch in zip(longer, (case.mean, case.largest), strict=True)
    )
    return mean, largest


# -------------------------------------------------------------------------------------------------- in words


def proposal_lines(found: list[Proposal]) -> list[str]:
    """The three fastest settings that would fit, a line each, as a command takes them."""
    return [
        f"{as_options(changed)} ({prediction.memory_gib:.1f} GiB, {prediction.tokens_per_s:,.0f} tokens/s)"
        for changed, prediction in found[:3]
    ]


def as_options(changed: dict[str, Any]) -> str:
    return " ".join(["--config", *(shlex.quote(f"{name}={in_yaml(value)}") for name, value in changed.items())])


def faster_line(forecast: Forecast, batches_of: BatchesOf | None = None) -> list[str]:
    """What to say where the same GPUs would be faster if they shared the model in another way."""
    case, rate = forecast.case, forecast.prediction.tokens_per_s
    values, machine = case.values, case.machine
    if not fits(forecast.prediction, machine):
        return []
    tried = (
        (changed, predicted(case, forecast.calibration, changed, batches_of)) for changed in shared_otherwise(case)
    )
    others = [(changed, what) for changed, what in tried if what and fits(what, machine)]
    changed, other = max(others, key=lambda each: each[1].tokens_per_s, default=({}, forecast.prediction))
    if other.tokens_per_s <= WORTH_SAYING * rate:
        return []
    now = {name: getattr(values, name) for name in (TENSOR, PIPELINE) if name in changed}
    asked = " and ".join(f"{name} {size}" for name, size in now.items() if size > 1 or max(now.values()) == 1)
    return [
        f"{asked}: {rate:,.0f} tokens/s; the same GPUs would do {other.tokens_per_s:,.0f} with "
        f"{as_options(changed)} ({other.memory_gib:.1f} of {machine.memory_gib:.1f} GiB)"
    ]
