"""Scores of an answer, by the definitions of the field, and a user's own function. Imported by the settings: nothing heavy.

A score is spelled `NAME`, `NAME:PARAMETER` or `path/to/file.py:function` (SPELLINGS). It is True or False where an answer is
right or wrong, else a number from 0 to 1. White space at both ends of an answer never counts.
"""

import contextlib
import importlib.util
import inspect
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llava_sft.errors import SHOWN, DataError, SettingsError, shown

# From the model's answer, the true one, and {id, question, the record's other keys} to a score.
Rate = Callable[[str, str, dict[str, Any]], bool | float]

SPELLINGS = (
    "exact | normalised (as VQA) | number:0.05 (that share off) | choice (letter or text) | anls | f1 (of words) | "
    "regex (the true answer is one) | regex:PATTERN (its first group is the answer) | path/to/file.py:function"
)

NUMBER_WORDS = {
    word: str(n)
    for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER = re.compile(r"[-+]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:(?<=\d)[eE][-+]?\d+)?(?:(?<=\d)\s?%)?")
CHARACTER = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese: a word has no spaces around it
WORD = re.compile(rf"[{CHARACTER}]|[^\s{CHARACTER}]+")


class Score(NamedTuple):
    name: str  # as it is spelled in the settings
    rate: Rate


def exact(prediction: str, answer: str, record: dict[str, Any]) -> bool:
    """An answer is right when it is the expected text exactly, white space at both ends aside: “Temple.” is not “Temple”."""
    return prediction == answer


def normalised(prediction: str, answer: str, record: dict[str, Any]) -> bool:
    """An answer is right when it is the expected text after the normalisation of the VQA evaluation (Antol et al. 2015,
    vqaEval.py): case, articles, punctuation and number words do not count. Apostrophes are dropped, in place of its list of
    contractions."""
    return vqa_normalised(prediction) == vqa_normalised(answer)


def vqa_normalised(text: str) -> str:
    text = " ".join(text.split())
    kept = text
    for mark in VQA_PUNCTUATION:
        apart = f"{mark} " not in text and f" {mark}" not in text and not re.search(r"\d,\d", text)
        kept = kept.replace(mark, " " if apart else "")
    words = re.sub(r"\.(?!\d)|['’]", "", kept).lower().split()
    return " ".join({"none": "0", **NUMBER_WORDS}.get(word, word) for word in words if word not in ("a", "an", "the"))


def number(tolerance: float, prediction: str, answer: str, record: dict[str, Any]) -> bool:
    """Relaxed accuracy (Methani et al. 2020, Masry et al. 2022, ChartQA): a number is right when it is off by at most the
    share `tolerance` of the true one; an answer that is no number when it is equal, case aside. Beyond that definition,
    thousands may have commas, and the one number in a sentence is what it says."""
    true, found = as_number(answer), [each[0] for each in NUMBER.finditer(prediction)]
    if true is None:
        return prediction.lower() == answer.lower()
    said = as_number(found[0]) if len(found) == 1 else None
    return said is not None and abs(said - true) <= tolerance * abs(true)


def as_number(text: str) -> float | None:
    if not NUMBER.fullmatch(text):
        return None
    value = float(text.rstrip("% ").replace(",", ""))
    return value / 100 if text.endswith("%") else value


def choice(prediction: str, answer: str, record: dict[str, Any]) -> bool:
    """An answer is right when it names the same option of the question, by its letter or its text, alone or in a sentence
    (as the heuristic matching of MMBench, Liu et al. 2023, and MMMU, Yue et al. 2023). Options begin with `A.`, `A)`, `A:` or
    `(A)`."""
    options = options_of(record["question"])
    true, said = chosen(answer, options), chosen(prediction, options)
    return said == true if true else vqa_normalised(prediction) == vqa_normalised(answer)


def options_of(question: str) -> dict[str, str]:
    """Letter → text of the options, which stand in the question in order from A."""
    marks: list[re.Match[str]] = []
    for mark in re.finditer(r"(?:^|(?<=\s))(?:\(([A-Z])\)|([A-Z])[.):])(?=\s)", question):
        if (mark[1] or mark[2]) == string.ascii_uppercase[len(marks) % 26]:
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(question)] * bool(marks)
    return {mark[1] or mark[2]: question[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)}


def chosen(text: str, options: dict[str, str]) -> str | None:
    """The letter of the option that a text names; None where it names none, or several."""
    bare = re.sub(r"[*`]+|\\boxed\{(.*?)\}", r"\1", text).strip()  # **B**, as chat models write
    alone = re.fullmatch(r"\(?([A-Za-z])\)?[.):]?", bare) or re.match(r"(?:\(([A-Z])\)|([A-Z])[.):,])\s", bare)
    named = r"(?i:\b(?:(?:answer|option|choice)(?:\s+is)?|it(?:\s+is|'s)):?)\s*\(?([B-Z]\b|A\b(?!\s[a-z]))"
    said = alone or re.search(named, bare)
    letter = next((group for group in said.groups() if group), "").upper() if said else ""
    if letter and (letter in options or not options):
        return letter
    plain = {letter: vqa_normalised(option) for letter, option in options.items()}
    whole = vqa_normalised(text)
    same = [letter for letter, option in plain.items() if option == whole]
    within = same or [letter for letter, option in plain.items() if option and f" {option} " in f" {whole} "]
    return within[0] if len(within) == 1 else None


