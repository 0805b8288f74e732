"""The figures that a report states: medians of what was measured, the best validation, scores of earlier versions too."""

import math
from statistics import median
from typing import Any

from llava_sft.evaluation.intervals import wilson_interval

LOSS = "lm loss validation"


def measured(metrics: list[dict[str, Any]]) -> dict[str, float | None]:
    """Median tokens/s and seconds a step over the records of metrics.jsonl, and the greatest memory (GiB)."""
    values = {
        key: [record[key] for record in metrics if record.get(key) is not None]
        for key in ("tokens_per_s", "step_s", "memory_gib")
    }
    return {
        "speed": median(values["tokens_per_s"]) if values["tokens_per_s"] else None,
        "step_s": median(values["step_s"]) if values["step_s"] else None,
        "peak_gib": max(values["memory_gib"], default=0),
    }


def best_validation(validations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of validation.jsonl with the lowest loss; None where no loss is a number."""
    finite = (record for record in validations if isinstance(record.get(LOSS), int | float))
    return min(
        (record for record in finite if math.isfinite(record[LOSS])), key=lambda record: record[LOSS], default=None
    )


def is_scored(evaluation: dict[str, Any]) -> bool:
    """Whether evaluation.json, or a group in it, has figures for its samples, as evaluate.py writes them."""
    try:
        scores = with_scores(evaluation)["scores"]
        figures = [number for score in scores for number in (score["mean"], *score["interval"])]
    except (KeyError, TypeError, AttributeError):
        return False
    whole = len(figures) == 3 * len(scores) and all(isinstance(number, int | float) for number in figures)
    return whole and bool(scores or not evaluation["samples"])


def with_scores(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What evaluation.json says of all samples, or of a group, with the list of scores that earlier versions did not have."""
    correct, samples = evaluation["correct"], evaluation["samples"]
    if "scores" in evaluation or not samples:
        return {"scores": []} | evaluation
    exact = {"name": "exact", "mean": correct / samples, "interval": wilson_interval(correct, samples)}
    return evaluation | {"scores": [exact]}
