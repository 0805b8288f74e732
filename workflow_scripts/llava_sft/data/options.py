"""Options beside a question: an answer means little without them, so a record that has them nowhere else is rejected by name.

Notable: texts are options, and only those that the question lacks: a score under `a` and `b`, or the list that the question was
made of, is a column like any other. Numbers are where the answer is one of their letters, or a place in their list.
"""

import re
from typing import Any

from llava_sft.data.other_forms import is_empty, plain, unprinted
from llava_sft.data.rejects import Rejected

LISTED = ("choices", "options")
LETTERED = re.compile(r"(option|choice|answer)?[a-j]|(option|choice)[0-9]")
NUMBER = re.compile(r"[-+]?[0-9.,]+(e[-+]?[0-9]+)?%?|nan|true|false")  # of a table, too, where all is text
LETTER = re.compile(r"\W*((?i:option|answer|choice)\W*)?(([A-J]\W*)+|[a-j]\W*)")  # of one option, or of several


def check_options(record: dict[str, Any], question: str, answer: str) -> None:
    """Raise `Rejected` for options that the question, under the key `question`, does not have."""
    asked, given = _spaced(record[question]), _spaced(record[answer])
    letter, place = LETTER.fullmatch(str(record[answer])) is not None, given.isdecimal()
    listed, lettered = [], []
    for key, value in record.items():
        name = plain(key)
        if is_empty(value) or key in (question, answer):
            continue
        if name in LISTED:
            texts = _texts(value, letter or place)
            listed += [key] if _lacks(asked, texts) or (place and texts and given not in texts) else []
        elif LETTERED.fullmatch(name) and not isinstance(value, list | dict) and _lacks(asked, _texts(value, letter)):
            lettered.append(key)
    if listed or len(lettered) > 1:
        fix = "write them into the question, and the answer as its text; where these are no options"
        settle = f"columns: {{question: {question}, answer: {answer}}}"
        raise Rejected("options are not read", f"{', '.join(listed or lettered)}: {fix}, {settle}")


def _texts(value: Any, numbers: bool) -> list[str]:
    """The texts of options: of a list, of {A: text} or {label, text}, of either as it is printed, or the lines of a text."""
    value = unprinted(value)
    if isinstance(value, dict):
        value = value.get("text") or list(value.values())
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one, numbers)]
    lines = map(_spaced, value.splitlines() if isinstance(value, str) else () if value is None else (value,))
    return [line for line in lines if line and (numbers or not NUMBER.fullmatch(line))]


def _lacks(asked: str, texts: list[str]) -> bool:
    edged = (rf"(?:\b|(?=\W)){re.escape(text)}(?:\b|(?<=\W))" for text in texts)
    return any(not re.search(pattern, asked, re.ASCII) for pattern in edged)


def _spaced(text: Any) -> str:
    return " ".join(str(text).casefold().split())
