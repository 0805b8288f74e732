"""Work out every `auto` value of an experiment, check what can be checked without its machine, and show the result.

Writes resolved.json (what training uses: the same bytes for the same settings and data) and preflight.json.
"""

import argparse
from importlib.metadata import version

import yaml

from llava_sft.checkpoint.start import open_start
from llava_sft.config import CONFIG_DIR, load_settings, resolve, warnings
from llava_sft.errors import DataError, exits_cleanly
from llava_sft.files import read_json, write_json
from llava_sft.model.config import load_model_config
from llava_sft.paths import Paths

PACKAGES = ("torch", "megatron-core", "megatron-energon", "transformers", "snakemake")


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", help="a file of config/experiments/, without .yaml")
    parser.add_argument("--config", nargs="*", default=[], metavar="KEY=VALUE", help="settings of this run only")
    args = parser.parse_args()

    overrides = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.config)}
    settings = load_settings(args.experiment, overrides)
    paths = Paths(settings)
    paths.check_inputs()
    if not paths.dataset.is_file():
        raise DataError(f"{paths.dataset}: no such file", f"run `snakemake data_{args.experiment}` first")
    dataset = read_json(paths.dataset)
    model = load_model_config(CONFIG_DIR / "models" / f"{settings.model}.yaml")
    start = open_start(settings.load, paths.converted, settings.tokenizer)
    values, why = resolve(settings, dataset["train"]["samples"])

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
        },
        "versions": {package: version(package) for package in PACKAGES},
    }
    notes = warnings(settings, start.untrained)
    write_json(paths.resolved, resolved)
    write_json(paths.prediction, {"parameters": model.parameter_count(), "warnings": notes})
    show(resolved, model.parameter_count(), notes)


def show(resolved: dict, parameters: int, notes: list[str]) -> None:
    values, why, data, start = (resolved[key] for key in ("settings", "why", "data", "start"))
    gbs, iters = values["global_batch_size"], values["train_iters"]
    print(f"{resolved['run_name']}: {resolved['model']['name']}, {parameters:,} parameters, from {start['load']}")
    if start["untrained"]:
        print("  the start checkpoint is untrained: random weights")
    epochs = iters * gbs / data["train_samples"]
    print(
        f"  {data['train_samples']:,} samples for training ({epochs:.2f} epochs), {data['heldout_samples']:,} held out"
    )
    for name in (
        "train_iters",
        "global_batch_size",
        "micro_batch_size",
        "seq_length",
        "lr",
        "save_interval",
        "num_workers",
        "gpus_per_node",
        "bf16",
    ):
        print(f"  {name:18} {values[name]!s:10} {why.get(name, '')}".rstrip())
    for note in notes:
        print(f"  warning: {note}")


if __name__ == "__main__":
    main()
