"""From the bytes of a raw file to checked samples.

Notable: a reader yields raw records with their place, `parse_record` turns one into a `Sample` (forms.py rewrites what is
neither LLaVA's nor OpenAI's form), and `check_sample` applies the rules that hold for all forms. A record that breaks one
raises `Rejected`: the caller notes it and goes on with its neighbour.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import orjson

from llava_sft.data.forms import AS_GIVEN, Reading, as_known, renamed
from llava_sft.data.other_forms import (
    KNOWN_KEYS,
    OTHER_ROLES,
    ROLES,
    TOOL_ROLES,
    Unread,
    check_keys,
    check_text,
    counts_in_loss,
    image_of,
    named_in_text,
)
from llava_sft.data.rejects import Rejected
from llava_sft.data.values import exact_json, is_empty, unprinted
from llava_sft.model.tokens import CONTROL_TOKEN, IMAGE

BOM = b"\xef\xbb\xbf"
NO_NUMBER = re.compile(
    rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?\b(?:NaN|Infinity)\b', re.DOTALL
)  # as json.dumps writes them; and texts
MAX_LINE_BYTES = 64 << 20  # a longer line is most likely not JSONL at all; reading it whole would eat the memory


class Line(NamedTuple):
    """A record as it stands in a raw file: a line, an element of a JSON array, a row of a Parquet file."""

    number: int  # 1-based, counted from the first that starts in the range
    offset: int  # bytes from the start of the file (of the row group, for a row)
    data: bytes | dict[str, Any] | Rejected | None  # None: longer than MAX_LINE_BYTES
    word: str = "line"


class Sample[Image: str | bytes](NamedTuple):
    """A record in the one form that the rest of the project knows. Its images, in the order of the placeholders, are
    names of files or of members in a tar (`Sample[str]`), or encoded (`Sample[bytes]`); a raw record may have either."""

    id: str | None
    # role: system | user | assistant; content: text with <image> placeholders; loss: False, of an answer that does not count
    messages: list[dict[str, Any]]
    images: list[Image]
    meta: dict[str, Any]  # the record's other keys, scalars only

    @property
    def questions(self) -> str:
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")

    def answers(self) -> list[int]:
        """The numbers, from 0, of the messages that a model has to give: answers that count in the loss."""
        return [number for number, message in enumerate(self.messages) if counts(message)]

    def before(self, number: int) -> "Sample[Image]":
        """What a model sees that is asked for the message at `number`: those before it, and their images."""
        messages = self.messages[:number]
        shown = sum(message["content"].count(IMAGE) for message in messages if message["role"] == "user")
        return self._replace(messages=messages, images=self.images[:shown])

    def with_images[Other: str | bytes](self, images: list[Other]) -> "Sample[Other]":
        return Sample(self.id, self.messages, images, self.meta)


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
        record = exact_json(data)
    except orjson.JSONDecodeError as error:
        if not data.strip():
            return None
        if b"NaN" in data or b"Infinity" in data:
            finite = NO_NUMBER.sub(lambda found: found[0] if found[0][:1] == b'"' else b"null", data)
            if finite != data:
                return parse_json(line._replace(data=finite))
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


def counts(message: dict[str, Any]) -> bool:
    """Whether a message is an answer that counts in the loss."""
    return message["role"] == "assistant" and message.get("loss") is not False


def parse_record(
    record: dict[str, Any], unread: Unread | None = None, reading: Reading = AS_GIVEN
) -> Sample[str | bytes]:
    """LLaVA (`conversations` of {from, value}, `image`), ShareGPT/OpenAI (`messages` of {role, content}, `images`), and what
    `forms.as_known` makes of others.

    Images are absent, one, or a list; each a path, a picture in base64 or, as the Hugging Face hub has it, {bytes, path}. A
    content may be a list of parts, of which those of images may name them. `unread` notes keys that are not read.
    """
    try:
        return _parsed(record, Unread() if unread is None else unread, reading)
    except RecursionError:
        raise Rejected("nested too deeply", "lists or objects within one another, hundreds of them") from None


def _parsed(record: dict[str, Any], unread: Unread, reading: Reading) -> Sample[str | bytes]:
    if "messages" in record and "conversations" in record and not reading.settled:
        record = _one_conversation(record, reading)
    if reading.columns:
        record = renamed(record, reading.columns, unread)
    turns, image_first = record.get("conversations") or record.get("messages"), reading.image_first
    if reading.settled or not (
        type(turns) is list and turns and type(turns[0]) is dict and ("from" in turns[0] or "role" in turns[0])
    ):
        record, of_form = as_known(record, reading, unread)
        turns, image_first = record["messages"], image_first or of_form
    messages, in_parts = [], []
    for number, turn in enumerate(turns, 1):
        message, named = _message(turn, number)
        if not counts_in_loss(turn, message["role"], number, unread):
            message["loss"] = False
        messages.append(message)
        in_parts += named
    images = _images(record, in_parts)
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    prompt, other = check_keys(record, bool(images), system, unread, reading.columns)
    if prompt is not None and system is None:
        messages.insert(0, {"role": "system", "content": prompt})
    if other:
        images = _listed(record, other)
    if image_first and images:
        _put_first(messages, len(images))
    name = record.get("id")
    others = ((key, value) for key, value in record.items() if key not in KNOWN_KEYS)
    meta = {
        key: value for key, value in others if key != other and (value is None or isinstance(value, str | int | float))
    }
    return check_sample(Sample(None if name is None else str(name), messages, images, meta))


def _one_conversation(record: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """A record that holds its turns twice, with those of `conversations`; or with `messages`, where these are empty."""
    left = {
        key: {name: value for name, value in record.items() if name != other}
        for key, other in (("conversations", "messages"), ("messages", "conversations"))
        if not is_empty(record[key])
    }
    if len(left) == 2:
        read = [parse_record(one, None, reading).messages for one in left.values()]
        if read[0] != read[1]:
            raise Rejected("conversations and messages differ", "keep one, or say which, columns: {conversations: KEY}")
    return next(iter(left.values()), record)


def _put_first(messages: list[dict[str, Any]], images: int) -> None:
    """Placeholders before the first question, where no question has one."""
    asked = [message for message in messages if message["role"] == "user" and isinstance(message["content"], str)]
    if asked and not any(IMAGE in message["content"] for message in asked):
        asked[0]["content"] = f"{IMAGE}\n" * images + asked[0]["content"]


def _message(turn: Any, number: int) -> tuple[dict[str, Any], list[Any]]:
    """A turn as role and content, and what its image parts name."""
    if not isinstance(turn, dict):
        raise Rejected("malformed conversation", f"turn {number} is a {type(turn).__name__}, not an object")
    try:
        speaker, content = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
    except KeyError as error:
        raise Rejected("missing key", f"{error.args[0]} of turn {number}") from None
    role = (ROLES.get(speaker) or _other_role(speaker)) if isinstance(speaker, str) else None
    if role is None:
        what = "is null" if speaker is None else f"{str(speaker)[:40]!r} is none of {', '.join(ROLES)}"
        raise Rejected("unknown role", f"of turn {number}: {what}")
    read = _read_parts(content) if isinstance(content, list) else None
    text, images = read or (content, [])
    if role == "user" and isinstance(text, str):
        if text[:2] == "[{" and isinstance(parts := unprinted(text), list) and _read_parts(parts):
            raise Rejected("malformed conversation", f"turn {number} is a list in a string: write the list itself")
        if "<img>" in text:
            text, named = named_in_text(text, number)
            images = images + named
    return {"role": role, "content": text}, images


def _other_role(speaker: str) -> str | None:
    name = speaker.strip().lower().replace("_", "").replace("-", "")
    if name in TOOL_ROLES:
        raise Rejected("tools are not supported", f"a turn of {speaker[:40]}")
    return ROLES.get(OTHER_ROLES.get(name, name))


def _images(record: dict[str, Any], in_parts: list[Any]) -> list[Any]:
    """The record's images in order: of `image` or `images`, or what the parts of its contents name."""
    image, images = (_listed(record, key) for key in ("image", "images"))
    if image and images and image != images:
        raise Rejected("image and images differ", "keep one of the two keys")
    entries = image or images
    if any(named is not None for named in in_parts):
        if entries and in_parts != entries:
            raise Rejected("image and images differ", "a part of a content names another picture than the record")
        entries = in_parts
    return entries


