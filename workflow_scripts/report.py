"""Write the report of a run, one self-contained HTML page, from what the steps before it left behind.

Every input but the resolved settings may be missing, and so may their keys: the page says so.
"""

import argparse
import math
from pathlib import Path
from statistics import median

from markupsafe import Markup

from llava_sft.errors import RunError, exits_cleanly
from llava_sft.files import read_json, write_text
from llava_sft.report.charts import charts
from llava_sft.report.html import render
from llava_sft.training.checkpoints import checkpoint_dir, iterations_done
from llava_sft.training.coverage import SAMPLE_COUNTS
from llava_sft.training.watch import VALIDATION, read_jsonl, read_metrics

OPTIONAL = {
    "prediction": "what preflight predicted",
    "dataset": "dataset file (index_webdataset)",
    "inspect": "what inspect_webdataset found",
    "train-done": "marker of the finished training",
    "evaluation": "answers on held-out data (evaluate)",
}
WRONG_SHOWN, RIGHT_SHOWN = 24, 12
DISTRIBUTIONS = ("images per sample", "question length", "answer length", "image width", "image height")


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--resolved", type=json_file, required=True, metavar="JSON", help="resolved settings (preflight)")
    add("--run-dir", type=Path, required=True, metavar="DIR", help="run directory, with metrics.jsonl")
    for name, meaning in OPTIONAL.items():
        add(f"--{name}", type=json_file, metavar="JSON", help=meaning)
    add("--export", type=Path, metavar="DIR", help="Hugging Face folder, to be named on the page")
    add("--output", type=Path, required=True, metavar="HTML")
    args = parser.parse_args()
    if not args.run_dir.is_dir():
        raise RunError(f"run directory {args.run_dir} does not exist", "train first, or name another --run-dir")
    write_text(args.output, page(args))
    print(f"report: {args.output}")


def json_file(path: str) -> dict:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file", "make it first, or leave its option out") from None
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON: {error}", "delete it and make it again") from None


def page(args: argparse.Namespace) -> str:
    """The page. In the template JSON files go by the names of their options, None where one is missing."""
    run_dir, export, resolved = args.run_dir, args.export, args.resolved
    metrics, evaluation = read_metrics(run_dir), args.evaluation or {}
    settings, why = resolved.get("settings", {}), resolved.get("why", {})
    groups, examples = evaluation.get("groups", {}), evaluation.get("examples", [])
    return render(
        "report.html.j2",
        **vars(args),
        derived={name: settings.get(name) for name in why},
        given={name: value for name, value in settings.items() if name not in why},
        distributions=DISTRIBUTIONS,
        last={**(metrics[-1] if metrics else {}), **(args.train_done or {})},
        speed=median(record["tokens_per_s"] for record in metrics) if metrics else None,
        step_s=median(record["step_s"] for record in metrics) if metrics else None,
        counts=read_json(run_dir / SAMPLE_COUNTS, None),
        peak_gib=max((record["memory_gib"] for record in metrics), default=0),
        charts=[chart | {"svg": Markup(chart["svg"])} for chart in charts(metrics)],
        validations=read_jsonl(run_dir / VALIDATION),
        interval=wilson_interval,
        groups=sorted(groups.items(), key=lambda item: item[1]["correct"] / (item[1]["samples"] or 1)),
        wrong=[example for example in examples if not example["correct"]][:WRONG_SHOWN],
        right=[example for example in examples if example["correct"]][:RIGHT_SHOWN],
        parity=export and read_json(export / "parity.json", None),
        paths=paths(run_dir, export),
    )


def paths(run_dir: Path, export: Path | None) -> dict[str, str]:
    """What a reader may want to open next, of that which is there."""
    found = {"run": str(run_dir)}
    if step := iterations_done(run_dir):
        found["newest checkpoint"] = str(checkpoint_dir(run_dir, step))
    if export:
        found["export (Hugging Face)"] = str(export)
    logs = sorted(run_dir.glob("run_*.log"))
    found |= {"log" if len(logs) == 1 else f"log {n}": str(path) for n, path in enumerate(logs, 1)}
    if (run_dir / "tensorboard").is_dir():
        found["TensorBoard"] = f"tensorboard --logdir {run_dir}/tensorboard"
    return found


def wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): what a held-out set of this size can tell."""
    if not samples:
        return 0.0, 1.0
    z = 1.96
    share, unit = correct / samples, z * z / samples
    middle, half = share + unit / 2, z * math.sqrt(share * (1 - share) / samples + unit / (4 * samples))
    return (middle - half) / (1 + unit), (middle + half) / (1 + unit)


if __name__ == "__main__":
    main()
