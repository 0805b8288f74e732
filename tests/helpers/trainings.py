"""Run directories that are trained, stopped, changed and trained on; also for benchmarks/resume.py."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT, SCRIPTS
from llava_sft.files import read_json, write_json
from llava_sft.run.layout import checkpoint_dir
from llava_sft.run.records import read_jsonl

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
        argv, env = [*before, sys.executable, *self.script()], ENVIRONMENT | environment
        with open(self.folder.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)

    def script(self) -> list[str]:
        """The script and its arguments."""
        done = self.folder.with_suffix(".done.json")
        return list(map(str, [SCRIPTS / "train.py", self.resolved, "--run-dir", self.folder, "--done", done]))

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
        records = read_jsonl(self.folder / "metrics.jsonl")
        return [(record["iteration"], record["lm loss"], record["grad-norm"]) for record in records]

    def samples(self) -> dict:
        return {path.name: read_jsonl(path) for path in sorted((self.folder / "samples").glob("*.jsonl"))}

    def validations(self) -> list:
        return read_jsonl(self.folder / "validation.jsonl")

    def weights(self, iteration: int) -> dict[str, bytes]:
        return stored(checkpoint_dir(self.folder, iteration))


def stored(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, weights and optimizer, as bytes."""
    from llava_sft.checkpoint.safetensors_io import tensor_bytes
    from llava_sft.checkpoint.torch_dist import TorchDistReader

    reader = TorchDistReader(checkpoint)
    return {name: bytes(tensor_bytes(reader.read(name))) for name in reader.tensors()}


def demo(project: Path) -> dict:
    """Resolved settings of the embedded experiment in a prepared project, for trainings that are started elsewhere."""
    resolved = read_json(project / "output/stage2_sft_vqa_results/resolved.json")
    for name in ("path", "sizes"):
        resolved["data"][name] = str(project / resolved["data"][name])
    resolved["start"] |= {key: str(project / resolved["start"][key]) for key in ("folder", "sidecars")}
    return resolved


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
