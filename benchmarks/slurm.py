"""Time to plan, to look through again, and to submit 10,000 conversion jobs under `--profile slurm`.

    python benchmarks/slurm.py                   # submits to a Slurm of its own where it can be had (see tests/helpers/mini_slurm.py)

Works in a clone of the project, on records as large as a shard. For the second look the outputs are made by hand; for the
submission both nodes are drained, so that no job starts.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import ROOT, row, timed, write_results

sys.path.insert(0, str(ROOT / "tests"))

from helpers import mini_slurm

SNAKEMAKE = Path(sys.executable).with_name("snakemake")
LINE = 512  # bytes of a record, and of a job's range
JOBS, PLAN_GOAL_S = 10_000, 20
ONE_BY_ONE_S = 132  # 10,000 jobs of a toy workflow, submitted singly


def copy_project(target: Path) -> None:
    timed("git", "clone", "--quiet", ROOT, target)
    profile = target / "profiles/slurm/config.yaml"
    text = profile.read_text().replace("# slurm-status-command", "slurm-status-command")
    profile.write_text(re.sub(r"mem_mb: \d+", "mem_mb: 100", text))


def write_data(project: Path) -> None:
    """An experiment `big` whose raw file makes JOBS shards."""
    conversations = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "One."}]
    record = json.dumps({"id": "0", "conversations": conversations})
    (project / "big.jsonl").write_text((record + " " * (LINE - 1 - len(record)) + "\n") * JOBS)
    for name in ("tokenizer.json", "config.json"):
        (project / name).write_text("{}")
    (project / "config/experiments/big.yaml").write_text(
        f"raw_data: big.jsonl\nshard_bytes: {LINE}\nmodel: tiny\nload: random\ntokenizer: .\n"
    )


def make_outputs(project: Path) -> None:
    """Empty files for everything that `data_big` makes, noted by Snakemake as made."""
    folder = project / "output/data/big"
    kinds = {"webdatasets": ("tar", "tar.idx"), "webdatasets.parts": ("samples.jsonl", "stats.json", "rejects.jsonl")}
    for place, names in kinds.items():
        (folder / place).mkdir(parents=True)
        for number, name in itertools.product(range(JOBS), names):
            (folder / place / f"subtaskdata-{number:05d}.{name}").touch()
    (folder / "dataset.json").touch()
    timed(SNAKEMAKE, "--cores", "1", "--touch", "data_big", cwd=project)


def submit(project: Path, cluster: mini_slurm.MiniSlurm) -> tuple[float, int]:
    """Seconds until all jobs are in the queue, and how many Slurm jobs these are. No job starts."""
    for name in mini_slurm.NODES:
        cluster.ask("scontrol", "update", f"nodename={name}", "state=drain", "reason=measured")
    began = time.monotonic()
    with open(project / "submit.log", "w") as log:
        command = [SNAKEMAKE, "--profile", "slurm", "data_big"]
        running = subprocess.Popen(command, cwd=project, stdout=log, stderr=log, start_new_session=True)
    seen, last = 0, began
    while not seen or time.monotonic() < last + 10:  # ten seconds without a new one: that was the last
        time.sleep(0.5)
        count = len(cluster.jobs())
        if count > seen:
            seen, last = count, time.monotonic()
        if running.poll() is not None:
            raise SystemExit((project / "submit.log").read_text()[-3000:])
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    cluster.ask("scancel", "--me")
    cluster.wait("an empty queue", lambda: not cluster.jobs(), 300)
    shutil.rmtree(project / ".snakemake")  # of jobs that never began
    return last - began, seen


def main() -> None:
    reason = mini_slurm.missing()
    with tempfile.TemporaryDirectory(prefix="slurm_plan_") as folder:
        project = Path(folder) / "project"
        copy_project(project)
        write_data(project)
        plan = timed(SNAKEMAKE, "data_big", "--profile", "slurm", "-n", "--quiet", "all", cwd=project)
        rows = [row(f"plan_{JOBS}_jobs_s", plan.seconds, "s", PLAN_GOAL_S, "lower", "dry run", jobs=JOBS)]
        if reason:
            print(f"nothing is submitted: {reason}")
        else:
            with mini_slurm.MiniSlurm(Path(folder) / "slurm") as cluster:
                seconds, count = submit(project, cluster)
            note = f"{count} Slurm jobs, from the command to the last in the queue"
            rows.append(row(f"submit_{JOBS}_jobs_s", seconds, "s", ONE_BY_ONE_S, "lower", note, jobs=JOBS))
        make_outputs(project)
        again = timed(SNAKEMAKE, "--profile", "slurm", "data_big", cwd=project)
        assert "Nothing to be done" in again.output, again.output
        rows.append(row(f"noop_{JOBS}_jobs_s", again.seconds, "s", PLAN_GOAL_S, "lower", "", jobs=JOBS))
    write_results("slurm", rows)


if __name__ == "__main__":
    main()
