"""From the bytes of a raw file to checked samples.

Notable: a reader yields raw records with their place, a `parse_…` function turns one record of a known form into a
`Sample`, and `check_sample` applies the rules that hold for all forms. A record that breaks one raises `Rejected`: the
caller notes it and goes on with its neighbour.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import orjson

IMAGE = "<image>"
BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 << 20  # a longer line is most likely not JSONL at all; reading it whole would eat the memory

# The tokens that the chat template and the image slots are made of: in a text they would forge a turn or an image.
# Grounding tokens (<|box_start|> …) are content, and pass.
CONTROL_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)

LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
LLAVA_KEYS = {"id", "image", "conversations"}


class Rejected(Exception):
    """A record is left out. `reason` is one of a fixed set (it is counted), `detail` holds this record's values."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Line(NamedTuple):
    """A line of a raw file; `data` is None when it is longer than MAX_LINE_BYTES."""

    number: int  # 1-based, counted from the first line that starts in the range
    offset: int  # bytes from the start of the file
    data: bytes | None


class Sample(NamedTuple):
    """A record in the one form that the rest of the project knows."""

    id: str | None
    messages: list[dict[str, str]]  # role: system | user | assistant; content: text with <image> placeholders
    images: list[str]  # paths relative to the image root, in the order of the placeholders
    meta: dict[str, Any]  # the record's other keys, scalars only


def read_lines(file: BinaryIO, start: int, end: int, update: Callable[[bytes], Any] = lambda _: None) -> Iterator[Line]:
    """Yield the lines that start in bytes [start, end); the last may end beyond. `update` sees exactly their bytes."""
    offset = start
    if start:
        file.seek(start - 1)
        offset -= 1
        while chunk := file.readline(MAX_LINE_BYTES):
            offset += len(chunk)
            if chunk.endswith(b"\n"):
                break
    number = 0
    while offset < end and (data := file.readline(MAX_LINE_BYTES)):
        update(data)
        number += 1
        length = len(data)
        if length == MAX_LINE_BYTES and not data.endswith(b"\n"):
            while rest := file.readline(MAX_LINE_BYTES):
                update(rest)
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            data = None
        yield Line(number, offset, data)
        offset += length


def parse_json(line: Line) -> dict[str, Any] | None:
    """Parse a line's JSON object; None for a blank line. A BOM at the start of the file and CRLF are accepted."""
    data = line.data
    if data is None:
        raise Rejected("line too long", f"more than {MAX_LINE_BYTES >> 20} MiB: is the file JSONL, one record a line?")
    if line.offset == 0:
        data = data.removeprefix(BOM)
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        if not data.strip():
            return None
        if b"\0" in data:
            raise Rejected("NUL byte") from None
        try:
            data.decode()
        except UnicodeDecodeError as unicode_error:
            raise Rejected("invalid UTF-8", f"byte {unicode_error.start} of the line") from None
        raise Rejected("invalid JSON" if data.endswith(b"\n") else "truncated last line", str(error)) from None
    if not isinstance(record, dict):
        raise Rejected("not a JSON object", f"the line holds a {type(record).__name__}")
    return record


def parse_llava(record: dict[str, Any]) -> Sample:
    """The LLaVA form: `conversations` of {from, value}, `image` absent, a path, or a list of paths."""
    if "conversations" not in record:
        raise Rejected("missing key", "conversations")
    if record.get("video"):
        raise Rejected("video is not supported")
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise Rejected("malformed conversation", f"conversations is a {type(turns).__name__}, not a list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Rejected("malformed conversation", f"a turn is a {type(turn).__name__}, not an object")
        try:
            speaker, content = turn["from"], turn["value"]
        except KeyError as error:
            raise Rejected("missing key", f"{error.args[0]} of a turn") from None
        role = LLAVA_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise Rejected("unknown role", f"{str(speaker)[:40]!r} is none of {', '.join(LLAVA_ROLES)}")
        messages.append({"role": role, "content": content})
    images = record.get("image")
    if images is None:
        images = []
    elif not isinstance(images, list):
        images = [images]
    name = record.get("id")
    meta = {key: value for key, value in record.items() if key not in LLAVA_KEYS and not isinstance(value, dict | list)}
    return check_sample(Sample(None if name is None else str(name), messages, images, meta))


def check_sample(sample: Sample) -> Sample:
    """Apply the rules that no form of raw data may break; return the sample or raise `Rejected`."""
    messages = sample.messages
    if not messages:
        raise Rejected("empty conversation")
    placeholders = 0
    expected = "user"
    for position, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise Rejected("content is not a string", f"turn {position + 1} holds a {type(content).__name__}")
        if "\0" in content:
            raise Rejected("NUL byte", f"in turn {position + 1}")
        if "<|" in content and (token := CONTROL_TOKEN.search(content)):
            raise Rejected("control token in the text", f"{token[0]} in turn {position + 1}")
        found = content.count(IMAGE)
        if found and role != "user":
            raise Rejected("<image> outside a user turn", f"in turn {position + 1}, of {role}")
        placeholders += found
        if role == "system" and position == 0:
            continue
        if role != expected:
            raise Rejected("wrong turn order", f"turn {position + 1} is of {role}, {expected} was due")
        if role == "assistant" and not content.strip():
            raise Rejected("empty answer", f"turn {position + 1}")
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] != "assistant":
        raise Rejected("wrong turn order", "the last turn is not of the assistant")
    if placeholders != len(sample.images):
        raise Rejected("number of <image> differs from images", f"{placeholders} <image>, {len(sample.images)} images")
    return sample
