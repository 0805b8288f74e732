"""What a shell script would pass to the program that it starts, read without running anything.

Notable: no shell. Quotes, comments, continued lines, arrays, `${VAR:-default}` and whole-number arithmetic are read as bash
reads them. What only running it could tell (`$(date)`, a variable of the environment) stays a mark in the text; `shown`
spells it again. No condition is evaluated: what stands outside an `if`, a loop or a function counts before what stands
inside, of branches the first that says something, and the others are noted.
"""

import ast
import fnmatch
import operator
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llava_sft.errors import SettingsError

type Array = list[str]
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[[^]]*\])?(\+?)=(.*)", re.S)
REDIRECTION = re.compile(r"\d*(?:&>>?|>>|>&|>\||>|<&|<<<|<)")
SEPARATOR = re.compile(r"\n|;;|;|&&|&|\|\||\||\(|\)")
NAME = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]")
PARAMETER = re.compile(r"([!#]?)(\w+|[@*])(?:\[(.*?)\])?(.*)", re.S)
OPENING, CLOSING = {"if", "for", "while", "until", "case", "{", "select"}, {"fi", "done", "esac", "}"}
LEADING = {"then", "else", "elif", "do", "!", "time", *OPENING - {"for", "case", "select"}}
DECLARING = {"export", "declare", "local", "readonly", "typeset"}
UNKNOWN = re.compile("[\ue000-\uf8ff]")  # one character of Unicode's private use for each text that is not known
ARITHMETIC: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


class Command(NamedTuple):
    line: int
    words: tuple[str, ...]


class Other(NamedTuple):
    """What a branch says of a variable that has another value already."""

    line: int
    name: str
    taken: str
    instead: str


class Variables:
    """A script's variables, and what a word becomes with them filled in."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Array] = {}  # a plain variable is an array of one
        self._unknown: list[str] = []

    def shown(self, text: str) -> str:
        """The text with what is not known spelled as the script does."""
        return UNKNOWN.sub(lambda mark: self._unknown[ord(mark[0]) - 0xE000], text)

    def expand(self, word: str, split: bool = True) -> list[str]:
        """The fields that a command would see of a word as it is spelled; not `split`, as of an assignment: at most one."""
        fields, position, quoted, seen = [""], 0, False, False
        while position < len(word):
            char = word[position]
            if char == '"':
                quoted, seen, position = not quoted, True, position + 1
            elif char == "'" and not quoted:
                end = word.index("'", position + 1)
                fields[-1] += word[position + 1 : end]
                seen, position = True, end + 1
            elif char == "\\" and (not quoted or word[position + 1 : position + 2] in set('$`"\\\n')):
                fields[-1] += word[position + 1 : position + 2].strip("\n")  # of a line that goes on
                position += 2
            elif char in "$`" or word.startswith(("<(", ">("), position):
                end = _end(word, position, 0)
                values, position = self._value(word[position:end]), end
                if split and not quoted:
                    values = [part for value in values for part in value.split()]
                if values:
                    fields[-1] += values[0]
                    fields += values[1:]
                    seen = True
            else:
                fields[-1] += char
                position += 1
        return fields if seen or fields != [""] else []

    def _value(self, text: str) -> list[str]:
        """Of `$NAME`, `${…}`, `$(…)` or `$((…))`."""
        if text.startswith("$(("):
            return [self._arithmetic(text)]
        if text.startswith(("$(", "`", "<(", ">(")):
            return [self._substitution(text)]
        match = PARAMETER.fullmatch(text[2:-1] if text.startswith("${") else text[1:])
        if not match:
            return [text if text == "$" else self._not_known(text)]
        sign, name, index, rest = match.groups()
        values = [str(self.path)] if name in ("0", "BASH_SOURCE") else self.values.get(name)
        if name in ("HOME", "USER") and values is None:
            values = [os.environ[name]] if name in os.environ else None
        if sign == "#" and not rest and values is not None:
            return [str(len(values) if index in ("@", "*") else len(values[0]))]
        if sign:
            return [self._not_known(text)]
        if values is not None and index not in ("@", "*"):
            values = values[int(index) :][:1] if index and index.isdigit() else values[:1]
        return self._with_operation(text, name, values, rest)

    def _with_operation(self, text: str, name: str, values: Array | None, rest: str) -> list[str]:
        """What `${name<rest>}` makes of the variable's values; None: it is not set."""
        full = bool(values) and (values != [""] or not rest.startswith(":"))
        if default := re.fullmatch(r":?([-=?+])(.*)", rest, re.S):
            kind, other = default[1], default[2]
            if kind == "+":
                return self.expand(other) if full else []
            if full or kind == "?":
                return values if values and full else [self._not_known(text)]
            values = ["".join(self.expand(other, split=False))]
            if kind == "=":
                self.values[name] = values
            return values
        if values is None:
            return [] if name in ("@", "*") or "[" in text else [self._not_known(text)]
        if trim := re.fullmatch(r"(%%?|##?)(.*)", rest, re.S):
            pattern = "".join(self.expand(trim[2], split=False))
            return [_trimmed(value, trim[1], pattern) for value in values]
        return [self._not_known(text)] if rest else values

    def _substitution(self, text: str) -> str:
        words = text.strip("$()`").split()
        if words and words[0] in ("basename", "dirname"):
            fields = [field for word in words[1:] for field in self.expand(word)]
            if fields and words[0] == "basename":
                return Path(fields[0]).name.removesuffix(fields[1] if len(fields) > 1 else "")
            if fields:
                return str(Path(fields[0]).parent)
        return self._not_known(text)

    def _arithmetic(self, text: str) -> str:
        inner = re.sub(r"(?<![\w$])[A-Za-z_]\w*", lambda name: f"${name[0]}", text[3:-2])
        formula = "".join(self.expand(inner, split=False)).strip()
        try:
            return str(_computed(ast.parse(formula, mode="eval").body))
        except (SyntaxError, KeyError, ValueError, ZeroDivisionError):
            return self._not_known(text)

    def _not_known(self, text: str) -> str:
        if text not in self._unknown:
            self._unknown.append(text)
        return chr(0xE000 + self._unknown.index(text))


