"""From a fresh clone to a report, as a newcomer does it, and the same command again: wall time and accuracy.

    python benchmarks/clone_to_report.py

Clones this checkout's last commit into a new folder, runs `make train_vqa` there twice, and removes the folder. Packages
come from the package cache where there is one; say so with the figure.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from results import row, write_results

PROJECT = Path(__file__).parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="clone_to_report_") as folder:
        clone = Path(folder) / "project"
        began = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(clone)], check=True)
        make_train(clone)
        first = time.monotonic() - began
        began = time.monotonic()
        output = make_train(clone)
        again = time.monotonic() - began
        if "Nothing to be done" not in output:
            raise SystemExit(f"the second run had something to do:\n{output}")
        evaluation = json.loads((clone / "output/stage2_sft_vqa_results/evaluation.json").read_text())
        note = f"{evaluation['samples']} held-out samples, chain to report included"
    write_results(
        "clone_to_report",
        [
            row("clone_to_report_s", first, "s", 240, "lower", "packages cached"),
            row("demo_accuracy", evaluation["accuracy"], "", 0.95, "higher", note),
            row("noop_rerun_s", again, "s", 5, "lower", "`make train_vqa` of a finished target"),
        ],
    )


def make_train(clone: Path) -> str:
    run = subprocess.run(["make", "train_vqa"], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise SystemExit(run.stdout)
    return run.stdout


if __name__ == "__main__":
    main()
