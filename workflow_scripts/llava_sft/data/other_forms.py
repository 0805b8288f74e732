"""Keys and tokens of other projects' records: those that would change what a sample means are rejected by name.

Notable: a key that is not read is counted (`unread`), and said when the data is indexed. Names are compared without case,
`-` and `_`. No record is guessed at: what is in doubt is a reject whose reason says what to write.
"""

import re
from collections import Counter
from typing import Any

from llava_sft.data.rejects import Rejected

KNOWN_KEYS = {"id", "image", "images", "conversations", "messages"}
TURN_KEYS = {"from", "value", "role", "content"}

# Without case, `-` and `_`. A stem with another spelling is found by its pattern.
IMAGE_KEYS = re.compile(
    r"(image|img|picture|photo|media|screenshot)s?(path|file|name|url|uri|list|byte|data|base64|b64)?s?"
)
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
WEIGHT_KEYS = re.compile(r"loss(scale|weight|mask)?|weight|train(able|onturn)?|mask|ignore")

# Placeholders that other projects replace by a picture, or by what they know of it.
IMAGE_TOKENS = re.compile(
    r"<\|?(?:image|img)[ _-]?\d+\|?>|<\|image\|>|<image ?/>|<(?:Image|IMAGE|ImageHere|image_placeholder|img_placeholder)>"
    r"|<img>[^<]{1,500}</img>|<img\s+src=[^>]{1,500}>|!\[[^\]]{0,200}\]\([^)\s]{1,500}\.(?:jpe?g|png|webp|gif|bmp|tiff?)\)"
)
MEDIA_TOKENS = re.compile(r"<\|?(video|audio|speech)(?:[ _-]?\d+)?\|?>")
OBJECT_TOKENS = re.compile(r"<(?:ref-object|bbox|quad|polygon|point-object)>")


def plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "").replace(" ", "")


def is_empty(value: Any) -> bool:
    """Whether a value says nothing, in any of the spellings of an empty cell."""
    if isinstance(value, dict):
        return all(is_empty(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(inner) for inner in value)
    return value is None or value in ("", b"") or value is False or value != value


def _check_supported(key: str, name: str, where: str = "") -> None:
    for reason, pattern in UNSUPPORTED.items():
        if pattern.fullmatch(name):
            only = ": only the answer to learn may be in the record" if "preference" in reason else ""
            raise Rejected(reason, f"{key}{where}{only}")


def check_keys(record: dict[str, Any], has_images: bool, system: str | None, unread: Counter[str]) -> None:
    """Raise `Rejected` for a key that changes what the record means; count those that are not read.

    `system`: the text of its system turn.
    """
    for key, value in record.items():
        if key in KNOWN_KEYS:
            continue
        name = plain(key)
        if name == "label" and isinstance(value, bool):
            raise Rejected("preference data is not supported", f"{key}: {value}")
        if is_empty(value):
            continue
        _check_supported(key, name)
        if name in SYSTEM_KEYS and value != system:
            raise Rejected("system prompt outside the turns", f"{key}: make it the first turn, of system")
        scalar, image = isinstance(value, str | int | float), IMAGE_KEYS.fullmatch(name)
        if image and not has_images and not isinstance(value, int | float):
            raise Rejected("image under another key", f"{key}: name it image")
        if image or not scalar:
            unread[key if scalar or isinstance(value, list | dict) else f"{key} ({type(value).__name__})"] += 1


def check_turn(turn: dict[str, Any], number: int, unread: Counter[str]) -> None:
    """The same for the keys of a turn; `number` counts from 1."""
    for key, value in turn.items():
        if key in TURN_KEYS:
            continue
        name = plain(key)
        if WEIGHT_KEYS.fullmatch(name):
            if value is not None and value is not True and value != 1:
                raise Rejected("weight of a turn is not supported", f"{key}: {str(value)[:40]} in turn {number}")
        elif not is_empty(value):
            if IMAGE_KEYS.fullmatch(name):
                raise Rejected("image under another key", f"{key} in turn {number}: name it image, in the record")
            _check_supported(key, name, f" in turn {number}")
            unread[f"{key} of a turn"] += 1


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
        kind = "video" if found[1] == "video" else "audio"
        raise Rejected(f"{kind} is not supported", f"{found[0]} in turn {number}")


def image_of(part: dict[str, Any]) -> Any:
    """The image that a part of an OpenAI content names; None where it names none."""
    values = [value for key, value in part.items() if key != "type" and IMAGE_KEYS.fullmatch(plain(key))]
    values += [part[key] for key in ("path", "url", "source", "bytes", "data") if key in part]
    named = next((value for value in values if not is_empty(value)), None)
    return named["url"] if isinstance(named, dict) and "url" in named else named
