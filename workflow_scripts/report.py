"""Write the report of a run, one self-contained HTML page, from what the steps before it left behind.

Every input but the resolved settings may be missing, and so may their keys: the page says so.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

import llava_sft  # noqa: F401 (first: it says what an unfit Python lacks)

# isort: split
from markupsafe import Markup

from llava_sft.checkpoint.verify import is_export
from llava_sft.data.index import leak_note
from llava_sft.errors import DamagedFileError, RunError, exits_cleanly
from llava_sft.evaluation.scores import explained
from llava_sft.files import read_json, write_text
from llava_sft.publish.card import write_card
from llava_sft.report.charts import charts
from llava_sft.report.figures import best_validation, measured, with_scores
from llava_sft.report.html import render
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.coverage import count_samples
from llava_sft.run.layout import SAMPLE_COUNTS, TENSORBOARD, VALIDATION, checkpoint_dir
from llava_sft.run.records import read_jsonl, read_metrics
from llava_sft.settings.resolved import ResolvedData

OPTIONAL = {
    "prediction": "what preflight predicted",
    "dataset": "dataset file (index_webdataset)",
    "inspect": "what inspect_webdataset found",
    "train-done": "marker of the finished training",
    "evaluation": "answers on held-out data (evaluate)",
}
# By option, keys that its file has had in every version, and the type of each: without them it is another file.
KEYS: dict[str, dict[str, Any]] = {
    "resolved": {"settings": dict, "why": dict, "run_name": str},
    "prediction": {"parameters": int, "warnings": list},
    "dataset": {"train": dict, "heldout": dict},
    "inspect": {"checks": list, "distributions": dict},
    "train_done": {"iteration": int},
    "evaluation": {"split": str, "samples": int, "correct": int, "groups": dict, "examples": list},
    "counts": {"epochs": (int, float), "seen": dict},
    "parity": {"passed": (bool, type(None))},
}
DISTRIBUTIONS = ("images per sample", "question length", "answer length", "image width", "image height")


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--resolved", type=Path, required=True, metavar="JSON", help="resolved settings (preflight)")
    add("--run-dir", type=Path, required=True, metavar="DIR", help="run directory, with metrics.jsonl")
    for name, meaning in OPTIONAL.items():
        add(f"--{name}", type=Path, metavar="JSON", help=meaning)
    add("--export", type=Path, metavar="DIR", help="Hugging Face folder, to be named on the page")
    add("--output", type=Path, required=True, metavar="HTML")
    args = parser.parse_args()
    if not args.run_dir.is_dir():
        raise RunError(f"run directory {args.run_dir} does not exist", "train first, or name another --run-dir")
    write_text(args.output, page(args))
    print(f"report: {args.output}")
    if args.export and is_export(args.export):
        write_card(args.export)  # again: the scores are known now
        print(f"talk to it: {chat_command(args.run_dir)}")


def read_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """The content of each option's file, None where it is not given, by its name in the template.

    Errors: DamagedFileError for a damaged file, RunError for one of another run.
    """
    files: dict[str, Path | None] = {name: getattr(args, name, None) for name in KEYS}
    files["counts"] = args.run_dir / SAMPLE_COUNTS
    files["parity"] = args.export and args.export / "parity.json"
    found: dict[str, Any] = {}
    for name, path in files.items():
        needed = name not in ("counts", "parity")  # the others are looked for, and given only where they exist
        found[name] = None
        if not path:
            continue
        if name == "counts" and found["train_done"] and "data" in found["resolved"] and not path.is_file():
            of_run = found["resolved"]  # the file was damaged, and deleted
            count_samples(args.run_dir, ResolvedData.model_validate(of_run["data"]), of_run["settings"]["train_iters"])
        found[name] = read_json(path, *(() if needed else (None,)))
        if found[name] is None:
            print(f"note: {path}: no such file; the page says so")
        else:
            check_keys(path, found[name], KEYS[name])
    data, fingerprint = found["resolved"].get("data", {}), (found["dataset"] or {}).get("fingerprint")
    if fingerprint and data.get("fingerprint", fingerprint) != fingerprint:
        raise not_this_run(args.dataset, f"its data is {fingerprint}, that of the run {data['fingerprint']}")
    run_name = found["resolved"]["run_name"]
    if (of := (found["prediction"] or {}).get("run_name", run_name)) != run_name:
        raise not_this_run(args.prediction, f"it is of {of}")
    if (of := Path((found["train_done"] or {}).get("run_dir", args.run_dir))) != args.run_dir:
        raise not_this_run(args.train_done, f"it is of {of}")
    return found


def check_keys(path: Path, content: Any, keys: dict[str, Any]) -> None:
    for key, kind in keys.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise DamagedFileError(
                f"{path}: damaged, or another file than its name says: it has no {key} as it should",
                "delete it and run the same command: it is made again",
            )


def not_this_run(path: Path, why: str) -> RunError:
    return RunError(f"{path}: not of this run: {why}", "delete it and run the same command: it is made again")


def page(args: argparse.Namespace) -> str:
    """The page. In the template JSON files go by the names of their options, None where one is missing."""
    run_dir, found = args.run_dir, read_inputs(args)
    metrics, validations = read_metrics(run_dir), read_jsonl(run_dir / VALIDATION)
    settings, why = found["resolved"]["settings"], found["resolved"]["why"]
    evaluation = found["evaluation"] = with_scores(found["evaluation"]) if found["evaluation"] else {}
    groups = {name: with_scores(group) for name, group in evaluation.get("groups", {}).items()}
    examples = evaluation.get("examples", [])
    return render(
        "report.html.j2",
        **found,
        **measured(metrics),
        export=args.export,
        derived={name: settings.get(name) for name in why},
        given={name: value for name, value in settings.items() if name not in why},
        distributions=DISTRIBUTIONS,
        last={**(metrics[-1] if metrics else {}), **(found["train_done"] or {})},
        charts=[chart | {"svg": Markup(chart["svg"])} for chart in charts(metrics)],
        validations=validations,
        best=best_validation(validations),
        meaning=explained(evaluation["scores"][0]["name"]) if evaluation.get("scores") else "",
        measure=measure_of(evaluation),
        others=other_sets(args.evaluation, evaluation.get("model")) if args.evaluation else {},
        leak=found["dataset"] and leak_note(found["dataset"]),
        groups=sorted(groups.items(), key=lambda item: item[1]["scores"][0]["mean"] if item[1]["samples"] else 0),
        wrong=[example for example in examples if not example["correct"]],
        right=[example for example in examples if example["correct"]],
        predictions=evaluation.get("predictions") and args.evaluation.with_name("predictions.jsonl"),
        paths=paths(run_dir, args.export, found["resolved"]),
    )


def measure_of(evaluation: dict[str, Any]) -> str:
    """What the first score's mean is called: the share of right answers is an accuracy."""
    if not evaluation.get("scores"):
        return "accuracy"
    first, samples = evaluation["scores"][0], evaluation["samples"]
    return "accuracy" if abs(first["mean"] * samples - evaluation["correct"]) < 1e-6 else f"score ({first['name']})"


