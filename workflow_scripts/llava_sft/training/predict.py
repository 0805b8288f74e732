"""Memory and time of a training step before it runs, and the settings that would fit.

Notable:
- what the architecture and the settings decide is computed (state of the optimizer, activations that are kept for the
  backward pass, FLOPs); what they do not is fitted to recorded runs: how far a byte and a FLOP go on this kind of machine;
- the recorded runs are rows of benchmarks/results/preflight.json; each row's error is that of a prediction from all others.
No torch: preflight runs where there is no GPU.
"""

import math
import os
import random
import subprocess
from collections.abc import Iterable
from functools import cache
from itertools import chain, product
from typing import Any, NamedTuple

import psutil

from llava_sft.config import CONFIG_DIR, data_parallel_size
from llava_sft.data.packing import cut_between
from llava_sft.data.sizes import SampleSizes
from llava_sft.errors import SettingsError
from llava_sft.files import read_json
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.model.flops import matmul_parameters
from llava_sft.training.checkpoints import expected_bytes
from llava_sft.training.watch import PEAK_FLOPS

RECORDED = CONFIG_DIR.parent / "benchmarks" / "results" / "preflight.json"
GIB = 2**30
# Bytes a parameter, of the weights in FP8 and their transposes beside the bf16 ones; measured on the 4B model.
FP8_COPIES = 1.52
RESERVE = 0.05  # of a device's memory that a prediction leaves free: its own error, and what other processes hold


class Load(NamedTuple):
    """What one micro-batch holds: tokens (with padding), the sum of squares of its segments' tokens, patches, the same of
    its images; and packed segments."""

    tokens: float
    token_squares: float
    patches: float
    patch_squares: float
    segments: float = 0.0


class Machine(NamedTuple):
    """`device`: CPU, or a GPU by its name in the recorded runs (H100, H200); `memory_gib` and `peak` FLOP/s of one."""

    device: str
    memory_gib: float
    peak: float


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


def loads(sizes: SampleSizes, values: dict[str, Any], packs: list[list[int]] | None) -> tuple[Load, Load]:
    """The mean micro-batch of an epoch, and the largest that goes through the model at once.

    The largest has the most of each, tokens and patches, as no single one need have. `packs`: of indices into `sizes`,
    with packing; they are put together and cut as the loader and the trainer do it, in one random order.
    """
    mbs = values["micro_batch_size"]
    if packs is None:
        return _padded([_load(sizes, [index]) for index in range(len(sizes.tokens))], mbs)
    draw = random.Random(values["seed"])
    packs = [draw.sample(pack, len(pack)) for pack in draw.sample(packs, len(packs))]
    packs *= math.ceil(mbs / len(packs))  # at least one batch, as of an endless stream
    starts = range(0, len(packs) - mbs + 1, mbs)
    batches = [list(chain.from_iterable(packs[first : first + mbs])) for first in starts]
    chunks = [
        [batch[place] for place in places]
        for batch in batches
        for places in cut_between([sizes.tokens[index] for index in batch], chunk_tokens(values))
    ]
    whole, part = ([_load(sizes, rows) for rows in each] for each in (batches, chunks))
    mean = Load(*(sum(column) / len(whole) for column in zip(*whole, strict=True)))
    return mean, Load(*(max(column) for column in zip(*part, strict=True)))


def _load(sizes: SampleSizes, row: list[int]) -> Load:
    tokens = [sizes.tokens[index] for index in row]
    patches = [count for index in row for count in sizes.patches[index]]
    squares = sum(n * n for n in tokens), sum(n * n for n in patches)
    return Load(sum(tokens), squares[0], sum(patches), squares[1], len(tokens))


def _padded(each: list[Load], mbs: int) -> tuple[Load, Load]:
    """Rows are padded to the longest of their batch: on average to the expected greatest of `mbs` random ones."""
    lengths = sorted(load.tokens for load in each)
    count = len(lengths)
    width = sum(length * ((i + 1) ** mbs - i**mbs) for i, length in enumerate(lengths)) / count**mbs
    mean = (mbs * sum(column) / count for column in zip(*each, strict=True))
    most = (mbs * max(column) for column in zip(*each, strict=True))

    def padded(load: Load, width: float) -> Load:  # all rows in one call of attention
        return load._replace(tokens=mbs * width, token_squares=mbs * width**2, segments=0.0)

    return padded(Load(*mean), width), padded(Load(*most), lengths[-1])


