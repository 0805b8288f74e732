"""Samples of one split, read in order straight from the tars, for evaluation and parity. No energon, no decoding."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import webdataset
import yaml


@dataclass
class StoredSample:
    """A sample as it lies in the WebDataset: `images` are the encoded bytes in the order of the placeholders."""

    id: str
    messages: list[dict]
    images: list[bytes]
    meta: dict


def read_split(folder: Path | str, split: str) -> Iterator[StoredSample]:
    """Yield the samples of `split` ("train", "val") in the order of the shards."""
    parts = yaml.safe_load((Path(folder) / ".nv-meta" / "split.yaml").read_text())["split_parts"]
    shards = [str(Path(folder) / name) for name in parts.get(split) or []]
    if not shards:
        return
    everywhere = lambda urls: urls  # noqa: E731 (every rank of a training reads the split; else webdataset refuses)
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False, nodesplitter=everywhere):
        record = orjson.loads(sample["json"])
        images = [sample[name] for name in record["images"]]
        yield StoredSample(record["id"], record["messages"], images, record.get("meta", {}))


def data_uri(image: bytes) -> str:
    """An encoded image as it is embedded in a page."""
    kind = "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
