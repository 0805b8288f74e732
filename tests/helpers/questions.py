"""A small test set with everything in it, for the tests of the evaluation."""

import json
import sys
from pathlib import Path

from evaluate import main
from helpers.webdatasets import Raw, record
from llava_sft.data.index import index_webdataset
from llava_sft.data.records import Sample
from llava_sft.data.stored import read_split
from llava_sft.evaluation import answers
from llava_sft.evaluation.judge import Answer
from llava_sft.files import write_json


def write_test_set(folder: Path) -> Path:
    """A WebDataset with a held-out split of none to two images, one and two turns, two kinds and one record of none."""
    held = Raw(
        folder,
        [record(n, [None, "a.png", ["a.png", "b.jpg"]][n % 3], kind=f"k{n % 2}") for n in range(8)],
        "held.jsonl",
    )
    more = record(8, None)
    more["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "a longer answer"}]
    with open(held.path, "a") as file:
        file.write(json.dumps(more) + "\n")
    held.convert("heldout")
    Raw(folder, [record(100 + n, None) for n in range(3)]).convert()
    write_json(folder / "dataset.json", index_webdataset(held.wds, held.parts))
    return folder


def asked_of(data: Path, split: str = "val") -> list[Sample]:
    return [sample.before(turn) for sample in read_split(data / "wds", split) for turn in sample.answers()]


def run(monkeypatch, export: Path, data: Path, output: Path, *words: str) -> None:
    """evaluate.py about the test set `data`, in this process."""
    options = ["--dataset", str(data / "dataset.json"), "--output", str(output), "--max-new-tokens", "2", *words]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(export), str(data / "wds"), *options])
    main()


def counted(monkeypatch) -> list[int]:
    """How many questions were asked at each loading of a model, whose answers are then always the same."""
    made: list[int] = []

    def answer(folder, questions, *options):
        made.append(len(questions))
        yield from ((number, Answer("Answer 0.", False)) for number in reversed(range(len(questions))))

    monkeypatch.setattr(answers, "generate", answer)
    return made
