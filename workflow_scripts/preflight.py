"""Work out every `auto` value of an experiment, check what can be checked without its machine, and show the result.

Writes resolved.json (what training uses: the same bytes for the same settings and data) and preflight.json.
"""

import argparse
from importlib.metadata import version

import yaml

from llava_sft.checkpoint.start import open_start
from llava_sft.config import CONFIG_DIR, load_settings, resolve, warnings
from llava_sft.data.lengths import token_lengths
from llava_sft.errors import DataError, exits_cleanly
from llava_sft.files import read_json, write_json
from llava_sft.model.config import load_model_config
from llava_sft.paths import Paths

PACKAGES = ("torch", "megatron-core", "megatron-energon", "transformers", "snakemake")

NOT_SHOWN = (
    "experiment",
    "model",
    "load",
    "tokenizer",
    "exp_dir",
    "raw_data",
    "heldout_data",
    "image_root",
    "webdatasets",
)
ALWAYS_SHOWN = (
    "stage",
    "trainable_modules",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "lr",
)


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", help="a file of config/experiments/, without .yaml")
    parser.add_argument("--config", nargs="*", default=[], metavar="KEY=VALUE", help="settings of this run only")
    parser.add_argument(
        "--cluster", nargs="*", default=[], metavar="KEY=NUMBER", help="what its profile says of a node"
    )
    args = parser.parse_args()

    overrides, cluster = (
        {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        for pairs in (args.config, args.cluster)
    )
    settings = load_settings(args.experiment, overrides, cluster)
    paths = Paths(settings)
    paths.check_inputs()
    if not paths.dataset.is_file():
        raise DataError(f"{paths.dataset}: no such file", f"run `snakemake data_{args.experiment}` first")
    dataset = read_json(paths.dataset)
    model = load_model_config(CONFIG_DIR / "models" / f"{settings.model}.yaml")
    start = open_start(settings.load, paths.converted, settings.tokenizer)
    lengths, left_out = None, 0
    if settings.packing and settings.train_iters == "auto":
        limits = (settings.seq_length, settings.min_pixels, settings.max_pixels)
        lengths, left_out = token_lengths(
            paths.webdatasets, dataset, start.sidecars, limits, paths.data / "lengths.json"
        )
    counts = dataset["train"]["samples"], dataset["heldout"]["samples"]
    values, why = resolve(settings, *counts, lengths, cores=cluster.get("cpus_per_task"))

    resolved = {
        "run_name": settings.run_name,
        "settings": values,
        "why": why,
        "model": model.model_dump(),
        "data": {
            "path": str(paths.training_data),
            "fingerprint": dataset["fingerprint"],
            "train_samples": dataset["train"]["samples"],
            "heldout_samples": dataset["heldout"]["samples"],
        },
        "start": {
            "load": settings.load,
            "folder": str(start.folder) if start.folder else None,
            "sidecars": str(start.sidecars),
            "fingerprint": start.fingerprint,
            "untrained": start.untrained,
            "old_names": start.old_names,
        },
        "versions": {package: version(package) for package in PACKAGES},
    }
    notes = warnings(settings, start.untrained)
    if left_out:
        notes.append(
            f"{left_out:,} training samples are left out: their first answer ends beyond seq_length {settings.seq_length:,}"
        )
    write_json(paths.resolved, resolved)
    prediction = {"parameters": model.parameter_count(), "warnings": notes, "origin": settings.origin}
    write_json(paths.prediction, prediction | {"overrides": args.config, "cluster": args.cluster})
    show(resolved, model.parameter_count(), notes, settings.origin)


def show(resolved: dict, parameters: int, notes: list[str], origin: dict[str, str]) -> None:
    """The settings that decide what is learned, and all that are not defaults: value, and where it came from."""
    values, why, data, start = (resolved[key] for key in ("settings", "why", "data", "start"))
    gbs, iters = values["global_batch_size"], values["train_iters"]
    print(f"{resolved['run_name']}: {resolved['model']['name']}, {parameters:,} parameters, from {start['load']}")
    if start["untrained"]:
        print("  the start checkpoint is untrained: random weights")
    epochs = iters * gbs / data["train_samples"]
    print(
        f"  {data['train_samples']:,} samples for training ({epochs:.2f} epochs), {data['heldout_samples']:,} held out"
    )
    defaults = str(CONFIG_DIR / "config.yaml")
    shown = [name for name in values if name in ALWAYS_SHOWN or name in why or origin.get(name, defaults) != defaults]
    for name in (name for name in shown if name not in NOT_SHOWN):
        value = ", ".join(values[name]) if isinstance(values[name], list) else values[name]
        print(f"  {name:26} {value!s:14} {f'auto: {why[name]}' if name in why else origin[name]}")
    for note in notes:
        print(f"  warning: {note}")


if __name__ == "__main__":
    main()
