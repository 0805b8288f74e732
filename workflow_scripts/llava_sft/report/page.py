"""The report of a run as one HTML page: everything that the chain's files say, for a person to judge the model by.

Notable:
- nothing outside the page is needed to read it: pictures, curves and style are in it (html.py);
- every input but the resolved settings may be missing, and so may their keys: the page says so and goes on.
"""

import math
from pathlib import Path
from statistics import median

from markupsafe import Markup

from llava_sft.files import read_json
from llava_sft.report.charts import charts
from llava_sft.report.html import render
from llava_sft.training.checkpoints import checkpoint_dir, iterations_done
from llava_sft.training.coverage import SAMPLE_COUNTS
from llava_sft.training.watch import VALIDATION, read_jsonl, read_metrics

WRONG_SHOWN, RIGHT_SHOWN = 24, 12
DISTRIBUTIONS = ("images per sample", "question length", "answer length", "image width", "image height")


def render_report(resolved: dict, run_dir: Path, export: Path | None, **known: dict | None) -> str:
    """The page. `known`: what the chain's JSON files hold, None where one is missing: prediction, dataset, inspection,
    done (the marker of the training), evaluation."""
    metrics, evaluation = read_metrics(run_dir), known["evaluation"] or {}
    settings, why = resolved.get("settings", {}), resolved.get("why", {})
    last = {**(metrics[-1] if metrics else {}), **(known["done"] or {})}
    speeds = [record["tokens_per_s"] for record in metrics if "tokens_per_s" in record]
    examples = evaluation.get("examples", [])
    groups = evaluation.get("groups", {})
    return render(
        "report.html.j2",
        resolved=resolved,
        derived={name: settings.get(name) for name in why},
        given={name: value for name, value in settings.items() if name not in why},
        **known,
        distributions=DISTRIBUTIONS,
        last=last,
        speed=median(speeds) if speeds else None,
        step_s=median(record["step_s"] for record in metrics) if metrics else None,
        counts=read_json(run_dir / SAMPLE_COUNTS, None),
        peak_gib=max((record.get("memory_gib", 0) for record in metrics), default=0),
        charts=[chart | {"svg": Markup(chart["svg"])} for chart in charts(metrics)],
        validations=read_jsonl(run_dir / VALIDATION),
        interval=wilson_interval,
        groups=sorted(groups.items(), key=lambda item: item[1]["correct"] / (item[1]["samples"] or 1)),
        wrong=[example for example in examples if not example.get("correct")][:WRONG_SHOWN],
        right=[example for example in examples if example.get("correct")][:RIGHT_SHOWN],
        parity=export and read_json(export / "parity.json", None),
        paths=_paths(run_dir, export),
    )


def _paths(run_dir: Path, export: Path | None) -> dict[str, str]:
    """What a reader may want to open next, of that which is there."""
    step = iterations_done(run_dir)
    logs = sorted(run_dir.glob("run_*.log"))
    return {
        "run": str(run_dir),
        **({"newest checkpoint": str(checkpoint_dir(run_dir, step))} if step else {}),
        **({"export (Hugging Face)": str(export)} if export else {}),
        **{"log" if len(logs) == 1 else f"log {n}": str(path) for n, path in enumerate(logs, 1)},
        **(
            {"TensorBoard": f"tensorboard --logdir {run_dir}/tensorboard"} if (run_dir / "tensorboard").is_dir() else {}
        ),
    }


def wilson_interval(correct: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): what a held-out set of this size can tell."""
    if not samples:
        return 0.0, 1.0
    share, unit = correct / samples, z * z / samples
    middle, half = share + unit / 2, z * math.sqrt(share * (1 - share) / samples + unit / (4 * samples))
    return (middle - half) / (1 + unit), (middle + half) / (1 + unit)