# --------------------------------------------------------------------------------------------- memory and FLOPs


def state_bytes(model: ModelConfig, values: dict[str, Any]) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state of the fullest process."""
    total, trained = model.parameter_count(), trained_parameters(model, values["trainable_modules"])
    weights, optimizer = expected_bytes(total, 0, values), expected_bytes(0, trained, values)  # as in a checkpoint
    gradients = 4 * trained
    if values["gpus_per_node"]:
        optimizer /= data_parallel_size(values)
        weights += 0 if values["fp8"] == "none" else FP8_COPIES * total
        gradients = (4 if values["optimizer_precision"] == "fp32" else 2) * trained
    split = values["tensor_model_parallel_size"] * values["pipeline_model_parallel_size"]
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    return {name: size / split for name, size in parts.items()}


def trained_parameters(model: ModelConfig, modules: Iterable[str]) -> int:
    """Parameters of the parts that are trained."""
    marks = {"adapter": ".merger.", "vision_model": ".visual."}
    count = dict.fromkeys(("language_model", "adapter", "vision_model"), 0)
    for name, shape in model.hf_tensor_shapes().items():
        part = next((part for part, mark in marks.items() if mark in name), "language_model")
        count[part] += math.prod(shape)
    return sum(count[part] for part in modules)


def checkpoint_size(model: ModelConfig, values: dict[str, Any]) -> int:
    """Bytes of one checkpoint, with what the optimizer keeps of the parts that are trained."""
    return expected_bytes(model.parameter_count(), trained_parameters(model, values["trainable_modules"]), values)


def checkpoints_kept(values: dict[str, Any]) -> int:
    """How many checkpoints lie on the disk when all steps are done."""
    count = -(-values["train_iters"] // values["save_interval"])
    return min(count, values["keep_last"] or count)


def save_copy(model: ModelConfig, values: dict[str, Any]) -> float:
    """Bytes of a node's memory that a save copies the GPUs' state to, and that stay taken."""
    return bool(values["gpus_per_node"]) * PINNED * checkpoint_size(model, values) / values["nodes"]


def activation_bytes(model: ModelConfig, values: dict[str, Any], load: Load) -> dict[str, float]:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, counted in the tensors of a layer.

    With full recomputation a layer keeps its input, and one layer at a time all of it. Attention in plain PyTorch (CPU)
    keeps its scores too.
    """
    size, t, v = 2 if values["bf16"] else 4, model.language, model.vision
    heads = t.num_attention_heads + 2 * t.num_query_groups
    attention = (2 * heads + t.num_attention_heads) * t.kv_channels
    language = load.tokens * (4 * t.hidden_size + attention + 3 * t.ffn_hidden_size)
    vision = load.patches * (8 * v.hidden_size + 2 * v.ffn_hidden_size)
    if not values["gpus_per_node"]:
        language += load.token_squares * t.num_attention_heads * (values["recompute_language"] == "none")
        vision += load.patch_squares * v.num_attention_heads
    language = _kept(language, load.tokens * t.hidden_size, t.num_layers, values["recompute_language"] == "full")
    vision = _kept(vision, load.patches * v.hidden_size, v.num_layers, values["recompute_vision"] == "full")
    if "vision_model" not in values["trainable_modules"]:
        vision = 0.0
    # Layers of a later pipeline stage run while an earlier stage holds several micro-batches: as much as without one.
    split = values["tensor_model_parallel_size"]
    return {"language activations": size * language / split, "vision activations": size * vision / split}


def _kept(layer: float, layer_input: float, layers: int, recomputed: bool) -> float:
    return layers * layer_input + layer if recomputed else layers * layer


def step_flops(model: ModelConfig, values: dict[str, Any], load: Load) -> tuple[float, float]:
    """FLOPs that one micro-batch makes a process do, for the language and the vision model, recomputation included."""
    language, _, vision, adapter = matmul_parameters(model)  # the output layer runs where an answer is: hardly ever
    t, v, trained = model.language, model.vision, set(values["trainable_modules"])
    llm = 2 * language * load.tokens + 2 * t.num_layers * t.num_attention_heads * t.kv_channels * load.token_squares
    vit = 2 * (vision + adapter / v.spatial_merge_size**2) * load.patches
    vit += 4 * v.num_layers * v.hidden_size * load.patch_squares
    llm *= (3 if "language_model" in trained else 2) + (values["recompute_language"] == "full")
    vit *= 3 + (values["recompute_vision"] == "full") if "vision_model" in trained else 1
    split = values["tensor_model_parallel_size"] * values["pipeline_model_parallel_size"]
    return llm / split, vit / split


