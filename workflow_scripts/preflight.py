"""Work out every `auto` value of an experiment, check what can be checked without its machine, predict memory and time.

Writes resolved.json (what training uses: the same bytes for the same settings, data and sizes.json) and preflight.json. For another
machine than this one (--gpu) it only shows what would be.
"""

import argparse
import os
import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from llava_sft.checkpoint.start import open_start
from llava_sft.config import (
    CONFIG_DIR,
    Settings,
    auto_num_workers,
    first_epoch,
    gpu_count,
    packing_window,
    resolve,
    warnings,
)
from llava_sft.data.index import leak_note
from llava_sft.data.sizes import Limits, SampleSizes, depends_on, global_order, measure
from llava_sft.data.verify import require_whole
from llava_sft.errors import DataError, SettingsError, exits_cleanly
from llava_sft.files import read_json, write_json
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.paths import Paths
from llava_sft.training import predict
from llava_sft.training.run import refuse_other_run, same_run
from llava_sft.workflow import Workflow

PACKAGES = ("torch", "megatron-core", "megatron-energon", "transformers", "snakemake")

NOT_SHOWN = {
    "experiment", "model", "load", "tokenizer", "exp_dir", "raw_data", "heldout_data", "image_root", "webdatasets",
}  # fmt: skip
ALWAYS_SHOWN = {
    "stage", "trainable_modules", "seq_length", "micro_batch_size", "global_batch_size", "train_iters", "lr",
}  # fmt: skip


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("experiment", help="a file of config/experiments/, without .yaml")
    add("--config", nargs="*", default=[], metavar="KEY=VALUE", help="settings of this run only")
    add("--cluster", nargs="*", default=[], metavar="KEY=NUMBER", help="what its profile says of a node")
    add("--gpu", metavar="NAME", help=f"for this GPU, not this machine: {', '.join(predict.PEAK_FLOPS)}")
    add("--gpu-memory", type=float, metavar="GIB", help="its memory, if it has another than usual")
    add("--gpus-per-node", type=int, default=1, metavar="N", help="with --gpu: GPUs (%(default)s)")
    args = parser.parse_args()

    overrides, cluster = (
        {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        for pairs in (args.config, args.cluster)
    )
    if args.gpu:
        overrides["gpus_per_node"] = args.gpus_per_node
    paths = Workflow(overrides, [], cluster).paths(args.experiment)
    settings = paths.settings
    paths.check_inputs()
    if not paths.dataset.is_file():
        raise DataError(f"{paths.dataset}: no such file", f"run `snakemake data_{args.experiment}` first")
    dataset = read_json(paths.dataset)
    require_whole(paths.webdatasets, paths.dataset)
    model = load_model_config(CONFIG_DIR / "models" / f"{settings.model}.yaml")
    start = open_start(settings.load, paths.converted, settings.tokenizer)
    sizes, prepared = sizes_of(paths, dataset, start.sidecars, keep=not args.gpu)
    if not sizes.tokens:
        raise DataError(
            f"none of the {len(sizes.left_out):,} training samples can be trained on with seq_length {settings.seq_length:,}",
            "a larger seq_length, or a smaller max_pixels",
        )
    window = packing_window(settings, sizes.tokens)
    order = global_order(
        paths.webdatasets, sizes, settings.seq_length if settings.packing else None, window, settings.seed
    )
    epoch = first_epoch(order, window)
    counts = len(sizes.tokens), dataset["heldout"]["samples"]
    cores = cluster.get("cpus_per_task") or len(os.sched_getaffinity(0))
    values, why = resolve(settings, *counts, epoch, cores=cores)
    mean, largest = predict.loads(sizes, values, epoch.packs if settings.packing else None)
    machine = predict.gpu(args.gpu, args.gpu_memory) if args.gpu else predict.this_machine(values)
    forecast = predict.forecast(model, values, machine, mean, largest)
    if forecast and "num_workers" in why:
        wanted = forecast.prediction.tokens_per_s / predict.data_parallel_size(values)
        values["num_workers"] = auto_num_workers(cores, values["nproc_per_node"], wanted, prepared)
        why["num_workers"] = f"each prepares {prepared:,.0f} tokens/s (measured), {wanted:,.0f} are trained on"
        if prepared * values["num_workers"] < wanted:
            why["num_workers"] += f"; half of {cores} cores allow no more: steps will wait for data"

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(start).items()}
    resolved = {
        "run_name": settings.run_name,
        "settings": values,
        "why": why,
        "model": model.model_dump(),
        "batch": {"mean": mean, "largest": largest},
        "data": {
            "path": str(paths.training_data),
            "dataset_file": str(paths.dataset),
            "fingerprint": dataset["fingerprint"],
            "sizes": str(paths.sizes),
            "sizes_depend": depends_on(
                dataset, start.sidecars, Limits(*(getattr(settings, name) for name in Limits._fields))
            ),
            "train_samples": dataset["train"]["samples"],
            "sequences": epoch.sequences,
            "heldout_samples": dataset["heldout"]["samples"],
        },
        "start": {"load": settings.load, **plain},
        "versions": {package: version(package) for package in PACKAGES},
    }
    notes = warnings(settings, start.untrained) + length_warning(settings, values, epoch.sequences)
    if sizes.left_out:
        notes.append(
            f"{len(sizes.left_out):,} training samples are left out: their first answer ends beyond seq_length "
            f"{settings.seq_length:,}, or control tokens stand in their text; the first is {sizes.left_out[0]}, "
            f"all are in {paths.sizes}, and the training's log says why"
        )
    notes += filter(None, [leak_note(dataset)])
    if not dataset["heldout"]["samples"]:
        notes.append(
            "no held-out data: there will be no accuracy, and no held-out loss during training: heldout_data, or "
            "val_fraction: 0.02"
        )
    if not args.gpu:
        check_gpus(values, bool(cluster))
        refuse_other_run(paths.run_dir, resolved)
        if other := same_run(paths.run_dir, resolved):
            notes.append(
                f"{other[0]} holds {other[1]:,} steps of this very run, under another name: to go on with them, stop now, "
                f"`mv {shlex.quote(str(other[0]))} {shlex.quote(str(paths.run_dir))}` and give the same command again"
            )
    predicted, lines = told(model, values, machine, forecast)
    if not args.gpu:
        write_json(paths.resolved, resolved, sealed=True)
        known = {"run_name": settings.run_name, "parameters": model.parameter_count()}
        known |= {"warnings": notes, "origin": settings.origin}
        given = {"overrides": args.config, "cluster": args.cluster}
        write_json(paths.prediction, known | given | {"prediction": predicted}, sealed=True)
    show(resolved, model.parameter_count(), notes, settings.origin)
    for line in lines:
        print(f"  {line}")


