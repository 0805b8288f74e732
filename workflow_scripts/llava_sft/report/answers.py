"""The answers of an evaluation as the table of a page shows them: wrong ones first, with small pictures, of bounded size."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from llava_sft.data.records import Sample
from llava_sft.errors import DataError
from llava_sft.report.pictures import thumbnail

TEXT_BYTES, PICTURE_BYTES = 4 << 20, 8 << 20  # of a page, at most
MOST_PICTURED = 2000  # samples
SIDE, INLINE_BYTES = 144, 5 << 10  # of a picture: pixels, and bytes that are embedded as they are


def table(runs: list[list[dict[str, Any]]], models: list[str], samples: Iterable[Sample[bytes]]) -> dict[str, Any]:
    """The content of the table: {models, rows, pictures, all, pictured, groups}.

    Args:
        runs: rows of predictions.jsonl, the same questions in each.
        models: a name for each run; one more where the answers of the start stand beside those of one run.
        samples: those of the rows, in order; there may be none. Where they cannot be read, the table has no pictures.
    """
    rows = [_row(same, len(models)) for same in zip(*runs, strict=True)]
    order = sorted(
        range(len(rows)), key=lambda i: (rows[i]["right"][0], rows[i]["right"][0] == rows[i]["right"][-1], i)
    )
    shown, size = [], 0
    for number in order:
        size += sum(len(text.encode()) for turn in rows[number]["turns"] for text in turn) + 120
        if size > TEXT_BYTES:
            break
        shown.append(number)
    pictures: list[str] = []
    with suppress(DataError, OSError):
        pictures = _pictures(shown[:MOST_PICTURED], {number: rows[number] for number in shown}, samples)
    found = [rows[number] for number in shown]
    groups = sorted({row["group"] for row in found})
    about = {"models": models, "rows": found, "pictures": pictures, "all": len(rows), "groups": groups}
    return about | {"pictured": sum(bool(row["pictures"]) for row in found)}


def _row(same: tuple[dict[str, Any], ...], models: int) -> dict[str, Any]:
    """One question with the answers of all runs, or of one run and its start."""
    first = same[0]
    keys = [("prediction", "cut", "correct", row) for row in same]
    if models > len(same):
        keys.append(("base", "base_cut", "base_correct", first))
    turns = [
        [
            _without_marks(turn["question"]),
            turn["answer"],
            *(row["turns"][place].get(key) or "" for key, _, _, row in keys),
        ]
        for place, turn in enumerate(first["turns"])
    ]
    cut = [any(turn.get(key) for turn in row["turns"]) for _, key, _, row in keys]
    right = [row.get(key) for _, _, key, row in keys]
    return {
        "id": first["id"] or "",
        "group": first["group"],
        "turns": turns,
        "cut": cut,
        "right": right,
        "pictures": [],
    }


def _without_marks(question: str) -> str:
    """Placeholders in front stand for pictures that are shown beside the text."""
    while question.startswith("<image>"):
        question = question.removeprefix("<image>").lstrip()
    return question


def _pictures(order: list[int], rows: dict[int, dict[str, Any]], samples: Iterable[Sample[bytes]]) -> list[str]:
    """Give these rows their pictures, numbers in the returned list, in this order as long as there is room."""
    wanted, of_row, encoded = set(order), dict[int, list[bytes]](), dict[bytes, bytes]()
    for number, sample in enumerate(samples):
        if number in wanted and (sample.id or "") == rows[number]["id"]:
            of_row[number] = [hashlib.sha256(image).digest() for image in sample.images]
            encoded |= zip(of_row[number], sample.images, strict=True)
    names = list(dict.fromkeys(name for number in order for name in of_row.get(number, ())))
    with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
        small = dict(
            zip(names, pool.map(lambda name: thumbnail(encoded[name], SIDE, INLINE_BYTES), names), strict=True)
        )
    pictures, places, size = list[str](), dict[bytes, int](), 0
    for number in order:
        new = [name for name in dict.fromkeys(of_row.get(number, ())) if name not in places and small[name]]
        size += sum(len(small[name]) for name in new)
        if size > PICTURE_BYTES:
            break
        for name in new:
            places[name] = len(pictures)
            pictures.append(small[name])
        rows[number]["pictures"] = [places[name] for name in of_row.get(number, ()) if name in places]
    return pictures
