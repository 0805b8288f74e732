"""Proof that an interrupted run is the undisturbed run: loss of every step, sample ids, final weights, bit for bit.

    python benchmarks/resume.py table            # each interruption × precision × data-parallel size
    python benchmarks/resume.py kills --count 30 # random kill -9 over one training

Uses the embedded data set (`snakemake preflight_vqa` once). Writes benchmarks/results/resume_<what>.json: 1 is equal.
"""

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llava_sft.files import read_json, write_json
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.layout import checkpoint_dir
from llava_sft.run.records import read_jsonl
from results import ROOT, row, write_results

SMALL = {"micro_batch_size": 8, "global_batch_size": 16, "log_interval": 1, "log_samples": True, "log_answers": 1}
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1"}


class Run:
    """One run directory, trained by workflow_scripts/train.py as often as it takes."""

    def __init__(self, base: dict, folder: Path, **settings):
        self.folder, self.resolved = folder, folder.with_suffix(".resolved.json")
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)
        values = base["settings"] | SMALL | settings
        values |= {"lr_decay_iters": values["train_iters"], "eval_iters": 1}
        values |= {"eval_interval": settings.get("eval_interval", values["save_interval"])}
        write_json(self.resolved, base | {"settings": values})

    def start(self, *before: str, **environment: str) -> subprocess.Popen:
        """`before`: words in front of the command; `environment`: variables on top of ours."""
        script = list(before)
        script += [sys.executable, str(ROOT / "workflow_scripts/train.py"), str(self.resolved)]
        script += ["--run-dir", str(self.folder), "--done", str(self.folder.with_suffix(".done.json"))]
        log = open(self.folder.with_suffix(".log"), "ab")  # noqa: SIM115 (the child's)
        return subprocess.Popen(
            script, cwd=ROOT, env=ENVIRONMENT | environment, stdout=log, stderr=log, start_new_session=True
        )

    def finish(self, *before: str, **environment: str) -> int:
        return self.start(*before, **environment).wait()

    def said(self) -> str:
        """Everything that train.py printed, over all starts."""
        return self.folder.with_suffix(".log").read_text()

    def interrupt(self, at: int, number: int) -> int:
        """Signal the run once it has logged step `at`: SIGKILL to all its processes, else to train.py alone."""
        process = self.start()
        while process.poll() is None and not self.logged(at):
            time.sleep(0.02)
        kill(process, number)
        return process.wait()

    def logged(self, step: int) -> bool:
        return any(record["iteration"] >= step for record in read_jsonl(self.folder / "metrics.jsonl"))

    def change(self, **settings) -> None:
        resolved = read_json(self.resolved)
        self.write(resolved | {"settings": resolved["settings"] | settings})

    def write(self, resolved: dict) -> None:
        write_json(self.resolved, resolved)

    def losses(self) -> list:
        return [
            (record["iteration"], record["lm loss"], record["grad-norm"])
            for record in read_jsonl(self.folder / "metrics.jsonl")
        ]

    def samples(self) -> dict:
        return {path.name: read_jsonl(path) for path in sorted((self.folder / "samples").glob("*.jsonl"))}

    def validations(self) -> list:
        return read_jsonl(self.folder / "validation.jsonl")

    def weights(self, iteration: int) -> dict[str, bytes]:
        """Every tensor of a checkpoint, weights and optimizer, as bytes."""
        from llava_sft.checkpoint.safetensors_io import tensor_bytes
        from llava_sft.checkpoint.torch_dist import TorchDistReader

        reader = TorchDistReader(checkpoint_dir(self.folder, iteration))
        return {name: bytes(tensor_bytes(reader.read(name))) for name in reader.tensors()}


def kill(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)


def same(run: Run, undisturbed: Run, steps: int) -> dict[str, bool]:
    return {
        "losses": run.losses()[-1][0] == steps and run.losses() == undisturbed.losses(),
        "samples": bool(run.samples()) and run.samples() == undisturbed.samples(),
        "validation": all(record in run.validations() for record in undisturbed.validations()),
        "weights": run.weights(steps) == undisturbed.weights(steps),
    }


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
            where = {"interruption": what, "precision": "bf16" if bf16 else "fp32", "data_parallel": ranks}
            where |= {"packing": packing}
            yield row("resume_is_exact", all(equal.values()), "", 1, "higher", note, **where)


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
    parser.add_argument(
        "--cases", nargs="*", default=["fp32_dp1", "fp32_dp1_packed", "fp32_dp2", "bf16_dp1", "bf16_dp2"]
    )
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--resolved", type=Path, default=ROOT / "output/stage2_sft_vqa_results/resolved.json")
    parser.add_argument("--out", type=Path, default=Path("/tmp/llava_sft_resume"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = read_json(args.resolved)
    rows = table(base, args.out, args.cases) if args.what == "table" else kills(base, args.out, args.count)
    for each in rows:
        write_results(f"resume_{args.what}", [each])


if __name__ == "__main__":
    main()
