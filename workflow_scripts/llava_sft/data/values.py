"""What a value of a record is, whatever its key: empty, a picture, texts in one list, or a list that a cell holds as text."""

import ast
import contextlib
import io
import itertools
import json
import tokenize
from typing import Any

import orjson

from llava_sft.data.image_checks import BASE64, SHORTEST_BASE64
from llava_sft.data.rejects import Rejected

PICTURE_ENDS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
BEYOND_64_BITS = 2.0**63
LONGEST_NAME = 300  # characters


def exact_json(data: bytes) -> Any:
    """The value that JSON holds, in which no id is another than it was written: whole numbers beyond 64 bits, of which orjson
    makes floats, are texts, and so is a record's `id` with a point or an exponent.

    Errors: orjson.JSONDecodeError; `Rejected`.
    """
    value = orjson.loads(data)
    try:
        if _holds_float_beyond_64_bits(value):
            value = json.loads(data, parse_int=_whole_number)
        if type(value) is dict and type(value.get("id")) is float:
            value["id"] = json.loads(data, parse_float=str)["id"]
    except RecursionError:
        raise Rejected("nested too deeply", "lists or objects within one another, hundreds of them") from None
    return value


def _holds_float_beyond_64_bits(value: Any) -> bool:
    left = [value]
    while left:
        each = left.pop()
        if type(each) is dict:
            left += each.values()
        elif type(each) is list:
            left += each
        elif type(each) is float and not -BEYOND_64_BITS < each < BEYOND_64_BITS:
            return True
    return False


def _whole_number(digits: str) -> int | str:
    fits = len(digits) <= 20 and -(1 << 63) <= int(digits) < 1 << 64
    return int(digits) if fits else digits


def is_empty(value: Any) -> bool:
    """Whether a value says nothing, in any of the spellings of an empty cell."""
    if type(value) is str:
        return not value
    if isinstance(value, dict):
        return all(is_empty(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(inner) for inner in value)
    return value is None or value in ("", b"") or value is False or value != value


def is_pair(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def is_flat(value: Any) -> bool:
    """Whether a value is several texts in one list, whose turns nobody tells apart; also as a cell holds it."""
    value = unprinted(value)
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def unprinted(value: Any) -> Any:
    """The list or object that a cell of a table holds as text, in JSON's spelling or Python's; anything else as it is, also a
    list as numpy prints it, `['a' 'b']`: Python would join its texts."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (orjson.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                if isinstance(found := read(value.strip()), list | dict):
                    return found if read is orjson.loads or not _texts_touch(value.strip()) else value
    return value


def _texts_touch(text: str) -> bool:
    tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    return any(one == following == tokenize.STRING for one, following in itertools.pairwise(tokens))


def only_answer(key: str, told: Any) -> str:
    """What all of `answers` say: a list, a cell that holds one as text, a struct with one, or a single text. Raises `Rejected`
    where they differ."""
    given, cell = unprinted(told), isinstance(told, str)
    if isinstance(given, dict):
        given = given.get("answer", given.get("text"))
    not_read = cell and given is told and told.lstrip()[:1] == "["  # a list in numpy's spelling, or somebody's own
    if cell and isinstance(given, list) and not all(isinstance(one, str | dict) for one in given):
        given = told  # numbers: a box, say
    texts = [
        one.get("answer", one.get("text")) if isinstance(one, dict) else one
        for one in (given if isinstance(given, list) else [given])
    ]
    if len(set(map(str, texts))) != 1 or not isinstance(texts[0], str) or not_read:
        settle = f"columns: {{answer: {key if cell else first_text(key, told)}}}"
        raise Rejected("several answers", f"{key}: choose one, {settle}, or the like")
    return texts[0]


def first_text(path: str, value: Any) -> str:
    """The path, as `columns` has it, of the first text that lies within a value."""
    if isinstance(value, dict) and value:
        name = next((name for name in ("answer", "text") if name in value), next(iter(value)))
        return first_text(f"{path}.{name}", value[name])
    return first_text(f"{path}.0", value[0]) if isinstance(value, list) and value else path


def picture_path(path: str, value: Any) -> str:
    """The path, as `columns` has it, of a value that `names_picture`."""
    if isinstance(value, dict) and not {"bytes", "path"} & value.keys():
        name = next(name for name, inner in value.items() if names_picture(inner))
        return picture_path(f"{path}.{name}", value[name])
    return path


def names_picture(value: Any) -> bool:
    """Whether a value is a picture, or names one, whatever its key."""
    if isinstance(value, str):
        name = value[-5:].lower().endswith(PICTURE_ENDS) and len(value) <= LONGEST_NAME and "\n" not in value
        return name or (len(value) > SHORTEST_BASE64 and bool(BASE64.match(value)))
    if isinstance(value, dict):
        return bool(value.get("bytes")) or any(map(names_picture, value.values()))
    if isinstance(value, list):
        return any(map(names_picture, value))
    return isinstance(value, bytes) and value.startswith(PICTURE_STARTS)
