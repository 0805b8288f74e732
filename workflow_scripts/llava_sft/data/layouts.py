"""How a sample lies in a WebDataset: this workflow's layout, the three that the original repository writes, and a record of
any form that raw data may have, or a caption, beside its pictures (`KEY.jpg`, and `KEY.json` or `KEY.txt`).

Notable: one function a layout, from a sample's JSON and the names of its members to the one form that the project
knows. The loader's cookers, the held-out reader, adoption and inspection all ask here. No torch, no energon.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from llava_sft.data.forms import has_known_form
from llava_sft.data.image_checks import EXTENSIONS
from llava_sft.data.other_forms import holds_image
from llava_sft.data.records import Sample, parse_record
from llava_sft.data.rejects import Rejected
from llava_sft.data.values import exact_json

OWN_NAME = re.compile(r"\d+\.\w+")
PICTURES = {*EXTENSIONS.values(), "jpeg", "tiff"}
CAPTIONS = ("txt", "caption")  # members that hold one


def _own(key: str, record: Any, members: Collection[str]) -> Sample[str]:
    return Sample(record["id"], record["messages"], record["images"], record.get("meta", {}))


def _mix(key: str, record: Any, members: Collection[str]) -> Sample[str]:
    """`KEY.0_photo.jpg`, `KEY.1_other.png`, … and `{texts, media, name}`."""
    if record["media"] == "video":
        raise Rejected("video is not supported")
    return Sample(key, _messages(record["texts"]), record.get("name") or [], {})


def _single(key: str, record: Any, members: Collection[str]) -> Sample[str]:
    """`KEY.jpg` and the list of messages itself."""
    return Sample(key, _messages(record), sorted(name for name in members if name != "json"), {})


def _packed(key: str, record: Any, members: Collection[str]) -> Sample[str]:
    """`KEY.img0.jpg`, … and `{prompts, captions}`: a pack of samples becomes one conversation of as many turns."""
    turns = []
    for prompt, caption in zip(record["prompts"], record["captions"], strict=True):
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": caption}]
    images = [name for name in members if re.match(r"img\d+\.", name)]
    return Sample(key, turns, sorted(images, key=_by_numbers), {})


def _by_numbers(name: str) -> list[str | int]:
    """`2.jpg` before `10.jpg`: texts and numbers of a name in turn."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _record(key: str, record: Any, members: Collection[str]) -> Sample[str]:
    """`KEY.jpg`, or several in the order of their names or of that in the record, and a record of raw data."""
    pictures = sorted((name for name in members if name.rpartition(".")[2].lower() in PICTURES), key=_by_numbers)
    named = [value for name, value in record.items() if holds_image(name, value)]
    order = next((value for value in named if isinstance(value, list) and len(value) == len(pictures)), [])
    places = {f"{key}.{name}": name for name in pictures} | {name: name for name in pictures}
    listed = [places.get(str(each).rpartition("/")[2]) for each in order]
    if len(pictures) > 1 and set(listed) == set(pictures):
        pictures = [name for name in listed if name]
    rest = {name: value for name, value in record.items() if not holds_image(name, value)}
    sample = parse_record(rest | {"images": pictures})
    return Sample(sample.id or key, sample.messages, pictures, sample.meta)


def _messages(texts: list[Any]) -> list[dict[str, str]]:
    return [{"role": text["role"], "content": text["content"]} for text in texts]


Layout = Callable[[str, Any, Collection[str]], Sample[str]]
LAYOUTS: dict[str, Layout] = {
    "own": _own,
    "mix": _mix,
    "single": _single,
    "packed": _packed,
    "record": _record,
    "caption": _record,
}
_MARKS = {"own": {"messages", "images"}, "mix": {"texts", "media"}, "packed": {"prompts", "captions"}}


def stored_sample(layout: str, key: str, contents: Mapping[str, bytes]) -> Sample[str]:
    """The sample that members of a tar are, by their names. Errors: `Rejected`; ValueError, KeyError, TypeError or AttributeError
    where their JSON is not of the layout."""
    if layout != "caption":
        if "json" not in contents:
            raise Rejected("no json member", f"has {', '.join(contents)}")
        return LAYOUTS[layout](key, exact_json(contents["json"]), contents)
    name = next((name for name in CAPTIONS if name in contents), None)
    if name is None:
        raise Rejected("no caption member", f"has {', '.join(contents)}")
    try:
        return _record(key, {"caption": contents[name].decode().strip()}, contents)
    except UnicodeDecodeError as error:
        raise Rejected("invalid UTF-8", f"byte {error.start} of a text") from None


def layout_of(record: Any) -> str | None:
    """The layout that a sample's JSON is of; None when it is none of LAYOUTS."""
    if isinstance(record, list):
        return "single"
    if not isinstance(record, dict):
        return None
    marked = next((name for name, keys in _MARKS.items() if keys <= record.keys()), None)
    if marked == "own" and "meta" not in record and not all(map(OWN_NAME.fullmatch, map(str, record["images"] or ()))):
        marked = None  # OpenAI's form, with the same two keys
    return marked or ("record" if has_known_form(record) else None)
