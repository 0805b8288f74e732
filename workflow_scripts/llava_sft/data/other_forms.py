"""Keys and tokens of other projects' records: those that would change what a sample means are read, or rejected by name.

Notable: a key that is not read is counted (`Unread`), and the inspection lists it. Names are compared without case, `-` and
`_`. No record is guessed at: what is in doubt is a reject whose reason says what to write.
"""

import re
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import orjson

from llava_sft.data.rejects import Rejected
from llava_sft.data.values import is_empty, is_flat, is_pair, names_picture, picture_path
from llava_sft.model.tokens import IMAGE

KNOWN_KEYS = {"id", "image", "images", "conversations", "messages"}
TURN_KEYS = {"from", "value", "role", "content"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
OTHER_ROLES = {"chatgpt": "gpt", "bot": "gpt", "model": "gpt", "developer": "system"}  # other projects' spellings
TOOL_ROLES = {"tool", "function", "observation", "functioncall", "toolcall", "functionresponse", "toolresponse"}
SPEAKERS = {*ROLES, *OTHER_ROLES, *TOOL_ROLES}
QUESTIONS = ("question", "query", "prompt", "instruction", "problem", "user", "human", "input", "inputs")
ANSWERS = (
    "answer", "response", "multiplechoiceanswer", "output", "outputs", "completion", "solution", "assistant", "gpt", "bot",
)  # fmt: skip
TURN_NAMES = {"from", "role", "speaker", *QUESTIONS, *ANSWERS}  # of which a turn has one
TURNS_BESIDE = {"conversations", "messages", "history"}  # keys whose turns are of the conversation: none is passed over

# Without case, `-` and `_`. A stem with another spelling is found by its pattern.
IMAGE_KEYS = re.compile(
    r"(image|img|picture|photo|media|screenshot)s?(path|file|filename|name|url|uri|list|byte|data|base64|base64str|b64)?s?|jpe?g|png|webp"
)
NUMBERED_KEYS = re.compile(r"(image|img|picture|photo)[0-9]+")  # of several pictures
WORD_KEYS = re.compile(r"(media|photo|picture|screenshot)s?")  # of those: where a post is from, whose photo it is
FILE_KEYS = re.compile(r"file(name|path)?")  # of a folder of images with a table: where they name a picture
PICTURE_NAME = re.compile(r".*\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE | re.DOTALL)
UNSUPPORTED = {
    "video is not supported": re.compile(r"videos?(path|file|name|url|uri|list|id)?s?"),
    "audio is not supported": re.compile(r"(audio|speech|wav|sound)s?(path|file|name|url|uri|list|id)?s?"),
    "tools are not supported": re.compile(r"tools|toolcalls?|functions|functioncall"),
    "preference data is not supported": re.compile(
        r"(rejected|chosen)(response|messages|conversations?|images?|answer)?s?|(dis)?preferred(output|response)"
        r"|ktotag|ischosen"
    ),
}
SYSTEM_KEYS = {"system", "systemprompt", "systemmessage"}
# False or 0 in an answer: it does not count in the loss. Of the others, True or 1 says so.
COUNTS_KEYS = re.compile(r"loss(scale|weight|mask)?|weight|train(able|onturn)?|computeloss|supervised?")
IGNORED_KEYS = re.compile(r"mask(ed)?|ignored?")
# Of a whole record, as numbers: kept beside the sample, and said to be without effect.
EFFECT_KEYS = re.compile(r"(sample|loss)?weight|loss(scale|mask)?|reward|advantage")

# Placeholders that other projects replace by a picture, or by what they know of it.
IMAGE_TOKENS = re.compile(
    r"(?!(?-i:<image>))(?:<\|?image[ _-]?\d*\|?>|<\|?img[ _-]?\d+\|?>|<image ?/>|<(?:imagehere|image_placeholder|img_placeholder)>"
    r"|</img>|<img\s+src=|!\[[^\]\[]*\]\((?:data:image|[^)(\s]*\.(?:jpe?g|png|webp|gif|bmp|tiff?)\)))",
    re.IGNORECASE,
)
NAMED = re.compile(r"<img>([^<]+)</img>")  # Qwen-VL's
MEDIA_TOKENS = re.compile(r"<\|?(video|audio|speech)(?:[ _-]?\d+)?\|?>", re.IGNORECASE)
OBJECT_TOKENS = re.compile(r"<(?:ref-object|bbox|quad|polygon|point-object)>")
EXAMPLE_CHARS = 80


class Unread(Counter[str]):
    """Keys that are not read, and how many records have each; `examples`: a value of each, as JSON would have it, cut."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def note(self, key: str, value: Any) -> None:
        key = key[:EXAMPLE_CHARS]
        self[key] += 1
        if key not in self.examples:
            self.examples[key] = example(value)


def example(value: Any) -> str:
    text = repr(value[:EXAMPLE_CHARS] if isinstance(value, str | bytes) else value)
    return text if len(text) <= EXAMPLE_CHARS else f"{text[:EXAMPLE_CHARS]}…"


@lru_cache(4096)  # the keys of all records are the same few
def plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "").replace(" ", "")


def is_turns(value: Any) -> bool:
    """Whether a value is turns: dicts of who says what, pairs of texts, a struct of lists, or JSON of one (Python's, too,
    which is refused by name)."""
    if isinstance(value, str):
        try:
            return value.lstrip()[:1] in ("[", "{") and is_turns(orjson.loads(value))
        except orjson.JSONDecodeError:
            return value.lstrip()[:2] in ("[{", "[[", "[(")
    if isinstance(value, dict):
        return says(value) and all(isinstance(values, list) for values in value.values())
    return isinstance(value, list) and any(is_pair(turn) or (isinstance(turn, dict) and says(turn)) for turn in value)


def says(turn: dict[str, Any]) -> bool:
    names = set(map(plain, turn))
    return not TURN_NAMES.isdisjoint(names) or {"q", "a"} <= names


def is_talk(value: Any) -> bool:
    """Whether a text is a conversation written out, such as `User: …`, `Assistant: …`, or `[USER] … [ASSISTANT] …`."""
    if not isinstance(value, str):
        return False
    low = value.lower()
    if not ("assistant" in low or "gpt" in low or "bot" in low or "model" in low):  # most texts
        return False
    said = {ROLES.get(OTHER_ROLES.get(name, name)) for name in re.findall(r"(\w+)\W{0,3}[:：\]]", low)}
    return said >= {"user", "assistant"}


@lru_cache(4096)
def _changes_nothing(name: str) -> bool:
    """Whether a text or number under a key of this plain name is kept beside the sample, and nothing more."""
    patterns = (*UNSUPPORTED.values(), IMAGE_KEYS, NUMBERED_KEYS, FILE_KEYS, EFFECT_KEYS, COUNTS_KEYS)
    others = {"label", *SYSTEM_KEYS, *TURNS_BESIDE}
    return name not in others and not any(pattern.fullmatch(name) for pattern in patterns)


def _check_supported(key: str, value: Any, beside_images: bool, where: str = "") -> None:
    """Raise `Rejected` for what is not supported; a column that cannot be it, such as the video that a picture is of, is not."""
    name = plain(key)
    for reason, pattern in UNSUPPORTED.items():
        if pattern.fullmatch(name):
            preference = "preference" in reason
            of_picture = beside_images and (type(value) is int or name.endswith("id"))
            words = "tools" in reason and isinstance(value, str | int) and str(value).lstrip()[:1] not in ("[", "{")
            if not preference and (type(value) is float or of_picture or words):
                continue
            only = ": only the answer to learn may be in the record" if preference else ""
            raise Rejected(reason, f"{key}{where}{only}")


def check_keys(
    record: dict[str, Any], has_images: bool, system: str | None, unread: Unread, columns: Collection[str] = ()
) -> tuple[str | None, str | None]:
    """The record's system prompt, and the key that its images stand under where it is not `image` or `images`.

    `system`: the text of its system turn; `columns`: what the settings name. Raises `Rejected` for a key that changes what the
    record means otherwise, and notes those that are not read.
    """
    prompt, named, pictures = system, [], []
    chosen = "image" in columns or "images" in columns
    said = has_images or chosen  # where its pictures stand
    for key, value in record.items():
        if key in KNOWN_KEYS:
            continue
        name = plain(key)
        if _changes_nothing(name) and isinstance(value, str | int | float):
            if not said and names_picture(value):
                pictures.append(key)
            continue
        _check_flags(key, name, value, columns)
        if is_empty(value):
            continue
        _check_supported(key, value, has_images or any(holds_image(*item) for item in record.items()))
        if name in TURNS_BESIDE and (is_turns(value) or is_flat(value)):
            raise Rejected("turns under several keys", f"{key}, beside others: join them, or remove one")
        if name in SYSTEM_KEYS and not isinstance(value, int | float):
            if not isinstance(value, str):
                raise Rejected("content is not a string", f"{key} holds a {type(value).__name__}")
            if value != (value if prompt is None else prompt):
                raise Rejected("system prompts differ", f"{key}, and the first turn or another key: keep one")
            prompt = value
            continue
        scalar, image = isinstance(value, str | int | float), _is_image(name, value)
        if image and not has_images:
            named.append(key)
        elif not said and not image and names_picture(value):
            pictures.append(key)
        elif has_images and not chosen and NUMBERED_KEYS.fullmatch(name) and names_picture(value):
            raise Rejected("image under several keys", f"{key}, beside others: list them under images, or leave it out")
        elif image or not scalar or EFFECT_KEYS.fullmatch(name):
            unread.note(key if scalar or isinstance(value, list | dict) else f"{key} ({type(value).__name__})", value)
    return prompt, _key_of_images(record, named, pictures, unread)


def _check_flags(key: str, name: str, value: Any, columns: Collection[str]) -> None:
    """Raise `Rejected` for true or false that says whether a record, whose parts `columns` do not settle, is to be learned."""
    settled = not {"answer", "caption", "conversations"}.isdisjoint(columns)
    if name == "label" and not settled and str(value).lower() in ("true", "false"):
        fix = "keep the good ones, without the key; where it is a column like any other, columns: {question: …, answer: …}"
        raise Rejected("preference data is not supported", f"{key}: {value}: does it say which answers are good? {fix}")
    if value is False and COUNTS_KEYS.fullmatch(name):
        raise Rejected("weight of a record is not supported", f"{key}: {value}: leave the record out")


def _key_of_images(record: dict[str, Any], named: list[str], pictures: list[str], unread: Unread) -> str | None:
    """The key of the images of a record that has them under none of KNOWN_KEYS: one of `named`; `pictures`: keys whose values
    are pictures, whatever they are called."""
    if any(record[key] != record[named[0]] for key in named):
        raise Rejected("image under several keys", f"{', '.join(named)}: say which, columns: {{image: {named[0]}}}")
    if named:
        for key in pictures:
            unread.note(key, record[key])
        return named[0]
    if len(pictures) > 1:
        raise Rejected("picture is not named", f"{', '.join(pictures)}: list them under images, or leave them out")
    if pictures:
        path = picture_path(pictures[0], record[pictures[0]])
        raise Rejected("picture is not named", f"{path}: columns: {{image: {path}}}, or leave it out")
    return None


def holds_image(key: str, value: Any) -> bool:
    """Whether a key of a record names a picture, or holds it."""
    return not is_empty(value) and (key in ("image", "images") or _is_image(plain(key), value))


def _is_image(name: str, value: Any) -> bool:
    kind = _image_key(name)
    if kind == "file":
        return isinstance(value, str) and bool(PICTURE_NAME.fullmatch(value))
    if not kind or isinstance(value, int | float):
        return False
    return kind == "image" or not isinstance(value, str) or not value.replace(" ", "").isalpha()


@lru_cache(4096)
def _image_key(name: str) -> str:
    """What stands under a plain name: an "image", an "image or word", a "file" of any kind; empty for others."""
    if FILE_KEYS.fullmatch(name):
        return "file"
    return "" if not IMAGE_KEYS.fullmatch(name) else "image or word" if WORD_KEYS.fullmatch(name) else "image"


def counts_in_loss(turn: dict[str, Any], role: str, number: int, unread: Unread) -> bool:
    """False for an answer that does not count in the loss; its other keys are held to the same as a record's. `number`
    counts from 1."""
    if len(turn) == 2:  # who, and what
        return True
    counted = True
    for key, value in turn.items():
        if key in TURN_KEYS:
            if key == "content" and turn.get("value", value) != value:
                raise Rejected("malformed conversation", f"value and content of turn {number} differ")
            continue
        name = plain(key)
        learned = bool(COUNTS_KEYS.fullmatch(name))
        if learned or IGNORED_KEYS.fullmatch(name):
            if value is not None and value not in (0, 1):  # True and False are these, too
                raise Rejected(
                    "weight of a turn is not supported", f"{key}: {str(value)[:40]} in turn {number}: 0 or 1 is"
                )
            if role != "assistant" and value and name.startswith("train"):
                raise Rejected(
                    "weight of a turn is not supported", f"{key} in turn {number}, of {role}: only answers are learned"
                )
            counted = counted and (value is None or bool(value) == learned)
        elif not is_empty(value):
            if _is_image(name, value):
                raise Rejected("image under another key", f"{key} in turn {number}: name it image, in the record")
            _check_supported(key, value, False, f" in turn {number}")
            unread.note(f"{key} of a turn", value)
    return counted or role != "assistant"


def check_text(role: str, content: str, number: int) -> None:
    """Raise `Rejected` for a placeholder of another project in the text of turn `number`."""
    if "<" not in content and "![" not in content:
        return
    if found := OBJECT_TOKENS.search(content):
        raise Rejected("placeholder that is not read", f"{found[0]} in turn {number}: write the object itself")
    if role != "user":
        return
    if found := IMAGE_TOKENS.search(content):
        raise Rejected("placeholder that is not read", f"{found[0][:80]} in turn {number}: write <image>")
    if found := MEDIA_TOKENS.search(content):
        kind = "video" if found[1].lower() == "video" else "audio"
        raise Rejected(f"{kind} is not supported", f"{found[0]} in turn {number}")


def named_in_text(text: str, number: int) -> tuple[str, list[str]]:
    """A question of Qwen-VL with `<image>` in place of each `<img>path</img>`, and the paths."""
    images = NAMED.findall(text)
    if images and IMAGE in text:
        raise Rejected("placeholder that is not read", f"<img> and {IMAGE} in turn {number}: write one of them")
    return NAMED.sub(IMAGE, text), images


def image_of(part: dict[str, Any]) -> Any:
    """The image that a part of an OpenAI content names; None where it names none."""
    values = [value for key, value in part.items() if key != "type" and IMAGE_KEYS.fullmatch(plain(key))]
    values += [part[key] for key in ("path", "url", "source", "bytes", "data") if key in part]
    named = next((value for value in values if not is_empty(value)), None)
    if isinstance(named, dict):
        return next((named[key] for key in ("url", "bytes", "data", "path") if not is_empty(named.get(key))), named)
    return named
