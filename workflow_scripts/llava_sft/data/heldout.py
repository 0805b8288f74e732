"""Samples of one split, read in order straight from the tars, for evaluation and parity. No energon, no decoding."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_sft.data.tars import read_at, read_meta, source_folders, walk_tar


@dataclass
class StoredSample:
    """A sample as it lies in the WebDataset: `images` are the encoded bytes in the order of the placeholders."""

    id: str
    messages: list[dict]
    images: list[bytes]
    meta: dict


def stored_samples(folder: Path | str, split: str) -> Iterator[tuple]:
    """Yield (sample, file descriptor, place of each member) of `split` in the order of the shards, no image read."""
    for source in source_folders(Path(folder)):
        meta = read_meta(source)
        for name in meta.splits.get(split, []):
            with open(source / name, "rb") as file:
                for stored in walk_tar(source / name):
                    if f"{name}/{stored.key}" not in meta.exclude:
                        sample, members = stored.read(file.fileno(), meta.layout)
                        yield sample, file.fileno(), members


def read_split(folder: Path | str, split: str) -> Iterator[StoredSample]:
    """Yield the samples of `split` ("train", "val") in the order of the shards, of one source after the other."""
    for sample, descriptor, members in stored_samples(folder, split):
        images = [read_at(descriptor, members[image]) for image in sample.images]
        yield StoredSample(sample.id, sample.messages, images, sample.meta)


def data_uri(image: bytes) -> str:
    """An encoded image as it is embedded in a page."""
    kinds = {b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}
    kind = kinds.get(image[:4], "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