class Script:
    """A script that was read: its variables, its commands with every variable filled in, and what was not followed."""

    def __init__(self, path: Path):
        self.path = path
        self.variables = Variables(path)
        self.exported: dict[str, int] = {}  # name → line
        self.commands: list[Command] = []
        self.others: list[Other] = []
        self.sourced: list[Command] = []
        self._inside: set[str] = set()  # variables that only branches have set
        self._depth = 0
        try:
            for line, words in _statements(path.read_text("utf-8", "replace")):
                self._run(line, words)
        except _UnclosedError as error:
            raise SettingsError(
                f"{path}: line {error.args[0]}: a quote or bracket that opens there is never closed",
                "close it; `bash -n` checks a script without running it",
            ) from None

    def _run(self, line: int, words: list[str | Array]) -> None:
        """Take a statement's assignments over, or keep its command."""
        while words and words[0] in LEADING | CLOSING:
            word = words.pop(0)
            self._depth += (word in OPENING) - (word in CLOSING)
        if not words or words[0] in OPENING:
            self._depth += bool(words)
            return
        declaring = words.pop(0) if words[0] in DECLARING else None
        while words and (declaring or _is_assignment(words[0])):
            word = str(words.pop(0))
            if not _is_assignment(word):
                continue  # an option of `declare`, or `export NAME`
            array = words.pop(0) if words and isinstance(words[0], list) else None
            self._assign(line, word, array if isinstance(array, list) else None)
            if declaring == "export":
                self.exported[word.partition("=")[0].removesuffix("+")] = line
        fields = [field for word in words if isinstance(word, str) for field in self.variables.expand(word)]
        if fields and fields[0] == "eval":
            fields = " ".join(fields[1:]).split()
        if fields:
            (self.sourced if fields[0] in (".", "source") else self.commands).append(Command(line, tuple(fields)))

    def _assign(self, line: int, word: str, array: Array | None) -> None:
        match = ASSIGNMENT.match(word)
        assert match
        name, append, text = match.groups()
        values = ["".join(self.variables.expand(text, split=False))]
        if array is not None:
            values = [field for item in array for field in self.variables.expand(item)]
        before = self.variables.values.get(name)
        if append and before is not None:
            values = before + values if array is not None else [*before[:-1], before[-1] + values[0]]
        elif self._depth and before is not None and not UNKNOWN.search("".join(before)):
            if array is not None and name in self._inside:
                values = self._merged(before, values)
            else:
                if values != before and not UNKNOWN.search("".join(values)):
                    self.others.append(Other(line, name, " ".join(before), " ".join(values)))
                return
        if self._depth:
            self._inside.add(name)
        else:
            self._inside.discard(name)
            self.others = [other for other in self.others if other.name != name]
        self.variables.values[name] = values

    def _merged(self, first: Array, second: Array) -> Array:
        """Arguments of one branch and what another has beside them."""
        groups: dict[str, Array] = {}
        for word in second:
            if word.startswith("--") or not groups:
                groups[word] = []
            else:
                groups[list(groups)[-1]].append(word)
        return first + [part for option, values in groups.items() if option not in first for part in (option, *values)]