# ------------------------------------------------------------------------------------------------- calibration


class Calibration(NamedTuple):
    """Factors fitted to recorded runs of one kind of device: of the rows of `memory_terms` and `time_terms`."""

    memory: tuple[float, ...]
    time: tuple[float, ...]


def memory_terms(model: ModelConfig, values: dict[str, Any], load: Load) -> list[float]:
    """GiB: what a process needs whatever it trains, language activations, vision activations."""
    return [1.0, *(size / GIB for size in activation_bytes(model, values, load).values())]


def time_terms(model: ModelConfig, values: dict[str, Any], load: Load, peak: float) -> list[float]:
    """Seconds of a step at the device's peak: of the language model in bf16 or in FP8, of the vision model. Then what
    costs time whatever a batch holds: GiB of gradients and optimizer state, calls of the model (in FP8 the host has more
    to do), and of attention."""
    llm, vit = step_flops(model, values, load)
    micro_batches = _micro_batches(values)
    state = state_bytes(model, values)
    calls = micro_batches * max(1.0, load.tokens / chunk_tokens(values))
    products, of_model = ([llm, 0.0], [calls, 0.0]) if values["fp8"] == "none" else ([0.0, llm], [0.0, calls])
    attentions = 0.0
    if not values["gpus_per_node"]:  # plain PyTorch calls it for each segment; on a GPU one call takes them all
        passes = 1 + (values["recompute_language"] == "full") / 3  # forward and backward, which takes twice as long
        attentions = micro_batches * load.segments * model.language.num_layers * passes
    return [
        *(micro_batches * flops / peak for flops in (*products, vit)),
        (state["gradients"] + state["optimizer"]) / GIB,
        *of_model,
        attentions,
    ]


def chunk_tokens(values: dict[str, Any]) -> float:
    """Tokens that go through the model at once: long packs are cut into chunks, but not with pipeline parallelism."""
    cut = values["packing"] and values["pipeline_model_parallel_size"] == 1
    return values["pack_chunk_tokens"] if cut else math.inf


def _micro_batches(values: dict[str, Any]) -> int:
    return values["global_batch_size"] // (values["micro_batch_size"] * data_parallel_size(values))


class Recorded(NamedTuple):
    """One measured run: its settings, the mean and largest micro-batch, GiB at the peak, seconds of a step."""

    model: ModelConfig
    values: dict[str, Any]
    machine: Machine
    mean: Load
    largest: Load
    memory_gib: float
    step_s: float


@cache
def recorded() -> tuple[Recorded, ...]:
    """The recorded runs; none when the file is not there."""
    by_settings: dict[str, dict[str, Any]] = {}
    for row in read_json(RECORDED, {"rows": []})["rows"]:
        if row["metric"] in ("peak_memory_gib", "step_s"):
            by_settings.setdefault(row["settings"]["run"], {"settings": row["settings"]})[row["metric"]] = row["value"]
    return tuple(_recorded(**run) for run in by_settings.values())


def _recorded(settings: dict[str, Any], peak_memory_gib: float, step_s: float) -> Recorded:
    model = load_model_config(CONFIG_DIR / "models" / f"{settings['values']['model']}.yaml")
    mean, largest, machine = Load(*settings["mean"]), Load(*settings["largest"]), Machine(*settings["machine"])
    return Recorded(model, settings["values"], machine, mean, largest, peak_memory_gib, step_s)


def calibrate(runs: Iterable[Recorded]) -> Calibration:
    """Non-negative factors with the least relative errors over `runs`."""
    memory, time = [], []
    for run in runs:
        state = sum(state_bytes(run.model, run.values).values()) / GIB
        rest = max(run.memory_gib - state, 0.0)
        terms = memory_terms(run.model, run.values, run.largest)
        memory.append(([term / run.memory_gib for term in terms], rest / run.memory_gib))
        terms = time_terms(run.model, run.values, run.mean, run.machine.peak)
        time.append(([term / run.step_s for term in terms], 1.0))
    return Calibration(_fit(memory), _fit(time))


