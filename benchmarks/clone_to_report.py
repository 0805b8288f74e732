"""From a fresh clone to a report, as a newcomer does it, and the same command again: wall time and accuracy.

    python benchmarks/clone_to_report.py

Clones this checkout's last commit into a new folder, runs `make train_vqa` there twice, and removes the folder. Packages
come from the package cache where there is one; say so with the figure.
"""

import json
import tempfile
from pathlib import Path

from results import ROOT, row, timed, write_results


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="clone_to_report_") as folder:
        clone = Path(folder) / "project"
        cloned = timed("git", "clone", "--quiet", ROOT, clone)
        made = timed("make", "train_vqa", cwd=clone)
        again = timed("make", "train_vqa", cwd=clone)
        if "Nothing to be done" not in again.output:
            raise SystemExit(f"the second run had something to do:\n{again.output}")
        evaluation = json.loads((clone / "output/stage2_sft_vqa_results/evaluation.json").read_text())
        note = f"{evaluation['samples']} held-out samples, chain to report included"
    rows = [
        row("clone_to_report_s", cloned.seconds + made.seconds, "s", 240, "lower", "packages cached"),
        row("demo_accuracy", evaluation["accuracy"], "", 0.95, "higher", note),
        row("noop_rerun_s", again.seconds, "s", 5, "lower", "`make train_vqa` of a finished target"),
    ]
    write_results("clone_to_report", rows)


if __name__ == "__main__":
    main()
