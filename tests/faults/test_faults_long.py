"""All faults, about an hour on two quiet cores: `make test-faults`. Each test writes its rows into benchmarks/results/faults.json.

FAULTS_FOLDER (default: in the temporary folder) keeps the undisturbed chain and the cases, a line each, from run to run.
"""

import json
import os
import random
import tempfile
from pathlib import Path

import pytest

from faults import live_faults, results
from faults.at_rest import BAD, Bench, run_cases, table
from faults.kinds import KINDS
from faults.live import Reference
from results import row

FOLDER = Path(os.environ.get("FAULTS_FOLDER", Path(tempfile.gettempdir()) / "llava_sft_faults"))
MUTATIONS = int(os.environ.get("FAULTS_MUTATIONS", "1200"))
SEED = int(os.environ.get("FAULTS_SEED", "1"))

pytestmark = [pytest.mark.long, pytest.mark.timeout(6 * 3600)]


@pytest.fixture(scope="module")
def reference():
    return Reference(FOLDER / "reference")


def happened(fault: str, reference: Reference) -> list[str]:
    """Cause a fault of `live_faults` everywhere, note the cases, write the rows; returns what went wrong."""
    kept, cases = FOLDER / f"{fault}.jsonl", []
    for case in live_faults.FAULTS[fault](reference, FOLDER, random.Random(SEED)):
        cases.append(case)
        kept.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in cases))
    results.write(results.live_rows([case for path in sorted(FOLDER.glob("*.jsonl")) if path.stem in live_faults.FAULTS
                                     for case in results.read(path)]))  # fmt: skip
    return [str(case) for case in cases if case["outcome"] not in ("mended", "reported")]


def test_a_thousand_damaged_files_are_never_believed():
    out = FOLDER / "at_rest" / "cases.jsonl"
    with Bench(out.parent) as bench:
        out.unlink(missing_ok=True)
        found = run_cases(bench, MUTATIONS, SEED, KINDS, out)
    results.write(results.at_rest_rows(found))
    bad = [str(case) for case in found if case["outcome"] in BAD]
    assert not bad, "\n".join([table(found), *bad])


def test_kills_at_random_moments_of_every_rule_leave_no_trace(reference):
    assert not happened("kills", reference)


def test_signals_of_each_sort_lose_nothing_and_save_where_promised(reference):
    assert not happened("signals", reference)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts small file systems: root only")
def test_full_disk_at_each_writing_step_is_said_and_mended_by_the_same_command(reference):
    assert not happened("full disks", reference)


def test_two_copies_at_once_do_not_disturb_each_other(reference):
    assert not happened("twice", reference)


def test_odd_places_make_no_difference(reference):
    assert not happened("odd places", reference)


def test_memory_and_descriptors_stay_flat_over_a_long_training(reference):
    grown = live_faults.steady_training(reference, FOLDER)
    note = f"tiny model, CPU, {grown['samples']} samples: median of the last quarter less that of the second"
    rows = [
        row("rss_growth_mb", grown["rss_growth_mb"], "MB", 20, "lower", note, steps=3000),
        row("fd_growth", grown["fd_growth"], "", 0, "lower", note, steps=3000),
    ]
    results.write(rows)
    assert all(each["value"] <= each["goal"] for each in rows)