def sizes_of(paths: Paths, dataset: dict, tokenizer: Path, keep: bool) -> tuple[SampleSizes, float]:
    """The training samples' sizes, and what a loader process prepares, tokens/s: of sizes.json, or counted here for
    settings that it is not of; then written there if it is to be kept."""
    settings = paths.settings
    limits = Limits(settings.seq_length, settings.min_pixels, settings.max_pixels)
    known = read_json(paths.sizes, {})
    if known.get("depends") != depends_on(dataset, tokenizer, limits):
        known = measure(paths.webdatasets, dataset, tokenizer, limits, paths.kept_sizes, len(os.sched_getaffinity(0)))
        if keep:
            write_json(paths.sizes, known, indent=None, sealed=True)
    return SampleSizes.of(known), known["prepared_tokens_per_s"]


def length_warning(settings: Settings, values: dict, sequences: float) -> list[str]:
    """Where train_iters was given and is far from `epochs`: with packing the guide's numbers are."""
    epochs = values["train_iters"] * values["global_batch_size"] / sequences
    if settings.train_iters == "auto" or 0.5 <= epochs / settings.epochs <= 3:
        return []
    what = "packs: packing: false gives the guide's numbers" if settings.packing else "samples"
    return [
        f"train_iters {settings.train_iters:,} make {epochs:,.2f} epochs, epochs says {settings.epochs:g}; a batch counts "
        f"{what}. train_iters: auto follows epochs"
    ]


