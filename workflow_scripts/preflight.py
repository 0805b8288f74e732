"""Work out every `auto` value of an experiment, check what can be checked without its machine, predict memory and time.

Writes resolved.json (what training uses: the same bytes for the same settings, data and sizes.json) and preflight.json. For another
machine than this one (--gpu) it only shows what would be.
"""

import argparse
import os
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import llava_sft  # noqa: F401 (first: it says what an unfit Python lacks)

# isort: split
import yaml

from llava_sft.checkpoint.architecture import model_of_start
from llava_sft.checkpoint.base import beside_its_base
from llava_sft.checkpoint.start import open_start
from llava_sft.data.index import leak_note, unread_note
from llava_sft.data.nv_meta import Dataset
from llava_sft.data.sizes import Limits, SampleSizes, depends_on, global_order, measure
from llava_sft.data.verify import require_whole
from llava_sft.errors import DataError, exits_cleanly
from llava_sft.evaluation.questions import require_positions
from llava_sft.files import read_json, write_json
from llava_sft.inputs import check_gpus, check_inputs
from llava_sft.machine import GIB, PEAK_FLOPS, gpu, this_machine
from llava_sft.model.config import ModelConfig
from llava_sft.model.tensors import parameter_count
from llava_sft.paths import Paths
from llava_sft.preflight.cost import MicroBatch, checkpoint_size, checkpoints_kept, host_bytes_for_save
from llava_sft.preflight.predict import Case, answer, details, fits, mean_and_largest
from llava_sft.preflight.proposals import BatchesOf, Forecast, faster_line, forecast_of, proposal_lines
from llava_sft.run.identity import refuse_other_run, same_run
from llava_sft.run.sessions import command_line
from llava_sft.settings.conflicts import check_parallel_sizes
from llava_sft.settings.layers import CONFIG_DIR, load_model
from llava_sft.settings.resolve import (
    Epoch,
    ResolvedSettings,
    auto_num_workers,
    packing_window,
    resolve,
    warnings,
)
from llava_sft.settings.resolved import Resolved, ResolvedData
from llava_sft.settings.schema import ABOUT, Settings
from llava_sft.workflow import Workflow

ENOUGH_PACKS = 2000  # whose largest is as good as that of an epoch
PACKAGES = ("torch", "megatron-core", "megatron-energon", "transformers", "snakemake")


class Samples(NamedTuple):
    """The data set as this experiment sees it; `prepared`: tokens/s that one loader process delivers."""

    dataset: Dataset
    sizes: SampleSizes
    prepared: float
    epoch: Epoch