def _computed(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        return ARITHMETIC[type(node.op)](_computed(node.left), _computed(node.right))
    raise ValueError(node)


def _trimmed(value: str, kind: str, pattern: str) -> str:
    """`${value%pattern}` and its like: the shortest, or for %% and ## the longest, end or beginning that matches."""
    cuts = range(len(value) + 1)
    for cut in cuts if kind in ("%%", "#") else reversed(cuts):
        before, after = value[:cut], value[cut:]
        if kind[0] == "%" and fnmatch.fnmatchcase(after, pattern):
            return before
        if kind[0] == "#" and fnmatch.fnmatchcase(before, pattern):
            return after
    return value


def _is_assignment(word: str | Array) -> bool:
    return isinstance(word, str) and bool(ASSIGNMENT.match(word))


# --- words: as the script spells them, quotes included ----------------------------------------------------------------


class _UnclosedError(Exception):
    """args: the line where it opens."""


def _end(text: str, start: int, line: int) -> int:
    """Where what begins at `start` ends: an escape, a quoted string, an expansion, or one character."""
    pairs = {"$(": ")", "${": "}", "<(": ")", ">(": ")"}
    opening = text[start : start + 2] if text[start : start + 2] in pairs else text[start]
    closing = pairs.get(opening, opening)
    position = start + len(opening)
    if opening == "\\":
        return position + 1
    if opening == "$" and (name := NAME.match(text, position)):
        return name.end()
    if opening not in pairs and opening not in "\"'`(":
        return position
    closing = ")" if opening == "(" else closing
    while position < len(text):
        if text[position] == closing:
            return position + 1
        nests = opening != "'" and (text[position] in "\\$`" or (opening != '"' and text[position] in "\"'("))
        position = _end(text, position, line) if nests else position + 1
    raise _UnclosedError(line)


def _statements(text: str) -> Iterator[tuple[int, list[str | Array]]]:
    """(line, words) of each simple command; the items of `NAME=( … )` follow their word as a list."""
    words: list[str | Array] = []
    line, begins, position, here = 1, 1, 0, list[str]()
    array: Array | None = None
    while position < len(text):
        char = text[position]
        if text.startswith("\\\n", position) or (char.isspace() and char != "\n"):
            end = position + 1 + (char == "\\")
        elif char == "#":
            end = text.find("\n", position) % (len(text) + 1)
        elif array is not None and char in "\n)":
            end = position + 1
            array = None if char == ")" else array
        elif (
            text.startswith("((", position)
            and LEADING.union({"for"}).issuperset(map(str, words))
            and (text[(end := _end(text, position, line)) - 2 : end] == "))")
        ):
            begins = begins if words else line
            words += _assigned(text[position + 2 : end - 2])
        elif found := re.compile(r"<<-?\s*(['\"]?)(\w+)\1").match(text, position):
            here.append(found[2])
            end = found.end()
        elif (found := REDIRECTION.match(text, position)) and not text.startswith(("<(", ">("), position):
            end = _word_end(text, re.compile(r"[ \t]*").match(text, found.end()).end(), line)  # type: ignore[union-attr]
        elif found := SEPARATOR.match(text, position):
            end = found.end()
            if char == "(" and words and isinstance(words[-1], str) and re.fullmatch(r"[A-Za-z_]\w*\+?=", words[-1]):
                words.append(array := [])
            else:
                yield begins, words
                words = []
            while char == "\n" and here:  # what a heredoc holds
                closed = re.compile(rf"^\s*{here.pop(0)}$", re.M).search(text, end)
                end = closed.end() if closed else len(text)
        else:
            begins = begins if words else line
            end = _word_end(text, position, line)
            (words if array is None else array).append(text[position:end])
        line += text.count("\n", position, end)
        position = end
    if array is not None:
        raise _UnclosedError(begins)
    yield begins, words


def _assigned(arithmetic: str) -> list[str]:
    """What `(( arithmetic ))` assigns, as assignments; a command that does nothing, where it only compares."""
    words = []
    for each in arithmetic.split(","):
        if found := re.fullmatch(r"\s*([A-Za-z_]\w*)\s*([-+*/%&|^]|<<|>>)?=(?!=)\s*(.*)", each, re.S):
            name, operation, value = found.groups()
            words.append(f"{name}=$(({name}{operation}({value})))" if operation else f"{name}=$(({value}))")
        elif found := re.fullmatch(r"\s*(\+\+|--)?\s*([A-Za-z_]\w*)\s*(\+\+|--)?\s*", each):
            sign = (found[1] or found[3] or "")[:1]
            words += [f"{found[2]}=$(({found[2]}{sign}1))"] if sign else []
    return words or [":"]


def _word_end(text: str, position: int, line: int) -> int:
    while position < len(text) and not text[position].isspace() and text[position] not in ";&|()":
        if text[position] in "<>" and not text.startswith(("<(", ">("), position):
            break
        position = _end(text, position, line)
    return position