def check_gpus(values: dict, cluster: bool) -> None:
    """Raise SettingsError for GPUs that cannot train as asked, or that this machine, which is to train, does not have."""
    gpus = values["gpus_per_node"]
    if gpus and not values["bf16"]:
        raise SettingsError(
            f"bf16 is false, gpus_per_node {gpus}: on GPUs attention and matrix units work in bf16",
            "bf16: true, or gpus_per_node: 0 to train on the CPU in float32",
        )
    if not cluster and gpus > (found := gpu_count()):
        raise SettingsError(
            f"gpus_per_node is {gpus}, this machine has {found}",
            f"gpus_per_node: {found}" + ("" if found else " trains on the CPU") + ", or snakemake --profile slurm",
        )


def told(
    model: ModelConfig, values: dict, machine: predict.Machine | None, forecast: predict.Forecast | None
) -> tuple[dict | None, list[str]]:
    """The prediction for preflight.json, and its lines for the terminal."""
    if forecast is None:
        return None, ["no prediction: no recorded run of such a machine"]
    prediction, runs, found = forecast
    lines = predict.table(prediction, machine, runs, values)
    if not predict.fits(prediction, machine):
        would_fit = [f"would fit: {line}" for line in predict.proposal_lines(found)]
        lines += would_fit or ["nothing near these settings fits"]
    size = predict.checkpoint_size(model, values)
    kept = predict.checkpoints_kept(values)
    lines.append(f"disk    {kept} × {size / predict.GIB:,.3g} GiB of checkpoints: {kept * size / predict.GIB:,.1f} GiB")
    if copied := predict.save_copy(model, values):
        lines.append(f"host    {copied / predict.GIB:,.1f} GiB of a node's memory, for the copy that a save makes")
    facts = {
        "machine": machine._asdict(),
        "memory_gib": prediction.memory,
        "fits": predict.fits(prediction, machine),
        "step_s": prediction.step_s,
        "tokens_per_s": prediction.tokens_per_s,
        "would_fit": [changed for changed, _ in found],
        "checkpoint_gib": size / predict.GIB,
        "checkpoints_kept": kept,
        "recorded_runs": len(runs),
    }
    return facts, lines


def show(resolved: dict, parameters: int, notes: list[str], origin: dict[str, str]) -> None:
    """The settings that decide what is learned, and all that are not defaults: value, and where it came from."""
    values, why, data, start = (resolved[key] for key in ("settings", "why", "data", "start"))
    gbs, iters = values["global_batch_size"], values["train_iters"]
    print(f"{resolved['run_name']}: {resolved['model']['name']}, {parameters:,} parameters, from {start['load']}")
    if start["untrained"]:
        print("  the start checkpoint is untrained: random weights")
    packs = f" in {data['sequences']:,.0f} packs" if values["packing"] else ""
    print(
        f"  {data['train_samples']:,} samples for training{packs} ({iters * gbs / data['sequences']:,.2f} epochs),"
        f" {data['heldout_samples']:,} held out"
    )
    defaults = str(CONFIG_DIR / "config.yaml")
    given = {name for name in values if origin.get(name, defaults) != defaults}
    shown = (ALWAYS_SHOWN | why.keys() | given) - NOT_SHOWN
    for name, value in values.items():
        if name in shown:
            print(f"  {name:26} {spelled(value):14} {f'auto: {why[name]}' if name in why else origin[name]}")
    for note in notes:
        print(f"  warning: {note}")


def spelled(value: Any) -> str:
    """A setting's value in one line; of an entry of `sources` what is not a default."""
    if isinstance(value, list):
        return ", ".join(map(spelled, value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {spelled(each)}" for key, each in value.items() if each not in (None, "")) + "}"
    return str(value)


if __name__ == "__main__":
    main()
