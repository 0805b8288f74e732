"""The report of a run as one HTML page: everything that the chain's files say, for a person to judge the model by.

Notable:
- nothing outside the page is needed to read it: pictures, curves and style are in it;
- whatever comes from data is escaped (autoescape), and only embedded bitmaps become pictures;
- every input but the resolved settings may be missing, and so may their keys: the page says so and goes on.
"""

import base64
import io
import math
import re
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from llava_sft.files import read_json
from llava_sft.report.charts import charts
from llava_sft.training.watch import VALIDATION, read_jsonl

WRONG_SHOWN, RIGHT_SHOWN = 24, 12
ENLARGE_BELOW, ENLARGED = 100, 112  # pixels: a smaller picture is shown at a multiple of its size, at least this large
DISTRIBUTIONS = ("images per sample", "question length", "answer length", "image width", "image height")


def render_report(
    resolved: dict,
    run_dir: Path,
    metrics: list[dict],
    prediction: dict | None = None,
    dataset: dict | None = None,
    inspection: dict | None = None,
    done: dict | None = None,
    evaluation: dict | None = None,
    export: Path | None = None,
) -> str:
    """The page. The dictionaries are the JSON files of the chain; `metrics` the records of `metrics.jsonl`."""
    loader, missing = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.ChainableUndefined
    environment = jinja2.Environment(
        loader=loader, undefined=missing, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {f.__name__: f for f in (number, percent, size, duration, picture)}
    settings, why = resolved.get("settings", {}), resolved.get("why", {})
    last = {**(metrics[-1] if metrics else {}), **(done or {})}
    speeds = [record["tokens_per_s"] for record in metrics if "tokens_per_s" in record]
    examples = (evaluation or {}).get("examples", [])
    groups = (evaluation or {}).get("groups", {})
    return environment.get_template("report.html.j2").render(
        resolved=resolved,
        derived={name: settings.get(name) for name in why},
        given={name: value for name, value in settings.items() if name not in why},
        prediction=prediction,
        memory={part: b for part, b in (prediction or {}).get("memory", {}).items() if part != "total"},
        dataset=dataset,
        inspection=inspection,
        distributions=DISTRIBUTIONS,
        done=done,
        last=last,
        speed=median(speeds) if speeds else None,
        peak_gib=max((record.get("memory_gib", 0) for record in metrics), default=0),
        charts=[chart | {"svg": Markup(chart["svg"])} for chart in charts(metrics)],
        evaluation=evaluation,
        validations=read_jsonl(run_dir / VALIDATION),
        interval=wilson_interval,
        groups=sorted(groups.items(), key=lambda item: item[1]["correct"] / (item[1]["samples"] or 1)),
        wrong=[example for example in examples if not example.get("correct")][:WRONG_SHOWN],
        right=[example for example in examples if example.get("correct")][:RIGHT_SHOWN],
        parity=read_json(export / "parity.json") if export and (export / "parity.json").is_file() else None,
        paths=_paths(run_dir, export),
    )


def _paths(run_dir: Path, export: Path | None) -> dict[str, str]:
    """What a reader may want to open next, of that which is there."""
    tracker = run_dir / "latest_checkpointed_iteration.txt"
    step = tracker.read_text().strip() if tracker.is_file() else ""
    newest = run_dir / (f"iter_{int(step):07d}" if step.isdigit() else step)
    logs = sorted(run_dir.glob("run_*.log"))
    return {
        "run": str(run_dir),
        **({"newest checkpoint": str(newest)} if step else {}),
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


def picture(uri: Any, alt: str) -> Markup:
    """An `<img>` of an embedded bitmap, enlarged when tiny; anything else would make the page reach outside."""
    match = re.fullmatch(r"data:image/(?:png|jpeg|gif|webp);base64,([A-Za-z0-9+/=]+)", str(uri))
    if not match:
        return Markup('<span class="soft">(picture not embedded)</span>')
    try:
        width, height = Image.open(io.BytesIO(base64.b64decode(match[1]))).size
    except (OSError, ValueError, Image.DecompressionBombError):
        return Markup('<span class="soft">(picture not readable)</span>')
    tiny = Markup("")
    if max(width, height) < ENLARGE_BELOW:
        tiny = Markup(' class="tiny" width="{}"').format(width * math.ceil(ENLARGED / max(width, height)))
    return Markup('<img{} src="{}" alt="{}">').format(tiny, uri, alt)


# ------------------------------------------------------------------------------------- figures as people read them


def number(value: Any) -> str:
    """1234567 → `1,234,567`, 0.0012345 → `0.00123`; None and what is missing → `–`; other values as YAML spells them."""
    if value is None or isinstance(value, jinja2.Undefined):
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"
    return str(value)


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "–"


def size(value: Any) -> str:
    """Bytes as GiB or MiB."""
    if not isinstance(value, int | float):
        return number(value)
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def duration(seconds: Any) -> str:
    """12.3 → `12 s`, 83 → `1 min 23 s`, 7384 → `2 h 3 min`."""
    if not isinstance(seconds, int | float):
        return "–"
    minutes, left = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"
