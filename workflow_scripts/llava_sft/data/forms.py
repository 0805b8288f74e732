"""Records of other forms → OpenAI's (`messages`, `images`): turns in pairs, question and answer, captions, JSON in strings.

Notable: a form is known by its keys (other_forms.plain), and read where it can be read in one way alone. Where two keys might
be the question, or the keys are of two forms, the record is rejected with the `columns` that settle it; what those settle
against is noted as not read. In the forms that write no `<image>` the pictures come before the first question, as the
projects behind them have it.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import orjson

from llava_sft.data.options import check_caption, check_options
from llava_sft.data.other_forms import (
    ANSWERS,
    KNOWN_KEYS,
    QUESTIONS,
    Unread,
    holds_image,
    is_talk,
    is_turns,
    plain,
)
from llava_sft.data.rejects import Rejected
from llava_sft.data.turns import as_list, by_name, expanded, of
from llava_sft.data.values import first_text, is_empty, is_flat, names_picture, only_answer
from llava_sft.errors import SettingsError

# What `columns` may name, and `as_known` reads.
Target = Literal["id", "image", "images", "question", "answer", "caption", "system", "history", "conversations", "kind"]
TARGETS: tuple[str, ...] = get_args(Target)
TURNS = (
    "conversations", "messages", "conversation", "dialog", "dialogue", "chat", "turns", "texts", "qa", "qapairs", "rounds", "history",
)  # fmt: skip
CAPTIONS = ("caption", "captions", "text", "txt", "description")
# What makes a form: by target of `columns`, the form, and the names that the records' own keys may have.
PARTS = {
    "conversations": ("turns", TURNS), "question": ("question and answer", QUESTIONS), "answer": ("question and answer", ANSWERS),
    "caption": ("caption", CAPTIONS),
}  # fmt: skip
PART_OF = {name: what for what, (_, names) in PARTS.items() for name in names}
NUMBERS = ("imageid", "imgid")  # of a picture that is somewhere else


class Reading(NamedTuple):
    """Settings that say how records are read."""

    columns: dict[str, str] = {}  # one of TARGETS → key of the records, `answers.0.text` for what lies within
    caption_prompt: str = "Describe the image."  # the question of a record that is a picture and its caption
    image_first: bool = False  # pictures come before the first question of records without <image>

    @property
    def settled(self) -> bool:
        """Whether `columns` say which keys hold the conversation."""
        return bool(self.columns) and not self.columns.keys().isdisjoint(PARTS)


AS_GIVEN = Reading()


def add_reading(add: Callable[..., Any]) -> None:
    """The options of a script that reads records; `add`: of its parser."""
    add("--columns", type=orjson.loads, default={}, metavar="JSON",
        help='other names of keys or columns: {"question": "q", "answer": "a", "image": "file"}')  # fmt: skip
    add("--caption-prompt", default=AS_GIVEN.caption_prompt, metavar="TEXT",
        help="the question of a record that is a picture and its caption (%(default)s)")  # fmt: skip
    add("--image-first", choices=["True", "False"], default="False",
        help="put <image> before the first question where a record's texts have none (%(default)s)")  # fmt: skip


def reading_of(args: Namespace) -> Reading:
    """Errors: SettingsError for columns that there are not."""
    if not isinstance(args.columns, dict) or not args.columns.keys() <= set(TARGETS):
        raise SettingsError(
            f"--columns {args.columns}: keys are {', '.join(TARGETS)}", '--columns \'{"question": "q"}\''
        )
    return Reading(args.columns, args.caption_prompt, args.image_first == "True")


def renamed(record: dict[str, Any], columns: dict[str, str], unread: Unread) -> dict[str, Any]:
    """A record with the keys that `columns` gives it; own keys of these names give way. Errors: `Rejected` for one without
    them, but for the picture of a record that has none."""
    taken = {target: _within(record, key, target) for target, key in columns.items()}
    rest = {key: value for key, value in record.items() if key not in columns.values()}
    given_way = set(taken)
    if not (is_empty(taken.get("image")) and is_empty(taken.get("images"))):
        given_way |= {"image", "images"}
    return _without(rest, given_way, unread) | taken


def _without(record: dict[str, Any], keys: set[str], unread: Unread) -> dict[str, Any]:
    """A record without keys that `columns` were preferred to; they are noted."""
    for key, value in record.items():
        if key in keys and not is_empty(value):
            unread.note(key, value)
    return {key: value for key, value in record.items() if key not in keys}


def _within(record: dict[str, Any], path: str, target: str) -> Any:
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, ValueError, TypeError):
            if target in ("image", "images") and not any(
                holds_image(*item) or names_picture(item[1]) for item in record.items()
            ):
                return None
            found = ", ".join(map(str, record))
            raise Rejected("missing column", f"columns names {path}, there are: {found}") from None
    return value


def as_known(record: dict[str, Any], reading: Reading, unread: Unread) -> tuple[dict[str, Any], bool]:
    """The record with its turns as a list under `messages`, and whether it is of a form whose pictures come first.

    Errors: `Rejected` for a record of no known form, or of several.
    """
    names = by_name(key for key, value in record.items() if not is_empty(value))
    keys: dict[str, list[str]] = {what: [] for what in PARTS}
    for name, same in names.items():
        if name in PART_OF:
            keys[PART_OF[name]] += same
    asked = [key for key in keys["question"] if not isinstance(record[key], int | float)]
    keys["question"] = asked or keys["question"]  # a number beside a question is a user's, say
    form, image_first = _form(record, keys, names, reading), True
    if form == "turns":
        key = _only("conversations", keys["conversations"], record)
        turns, image_first = expanded(as_list(record[key], key))
        used = {key}
    elif form == "caption":
        turns, used = _caption(record, keys["caption"], names, reading)
    else:
        turns, used = _question_and_answer(record, keys, names, reading)
    if image_first and form != "caption":  # the texts of these do not say that there is one
        _named_picture(record, names)
    left = {key: value for key, value in record.items() if key not in used}
    if reading.settled or form != "turns":
        history = names.get("history", ()) if reading.settled else ()
        left = _without(left, {"conversations", "messages", *history}, unread)
    return left | {"messages": turns}, image_first


def _form(record: dict[str, Any], keys: dict[str, list[str]], names: dict[str, list[str]], reading: Reading) -> str:
    """The form of a record, and in `keys` the turns that it is to be read from."""
    if reading.settled:
        named = {PARTS[what][0]: what for what in reading.columns if what in PARTS}
        if len(named) > 1:
            raise Rejected("columns of several forms", f"a record is {' or '.join(named)}: name the columns of one")
        keys |= {what: [what] for what in reading.columns if what in PARTS}
        return next(iter(named))
    asked, turns = keys["question"] + keys["answer"] + names.get("answers", []), keys["conversations"]
    known = [key for key in turns if plain(key) in TURNS[:2] and (is_turns(record[key]) or not asked)]
    if turns and not known:
        found = [key for key in turns if is_turns(record[key])]
        if any(plain(key) in (*QUESTIONS, *ANSWERS) for key in record):
            turns = [key for key in found if plain(key) != "history"]  # which is of that question
        elif found or keys["caption"]:
            turns = found
    keys["conversations"] = turns = known or turns
    if turns and asked and not known:
        settle = f"columns: {{conversations: {turns[0]}}}, or {{question: {asked[0]}, …}}"
        raise Rejected("keys of several forms", f"{', '.join(asked + turns)}: say which, {settle}")
    return "turns" if turns else "question and answer" if asked else "caption"


def _content(record: dict[str, Any], key: str, role: str, columns: dict[str, str]) -> Any:
    """A text, or the parts or messages in its place. Several texts are several answers: none is chosen, and none joined."""
    value = record[key]
    if isinstance(value, list) and all(
        isinstance(part, dict) and {"type", "role", "from"} & part.keys() for part in value
    ):
        return value
    return _text(record, key, role, columns)


def _question_and_answer(
    record: dict[str, Any], keys: dict[str, list[str]], names: dict[str, list[str]], reading: Reading
) -> tuple[list[Any], set[str]]:
    """The turns of a record that holds one question and its answer, after a `history` of earlier ones; and the keys used."""
    asked, answered, several = keys["question"], keys["answer"], names.get("answers", [])
    if sorted(map(plain, asked)) in (["input", "instruction"], ["inputs", "instruction"]):  # Alpaca's
        asked.sort(key=plain, reverse=True)
        question: Any = "\n".join(_text(record, key, "question", reading.columns) for key in asked)
    else:
        asked = [_only("question", asked, record)]
        question = _content(record, asked[0], "question", reading.columns)
    if several and not answered:
        answered = [_only("answer", several, record)]
        answer: Any = only_answer(answered[0], record[answered[0]])
    else:
        answered = [_only("answer", answered, record)]
        answer = _content(record, answered[0], "answer", reading.columns)
    settled = {"question", "answer"} <= reading.columns.keys()
    if not settled:
        check_options(record, asked[0], answered[0])
    if not settled or "history" in reading.columns:
        for key in filter(lambda key: is_flat(record[key]), names.get("history", [])):
            settle = f"columns: {{question: {asked[0]}, answer: {answered[0]}}}"
            raise Rejected(
                "malformed conversation", f"{key}: texts in one list: write pairs; where it is no talk, {settle}"
            )
    history = [key for key in names.get("history", []) if is_turns(record[key]) or is_talk(record[key])]
    key = _only("history", history, record) if history else ""
    before = expanded(as_list(record[key], key))[0] if key else []
    if isinstance(question, list) and isinstance(answer, list):  # a prompt and its completion, of messages
        turns = [*question, *answer]
    else:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*before, *turns], {*asked, *answered, *history}


def _named_picture(record: dict[str, Any], names: dict[str, list[str]]) -> bool:
    """Whether a record names a picture, or holds it. Errors: `Rejected` where it only numbers one."""
    for key, value in record.items():
        if holds_image(key, value):
            return True
    if number := next(iter(of(NUMBERS, names)), None):
        raise Rejected(
            "picture is not named", f"{number} is no file: add one with the picture's file, or columns: {{image: KEY}}"
        )
    return False


def _caption(
    record: dict[str, Any], captions: list[str], names: dict[str, list[str]], reading: Reading
) -> tuple[list[Any], set[str]]:
    """The turns of a record that is a picture and a text about it."""
    if not captions:
        if "conversations" in record or "messages" in record:
            raise Rejected("empty conversation")
        if any(plain(key) in CAPTIONS for key in record):
            _only("caption", [], record)
        if {"from", "value"} <= record.keys() or {"role", "content"} <= record.keys():
            raise Rejected("malformed conversation", "a turn by itself: write the turns of a record under messages")
        found = ", ".join(map(str, record))
        raise Rejected("missing key", f"conversations or messages, question and answer, or caption; found: {found}")
    key = _only("caption", captions, record)
    if not _named_picture(record, names):
        raise Rejected("caption without a picture", f"{key}; found: {', '.join(map(str, record))}")
    if not reading.settled:
        check_caption(record, key, names)
    turns = [
        {"role": "user", "content": reading.caption_prompt},
        {"role": "assistant", "content": _text(record, key, "caption", reading.columns)},
    ]
    return turns, {key}


def _only(what: str, keys: list[str], record: dict[str, Any]) -> str:
    """The key that says `what`, the first of several that say the same. Errors: `Rejected` where there is none, an empty one, or
    several that differ."""
    if keys and all(record[key] == record[keys[0]] for key in keys) and not is_empty(record[keys[0]]):
        return keys[0]
    if len(keys) > 1:
        raise Rejected(f"several keys for the {what}", f"{', '.join(keys)}: say which, columns: {{{what}: {keys[0]}}}")
    for key in keys or record:
        if plain(key) in (PARTS[what][1] if what in PARTS else (what,)):  # and empty
            if record[key] is False:
                _text(record, key, what, {})
            raise Rejected("empty conversation" if what == "conversations" else f"empty {what}", key)
    found = ", ".join(map(str, record))
    raise Rejected("missing key", f"{what}; found: {found}: say which, columns: {{{what}: KEY}}")


def _text(record: dict[str, Any], key: str, what: str, columns: dict[str, str]) -> str:
    value = record[key]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        several = isinstance(value, list | dict) and value
        fix = (
            f"choose one, columns: {{{what}: {first_text(columns.get(key, key), value)}}}"
            if several
            else "write it as a text"
        )
        raise Rejected("content is not a string", f"{columns.get(key, key)} holds a {type(value).__name__}: {fix}")
    return value


def has_known_form(record: dict[str, Any]) -> bool:
    """Whether a record has a key that a conversation may stand under."""
    known = {*KNOWN_KEYS, *TURNS, *QUESTIONS, *CAPTIONS} - {"id", "image", "images"}
    return bool(known & set(map(plain, record)))
