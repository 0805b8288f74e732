"""Memory and time of a training step before it runs.

Notable:
- what the architecture and the settings decide is computed (cost.py); what they do not is fitted to recorded runs:
  how far a byte and a FLOP go on this kind of machine;
- the factors of that fit stand in factors.json, made by benchmarks/preflight.py from the runs that it records.
No torch: preflight runs where there is no GPU.
"""

import math
import random
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from llava_sft.data.packing import cut_between
from llava_sft.data.sizes import SampleSizes
from llava_sft.files import read_json
from llava_sft.machine import GIB, Machine
from llava_sft.model.config import ModelConfig
from llava_sft.preflight.cost import (
    MicroBatch,
    Stage,
    activation_bytes,
    host_seconds,
    layer_calls,
    micro_batches,
    stages,
    state_bytes,
    step_flops,
    summed_bytes,
)
from llava_sft.settings.conflicts import possible_cuts
from llava_sft.settings.resolve import ResolvedSettings

FACTORS = Path(__file__).with_name("factors.json")
RESERVE = 0.05  # of a device's memory that a prediction leaves free: its own error, and what other processes hold
CUDA_GIB = 1.5  # of a GPU, at least: CUDA's own memory (0.5 to 1.3 GiB) is no part of the prediction


class Case(NamedTuple):
    """A training on a machine: the mean micro-batch of an epoch, and the largest that goes through the model at once."""

    model: ModelConfig
    values: ResolvedSettings
    machine: Machine
    mean: MicroBatch
    largest: MicroBatch


