"""The pages in a real browser, English and Chinese: no error on the console, no request, nothing wider than a phone."""

import argparse
import ast
import asyncio
import re
import shutil

import pytest

from helpers import ROOT, SCRIPTS
from helpers.browser import Browser
from llava_sft.report.html import make_environment
from llava_sft.report.language import chinese, spoken

PAGES = SCRIPTS / "llava_sft/report"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def messages() -> set[str]:
    """Every text that a template or a script says."""
    found = set()
    for path in PAGES.glob("*.j2"):
        for _, _, texts in make_environment("en").extract_translations(path.read_text(), ("_", "gettext", "ngettext")):
            found |= {text for text in ((texts,) if isinstance(texts, str) else texts) if text}
    for path in SCRIPTS.rglob("*.py"):
        text = path.read_text()
        for call in ast.walk(ast.parse(text)) if "report.language" in text else ():
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("say", "sayer"):
                found |= {each.value for each in call.args[:1] if isinstance(each, ast.Constant)}
    return found


def test_every_message_has_a_chinese_one_with_the_same_values():
    table = chinese()
    assert messages() - table.keys() == set()
    for english, translated in table.items():
        values = re.findall(r"%\((\w+)\)s|(%%)|\{(\w+)\}|(</?\w+>)|`([^`]+)`", english)
        assert sorted(values) == sorted(re.findall(r"%\((\w+)\)s|(%%)|\{(\w+)\}|(</?\w+>)|`([^`]+)`", translated)) or (
            "<i>Before" in english
        ), english
