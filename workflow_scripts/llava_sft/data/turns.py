"""Turns of other forms, one by one: pairs, structs of lists, JSON in strings."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import orjson

from llava_sft.data.other_forms import ANSWERS, QUESTIONS, SPEAKERS, plain
from llava_sft.data.rejects import Rejected
from llava_sft.data.values import is_pair


def by_name(keys: Iterable[str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        names[plain(key)].append(key)
    return names


def of(known: tuple[str, ...], names: dict[str, list[str]]) -> list[str]:
    return [key for name in known if name in names for key in names[name]]


def as_list(turns: Any, key: str) -> list[Any]:
    """Turns as a list: of JSON in a string, or of a struct of lists, as `datasets` keeps a list of structs."""
    if isinstance(turns, str):
        try:
            turns = orjson.loads(turns)
        except orjson.JSONDecodeError:
            python = turns.lstrip()[:2] in ("[{", "[[")
            fix = "Python's spelling: write it with json.dumps" if python else "write a list of turns"
            raise Rejected("malformed conversation", f"{key} is a string that is no JSON; {fix}") from None
    if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
        if len({len(values) for values in turns.values()}) > 1:
            raise Rejected("malformed conversation", f"{key}: a struct of lists of different lengths")
        turns = [dict(zip(turns, row, strict=True)) for row in zip(*turns.values(), strict=True)]
    if isinstance(turns, list) and not turns:
        raise Rejected("empty conversation")
    if not isinstance(turns, list):
        raise Rejected("malformed conversation", f"{key}: a {type(turns).__name__}, not a list of turns")
    return turns


def expanded(turns: list[Any]) -> tuple[list[Any], bool]:
    """Turns in pairs, [question, answer], {user, assistant} or [role, text], one by one; and whether they were pairs."""
    expanded: list[Any] = []
    spoken = [plain(turn[0]) in SPEAKERS for turn in turns if is_pair(turn)]
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and not {"from", "role"} & turn.keys():
            expanded += _of_keys(turn, expanded[:1])
        elif isinstance(turn, dict):
            expanded.append(turn)
        elif not is_pair(turn):
            if isinstance(turn, str):
                raise Rejected("malformed conversation", f"turn {number} is a text: write {{role, content}}, or pairs")
            raise Rejected("malformed conversation", f"turn {number} is a {type(turn).__name__}, not an object")
        elif all(spoken):
            expanded.append({"role": turn[0], "content": turn[1]})
        elif any(spoken):
            raise Rejected(
                "malformed conversation",
                f"{turn[0][:20]}: role and text, or question and answer? Write {{role, content}}",
            )
        else:
            expanded += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return expanded, len(expanded) > len(turns)


def _of_keys(turn: dict[str, Any], first: list[Any]) -> list[Any]:
    """The turns of {user, assistant}, {system, input, output} or {speaker, text}; `first`: the turn that begins all, if any."""
    names = by_name(turn)
    asked, answered = of(QUESTIONS, names), of(ANSWERS, names)
    speaker, content = of(("speaker", "role", "from"), names), of(("value", "content", "text"), names)
    if len(asked) == len(answered) == 1:
        rest = {key: value for key, value in turn.items() if key not in (*asked, *answered, "source")}
        system = {"role": "system", "content": rest.pop("system", None)}
        return [
            *([system] if system["content"] and system not in first else []),
            {"role": "user", "content": turn[asked[0]]},
            {"role": "assistant", "content": turn[answered[0]]} | rest,
        ]
    if len(speaker) == len(content) == 1:
        rest = {key: value for key, value in turn.items() if key not in (*speaker, *content)}
        return [{"role": turn[speaker[0]], "content": turn[content[0]]} | rest]
    return [turn]
