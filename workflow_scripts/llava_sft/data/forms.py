"""Records of other forms → OpenAI's (`messages`, `images`): turns in pairs, question and answer, captions, JSON in strings.

Notable: a form is known by its keys (other_forms.plain), and read where it can be read in one way alone. Where two keys might
be the question, or several answers are given, the record is rejected with the `columns` that settle it. In the forms that
write no `<image>` the pictures come before the first question, as the projects behind them have it.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import orjson

from llava_sft.data.other_forms import KNOWN_KEYS, holds_image, is_empty, plain
from llava_sft.data.rejects import Rejected
from llava_sft.model.tokens import IMAGE

# What `columns` may name, and `as_known` reads.
Target = Literal["id", "image", "images", "question", "answer", "caption", "system", "history", "conversations", "kind"]
TARGETS: tuple[str, ...] = get_args(Target)
TURNS = ("conversation", "dialog", "dialogue", "chat", "turns", "texts", "qa", "qapairs", "rounds", "history")
QUESTIONS = ("question", "query", "prompt", "instruction", "problem", "user", "human", "input")
ANSWERS = ("answer", "response", "multiplechoiceanswer", "output", "completion", "solution", "assistant", "gpt", "bot")
CAPTIONS = ("caption", "captions", "text", "txt", "description")
OPTIONS = ("choices", "options")
NUMBERS = ("imageid", "imgid")  # of a picture that is somewhere else
NAMED = re.compile(r"<img>([^<]{1,500})</img>")  # Qwen-VL's


class Reading(NamedTuple):
    """Settings that say how records are read."""

    columns: dict[str, str] = {}  # one of TARGETS → key of the records, `answers.0.text` for what lies within
    caption_prompt: str = "Describe the image."  # the question of a record that is a picture and its caption
    image_first: bool = False  # pictures come before the first question of records without <image>


AS_GIVEN = Reading()


def renamed(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A record with the keys that `columns` gives it. Errors: `Rejected` for one without them."""
    taken = {target: _within(record, key) for target, key in columns.items()}
    used = {key.partition(".")[0] if key not in record else key for key in columns.values()}
    return {key: value for key, value in record.items() if key not in used and key not in taken} | taken


def _within(record: dict[str, Any], path: str) -> Any:
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, ValueError, TypeError):
            found = ", ".join(map(str, record))
            raise Rejected("missing column", f"columns names {path}, there are: {found}") from None
    return value


def as_known(record: dict[str, Any], reading: Reading) -> tuple[dict[str, Any], bool]:
    """The record with its turns as a list under `messages`, and whether it is of a form whose pictures come first.

    Errors: `Rejected` for a record of no known form.
    """
    names = {plain(key): key for key, value in reversed(record.items()) if not is_empty(value)}
    asked, answered = (
        [what] if what in reading.columns else _one_of(known, names)
        for what, known in (("question", QUESTIONS), ("answer", ANSWERS))
    )
    key = next((key for key in ("conversations", "messages") if not is_empty(record.get(key))), None)
    if key is None and not (asked and answered):
        key = next((names[name] for name in TURNS if name in names), None)
    if key is not None:
        turns, of_pairs = _expanded(_as_list(record[key], key))
        return {other: value for other, value in record.items() if other not in (key, "conversations")} | {
            "messages": turns
        }, of_pairs
    if asked or answered or "answers" in names:
        turns, used = _question_and_answer(record, names, asked, answered, reading)
    else:
        turns, used = _caption(record, names, reading)
    return {other: value for other, value in record.items() if other not in used} | {"messages": turns}, True


def _one_of(known: Iterable[str], names: dict[str, str]) -> list[str]:
    return [names[name] for name in known if name in names]


def _as_list(turns: Any, key: str) -> list[Any]:
    """Turns as a list: of JSON in a string, or of a struct of lists, as `datasets` keeps a list of structs."""
    if isinstance(turns, str):
        try:
            turns = orjson.loads(turns)
        except orjson.JSONDecodeError:
            fix = (
                "Python's spelling: write it with json.dumps"
                if turns.lstrip()[:2] in ("[{", "[[")
                else "write a list of turns"
            )
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


def _expanded(turns: list[Any]) -> tuple[list[Any], bool]:
    """Turns in pairs, [question, answer] or {user, assistant}, one by one; and whether they were pairs."""
    expanded: list[Any] = []
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and not {"from", "role"} & turn.keys():
            names = {plain(key): key for key in turn}
            asked, answered = _one_of(QUESTIONS, names), _one_of(ANSWERS, names)
            speaker, content = _one_of(("speaker", "role", "from"), names), _one_of(("value", "content", "text"), names)
            if len(asked) == len(answered) == 1:
                rest = {key: value for key, value in turn.items() if key not in (*asked, *answered, "source")}
                system = rest.pop("system", None)
                expanded += [{"role": "system", "content": system}] if system and not expanded else []
                expanded += [{"role": "user", "content": turn[asked[0]]}]
                expanded += [{"role": "assistant", "content": turn[answered[0]]} | rest]
                continue
            if len(speaker) == len(content) == 1:
                rest = {key: value for key, value in turn.items() if key not in (*speaker, *content)}
                expanded.append({"role": turn[speaker[0]], "content": turn[content[0]]} | rest)
                continue
        elif isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            expanded += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
            continue
        if not isinstance(turn, dict):
            raise Rejected("malformed conversation", f"turn {number} is a {type(turn).__name__}, not an object")
        expanded.append(turn)
    return expanded, len(expanded) > len(turns)


