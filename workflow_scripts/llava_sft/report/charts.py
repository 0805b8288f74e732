"""Curves of a run as SVG for an HTML page: text stays text, colours are the page's, equal records give equal bytes."""

import io
import re
from math import isfinite

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

CHARTS = (  # key in metrics.jsonl, title, factor
    ("lm loss", "loss", 1),
    ("learning-rate", "learning rate", 1),
    ("grad-norm", "gradient norm", 1),
    ("tokens_per_s", "tokens/s", 1),
    ("data_wait_share", "waiting for data, % of the time", 100),
    ("memory_gib", "memory of a process, GiB", 1),
)
# Matplotlib knows no CSS: it draws in these colours, and each is then replaced by what follows the page's theme.
TEXT, LINE, GRID = "#000001", "#000002", "#000003"
CSS_COLOURS = {TEXT: "currentColor", LINE: "var(--bar)", GRID: "var(--line)"}
LOG_RANGE = 20  # a loss that falls by more is drawn on a log axis, else its end is a flat line


def charts(records: list[dict]) -> list[dict]:
    """Return {title, svg, low, high, last} for each figure that the records of `metrics.jsonl` hold."""
    drawn = []
    for key, title, factor in CHARTS:
        points = [(r["iteration"], r[key] * factor) for r in records if r.get(key) is not None and isfinite(r[key])]
        if points:
            steps, values = zip(*points, strict=True)
            log = key == "lm loss" and min(values) > 0 and max(values) > LOG_RANGE * min(values)
            svg, low, high = _draw(title, steps, values, log), min(values), max(values)
            drawn.append({"title": title, "svg": svg, "low": low, "high": high, "last": values[-1]})
    return drawn


def _draw(title: str, steps: tuple, values: tuple, log: bool) -> str:
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11, "text.color": TEXT}):
        figure = Figure(figsize=(5, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, values, color=LINE, linewidth=1.8, marker="o" if len(steps) < 3 else None)
        plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}")
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.minorticks_off()
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(plain)
        axes.xaxis.set_major_formatter(plain)
        axes.set_xlabel("step", color=TEXT)
        axes.tick_params(colors=TEXT, length=0)
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_html(buffer.getvalue(), title)


def _for_html(svg: str, title: str) -> str:
    """Take out what an SVG within HTML does not need: prologue, namespaces, metadata, ids that other charts have too."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    for colour, css in CSS_COLOURS.items():
        svg = svg.replace(colour, css)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title} over steps"', 1)
