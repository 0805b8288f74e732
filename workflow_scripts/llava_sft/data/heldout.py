"""Samples of one split, read in order straight from the tars, for evaluation and parity. No energon, no decoding."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llava_sft.data.records import IMAGE
from llava_sft.data.tars import read_at, read_meta, source_folders, walk_tar


@dataclass
class StoredSample:
    """A sample as it lies in the WebDataset: `images` are the encoded bytes in the order of the placeholders."""

    id: str
    messages: list[dict]
    images: list[bytes]
    meta: dict

    @property
    def questions(self) -> str:
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")

    def answers(self) -> list[int]:
        """Places of the messages that a model has to give."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]

    def before(self, place: int) -> "StoredSample":
        """What a model sees that is asked for the message at `place`: those before it, and their images."""
        messages = self.messages[:place]
        shown = sum(message["content"].count(IMAGE) for message in messages if message["role"] == "user")
        return replace(self, messages=messages, images=self.images[:shown])


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