def anls(threshold: float, prediction: str, answer: str, record: dict[str, Any]) -> float:
    """Normalised Levenshtein similarity (Biten et al. 2019, ST-VQA and DocVQA), 0 where it is below `threshold`; case and
    the amount of white space do not count. ANLS is its average over the answers."""
    first, second = (" ".join(text.lower().split()) for text in (prediction, answer))
    longest = max(len(first), len(second))
    similarity = 1 - edit_distance(first, second) / longest if longest else 1.0
    return similarity if similarity >= threshold else 0.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the least number of characters to insert, delete or exchange."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def f1(prediction: str, answer: str, record: dict[str, Any]) -> float:
    """F1 of the words that both have (Rajpurkar et al. 2016, SQuAD): case, punctuation and articles do not count. Of Chinese
    and Japanese each character is a word (Cui et al. 2019, CMRC 2018)."""
    said, true = (Counter(squad_words(text)) for text in (prediction, answer))
    common = (said & true).total()
    return 2 * common / (said.total() + true.total()) if said and true else float(said == true)


def squad_words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return [word for word in WORD.findall(kept) if word not in ("a", "an", "the")]


def regex(prediction: str, answer: str, record: dict[str, Any]) -> bool:
    """An answer is right when the whole of it matches the expected text, which is a regular expression."""
    try:
        return re.fullmatch(answer, prediction, re.DOTALL) is not None
    except re.error as error:
        raise DataError(
            f"sample {record.get('id')}: its answer is no regular expression: {shown(answer)}: {error}",
            "another of evaluate_scores, or mend that answer",
        ) from None


def extracted(pattern: re.Pattern[str], prediction: str, answer: str, record: dict[str, Any]) -> bool:
    """An answer is right when what the pattern's first group matches in it is the expected text, or its match in that."""

    def extract(text: str) -> str | None:
        found = pattern.search(text)
        return found and (found[1] if pattern.groups else found[0] or "").strip()

    said, true = extract(prediction), extract(answer)
    return said is not None and said == (answer if true is None else true)


PLAIN: dict[str, Rate] = {"exact": exact, "normalised": normalised, "choice": choice, "f1": f1, "regex": regex}
SHARES: dict[str, tuple[Callable[..., bool | float], float]] = {"number": (number, 0.05), "anls": (anls, 0.5)}


# ------------------------------------------------------------------------------------------- how they are spelled


def parse_score(spelled: str) -> Score | None:
    """The score, or None for a user's function, which `load_score` reads. Errors: ValueError with the rule it breaks."""
    name, separator, parameter = spelled.partition(":")
    if name in SHARES:
        rate, share = SHARES[name]
        try:
            share = float(parameter) if separator else share
        except ValueError:
            share = -1
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: a number from 0 to 1 after the colon, as in {name}:{SHARES[name][1]}")
        return Score(spelled, partial(rate, share))
    if name == "regex" and separator:
        try:
            return Score(spelled, partial(extracted, re.compile(parameter, re.DOTALL)))
        except re.error as error:
            raise ValueError(f"{shown(parameter)} is no regular expression: {error}") from None
    if name in PLAIN and not separator:
        return Score(name, PLAIN[name])
    if ".py:" in spelled:
        return None
    raise ValueError(f"{shown(spelled)} is none of {SPELLINGS}")


def function_file(spelled: str) -> Path | None:
    """The file of a user's function; None for a score of ours."""
    return None if parse_score(spelled) else Path(spelled.rpartition(":")[0])


def explained(spelled: str) -> str:
    """What counts as right, in words."""
    score = parse_score(spelled)
    rate = getattr(score.rate, "func", score.rate) if score else None
    return " ".join((rate.__doc__ or "").replace("`", "").split()) if rate else f"As the function {spelled} scores it."


def load_score(spelled: str) -> Score:
    """The score; a user's file is run. Errors: SettingsError where it cannot be, or has no such function."""
    if score := parse_score(spelled):
        return score
    path, _, name = spelled.rpartition(":")
    signature = f"def {name}(prediction: str, answer: str) -> bool | float"
    if not Path(path).is_file():
        raise _no_score(spelled, "no such file", "a path that begins in the project's folder, or with /")
    spec = importlib.util.spec_from_file_location(f"score_{Path(path).stem}", path)
    assert spec and spec.loader, "it ends in .py"
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # of the user's code
        raise _no_score(spelled, f"the file cannot be run: {_in_short(error)}", "mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise _no_score(spelled, f"there is no function {name} in it", signature)
    for count in (3, 2):  # with the record, or without
        with contextlib.suppress(TypeError, ValueError):
            inspect.signature(function).bind(*range(count))
            return Score(spelled, partial(_own, spelled, function, count))
    raise _no_score(spelled, f"{name} does not take (prediction, answer)", signature)


def _own(spelled: str, function: Any, count: int, prediction: str, answer: str, record: dict[str, Any]) -> bool | float:
    where = f"answer {shown(prediction)} to sample {shown(record.get('id'))}"
    try:
        value = function(*(prediction, answer, record)[:count])
        share = float(value)
    except (Exception, SystemExit) as error:  # of the user's code
        raise _no_score(
            spelled, f"{where}: {_in_short(error)}", "mend the function, and run the same command"
        ) from error
    if not 0 <= share <= 1:
        raise _no_score(spelled, f"{where}: it returned {shown(value)}", "return True, False or a number from 0 to 1")
    return value if isinstance(value, bool) else share


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:SHOWN]}"


def _no_score(spelled: str, problem: str, fix: str) -> SettingsError:
    return SettingsError(f"evaluate_scores (--scores): {shown(spelled)[1:-1]}: {problem}", fix)
