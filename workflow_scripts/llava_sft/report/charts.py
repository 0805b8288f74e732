"""The curves of a page: their points and names, for page.js, and Vega, which draws them, as one script to embed."""

from functools import cache
from math import isfinite
from typing import Any, NamedTuple

from markupsafe import Markup

from llava_sft.report.figures import LOSS
from llava_sft.report.html import number
from llava_sft.report.language import Say

CHARTS = (  # key in metrics.jsonl, title, factor, whether a log scale may show it, whether it is noisy
    ("lm loss", "loss", 1, True, True),
    ("learning-rate", "learning rate", 1, False, False),
    ("grad-norm", "gradient norm", 1, True, True),
    ("tokens_per_s", "tokens/s", 1, False, True),
    ("data_wait_share", "waiting for data, %% of the time", 100, False, True),
    ("memory_gib", "memory of a process, GiB", 1, False, False),
)
MOST_POINTS = 2000  # of a curve: of more, neighbours are averaged
LOG_RANGE = 20  # a loss that falls by more is drawn on a log axis at first, else its end is a flat line


class Records(NamedTuple):
    """What a run noted while it trained; `name` tells it from others on the same page."""

    metrics: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    name: str = ""


def charts(runs: list[Records], say: Say) -> list[dict[str, Any]]:
    """Return {title, facts, log, start_log, series} for each figure that the records hold, with one series a run, and of the
    loss another with the held-out one."""
    drawn = []
    for key, title, factor, log, noisy in CHARTS:
        series = []
        for place, run in enumerate(runs):
            name, held_out = run.name or say("training"), f"{run.name} {say('held out')}".strip()
            series.append(_series(run.metrics, key, name, factor, place if len(runs) > 1 else 0))
            if key == "lm loss":
                colour = place if len(runs) > 1 else 1
                series.append(_series(run.validations, LOSS, held_out, 1, colour) | {"dots": True, "dash": True})
        series = [one for one in series if one["points"]]
        if not series:
            continue
        values = [y for _, y in series[0]["points"]]
        facts = say(
            "lowest %(low)s · highest %(high)s · last %(last)s",
            low=number(min(values)), high=number(max(values)), last=number(values[-1]),
        )  # fmt: skip
        start_log = key == "lm loss" and min(values) > 0 and max(values) > LOG_RANGE * min(values)
        about = {"title": say(title), "facts": facts if len(runs) == 1 else "", "log": log, "noisy": noisy}
        drawn.append(about | {"start_log": start_log, "series": series})
    return drawn


def _series(records: list[dict[str, Any]], key: str, name: str, factor: float, colour: int) -> dict[str, Any]:
    points = [
        [r["iteration"], float(f"{r[key] * factor:.6g}")]
        for r in records
        if r.get(key) is not None and isfinite(r[key])
    ]
    return {"name": name, "points": thinned(points), "color": colour, "dots": False, "dash": False}


def thinned(points: list[list[float]]) -> list[list[float]]:
    """At most MOST_POINTS: the mean of so many neighbours, at the step of the last."""
    size = -(-len(points) // MOST_POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [[group[-1][0], float(f"{sum(y for _, y in group) / len(group):.6g}")] for group in groups]


@cache
def vega() -> Markup:
    """Vega (https://vega.github.io/vega/) as one script without requests of its own."""
    from vl_convert import javascript_bundle  # a second: it has a JavaScript engine of its own

    script = javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return Markup(script.replace("</script", "<\\/script").replace("<!--", "<\\!--"))