class Prediction(NamedTuple):
    """Of the fullest process: memory in GiB by part. Seconds of a global batch of `tokens_per_step` tokens."""

    memory: dict[str, float]
    step_s: float
    tokens_per_step: float

    @property
    def memory_gib(self) -> float:
        return sum(self.memory.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s


# ------------------------------------------------------------------------------------------- batches of an epoch


def mean_and_largest(
    sizes: SampleSizes, values: ResolvedSettings, packs: list[list[int]] | None
) -> tuple[MicroBatch, MicroBatch]:
    """The mean micro-batch of an epoch, and the largest that goes through the model at once.

    The largest has the most of each, tokens and patches, as no single one need have. `packs`: of indices into `sizes`,
    with packing; they are put together and cut as the loader and the trainer do it, in one random order.
    """
    mbs = values.micro_batch_size
    if packs is None:
        return _padded([_micro_batch(sizes, [index]) for index in range(len(sizes.tokens))], mbs)
    draw = random.Random(values.seed)
    packs = [draw.sample(pack, len(pack)) for pack in draw.sample(packs, len(packs))]
    packs *= math.ceil(mbs / len(packs))  # at least one batch, as of an endless stream
    starts = range(0, len(packs) - mbs + 1, mbs)
    batches = [list(chain.from_iterable(packs[first : first + mbs])) for first in starts]
    chunks = [
        [batch[place] for place in places]
        for batch in batches
        for places in cut_between([sizes.tokens[index] for index in batch], values.chunk_tokens)
    ]
    whole, part = ([_micro_batch(sizes, rows) for rows in each] for each in (batches, chunks))
    mean = MicroBatch(*(sum(column) / len(whole) for column in zip(*whole, strict=True)))
    return mean, MicroBatch(*(max(column) for column in zip(*part, strict=True)))


def _micro_batch(sizes: SampleSizes, row: list[int]) -> MicroBatch:
    tokens = [sizes.tokens[index] for index in row]
    patches = [count for index in row for count in sizes.patches[index]]
    squares = sum(n * n for n in tokens), sum(n * n for n in patches)
    return MicroBatch(sum(tokens), squares[0], sum(patches), squares[1], len(tokens))


def _padded(each: list[MicroBatch], mbs: int) -> tuple[MicroBatch, MicroBatch]:
    """Rows are padded to the longest of their batch: on average to the expected greatest of `mbs` random ones."""
    lengths = sorted(batch.tokens for batch in each)
    count = len(lengths)
    width = sum(length * ((i + 1) ** mbs - i**mbs) for i, length in enumerate(lengths)) / count**mbs
    mean = (mbs * sum(column) / count for column in zip(*each, strict=True))
    most = (mbs * max(column) for column in zip(*each, strict=True))

    def padded(batch: MicroBatch, width: float) -> MicroBatch:  # all rows in one call of attention
        return batch._replace(tokens=mbs * width, token_squares=mbs * width**2, segments=0.0)

    return padded(MicroBatch(*mean), width), padded(MicroBatch(*most), lengths[-1])


# ------------------------------------------------------------------------------------------------- prediction


class Calibration(NamedTuple):
    """Factors fitted to recorded runs of one kind of device, one for each of `memory_terms` and `time_terms`."""

    memory: list[float]
    time: list[float]
    runs: int
    devices: list[str]  # that the runs are of


def calibration_for(device: str) -> Calibration:
    """The factors of this device where enough of its runs are recorded, else those of all GPUs, which peaks scale."""
    fitted = read_json(FACTORS)
    return Calibration(**fitted.get(device) or fitted["GPU"])


def memory_terms(case: Case, stage: Stage) -> list[float]:
    """GiB: what a process needs whatever it trains, language activations, vision activations; and gradients where a GPU
    recomputes the language model, which leaves memory unused between them (8 % of what full training takes then)."""
    model, values = case.model, case.values
    gradients = state_bytes(model, values, stage)["gradients"] / GIB
    holes = gradients if values.on_gpu and values.recompute_language == "full" else 0.0
    activations = activation_bytes(model, values, case.largest, case.machine.memory_gib * GIB, stage)
    return [1.0, *(size / GIB for size in activations.values()), holes]


def time_terms(case: Case, slowest: Stage) -> list[float]:
    """Seconds of a step at the device's peak: of the language model in bf16 or in FP8, of the vision model. Then what
    costs time whatever a batch holds: GiB of gradients and optimizer state, calls of the model (in FP8 the host has more
    to do), of attention, and GiB that tensor-parallel ranks sum in forward passes, in which they wait for it. All micro-batches
    go through the slowest pipeline stage one after the other; the first or the last of them has to go through the others,
    too."""
    others = stages(case.model, case.values)
    others.remove(slowest)
    state = state_bytes(case.model, case.values, slowest)
    of_state = (state["gradients"] + state["optimizer"]) / GIB
    counted = [(slowest, micro_batches(case.values)), *((stage, 1) for stage in others)]
    passes = [[count * term for term in _terms_of_pass(case, stage)] for stage, count in counted]
    terms = [sum(column) for column in zip(*passes, strict=True)]
    return [*terms[:3], of_state, *terms[3:]]


def _terms_of_pass(case: Case, stage: Stage) -> list[float]:
    """Of `time_terms`, those of one micro-batch in one stage."""
    model, values, batch = case.model, case.values, case.mean
    llm, pairs, vit = step_flops(model, values, batch, stage)
    calls = layer_calls(model, values, batch, stage) / (model.language.num_layers + model.vision.num_layers)
    products, of_model = ([llm + pairs, 0.0], [calls, 0.0]) if values.fp8 == "none" else ([pairs, llm], [0.0, calls])
    attentions = 0.0
    if not values.on_gpu:  # plain PyTorch calls it for each segment; on a GPU one call takes them all
        times = 1 + (values.recompute_language == "full") / 3  # forward and backward, which takes twice as long
        attentions = batch.segments * stage.share * model.language.num_layers * times
    summed = summed_bytes(model, values, batch, stage) / GIB
    return [*(flops / case.machine.peak for flops in (*products, vit)), *of_model, attentions, summed]


def predict(case: Case, calibration: Calibration) -> Prediction:
    """What one step takes: of pipeline stages the fullest decides on memory, the slowest on time."""
    each = stages(case.model, case.values)
    memory = max((stage_memory(case, calibration, stage) for stage in each), key=lambda parts: sum(parts.values()))
    seconds = max(stage_seconds(case, calibration, stage) for stage in each)
    count = micro_batches(case.values) * case.values.data_parallel_size
    return Prediction(memory, seconds, case.mean.tokens * count)


def stage_memory(case: Case, calibration: Calibration, stage: Stage) -> dict[str, float]:
    """GiB of a process by part."""
    state = {name: size / GIB for name, size in state_bytes(case.model, case.values, stage).items()}
    fixed, language, vision, holes = (
        factor * term for factor, term in zip(calibration.memory, memory_terms(case, stage), strict=True)
    )
    activations = {"language activations": language, "vision activations": vision}
    return state | activations | {"libraries and the rest": fixed + holes}


def stage_seconds(case: Case, calibration: Calibration, stage: Stage) -> float:
    """Of a step whose slowest stage this is."""
    of_gpu = sum(factor * term for factor, term in zip(calibration.time, time_terms(case, stage), strict=True))
    return max(of_gpu, host_seconds(case.model, case.values, case.mean, stage))


def equally_slow_stages(case: Case, calibration: Calibration) -> ResolvedSettings:
    """The settings with the model cut into the pipeline stages whose slowest is the fastest, of those that fit if any do."""
    values = case.values
    if values.pipeline_model_parallel_size == 1:
        return values
    cuts = possible_cuts(case.model.language.num_layers, values.pipeline_model_parallel_size)
    tried = [values.model_copy(update={"first_stage_layers": first}) for first in cuts]

    def misfit_and_time(each: ResolvedSettings) -> tuple[bool, float]:
        prediction = predict(case._replace(values=each), calibration)
        return not fits(prediction, case.machine), prediction.step_s

    return min(tried, key=misfit_and_time)


def fits(prediction: Prediction, machine: Machine) -> bool:
    least = 0.0 if machine.device == "CPU" else CUDA_GIB
    return prediction.memory_gib <= machine.memory_gib - max(RESERVE * machine.memory_gib, least)


# -------------------------------------------------------------------------------------------------- in words


def answer(prediction: Prediction, machine: Machine, values: ResolvedSettings) -> list[str]:
    """Lines for a terminal: does it fit, how long does it take."""
    verdict = "yes" if fits(prediction, machine) else "no"
    steps, devices = values.train_iters, values.nodes * values.nproc_per_node
    hours = steps * prediction.step_s / 3600
    long = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min" if hours > 1 / 30 else f"{hours * 3600:.0f} s"
    cost = "" if machine.device == "CPU" else f", {hours * devices:,.1f} GPU-hours"
    return [
        f"fits    {verdict}: {prediction.memory_gib:.1f} GiB of {machine.memory_gib:.1f} ({machine.device})",
        f"takes   {long}: {steps:,} steps of {prediction.step_s:.3g} s, {prediction.tokens_per_s:,.0f} tokens/s{cost}",
    ]


def details(prediction: Prediction, calibration: Calibration) -> list[str]:
    """Lines about the memory's parts, and where the prediction comes from."""
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in prediction.memory.items() if gib >= 0.05)
    return [
        f"memory  {parts} GiB; {prediction.tokens_per_step:,.0f} tokens a step",
        f"        from {calibration.runs} recorded runs ({', '.join(calibration.devices)}, benchmarks/results/preflight.json)",
    ]
