"""Beside a question options, or the text that it is about: an answer means little without them, so a record that has them nowhere
else is rejected by name. So is a caption that may be a question, or a whole conversation.

Notable: texts are options, and only those that the question lacks: a score under `a` and `b`, or the list that the question was
made of, is a column like any other. Numbers are where the answer is one of their letters, or a place in their list.
"""

import re
from typing import Any

from llava_sft.data.other_forms import is_talk, is_turns, plain, says
from llava_sft.data.rejects import Rejected
from llava_sft.data.values import is_empty, unprinted

LISTED = ("choices", "options")
LETTERED = re.compile(r"(option|choice|answer)?[a-j]|(option|choice)[0-9]")
NUMBER = re.compile(r"[-+]?[0-9.,]+(e[-+]?[0-9]+)?%?|nan|true|false")  # of a table, too, where all is text
LETTER = re.compile(r"\W*((?i:option|answer|choice)\W*)?(([A-J]\W*)+|[a-j]\W*)")  # of one option, or of several
CONTEXT = ("context", "passage", "paragraph", "hint")  # of SQuAD, Dolly, BoolQ, ScienceQA


def check_caption(record: dict[str, Any], caption: str, names: dict[str, list[str]]) -> None:
    """Raise `Rejected` for a text, under the key `caption`, that may be no caption; `names`: of the record's keys, plain."""
    asked = names.get("questionid") if plain(caption) in ("text", "txt") else None
    if beside := names.get("label") or asked:
        label, found = names.get("label", ["KEY"])[0], beside[0]
        settle = f"columns: {{caption: {caption}}}, or {{question: {caption}, answer: {label}}}"
        raise Rejected("keys of several forms", f"{caption}, {found}: a caption, or a question? Say which, {settle}")
    text = record[caption]
    written = unprinted(text) if isinstance(text, str) and text.lstrip()[:1] in ("[", "{") else None
    if is_talk(text) or (written and (is_turns(written) or (isinstance(written, dict) and says(written)))):
        raise Rejected(
            "conversation in a text",
            f"{caption}: write messages; where it is a caption, columns: {{caption: {caption}}}",
        )


def check_options(record: dict[str, Any], question: str, answer: str) -> None:
    """Raise `Rejected` for options that the question, under the key `question`, does not have."""
    asked, given = _spaced(record[question]), _spaced(record[answer])
    letter, place = LETTER.fullmatch(str(record[answer])) is not None, given.isdecimal()
    listed, lettered, context = [], [], []
    for key, value in record.items():
        name = plain(key)
        if is_empty(value) or key in (question, answer):
            continue
        if name in LISTED:
            texts = _texts(value, letter or place)
            listed += [key] if _lacks(asked, texts) or (place and texts and given not in texts) else []
        elif LETTERED.fullmatch(name) and not isinstance(value, list | dict) and _lacks(asked, _texts(value, letter)):
            lettered.append(key)
        elif name in CONTEXT and any(" " in text and text not in asked for text in _texts(value, True)):
            context.append(key)
    settle = f"columns: {{question: {question}, answer: {answer}}}"
    if listed or len(lettered) > 1:
        fix = "write them into the question, and the answer as its text; where these are no options"
        raise Rejected("options are not read", f"{', '.join([*(listed or lettered), *context])}: {fix}, {settle}")
    if context:
        fix = "write it into the question; where the question does without"
        raise Rejected("context is not read", f"{', '.join(context)}: {fix}, {settle}")


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
