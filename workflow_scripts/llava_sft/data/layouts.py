"""How a sample lies in a WebDataset: this workflow's layout and the three that the original repository writes.

Notable: one function a layout, from a sample's JSON and the names of its members to the one form that the project
knows. The loader's cookers, the held-out reader, adoption and inspection all ask here. No torch, no energon.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from llava_sft.data.records import Sample
from llava_sft.data.rejects import Rejected


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
    return Sample(key, turns, sorted(images, key=lambda name: int(name[3 : name.index(".")])), {})


def _messages(texts: list[Any]) -> list[dict[str, str]]:
    return [{"role": text["role"], "content": text["content"]} for text in texts]


Layout = Callable[[str, Any, Collection[str]], Sample[str]]
LAYOUTS: dict[str, Layout] = {"own": _own, "mix": _mix, "single": _single, "packed": _packed}
_MARKS = {"own": {"messages", "images"}, "mix": {"texts", "media"}, "packed": {"prompts", "captions"}}


def layout_of(record: Any) -> str | None:
    """The layout that a sample's JSON is of; None when it is none of LAYOUTS."""
    if isinstance(record, list):
        return "single"
    return next((name for name, keys in _MARKS.items() if isinstance(record, dict) and keys <= record.keys()), None)
