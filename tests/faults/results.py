"""benchmarks/results/faults.json: the figures of a long run, with the outcomes of an earlier commit beside them."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from faults.at_rest import OUTCOMES
from results import row, write_results

BEFORE = "db11b88"  # the commit before faults were looked for


def read(path: Path) -> list[dict]:
    """The cases of a run, a line each."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def told(counts: Counter) -> str:
    return ", ".join(f"{outcome} {counts[outcome]}" for outcome in OUTCOMES if counts[outcome])


def at_rest_rows(cases: list[dict], commit: str = "") -> list[dict[str, Any]]:
    """Rows of damage at rest; `commit`: of an earlier one, which has no goals to reach."""
    total, what = (
        Counter(case["outcome"] for case in cases),
        {"faults": "damage at rest"} | ({"commit": commit} if commit else {}),
    )
    rows = [
        row(
            f"faults_{name}",
            total[outcome],
            "cases",
            None if commit else 0,
            "lower",
            f"of {len(cases):,} mutations",
            **what,
        )
        for name, outcome in (("silent", "silent"), ("lost", "lost"), ("tracebacks", "traceback"), ("stuck", "stuck"))
    ]
    rows.append(
        row(
            "faults_documented", total["documented"], "cases", None, "lower", "limits that docs/faults.md names", **what
        )
    )
    goal = None if commit else 1000
    rows.append(row("faults_mutations", len(cases), "cases", goal, "higher", told(total), **what))
    for kind in dict.fromkeys(case["kind"] for case in cases):
        counts = Counter(case["outcome"] for case in cases if case["kind"] == kind)
        rows.append(row("faults_by_kind", counts.total(), "cases", None, "higher", told(counts), **what, kind=kind))
    return rows


def live_rows(cases: list[dict], commit: str = "") -> list[dict[str, Any]]:
    """Rows of the faults of running chains; each case ends by the same command with the undisturbed artefacts, or is bad."""
    rows, at = [], {"commit": commit} if commit else {}
    if killed := [case for case in cases if case["fault"] == "kill -9"]:
        places = ", ".join(f"{case['where']} {case['times']}" for case in killed)
        goal = None if commit else 100
        rows.append(row("kills", sum(case["times"] for case in killed), "kills", goal, "higher", places, **at))
    for fault in dict.fromkeys(case["fault"] for case in cases):
        mine = [case for case in cases if case["fault"] == fault]
        bad = [case for case in mine if case["outcome"] not in ("mended", "reported")]
        note = "; ".join(f"{case['where']}: {case['outcome']}" for case in bad) or "same artefacts as undisturbed"
        notes = "; ".join(f"{case['where']}: {case['note']}" for case in mine if case.get("note"))
        rows.append(
            row("faults_survived", 1 - len(bad) / len(mine), "", None if commit else 1, "higher",
                "; ".join(filter(None, (note, notes))), fault=fault, **at)
        )  # fmt: skip
    what = {"faults": "running chains"} | at
    counts = Counter(case["outcome"] for case in cases)
    for name, outcome in (("silent", "silent"), ("lost", "lost"), ("tracebacks", "traceback"), ("stuck", "stuck")):
        rows.append(
            row(
                f"faults_{name}",
                counts[outcome],
                "cases",
                None if commit else 0,
                "lower",
                f"of {len(cases)} faults",
                **what,
            )
        )
    return rows


def write(rows: Iterable[dict], command: str = "make test-faults") -> None:
    write_results("faults", list(rows), command)


def main() -> None:
    """python -m faults.results --at-rest cases.jsonl --live faults.jsonl --before old.jsonl"""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--at-rest", type=Path)
    parser.add_argument("--live", type=Path)
    parser.add_argument("--before", type=Path, help=f"damage at rest of {BEFORE}")
    parser.add_argument("--before-live", type=Path, help=f"running chains of {BEFORE}")
    args = parser.parse_args()
    rows = at_rest_rows(read(args.at_rest)) if args.at_rest else []
    rows += live_rows(read(args.live)) if args.live else []
    rows += at_rest_rows(read(args.before), BEFORE) if args.before else []
    rows += live_rows(read(args.before_live), BEFORE) if args.before_live else []
    write(rows)


if __name__ == "__main__":
    main()