def other_sets(evaluation: Path, model: str | None) -> dict[str, dict[str, Any]]:
    """What evaluate.py found by hand on other data with the same export, by the name of the data."""
    files = sorted(evaluation.parent.glob("evaluations/*/evaluation.json"))
    found = {path.parent.name: read_json(path) for path in files}
    return {
        name: with_scores(each) for name, each in found.items() if each.get("samples") and each.get("model") == model
    }


def paths(run_dir: Path, export: Path | None, resolved: dict[str, Any]) -> dict[str, str]:
    """What a reader may want to open next, where it exists."""
    found = {"run": str(run_dir)}
    if step := iterations_done(run_dir):
        found["newest checkpoint"] = str(checkpoint_dir(run_dir, step))
    if export:
        found["export (Hugging Face)"] = str(export)
    found |= of_lora(found.get("newest checkpoint"), resolved)
    logs = sorted(run_dir.glob("run_*.log"))
    found |= {"log" if len(logs) == 1 else f"log {n}": str(path) for n, path in enumerate(logs, 1)}
    if (run_dir / TENSORBOARD).is_dir():
        found["TensorBoard"] = f"tensorboard --logdir {run_dir / TENSORBOARD}"
    if export and is_export(export):
        found["talk to it"] = chat_command(run_dir)
    return found


def of_lora(checkpoint: str | None, resolved: dict[str, Any]) -> dict[str, str]:
    """What LoRA's pairs stand beside, and the command that makes a PEFT folder of them; of a run without LoRA nothing."""
    settings, start = resolved["settings"], resolved.get("start", {})
    if not settings.get("lora_rank"):
        return {}
    found = {"base, which checkpoints need": str(start["folder"])} if start.get("folder") else {}
    if checkpoint and set(settings["trainable_modules"]) == set(settings["lora_modules"]):
        to_peft = f"python workflow_scripts/convert_checkpoint.py mcore2peft {shlex.quote(checkpoint)} adapter"
        found["adapter for PEFT"] = to_peft
    return found


def chat_command(run_dir: Path) -> str:
    return f"make chat RUN={shlex.quote(str(run_dir))}"


if __name__ == "__main__":
    main()
