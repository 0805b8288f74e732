"""Which answers to held-out questions are right.

A sample is correct when each of its answers equals the true one, white space at both ends aside.
"""

from typing import Any, NamedTuple

from llava_sft.data.records import Sample
from llava_sft.report.pictures import data_uri

WRONG_SHOWN, RIGHT_SHOWN = 24, 12  # samples whose answers the report shows, with their pictures


class Answer(NamedTuple):
    text: str
    cut: bool  # after max_new_tokens, before any end token


def judge(samples: list[Sample], answers: list[Answer], by: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each sample; and the first wrong and right ones again, with turns joined and pictures embedded.

    Args:
        answers: one for each assistant turn of the samples, in their order.
        by: the record's key that names a sample's group.
    """
    rows: list[dict[str, Any]] = []
    examples: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    remaining = iter(answers)
    for sample in samples:
        turns = []
        for turn in sample.answers():
            answer = next(remaining)
            truth = sample.messages[turn]["content"].strip()
            turns.append({"answer": truth, "prediction": answer.text, "cut": answer.cut})
        correct = all(turn["prediction"] == turn["answer"] for turn in turns)
        row = {
            "id": sample.id,
            "group": str(sample.meta.get(by, "all")),
            "question": sample.questions,
            "correct": correct,
        }
        rows.append(row | {"turns": turns})
        if len(examples[correct]) < (RIGHT_SHOWN if correct else WRONG_SHOWN):
            joined = {key: "\n".join(str(turn[key]) for turn in turns) for key in ("answer", "prediction")}
            pictures = [data_uri(data) for data in sample.images]
            examples[correct].append(row | joined | {"cut": any(turn["cut"] for turn in turns), "images": pictures})
    return rows, examples[False] + examples[True]


def group_counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Samples and correct ones of each group, by name."""
    groups: dict[str, dict[str, int]] = {}
    for row in rows:
        group = groups.setdefault(row["group"], {"samples": 0, "correct": 0})
        group["samples"] += 1
        group["correct"] += row["correct"]
    return dict(sorted(groups.items()))
