"""Recorded speeds beside the accepted ones of the same kind of GPU."""

import json
import sys

import pytest

from helpers import ROOT


@pytest.fixture(scope="module")
def results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import results
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return results


def recorded(results):
    return [row for path in results.RESULTS.glob("*.json") for row in json.loads(path.read_text())["rows"]]


def test_nothing_that_is_recorded_is_slower_than_what_was_accepted(results):
    """A slower one that is meant: python benchmarks/results.py --accept."""
    assert results.speeds(recorded(results)), "nothing is compared"
    assert results.regressions(recorded(results)) == []


def test_a_loss_of_more_than_three_percent_on_the_same_gpu_is_said(results):
    row = next(row for row in results.speeds(recorded(results)) if row["metric"] == "mfu_bf16_8192_h200")
    accepted = {json.dumps(each["settings"]): each["value"] for each in json.loads(results.BASELINE.read_text())
                if each["metric"] == row["metric"]}[json.dumps(row["settings"])]  # fmt: skip
    slower = row | {"value": 0.96 * accepted}
    (said,) = results.regressions([slower])
    assert "mfu_bf16_8192_h200" in said and "-4.0%" in said
    assert results.regressions([row | {"value": 0.98 * accepted}]) == []
    assert results.regressions([slower | {"settings": row["settings"] | {"gpu": "another"}}]) == []