@exits_cleanly
def main() -> None:
    args = parse_arguments()
    overrides, cluster = (
        {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        for pairs in (args.config, args.cluster)
    )
    if args.gpu:
        overrides["gpus_per_node"] = args.gpus_per_node
    paths = Workflow(overrides, [], cluster).paths(args.experiment)
    settings = paths.settings
    check_inputs(paths, of_start=not args.gpu)
    if not paths.dataset.is_file():
        raise DataError(f"{paths.dataset}: no such file", f"run `make data_{args.experiment}` first")
    require_whole(paths.webdatasets, paths.dataset)
    start = open_start(paths.checkpoint, paths.converted, settings.tokenizer)
    model, own_values = load_model(settings.model), list[str]()
    if not args.gpu:  # what another machine would need may be asked for any size, whatever there is to start from
        start = beside_its_base(start, settings.trained.lora)
        model, own_values = model_of_start(start, model, paths.converted is not None)
        check_parallel_sizes(settings, model)  # the checkpoint may have another vocabulary than the model's file
        require_positions(settings.max_new_tokens, model)
    samples = samples_of(paths, start.sidecars, keep=not args.gpu)
    cores = cluster.get("cpus_per_task") or len(os.sched_getaffinity(0))
    counts = len(samples.sizes.tokens), samples.dataset["heldout"]["samples"]
    values, why = resolve(settings, *counts, samples.epoch, cores=cores)
    packs = samples.epoch.packs if settings.packing else None
    batch = mean_and_largest(samples.sizes, values, packs)

    def batches_of(**changed) -> tuple[MicroBatch, MicroBatch]:
        return mean_and_largest(samples.sizes, values.model_copy(update=changed), packs and packs[:ENOUGH_PACKS])

    machine = gpu(args.gpu, args.gpu_memory) if args.gpu else this_machine(values.gpus_per_node, values.nproc_per_node)
    case = Case(model, values, machine, *batch) if machine else None
    forecast = forecast_of(case, batches_of, cut="first_stage_layers" in why) if case else None
    values = with_workers(forecast, why, cores, samples.prepared) if forecast else values
    resolved = Resolved(
        run_name=settings.run_name,
        settings=values,
        why=why,
        model=model.model_dump(),
        batch=dict(zip(("mean", "largest"), batch, strict=True)),
        data=data_of(paths, samples, start.sidecars),
        start=start,
        versions={package: version(package) for package in PACKAGES},
    )
    notes = [*start.notes, *own_values, *notes_of(paths, samples, resolved, forecast, batches_of)]
    if not args.gpu:
        check_gpus(values, values.gpus_per_node, bool(cluster))
        refuse_other_run(paths.run_dir, resolved)
        notes += renamed_run(paths.run_dir, resolved)
    unknown = None, ["fits    not known: no recorded run of such a machine"], list[str]()
    predicted, first, last = describe(forecast) if forecast else unknown
    if not args.gpu:
        resolved.write(paths.resolved)
        known = {"run_name": settings.run_name, "parameters": parameter_count(model)}
        known |= {"trained_parameters": values.trained.parameters(model)}
        known |= {"warnings": notes, "origin": settings.origin}
        given = {"overrides": args.config, "cluster": args.cluster, "command": command_line()}
        write_json(paths.prediction, known | given | {"prediction": predicted}, sealed=True)
    show(resolved, model, first, notes, last, settings.origin)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("experiment", help="a file of config/experiments/, without .yaml")
    add("--config", nargs="*", default=[], metavar="KEY=VALUE", help="settings of this run only")
    add("--cluster", nargs="*", default=[], metavar="KEY=NUMBER", help="what its profile says of a node")
    add("--gpu", metavar="NAME", help=f"for this GPU, not this machine: {', '.join(PEAK_FLOPS)}")
    add("--gpu-memory", type=float, metavar="GIB", help="its memory, if it has another than usual")
    add("--gpus-per-node", type=int, default=1, metavar="N", help="with --gpu: GPUs (%(default)s)")
    return parser.parse_args()


def samples_of(paths: Paths, tokenizer: Path, keep: bool) -> Samples:
    """Raises DataError when there is no sample to train on."""
    settings, dataset = paths.settings, read_json(paths.dataset)
    sizes, prepared = sizes_of(paths, dataset, tokenizer, keep)
    if not sizes.tokens:
        raise DataError(
            f"none of the {len(sizes.left_out):,} training samples can be trained on with seq_length {settings.seq_length:,}",
            "a larger seq_length, or a smaller max_pixels",
        )
    window = packing_window(settings, sizes.tokens)
    capacity = settings.seq_length if settings.packing else None
    order = global_order(paths.webdatasets, sizes, capacity, window, settings.seed)
    return Samples(dataset, sizes, prepared, Epoch(window, *order.first_pass()))


def with_workers(forecast: Forecast, why: dict[str, str], cores: int, prepared: float) -> ResolvedSettings:
    """The forecast's settings, with as many loader processes as keep up with the predicted speed where `why` has them."""
    values = forecast.case.values
    if "num_workers" not in why:
        return values
    wanted = forecast.prediction.tokens_per_s / values.data_parallel_size
    count = auto_num_workers(cores, values.nproc_per_node, wanted, prepared)
    why["num_workers"] = f"each prepares {prepared:,.0f} tokens/s (measured), {wanted:,.0f} are trained on"
    if prepared * count < wanted:
        why["num_workers"] += f"; half of {cores} cores allow no more: steps will wait for data"
    return values.model_copy(update={"num_workers": count})


def data_of(paths: Paths, samples: Samples, tokenizer: Path) -> ResolvedData:
    dataset = samples.dataset
    return ResolvedData(
        path=str(paths.training_data),
        dataset_file=str(paths.dataset),
        fingerprint=dataset["fingerprint"],
        sizes=str(paths.sizes),
        sizes_depend=depends_on(dataset, tokenizer, limits_of(paths.settings)),
        train_samples=dataset["train"]["samples"],
        sequences=samples.epoch.sequences,
        heldout_samples=dataset["heldout"]["samples"],
    )


def notes_of(
    paths: Paths, samples: Samples, resolved: Resolved, forecast: Forecast | None, batches_of: BatchesOf
) -> list[str]:
    """What a person should know before the training, and what does not stop it."""
    settings, values, excluded = paths.settings, resolved.settings, samples.sizes.left_out
    notes = warnings(settings, resolved.start.untrained, resolved.architecture.language.hidden_size)
    notes += length_warning(settings, resolved.settings, samples.epoch.sequences)
    if excluded:
        notes.append(
            f"{len(excluded):,} training samples are left out: their first answer ends beyond seq_length "
            f"{settings.seq_length:,}, or control tokens stand in their text; the first is {excluded[0]}, "
            f"all are in {paths.sizes}, and the training's log says why"
        )
    notes += faster_line(forecast, batches_of) if forecast else []
    if values.log_answers and values.eval_iters and values.pipeline_model_parallel_size > 1:
        notes.append("with pipeline parallelism no held-out sample is answered during the training (log_answers)")
    notes += filter(None, [leak_note(samples.dataset), unread_note(samples.dataset)])
    if not samples.dataset["heldout"]["samples"]:
        notes.append(
            "no held-out data: there will be no accuracy, and no held-out loss during training: heldout_data, or "
            "val_fraction: 0.02"
        )
    return notes


def renamed_run(run_dir: Path, resolved: Resolved) -> list[str]:
    """How to go on with this run where it lies under another name."""
    found = same_run(run_dir, resolved)
    if not found:
        return []
    other, steps = found
    return [
        f"{other} holds {steps:,} steps of this very run, under another name: to go on with them, stop now, "
        f"`mv {shlex.quote(str(other))} {shlex.quote(str(run_dir))}` and run the same command again"
    ]


def limits_of(settings: Settings) -> Limits:
    return Limits(settings.seq_length, settings.min_pixels, settings.max_pixels)


def sizes_of(paths: Paths, dataset: Dataset, tokenizer: Path, keep: bool) -> tuple[SampleSizes, float]:
    """The training samples' sizes, and what a loader process prepares, tokens/s: of sizes.json, or counted here for
    settings that it is not of; then written there if it is to be kept."""
    settings = paths.settings
    limits = limits_of(settings)
    known = read_json(paths.sizes, {})
    if known.get("depends") != depends_on(dataset, tokenizer, limits):
        known = measure(paths.webdatasets, dataset, tokenizer, limits, paths.kept_sizes, len(os.sched_getaffinity(0)))
        if keep:
            write_json(paths.sizes, known, indent=None, sealed=True)
    return SampleSizes.of(known), known["prepared_tokens_per_s"]


def length_warning(settings: Settings, values: ResolvedSettings, sequences: float) -> list[str]:
    """Where train_iters was given and is far from `epochs`: with packing the guide's numbers are."""
    epochs = values.train_iters * values.global_batch_size / sequences
    if settings.train_iters == "auto" or 0.5 <= epochs / settings.epochs <= 3:
        return []
    what = "packs: packing: false gives the guide's numbers" if settings.packing else "samples"
    return [
        f"train_iters {settings.train_iters:,} make {epochs:,.2f} epochs, epochs says {settings.epochs:g}; a batch counts "
        f"{what}. train_iters: auto follows epochs"
    ]


def describe(forecast: Forecast) -> tuple[dict, list[str], list[str]]:
    """The prediction for preflight.json, and its lines for the terminal: the answer, and the details."""
    case, prediction, calibration, found = forecast
    model, values, machine = case.model, case.values, case.machine
    first, last = answer(prediction, machine, values), details(prediction, calibration)
    if not fits(prediction, machine):
        would_fit = [f"        would fit: {line}" for line in proposal_lines(found)]
        first[1:1] = would_fit or ["        nothing near these settings fits"]
    size = checkpoint_size(model, values)
    kept = checkpoints_kept(values)
    last.append(f"disk    {kept} × {size / GIB:,.3g} GiB of checkpoints: {kept * size / GIB:,.1f} GiB")
    if copied := host_bytes_for_save(model, values):
        last.append(f"host    {copied / GIB:,.1f} GiB of a node's memory, for the copy that a save makes")
    facts = {
        "machine": machine._asdict(),
        "memory_gib": prediction.memory,
        "fits": fits(prediction, machine),
        "step_s": prediction.step_s,
        "tokens_per_s": prediction.tokens_per_s,
        "would_fit": [changed for changed, _ in found],
        "checkpoint_gib": size / GIB,
        "checkpoints_kept": kept,
        "recorded_runs": calibration.runs,
    }
    return facts, first, last


def show(
    resolved: Resolved, model: ModelConfig, first: list[str], notes: list[str], last: list[str], origin: dict[str, str]
) -> None:
    """The answer first; then the settings that decide what is learned, and all that are not defaults: value, and where it
    came from."""
    values, why, data = resolved.settings, resolved.why, resolved.data
    parameters, trained = parameter_count(model), values.trained.parameters(model)
    learning = f" ({trained:,} trained{', by LoRA' if values.lora_rank else ''})" if trained != parameters else ""
    print(f"{resolved.run_name}: {model.name}, {parameters:,} parameters{learning}, from {resolved.start.load}")
    packs = f" in {data.sequences:,.0f} packs" if values.packing else ""
    epochs = values.train_iters * values.global_batch_size / data.sequences
    held = data.heldout_samples
    weights = "random weights: the start checkpoint is untrained" if resolved.start.untrained else "trained weights"
    of_accuracy = f"its accuracy on {held:,} held-out samples, to within ±{98 / held**0.5:.1f} points" if held else ""
    lines = [
        f"learns  {epochs:,.2f} epochs of {data.train_samples:,} samples{packs}, from {weights}",
        f"shows   {of_accuracy or 'no accuracy: there is no held-out data'}",
    ]
    print("\n".join(f"  {line}" for line in [*first, *lines, *(f"warning: {note}" for note in notes)]))
    defaults = str(CONFIG_DIR / "config.yaml")
    for name, value in values.dump().items():
        shown = ABOUT[name].shown
        given = name in why or origin.get(name, defaults) != defaults
        if shown or (shown is None and given):
            print(f"  {name:26} {spelled(value):14} {f'auto: {why[name]}' if name in why else origin[name]}")
    print("\n".join(f"  {line}" for line in last))


def spelled(value: Any) -> str:
    """A setting's value in one line; of an entry of `sources` what is not a default."""
    if isinstance(value, list):
        return ", ".join(map(spelled, value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {spelled(each)}" for key, each in value.items() if each not in (None, "")) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
