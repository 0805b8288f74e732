"""Proof that an interrupted run is the undisturbed run: loss of every step, sample ids, final weights, bit for bit.

    python benchmarks/resume.py table            # each interruption × precision × data-parallel size
    python benchmarks/resume.py kills --count 30 # random kill -9 over one training

Uses the embedded data set (`snakemake preflight_vqa` once). Writes benchmarks/results/resume_<what>.json: 1 is equal.
"""

import argparse
import itertools
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llava_sft.files import read_json
from llava_sft.run.checkpoints import iterations_done
from results import DEMO_RUN, ROOT, row, write_results

sys.path.insert(0, str(ROOT / "tests"))

from helpers.trainings import Run, kill, same

CASES = ["fp32_dp1", "fp32_dp1_packed", "fp32_dp2", "bf16_dp1", "bf16_dp2"]


def table(base: dict, out: Path, cases: list[str], steps: int = 20) -> Iterator[dict]:
    """One row per interruption; `cases`: fp32_dp1 … The intervals do not divide each other."""
    for bf16, ranks, packing in itertools.product((False, True), (1, 2), (False, True)):
        name = f"{'bf16' if bf16 else 'fp32'}_dp{ranks}{'_packed' if packing else ''}"
        if name not in cases:
            continue
        how = {"bf16": bf16, "nproc_per_node": ranks, "packing": packing, "train_iters": steps}
        how |= {"save_interval": 8, "log_interval": 3, "eval_interval": 7}
        undisturbed = Run(base, out / name, **how)
        assert undisturbed.finish() == 0, undisturbed.folder
        for what in ("SIGTERM", "SIGUSR1", "SIGKILL", "exit at a step", "time limit"):
            run = Run(base, out / f"{name}_{what.replace(' ', '_')}", **how)
            if what.startswith("SIG"):
                code = run.interrupt(11, signal.Signals[what])
            elif what == "time limit":
                run.change(max_minutes=0.001)
                code = run.finish()
                run.change(max_minutes=None)
            else:  # trained to step 12, then made longer
                run.change(train_iters=12)
                code = run.finish()
                run.change(train_iters=steps)
            reached = iterations_done(run.folder)
            assert run.finish() == 0, run.folder
            equal = same(run, undisturbed, steps)
            note = ", ".join(f"{key} {'equal' if value else 'DIFFER'}" for key, value in equal.items())
            note = f"exit code {code}, resumed at step {reached}: {note}"
            where = {"precision": "bf16" if bf16 else "fp32", "data_parallel": ranks, "packing": packing}
            equal = all(equal.values())
            yield row("resume_is_exact", equal, "", 1, "higher", note, interruption=what, **where)


def kills(base: dict, out: Path, count: int, steps: int = 120) -> Iterator[dict]:
    how = {"train_iters": steps, "save_interval": 4}
    undisturbed, run = Run(base, out / "undisturbed", **how), Run(base, out / "killed", **how)
    assert undisturbed.finish() == 0
    chance, places = random.Random(1), []
    for number in range(count):
        process, before = run.start(), iterations_done(run.folder)
        # Half of them at any moment of start or training, half of them within a second after a save.
        if number % 2:
            while process.poll() is None and iterations_done(run.folder) == before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1))
        else:
            time.sleep(chance.uniform(0, 12))
        kill(process, signal.SIGKILL)
        process.wait()
        time.sleep(0.2)
        places.append(iterations_done(run.folder))
        print(f"kill {number + 1}: at step {places[-1]}", flush=True)
    assert run.finish() == 0
    equal = same(run, undisturbed, steps)
    print(equal)
    unfinished = len(re.findall("not finished when", run.said()))
    note = f"{count} kills, whole checkpoints after them: {places}; half-written checkpoints met: {unfinished}; {equal}"
    yield row("resume_is_exact", all(equal.values()), "", 1, "higher", note, interruption="random kill -9", kills=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table", "kills"])
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--resolved", type=Path, default=DEMO_RUN)
    parser.add_argument("--out", type=Path, default=Path("/tmp/llava_sft_resume"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = read_json(args.resolved)
    rows = table(base, args.out, args.cases) if args.what == "table" else kills(base, args.out, args.count)
    for each in rows:
        write_results(f"resume_{args.what}", [each])


if __name__ == "__main__":
    main()