def _fit(rows: list[tuple[list[float], float]]) -> tuple[float, ...]:
    import numpy as np
    from scipy.optimize import nnls

    matrix, target = np.array([terms for terms, _ in rows]), np.array([value for _, value in rows])
    scale = np.where(matrix.any(0), np.abs(matrix).max(0), 1.0)  # columns of one size: the fit is well-conditioned
    return tuple(map(float, nnls(matrix / scale, target)[0] / scale))


ENOUGH_RUNS = 8  # of one device; from fewer of them no factor is sure


def of_device(device: str, runs: Iterable[Recorded]) -> list[Recorded]:
    """The runs of this device where they are enough, else those of all GPUs, scaled by the peaks; a CPU stands for no GPU and
    no GPU for a CPU."""
    kind = [run for run in runs if (run.machine.device == "CPU") == (device == "CPU")]
    own = [run for run in kind if run.machine.device == device]
    return own if len(own) >= ENOUGH_RUNS else kind


def predict(
    model: ModelConfig, values: dict[str, Any], machine: Machine, mean: Load, largest: Load, calibration: Calibration
) -> Prediction:
    """What one step of these settings takes on this machine."""
    state = {name: size / GIB for name, size in state_bytes(model, values).items()}
    fixed, language, vision = (
        factor * term for factor, term in zip(calibration.memory, memory_terms(model, values, largest), strict=True)
    )
    memory = state | {"language activations": language, "vision activations": vision, "libraries and the rest": fixed}
    terms = time_terms(model, values, mean, machine.peak)
    seconds = sum(factor * term for factor, term in zip(calibration.time, terms, strict=True))
    replicas = data_parallel_size(values)
    return Prediction(memory, seconds, mean.tokens * _micro_batches(values) * replicas)


# ---------------------------------------------------------------------------------------------------- machines

PINNED = 1.35  # pinned memory is taken in powers of two, tensor by tensor: so much for 4B and 8B
GPU_MEMORY_GIB = {"H100": 79.1, "GH200": 94.5, "H200": 139.8, "B200": 178.4, "A100": 79.2, "L40S": 44.5}
CPU_FLOPS = 3e10  # a core's share in float32; the recorded runs say how much of it is reached


def gpu(name: str, memory_gib: float | None = None) -> Machine:
    """A GPU by the name its maker gives it, or a part of that. Raises SettingsError for one whose peak is not known."""
    known = next((key for key in sorted(PEAK_FLOPS, key=len, reverse=True) if key in name.upper()), None)
    if known is None:
        raise SettingsError(f"the peak of a GPU {name!r} is not known", f"one of {', '.join(PEAK_FLOPS)}")
    return Machine(known, memory_gib or GPU_MEMORY_GIB[known], PEAK_FLOPS[known])


