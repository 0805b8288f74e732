"""The figures that a report states: medians of what was measured, the best validation, the interval of an accuracy."""

import math
from statistics import median
from typing import Any

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


def wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927) of at least one sample: what a held-out set of this size can tell."""
    z = 1.96
    share, unit = correct / samples, z * z / samples
    middle, half = share + unit / 2, z * math.sqrt(share * (1 - share) / samples + unit / (4 * samples))
    return (middle - half) / (1 + unit), (middle + half) / (1 + unit)
