"""The language of pages and of the messages at the end: English, or Chinese as zh.yaml has it, by English text, and
zh_messages.yaml and zh_details.yaml for what other parts have said in English, values and all."""

import os
import re
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
    return yaml.safe_load((Path(__file__).parent / "zh.yaml").read_text("utf-8"))


@cache
def messages(name: str = "zh_messages.yaml") -> list[tuple[re.Pattern[str], str]]:
    """A pattern for each English message, whose groups are its values, and the Chinese one."""
    table = yaml.safe_load((Path(__file__).parent / name).read_text("utf-8"))
    return [(re.compile(re.escape(text).replace(r"\{\}", "(.*?)"), re.DOTALL), found) for text, found in table.items()]


def spoken(language: str, environment: Mapping[str, str] = os.environ) -> str:
    """`en` or `zh`; of `auto` what the locale says."""
    if language != "auto":
        return language
    locale = next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := environment.get(name))), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def translator(language: str) -> Callable[[str], str]:
    """The text in a language, with its placeholders; what zh.yaml does not have stays as it is."""
    table = chinese() if language == "zh" else {}
    return lambda text: table.get(text, text)


def quoted(text: str, language: str) -> str:
    """What another part of the workflow has said, in a language; never for a name from the data."""
    known = chinese().get(text) if language == "zh" else text
    if known is not None:
        return known
    reason, colon, detail = text.partition(": ")  # of a reject
    translated = _matched(text, messages())
    known = "" if translated or not colon else quoted(reason, language)
    return translated or (f"{known}：{detailed(detail, reason, language)}" if known not in ("", reason) else text)


def detailed(detail: str, reason: str, language: str) -> str:
    """What is said of a rejected record beside the reason, in a language; values of the record stay as they are."""
    return (language == "zh" and _matched(f"{reason}: {detail}", messages("zh_details.yaml"))) or detail


def _matched(text: str, table: list[tuple[re.Pattern[str], str]]) -> str:
    matches = ((pattern.fullmatch(text), found) for pattern, found in table)
    return next((found.format(*match.groups()) for match, found in matches if match), "")


def sayer(language: str) -> Say:
    found = translator(language)
    return lambda text, /, **values: found(text) % values