def this_machine(values: dict[str, Any]) -> Machine | None:
    """What one process of a training on this machine has; None for a GPU whose peak is not known."""
    if values["gpus_per_node"]:
        for name, total, _ in gpus_of_this_machine():
            try:
                return gpu(name, total)
            except SettingsError:
                return None
        return None
    processes = values["nproc_per_node"]
    memory = psutil.virtual_memory().total / GIB
    return Machine("CPU", memory / processes, CPU_FLOPS * max(1, len(os.sched_getaffinity(0)) // processes))


def gpus_of_this_machine() -> list[tuple[str, float, float]]:
    """Name, memory and memory in use (GiB) of each GPU that `CUDA_VISIBLE_DEVICES` leaves."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(", ", 2) for line in listing.splitlines()]
    return [(name, float(total) / 1024, float(used) / 1024) for name, total, used in rows]


# --------------------------------------------------------------------------------------------------- proposals


def fits(prediction: Prediction, machine: Machine) -> bool:
    return prediction.memory_gib <= machine.memory_gib * (1 - RESERVE)


def proposals(
    model: ModelConfig, values: dict[str, Any], machine: Machine, mean: Load, largest: Load, calibration: Calibration
) -> list[tuple[dict[str, Any], Prediction]]:
    """Changed settings that would fit, the fastest first; those that keep seq_length before those that do not."""
    tp, per_node = values["tensor_model_parallel_size"], max(1, values["gpus_per_node"])
    choices: dict[str, list] = {
        "seq_length": [values["seq_length"], values["seq_length"] // 2, values["seq_length"] // 4],
        "pack_chunk_tokens": [values["pack_chunk_tokens"]],
        "micro_batch_size": [values["micro_batch_size"], 1],
        "recompute_vision": [values["recompute_vision"], "full"],
        "recompute_language": [values["recompute_language"], "full"],
        "tensor_model_parallel_size": [n for n in (tp, 2 * tp, 4 * tp) if per_node % n == 0 and _divides(model, n)],
    }
    piece = min(values["seq_length"], chunk_tokens(values))  # what goes through the model at once
    if chunk_tokens(values) < math.inf:
        choices["pack_chunk_tokens"] += [piece // 2, piece // 4]
    if values["optimizer_precision"] == "fp32":
        choices["optimizer_precision"] = ["fp32", "bf16"]
    found = []
    for picked in product(*(dict.fromkeys(options) for options in choices.values())):
        changed = {name: value for name, value in zip(choices, picked, strict=True) if values[name] != value}
        tried = values | changed
        rows = tried["micro_batch_size"] / values["micro_batch_size"]
        scales = tried["seq_length"] / values["seq_length"], min(tried["seq_length"], chunk_tokens(tried)) / piece
        if not changed or tried["global_batch_size"] % (tried["micro_batch_size"] * data_parallel_size(tried)):
            continue
        scaled = [
            Load(*(rows * scale * each for each in load)) for scale, load in zip(scales, (mean, largest), strict=True)
        ]
        prediction = predict(model, tried, machine, *scaled, calibration)
        if fits(prediction, machine):
            found.append((changed, prediction))
    found.sort(key=lambda each: ("seq_length" in each[0], -each[1].tokens_per_s, len(each[0])))
    needless = [a for a, _ in found if any(b.items() < a.items() for b, _ in found)]  # less of a change would do
    return [each for each in found if each[0] not in needless]


def _divides(model: ModelConfig, size: int) -> bool:
    return not (model.language.num_query_groups % size or model.vision.num_attention_heads % size)


class Forecast(NamedTuple):
    """A prediction, the recorded runs behind it, and the changed settings that would fit where it does not."""

    prediction: Prediction
    runs: list[Recorded]
    would_fit: list[tuple[dict[str, Any], Prediction]]


def forecast(
    model: ModelConfig, values: dict[str, Any], machine: Machine | None, mean: Load, largest: Load
) -> Forecast | None:
    """What a run takes on a machine; None when no recorded run is of such a one."""
    runs = of_device(machine.device, recorded()) if machine else []
    if not runs:
        return None
    calibration = calibrate(runs)
    prediction = predict(model, values, machine, mean, largest, calibration)
    near = [] if fits(prediction, machine) else proposals(model, values, machine, mean, largest, calibration)
    return Forecast(prediction, runs, near)


# -------------------------------------------------------------------------------------------------- in words


def table(prediction: Prediction, machine: Machine, runs: list[Recorded], values: dict[str, Any]) -> list[str]:
    """Lines for a terminal: memory by part, whether it fits, time."""
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in prediction.memory.items() if gib >= 0.05)
    verdict = "fits" if fits(prediction, machine) else "DOES NOT FIT"
    steps, devices = values["train_iters"], values["nodes"] * values["nproc_per_node"]
    measured = ", ".join(sorted({run.machine.device for run in runs}))
    hours = steps * prediction.step_s / 3600
    long = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
    cost = "" if machine.device == "CPU" else f", {hours * devices:,.1f} GPU-hours"
    return [
        f"memory  {prediction.memory_gib:.1f} GiB of {machine.memory_gib:.1f} ({machine.device}): {verdict}",
        f"        {parts}",
        f"time    {prediction.step_s:.3g} s a step of {prediction.tokens_per_step:,.0f} tokens "
        f"({prediction.tokens_per_s:,.0f} tokens/s), {long} for {steps:,} steps{cost}",
        f"        from {len(runs)} recorded runs ({measured}, {RECORDED.relative_to(CONFIG_DIR.parent)})",
    ]


def proposal_lines(found: list[tuple[dict[str, Any], Prediction]]) -> list[str]:
    """The three fastest settings that would fit, a line each."""
    return [
        ", ".join(f"{name}: {value}" for name, value in changed.items())
        + f" ({prediction.memory_gib:.1f} GiB, {prediction.tokens_per_s:,.0f} tokens/s)"
        for changed, prediction in found[:3]
    ]
