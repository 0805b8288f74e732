"""The questions that every program gets, and this project's own answers to them, those of `evaluate`.

embedded  held-out records of the embedded experiment: one picture, two, none, a second turn
tiny      random weights: every token of an answer hangs on all pixels; pictures of many shapes
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from llava_sft.data.records import Sample
from llava_sft.data.stored import read_split
from llava_sft.evaluation.answers import generate
from llava_sft.model.tokens import IMAGE

RECORDS = 60  # of the embedded experiment
SHAPES = [(56, 56), (120, 90), (448, 448), (30, 800), (333, 77)]  # width, height

type Question = list[dict[str, Any]]  # messages, as asked.py describes them


def embedded_samples(webdatasets: Path) -> Iterator[tuple[Sample, str]]:
    """What a model sees before each answer of the held-out records, and the true answer."""
    for sample in itertools.islice(read_split(webdatasets, "val"), RECORDS):
        for turn in sample.answers():
            yield sample.before(turn), sample.messages[turn]["content"].strip()


def tiny_samples(folder: Path) -> Iterator[Sample]:
    """`folder` gets the pictures."""
    one, two = f"{IMAGE}\nWhat is this?", f"First digit: {IMAGE}\nSecond digit: {IMAGE}\nWhich is larger?"
    asked = [(one, (shape,)) for shape in SHAPES]
    asked += [(f"{IMAGE}\n{two}", SHAPES[1:4]), (two, (SHAPES[4], SHAPES[0])), ("Which is larger, 2 or 3?", ())]
    for number, (text, shapes) in enumerate(asked):
        images = []
        for place, shape in enumerate(shapes):
            path = folder / f"made_{number}_{place}.png"
            Image.radial_gradient("L").rotate(17 * (number + place)).resize(shape).save(path)
            images.append(path.read_bytes())
        yield Sample(None, [{"role": "user", "content": text}], images, {})


def written(samples: list[Sample], folder: Path) -> list[Question]:
    """The questions as every script takes them; `folder` gets the pictures."""
    return [
        [_message(m, images, folder) for m in sample.messages] for sample in samples if (images := iter(sample.images))
    ]


def _message(message: dict[str, str], images: Iterator[bytes], folder: Path) -> dict[str, Any]:
    content: list[dict[str, str]] = []
    for place, text in enumerate(message["content"].split(IMAGE)):
        if place:
            data = next(images)
            path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.png"
            path.write_bytes(data)
            content.append({"type": "image", "path": str(path)})
        if text:
            content.append({"type": "text", "text": text})
    return {"role": message["role"], "content": content}


def own_answers(export: Path, samples: list[Sample], max_new_tokens: int) -> list[str]:
    """`export` holds float32 weights."""
    answers = dict(generate(export, samples, 8, max_new_tokens))
    return [answers[number].text for number in range(len(samples))]