def _listed(record: dict[str, Any], key: str) -> list[Any]:
    """What stands under a key of images; empty where it says nothing, as a cell of a table does."""
    if (value := record.get(key)) is None:
        return []
    value = unprinted(value)
    entries = value if isinstance(value, list) else [value]
    empty = [is_empty(entry) for entry in entries]
    if all(empty):
        return []
    if any(empty):
        raise Rejected("empty image", f"entry {empty.index(True) + 1} of {key}")
    return [_path_or_bytes(entry) if isinstance(entry, dict) else entry for entry in entries]


def _path_or_bytes(image: dict[str, Any]) -> Any:
    if "bytes" in image or "path" in image:
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return image_of(image)


def _read_parts(parts: list[Any]) -> tuple[str, list[Any]] | None:
    """OpenAI's content as a list of parts (Qwen's name their one key only) → text with placeholders, and what each image part
    names; None for other lists."""
    texts, images = [], []
    for part in parts:
        kind = part.get("type", next(iter(part)) if len(part) == 1 else None) if isinstance(part, dict) else None
        if kind in ("image", "image_url", "input_image"):
            texts.append(IMAGE)
            images.append(image_of(part))
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        elif isinstance(kind, str) and ("video" in kind or "audio" in kind):
            raise Rejected(f"{'video' if 'video' in kind else 'audio'} is not supported", f"a part of type {kind[:40]}")
        else:
            return None
    return "".join(texts), images


