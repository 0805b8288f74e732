"""The scores of answers to held-out questions: a row for each sample, and their means with intervals.

A sample of several turns is right when every answer is; of other scores it has the mean.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from llava_sft.data.records import Sample
from llava_sft.evaluation.intervals import compare, mean_interval
from llava_sft.evaluation.scores import Score


class Answer(NamedTuple):
    text: str
    cut: bool  # after max_new_tokens, before any end token


def judge(
    samples: list[Sample], answers: list[Answer], scores: list[Score], by: str, base: list[Answer] | None = None
) -> list[dict[str, Any]]:
    """A row of predictions.jsonl for each sample; the first of `scores` decides what is correct.

    Args:
        answers, base: one for each assistant turn of the samples, in their order; `base` those of the model to compare with.
        by: the record's key that names a sample's group.
    """
    rows, place = [], 0
    for sample, cluster in zip(samples, picture_clusters(samples), strict=True):
        turns, asked = [], 0
        for turn in sample.answers():
            questions = (message["content"] for message in sample.messages[asked:turn] if message["role"] == "user")
            one: dict[str, Any] = {"question": "\n".join(questions), "answer": sample.messages[turn]["content"].strip()}
            one |= {"prediction": answers[place].text, "cut": answers[place].cut}
            turns.append(one | ({"base": base[place].text, "base_cut": base[place].cut} if base else {}))
            place, asked = place + 1, turn
        row: dict[str, Any] = {
            "id": sample.id,
            "group": str(sample.meta.get(by, "all")),
            "cluster": cluster,
            "question": sample.questions,
            "turns": turns,
        }
        for prefix, key in (("", "prediction"), ("base_", "base")) if base else (("", "prediction"),):
            row[f"{prefix}scores"] = {score.name: _rate(score, sample, turns, key) for score in scores}
            row[f"{prefix}correct"] = row[f"{prefix}scores"][scores[0].name] == 1
        rows.append(row)
    return rows


def picture_clusters(samples: list[Sample]) -> list[int]:
    """A number for each sample; the same one for samples that share a picture, or are linked by others that do."""
    parent = list(range(len(samples)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    first: dict[str, int] = {}
    for number, sample in enumerate(samples):
        for picture in sample.images:
            parent[root(number)] = root(first.setdefault(hashlib.sha256(picture).hexdigest(), number))
    return [root(number) for number in range(len(samples))]


def _rate(score: Score, sample: Sample, turns: list[dict[str, Any]], key: str) -> float:
    record = sample.meta | {"id": sample.id}
    values = [score.rate(turn[key], turn["answer"], record | {"question": turn["question"]}) for turn in turns]
    if all(isinstance(value, bool) for value in values):
        return float(all(values))
    return sum(values) / len(values)


def summary(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Counts and scores of all samples: {samples, correct, clusters, scores: [{name, mean, interval}]}, where samples that share
    a picture are one of `clusters`; beside another model, each score has `base` and `base_interval`, and what
    `intervals.compare` says."""
    clusters = [row["cluster"] for row in rows]
    result: dict[str, Any] = {"samples": len(rows), "correct": sum(row["correct"] for row in rows), "scores": []}
    result["clusters"] = len(set(clusters))
    for name in names if rows else ():
        values = [row["scores"][name] for row in rows]
        entry = {"name": name, "mean": sum(values) / len(values), "interval": mean_interval(values, clusters)}
        if "base_scores" in rows[0]:
            before = [row["base_scores"][name] for row in rows]
            entry |= {"base": sum(before) / len(before), "base_interval": mean_interval(before, clusters)}
            entry |= compare(before, values, clusters)
        result["scores"].append(entry)
    return result


def group_summaries(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The `summary` of each group, by name."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return {name: summary(group, names) for name, group in sorted(groups.items())}
