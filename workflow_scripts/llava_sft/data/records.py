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

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORM_KEYS = {"id", "image", "images", "conversations", "messages", "video", "videos"}


class Rejected(Exception):
    """A record is left out. `reason` is one of a fixed set (it is counted), `detail` holds this record's values."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Line(NamedTuple):
    """A record as it stands in a raw file: a line, an element of a JSON array, a row of a Parquet file."""

    number: int  # 1-based, counted from the first that starts in the range
    offset: int  # bytes from the start of the file (of the row group, for a row)
    data: bytes | dict[str, Any] | Rejected | None  # None: longer than MAX_LINE_BYTES
    word: str = "line"


class Sample(NamedTuple):
    """A record in the one form that the rest of the project knows."""

    id: str | None
    messages: list[dict[str, str]]  # role: system | user | assistant; content: text with <image> placeholders
    images: list[str | bytes]  # names of files, or the encoded images themselves, in the order of the placeholders
    meta: dict[str, Any]  # the record's other keys, scalars only

    @property
    def questions(self) -> str:
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")

    def answers(self) -> list[int]:
        """Places of the messages that a model has to give."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]

    def before(self, place: int) -> "Sample":
        """What a model sees that is asked for the message at `place`: those before it, and their images."""
        messages = self.messages[:place]
        shown = sum(message["content"].count(IMAGE) for message in messages if message["role"] == "user")
        return self._replace(messages=messages, images=self.images[:shown])


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
    """The record as a dict; None for a blank line. A BOM at the start of the file and CRLF are accepted."""
    data = line.data
    if isinstance(data, dict):
        return data
    if isinstance(data, Rejected):
        raise data
    if data is None:
        limit = f"more than {MAX_LINE_BYTES >> 20} MiB"
        raise Rejected(f"{line.word} too long", f"{limit}: is this the file of the records?")
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
            raise Rejected("invalid UTF-8", f"byte {unicode_error.start} of the {line.word}") from None
        cut = line.word == "line" and not data.endswith(b"\n")
        raise Rejected("truncated last line" if cut else "invalid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise Rejected("not a JSON object", f"the {line.word} holds a {type(record).__name__}")
    return record


def parse_record(record: dict[str, Any]) -> Sample:
    """LLaVA (`conversations` of {from, value}, `image`) and ShareGPT/OpenAI (`messages` of {role, content}, `images`).

    Images are absent, one, or a list; each a path or, as the Hugging Face hub has it, {bytes, path}.
    """
    turns = record.get("conversations")
    if turns is None:
        turns = record.get("messages")
    if turns is None:
        raise Rejected("missing key", "conversations or messages")
    if record.get("video") or record.get("videos"):
        raise Rejected("video is not supported")
    if not isinstance(turns, list):
        raise Rejected("malformed conversation", f"the conversation is a {type(turns).__name__}, not a list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Rejected("malformed conversation", f"a turn is a {type(turn).__name__}, not an object")
        try:
            speaker, content = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
        except KeyError as error:
            raise Rejected("missing key", f"{error.args[0]} of a turn") from None
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise Rejected("unknown role", f"{str(speaker)[:40]!r} is none of {', '.join(ROLES)}")
        messages.append({"role": role, "content": _join_parts(content) if isinstance(content, list) else content})
    images = record.get("image")
    if images is None:
        images = record.get("images")
    if images is None:
        images = []
    elif not isinstance(images, list):
        images = [images]
    images = [_image_file(image) if isinstance(image, dict) else image for image in images]
    name = record.get("id")
    others = ((key, value) for key, value in record.items() if key not in FORM_KEYS)
    meta = {key: value for key, value in others if value is None or isinstance(value, str | int | float)}
    return check_sample(Sample(None if name is None else str(name), messages, images, meta))


def _join_parts(parts: list[Any]) -> Any:
    """OpenAI's content as a list of parts → text with placeholders; anything else stays what it is, to be rejected."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            texts.append(IMAGE)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            return parts
    return "".join(texts)


def _image_file(image: dict[str, Any]) -> Any:
    return image.get("path") if image.get("bytes") is None else image["bytes"]


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
