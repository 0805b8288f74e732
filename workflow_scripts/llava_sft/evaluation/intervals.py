"""How far a mean score, and the difference of two models on the same samples, may be off by chance: 95 % intervals.

Samples that share a picture are right or wrong together, so that a picture with many questions says less than as many
pictures. `clusters` names the picture of each sample: the variance of the clusters' sums, over that of independent samples, is
the design effect (Kish 1965), and its quotient the effective number of samples, which is never larger than their number: method
of Rao and Scott 1992 (Biometrics 48, 577-585). With Wilson's interval: Franco et al. 2019 (J. Surv. Stat. Methodol. 7, 334-364).
"""

import math
from collections.abc import Sequence
from typing import Any

SEED, RESAMPLES = 0, 10_000


def is_binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def mean_interval(values: Sequence[float], clusters: Sequence[int] | None = None) -> tuple[float, float]:
    """Of right and wrong: Wilson 1927. Of other scores from 0 to 1: see `_bootstrap`."""
    if is_binary(values):
        return wilson_interval(sum(values), len(values), design_effect(values, clusters))
    return _bootstrap(values, clusters, 0)


def wilson_interval(correct: float, samples: int, effect: float = 1) -> tuple[float, float]:
    """`effect`: the design effect, by which both counts are divided."""
    z, n, p = 1.959963984540054, samples / effect, correct / samples
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def _sums(values: Sequence[float], clusters: Sequence[int] | None) -> tuple[list[float], list[int]]:
    """Sum and number of the values of each cluster."""
    sums: dict[int, tuple[float, int]] = {}
    for value, cluster in zip(values, clusters if clusters is not None else range(len(values)), strict=True):
        total, count = sums.get(cluster, (0.0, 0))
        sums[cluster] = total + value, count + 1
    return [total for total, _ in sums.values()], [count for _, count in sums.values()]


def design_effect(values: Sequence[float], clusters: Sequence[int] | None) -> float:
    """How many times the variance of the mean is that of independent samples, at least 1. Where it cannot be estimated, as all
    samples have the same value, each cluster counts as one sample."""
    totals, counts = _sums(values, clusters)
    n, k, mean = len(values), len(totals), sum(values) / len(values)
    if k == n:
        return 1.0
    independent = sum((value - mean) ** 2 for value in values) / n
    if k == 1 or independent == 0:
        return n / k
    between = k / (k - 1) * sum((total - count * mean) ** 2 for total, count in zip(totals, counts, strict=True)) / n
    return max(1.0, between / independent)


def compare(before: Sequence[float], after: Sequence[float], clusters: Sequence[int] | None = None) -> dict[str, Any]:
    """Two models' scores of the same samples: {difference of the means, interval_of_difference, p, gained, lost}.

    Of right and wrong, the interval is method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635-2650), of the effective
    number of samples; `gained` and `lost` are the samples that only `after` and only `before` has right. `p` is the exact
    McNemar test; where samples share a picture, the permutation test that exchanges the models picture by picture, which is
    McNemar's for one question a picture. Of other scores: the paired bootstrap (Koehn 2004), `p` None, and the samples that are
    scored higher and lower.
    """
    difference = [b - a for a, b in zip(before, after, strict=True)]
    gained, lost, p = sum(d > 0 for d in difference), sum(d < 0 for d in difference), None
    if is_binary(before) and is_binary(after):
        p = _exchange_test(difference, clusters)
        both, effect = sum(a * b for a, b in zip(before, after, strict=True)), design_effect(difference, clusters)
        interval = _newcombe(both, gained, lost, len(before), effect)
    else:
        interval = _bootstrap(difference, clusters, -1)
    mean = sum(difference) / len(difference)
    return {"difference": mean, "interval_of_difference": interval, "p": p, "gained": gained, "lost": lost}


def _exchange_test(difference: Sequence[float], clusters: Sequence[int] | None) -> float:
    """Two-sided: how probable it is that the clusters' differences, each of a random sign, sum up to as much. Exact."""
    import numpy as np

    totals = [abs(round(total)) for total in _sums(difference, clusters)[0]]
    reach, observed = sum(totals), abs(round(sum(difference)))
    ways = np.zeros(2 * reach + 1)  # the probability of each sum from -reach to reach
    ways[reach] = 1
    for total in totals:
        ways = (np.roll(ways, total) + np.roll(ways, -total)) / 2
    return min(1.0, float(ways[: reach - observed + 1].sum() + ways[reach + observed :].sum()))


def _newcombe(both: float, gained: int, lost: int, samples: int, effect: float) -> tuple[float, float]:
    neither = samples - both - gained - lost
    after, before = both + gained, both + lost
    (low_a, high_a), (low_b, high_b) = (wilson_interval(right, samples, effect) for right in (after, before))
    p_a, p_b = after / samples, before / samples
    margins = after * (samples - after) * before * (samples - before)
    product = both * neither - gained * lost
    product = max(product - effect * samples / 2, 0) if product > 0 else product  # a correction for continuity
    correlation = product / math.sqrt(margins) if margins else 0.0

    def off(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    middle = p_a - p_b
    return middle - off(p_a - low_a, high_b - p_b), middle + off(high_a - p_a, p_b - low_b)


def _bootstrap(values: Sequence[float], clusters: Sequence[int] | None, lowest: float) -> tuple[float, float]:
    """Of the mean of values from `lowest` to 1: percentiles of the mean, clusters drawn with replacement, a fixed seed.

    Where all k clusters have the same mean, that of the others is not seen: with a probability of 95 %, it is not that of at
    most 1 - 0.05^(1/k) of them, about 3/k (Hanley and Lippman-Hand 1983, JAMA 249, 1743-1745). One cluster says nothing.
    """
    import numpy as np
    from scipy.stats import bootstrap

    totals, counts = _sums(values, clusters)
    means = [total / count for total, count in zip(totals, counts, strict=True)]
    if math.isclose(min(means), max(means), abs_tol=1e-9):
        unseen = 1 - 0.05 ** (1 / len(means)) if means[1:] else 1.0
        return means[0] - unseen * (means[0] - lowest), means[0] + unseen * (1 - means[0])

    def mean(totals: Any, counts: Any, axis: int) -> Any:
        return totals.sum(axis) / counts.sum(axis)

    found = bootstrap(
        (totals, counts), mean, n_resamples=RESAMPLES, batch=100, method="percentile", paired=True, vectorized=True,
        rng=np.random.default_rng(SEED),
    )  # fmt: skip
    low, high = found.confidence_interval
    return float(low), float(high)
