"""The HTML pages: one file each, with nothing outside it, and data as text only; figures as people read them."""

import base64
import io
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from llava_sft.errors import SettingsError
from llava_sft.report.language import detailed, quoted, translator

ENLARGE_BELOW, ENLARGED = 100, 112  # pixels: a smaller picture is shown at a multiple of its size, at least this large


def render(template: str, language: str, **values: Any) -> str:
    """A page of this folder's templates. What is not in `values`, at any depth, is shown as missing."""
    return make_environment(language).get_template(template).render(values, language=language)


def refuse_others_page(output: Path) -> None:
    """Raise SettingsError where a page to be written is there already and is none."""
    try:
        with open(output, "rb") as file:
            head = file.read(100).lstrip().lower()
    except OSError:
        return  # not there; or writing it says why not
    if head and not head.startswith(b"<!doctype html"):
        raise SettingsError(
            f"--output {output}: exists already, and is no page: it would be lost",
            f"--output {output.with_suffix('.html')}",
        )


@cache
def make_environment(language: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.ChainableUndefined,
        extensions=["jinja2.ext.i18n"],
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = translator(language)
    environment.install_gettext_callables(  # type: ignore[attr-defined]  # of the extension
        found, lambda one, several, count: found(one if count == 1 and language == "en" else several), newstyle=True
    )
    environment.filters |= {f.__name__: f for f in (number, percent, points, size, duration, picture, code)}
    environment.filters["said"] = lambda value: quoted(str(value), language)  # text, unlike what _ returns
    environment.filters["detailed"] = lambda detail, reason: detailed(str(detail), reason, language)
    return environment


def picture(uri: Any, alt: str) -> Markup:
    """An `<img>` of an embedded bitmap, enlarged when tiny; anything else would make the page reach outside."""
    match = re.fullmatch(r"data:image/(?:png|jpeg|gif|webp);base64,([A-Za-z0-9+/=]+)", str(uri))
    if not match:
        return Markup('<span class="soft">(picture not embedded)</span>')
    from PIL import Image

    try:
        width, height = Image.open(io.BytesIO(base64.b64decode(match[1]))).size
    except (OSError, ValueError, Image.DecompressionBombError):
        return Markup('<span class="soft">(picture not readable)</span>')
    tiny = Markup("")
    if max(width, height) < ENLARGE_BELOW:
        tiny = Markup(' class="tiny" width="{}"').format(width * math.ceil(ENLARGED / max(width, height)))
    return Markup('<img{} src="{}" alt="{}">').format(tiny, uri, alt)


def code(text: str) -> Markup:
    """Text with what stands in `backticks` set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


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
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return f"[{', '.join(value)}]"
    return str(value)


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "–"


def points(value: Any) -> str:
    """The difference of two shares: 0.125 → `+12.5`."""
    return f"{100 * value:+.1f}" if isinstance(value, int | float) else "–"


def size(value: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """12.3 → `12 s`, 83 → `1 min 23 s`, 7384 → `2 h 3 min`."""
    minutes, left = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"