def _content(record: dict[str, Any], key: str, role: str) -> Any:
    """A text, or the parts or messages in its place. Several texts are several answers: none is chosen, and none joined."""
    value = record[key]
    if isinstance(value, list) and value and not any(isinstance(part, str) for part in value):
        return value
    return _text(record, key, role)


def _question_and_answer(
    record: dict[str, Any], names: dict[str, str], asked: list[str], answered: list[str], reading: Reading
) -> tuple[list[Any], set[str]]:
    """The turns of a record that holds one question and its answer, after a `history` of earlier ones; and the keys used."""
    if [plain(key) for key in asked] == ["instruction", "input"]:  # Alpaca's
        question = "\n".join(_text(record, key, "question") for key in asked)
    elif len(asked) == 1:
        question = _content(record, asked[0], "question")
    else:
        raise _unclear("question", QUESTIONS, asked, record)
    if not answered and "answers" in names:
        given, answered = record[names["answers"]], [names["answers"]]
        texts = [one.get("answer", one.get("text")) if isinstance(one, dict) else one for one in _listed(given)]
        if len(set(map(str, texts))) != 1 or not isinstance(texts[0], str):
            raise Rejected(
                "several answers", f"{answered[0]}: choose one, columns: {{answer: {answered[0]}.0}}, or the like"
            )
        answer: Any = texts[0]
    elif len(answered) == 1:
        answer = _content(record, answered[0], "answer")
    else:
        raise _unclear("answer", ANSWERS, answered, record)
    if (options := _one_of(OPTIONS, names)) and not {"question", "answer"} <= reading.columns.keys():
        raise Rejected(
            "options are not read", f"{options[0]}: write them into the question, and the answer as its text"
        )
    number = next((key for key in record if plain(key) in NUMBERS and not is_empty(record[key])), None)
    if number and not any(holds_image(key, value) for key, value in record.items()):
        raise Rejected("picture is not named", f"{number} is no file: add a key or column with the picture's file")
    before = _expanded(_as_list(record[names["history"]], "history"))[0] if "history" in names else []
    if isinstance(question, list) and isinstance(answer, list):  # a prompt and its completion, of messages
        turns = [*question, *answer]
    else:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*before, *turns], {*asked, *answered, names.get("history", "")}


def _caption(record: dict[str, Any], names: dict[str, str], reading: Reading) -> tuple[list[Any], set[str]]:
    """The turns of a record that is a picture and a text about it."""
    captions = [key for name, key in names.items() if name in CAPTIONS]
    if "caption" in reading.columns:
        captions = ["caption"]
    if not captions:
        if isinstance(record.get("conversations", record.get("messages")), list):
            raise Rejected("empty conversation")
        found = ", ".join(map(str, record))
        raise Rejected("missing key", f"conversations or messages, question and answer, or caption; found: {found}")
    if len(captions) > 1:
        raise _unclear("caption", CAPTIONS, captions, record)
    if not any(holds_image(key, value) for key, value in record.items()):
        raise Rejected("caption without a picture", f"{captions[0]}; found: {', '.join(map(str, record))}")
    text = _text(record, captions[0], "caption")
    return [{"role": "user", "content": reading.caption_prompt}, {"role": "assistant", "content": text}], set(captions)


def _unclear(what: str, known: tuple[str, ...], keys: list[str], record: dict[str, Any]) -> Rejected:
    if not keys and (empty := next((key for key in record if plain(key) in known), None)):
        return Rejected(f"empty {what}", empty)
    if not keys:
        return Rejected(
            "missing key", f"{what}; found: {', '.join(map(str, record))}: say which, columns: {{{what}: KEY}}"
        )
    return Rejected(f"several keys for the {what}", f"{', '.join(keys)}: say which, columns: {{{what}: {keys[0]}}}")


def _text(record: dict[str, Any], key: str, what: str) -> str:
    value = record[key]
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        fix = f": choose one, columns: {{{what}: {key}.0}}" if isinstance(value, list) else ""
        raise Rejected("content is not a string", f"{key} holds a {type(value).__name__}{fix}")
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def named_in_text(text: str, number: int) -> tuple[str, list[str]]:
    """A question of Qwen-VL with `<image>` in place of each `<img>path</img>`, and the paths."""
    images = NAMED.findall(text)
    if images and IMAGE in text:
        raise Rejected("placeholder that is not read", f"<img> and {IMAGE} in turn {number}: write one of them")
    return NAMED.sub(IMAGE, text), images


def has_known_form(record: dict[str, Any]) -> bool:
    """Whether a record has a key that a conversation may stand under."""
    known = {*KNOWN_KEYS, *TURNS, *QUESTIONS, *CAPTIONS} - {"id", "image", "images"}
    return bool(known & set(map(plain, record)))
