"""How far a mean score, and the difference of two models on the same samples, may be off by chance: 95 % intervals.

Samples count as independent of each other: where many ask about one picture, the intervals are too narrow.
"""

import math
from collections.abc import Sequence
from typing import Any

SEED, RESAMPLES = 0, 10_000


def is_binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Of right and wrong: Wilson 1927. Of other scores: the percentiles of the bootstrap, with a fixed seed."""
    if is_binary(values):
        return wilson_interval(round(sum(values)), len(values))
    return _bootstrap(values)


def wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    low, high = binomtest(correct, samples).proportion_ci(method="wilson")
    return float(low), float(high)


def compare(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Two models' scores of the same samples: {difference of the means, interval_of_difference, p, gained, lost}.

    Of right and wrong, the interval is method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635-2650), `p` the exact
    McNemar test, `gained` and `lost` the samples that only `after` and only `before` has right. Of other scores: the paired
    bootstrap (Koehn 2004), `p` None, and the samples that are scored higher and lower.
    """
    difference = [b - a for a, b in zip(before, after, strict=True)]
    gained, lost, p = sum(d > 0 for d in difference), sum(d < 0 for d in difference), None
    if is_binary(before) and is_binary(after):
        from scipy.stats import binomtest

        p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        interval = _newcombe(sum(a * b for a, b in zip(before, after, strict=True)), gained, lost, len(before))
    else:
        interval = _bootstrap(difference)
    mean = sum(difference) / len(difference)
    return {"difference": mean, "interval_of_difference": interval, "p": p, "gained": gained, "lost": lost}


def _newcombe(both: float, gained: int, lost: int, samples: int) -> tuple[float, float]:
    neither = samples - both - gained - lost
    after, before = both + gained, both + lost
    (low_a, high_a), (low_b, high_b) = (wilson_interval(round(right), samples) for right in (after, before))
    p_a, p_b = after / samples, before / samples
    margins = after * (samples - after) * before * (samples - before)
    product = both * neither - gained * lost
    product = max(product - samples / 2, 0) if product > 0 else product  # a correction for continuity
    correlation = product / math.sqrt(margins) if margins else 0.0

    def off(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    middle = p_a - p_b
    return middle - off(p_a - low_a, high_b - p_b), middle + off(high_a - p_a, p_b - low_b)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap

    if min(values) == max(values):
        return values[0], values[0]
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=np.random.default_rng(SEED)
    )
    low, high = found.confidence_interval
    return float(low), float(high)