def check_sample[Image: str | bytes](sample: Sample[Image]) -> Sample[Image]:
    """Apply the rules that no form of raw data may break; return the sample or raise `Rejected`."""
    messages = sample.messages
    if not messages:
        raise Rejected("empty conversation")
    placeholders = 0
    expected, learned = "user", False
    for position, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise Rejected("content is not a string", f"turn {position + 1} holds a {type(content).__name__}")
        if "\0" in content:
            raise Rejected("NUL byte", f"in turn {position + 1}")
        if "<|" in content and (token := CONTROL_TOKEN.search(content)):
            raise Rejected("control token in the text", f"{token[0]} in turn {position + 1}")
        check_text(role, content, position + 1)
        count = content.count(IMAGE)
        if count and role != "user":
            raise Rejected("<image> outside a user turn", f"in turn {position + 1}, of {role}")
        placeholders += count
        if role == "system" and position == 0:
            continue
        if role != expected:
            raise Rejected("wrong turn order", f"turn {position + 1} is of {role}, {expected} was due: join or remove")
        if role == "assistant" and not content.strip():
            raise Rejected("empty answer", f"turn {position + 1}")
        learned = learned or counts(message)
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] != "assistant":
        raise Rejected("wrong turn order", "the last turn is not of the assistant")
    if not learned:
        raise Rejected("no answer counts in the loss", "each has loss: false, or the like")
    if placeholders != len(sample.images):
        fix = "" if placeholders else ": write <image> in the question, or set image_first: true"
        pictures = len(sample.images)
        found = (
            f"{placeholders} <image>, 1 image{fix}"
            if pictures == 1
            else f"{placeholders} <image>, {pictures} images{fix}"
        )
        raise Rejected("number of <image> differs from images", found)
    return sample
