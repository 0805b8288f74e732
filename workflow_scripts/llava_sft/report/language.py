"""The language of pages and of the messages at the end: English, or Chinese as zh.yaml has it, by English text."""

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import yaml


class Say(Protocol):
    """A text in the language of the reader; `%(name)s` in it stands for a value, `%%` for a percent sign."""

    def __call__(self, text: str, /, **values: Any) -> str: ...


@cache
def chinese() -> dict[str, str]:
    return yaml.safe_load((Path(__file__).parent / "zh.yaml").read_text())


def spoken(language: str, environment: Mapping[str, str] = os.environ) -> str:
    """`en` or `zh`; of `auto` what the locale says."""
    if language != "auto":
        return language
    locale = next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := environment.get(name))), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def translator(language: str) -> Callable[[str], str]:
    """The text in a language, with its placeholders. What zh.yaml does not have (a name from the data) stays as it is."""
    table = chinese() if language == "zh" else {}
    return lambda text: table.get(text, text)


def sayer(language: str) -> Say:
    found = translator(language)
    return lambda text, /, **values: found(text) % values
