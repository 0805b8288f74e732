"""A run in Weights & Biases, SwanLab, MLflow or trackio beside its own files (`trackers`).

Notable: the training knows nothing of it. A process for each tracker follows metrics.jsonl and validation.jsonl, so that one
that is slow, broken or without a network costs neither a step nor the run. What has arrived is noted in RUN/trackers/: a run
that resumes goes on in the same run there, and what a broken network kept back is sent by the next start, or by hand, on a
machine with a network: `python -m llava_sft.training.trackers RUN_DIR wandb < /dev/null`. Where it was killed, steps may come
twice; none is lost.
"""

import contextlib
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_sft.errors import SettingsError
from llava_sft.files import read_json, write_json
from llava_sft.run.identity import read_run
from llava_sft.run.layout import METRICS, VALIDATION
from llava_sft.run.records import Tail
from llava_sft.settings.resolved import Resolved
from llava_sft.training.launcher import cut_short

PROJECT = "llava-sft"
# The variables that name project and run, as each tracker's documentation has them.
VARIABLES = {
    "wandb": ("WANDB_PROJECT", "WANDB_NAME"), "swanlab": ("SWANLAB_PROJ_NAME", "SWANLAB_EXP_NAME"),
    "mlflow": ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"), "trackio": ("TRACKIO_PROJECT", "TRACKIO_NAME"),
}  # fmt: skip
SECONDS = 2.0  # from one look at the files to the next
PATIENCE_S = 30.0  # with a tracker that has not sent everything when the training is over
LAST_LINE = 300  # characters of an error, at most


def require_packages(trackers: Sequence[str]) -> None:
    """Raise SettingsError for a tracker whose package is not installed."""
    for name in trackers:
        if not find_spec(name):
            pip = f"{sys.executable} -m pip" if find_spec("pip") else f"{sys.prefix}/bin/uv pip"
            raise SettingsError(
                f"trackers: {name}: the package {name} is not installed in {sys.prefix}",
                f"{pip} install {name} (`make` keeps it), or trackers: []",
            )


@contextlib.contextmanager
def followed(run_dir: Path, trackers: Sequence[str]) -> Iterator[None]:
    """Have each tracker follow the run while the block runs, and give it PATIENCE_S afterwards."""
    following = {
        name: subprocess.Popen(_command(run_dir, name), stdin=subprocess.PIPE, start_new_session=True)
        for name in trackers
    }
    try:
        yield
    finally:
        for process in following.values():
            assert process.stdin
            process.stdin.close()
        began = time.monotonic()
        with cut_short():
            for process in following.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, began + PATIENCE_S - time.monotonic()))
        waited = time.monotonic() - began
        for name, process in following.items():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                print(
                    f"warning: {name} has not taken everything within {waited:.0f} s{_later(run_dir, name)}", flush=True
                )


def _command(run_dir: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "llava_sft.training.trackers", str(run_dir), name]


def _later(run_dir: Path, name: str) -> str:
    return f"; the next start sends the rest, or {shlex.join(_command(run_dir, name))} < /dev/null"


# --- in the tracker's own process -------------------------------------------------------------------------------------


class Wandb:
    """Weights & Biases. A door opens with the id of the run there (None: a new one), and has it and its address afterwards."""

    def __init__(self, identifier: str | None, project: str, name: str, folder: Path, config: dict[str, Any]):
        import wandb

        self.id = identifier or uuid.uuid4().hex[:21]
        where = {} if "WANDB_DIR" in os.environ else {"dir": str(folder)}
        self.run = wandb.init(project=project, name=name, id=self.id, resume="allow", config=config, **where)
        self.run.define_metric("*", step_metric="iteration")  # its own step would refuse one that comes late
        self.address = self.run.url

    def log(self, values: dict[str, float], iteration: int) -> None:
        self.run.log(values | {"iteration": iteration})

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    def __init__(self, identifier: str | None, project: str, name: str, folder: Path, config: dict[str, Any]):
        import swanlab

        self.id = identifier or uuid.uuid4().hex[:21]
        self.run = swanlab.init(
            project=project, name=name, id=self.id, resume="allow", log_dir=str(folder), config=config
        )
        self.address = None
        with contextlib.suppress(ValueError):  # it has one only online
            self.address = self.run.url
        self.close = swanlab.finish
        self.log = lambda values, iteration: swanlab.log(values, step=iteration)


class MLflow:
    def __init__(self, identifier: str | None, project: str, name: str, folder: Path, config: dict[str, Any]):
        # Without a server all runs of an output folder lie in one database, which `mlflow ui` shows.
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve().parents[1] / 'mlflow.db'}")
        import mlflow

        mlflow.set_experiment(project)
        run = mlflow.start_run(run_id=identifier) if identifier else mlflow.start_run(run_name=name)
        if not identifier:
            mlflow.log_params(config)
        address = re.sub("//[^/@]*@", "//", os.environ["MLFLOW_TRACKING_URI"])  # without a password in it
        self.id, self.address, self.close = run.info.run_id, address, mlflow.end_run
        self.log = lambda values, iteration: mlflow.log_metrics(values, step=iteration)


class Trackio:
    def __init__(self, identifier: str | None, project: str, name: str, folder: Path, config: dict[str, Any]):
        import trackio

        self.id = identifier or f"{name}-{uuid.uuid4().hex[:6]}"  # a run's name is its id there
        trackio.init(project=project, name=self.id, resume="allow", config=config)
        self.address, self.close = f"trackio show --project {shlex.quote(project)}", trackio.finish
        self.log = lambda values, iteration: trackio.log(values, step=iteration)


DOORS: dict[str, Any] = {"wandb": Wandb, "swanlab": SwanLab, "mlflow": MLflow, "trackio": Trackio}


def main(folder: str, name: str) -> int:
    """Send a run's records to one tracker until the stdin ends. What the tracker prints goes to its log in RUN/trackers/."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # Slurm signals every process of a job; the training ends, then this does
    run_dir = Path(folder)
    notes = run_dir / "trackers"
    notes.mkdir(exist_ok=True)
    terminal = os.fdopen(os.dup(1), "w")
    with open(notes / f"{name}.log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        _follow(run_dir, name, terminal)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:LAST_LINE]
        print(
            f"warning: {name}: {said}\n  the training goes on without it{_later(run_dir, name)}",
            file=terminal,
            flush=True,
        )
        return 1
    return 0


def _follow(run_dir: Path, name: str, terminal: Any) -> None:
    state_file = run_dir / "trackers" / f"{name}.json"
    state = read_json(state_file, {"id": None})  # its id there, and of each file the last step that was sent
    resolved = read_run(run_dir)
    project, run_name = (os.environ.get(variable) for variable in VARIABLES[name])
    project = resolved.settings.tracker_project or project or PROJECT
    door = DOORS[name](state["id"], project, run_name or resolved.run_name, state_file.parent, _config(resolved))
    state["id"] = door.id
    write_json(state_file, state)
    if door.address:
        print(f"{name}: {door.address}", file=terminal, flush=True)
    formats = {METRICS: lambda record: (METRICS, record), VALIDATION: lambda record: (VALIDATION, record)}
    tail = Tail(run_dir, formats, whole=True)
    ended, latest = False, dict[str, int]()
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], SECONDS)[0])  # nobody writes there: it has ended
        for file, record in tail.new():
            iteration = record["iteration"]
            if iteration > state.get(file, 0):  # steps that are taken again after a resume have the same values
                door.log(_numbers(record), iteration)
                latest[file] = iteration
        sent = state | latest
        # The others send in the background, and have sent when they close.
        if sent != state and isinstance(door, MLflow):
            write_json(state_file, sent)
        state = sent
    door.close()
    write_json(state_file, state)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    plain = {key: value for key, value in record.items() if type(value) in (int, float) and math.isfinite(value)}
    return {key: value for key, value in plain.items() if key not in ("iteration", "train_iters")}


def _config(resolved: Resolved) -> dict[str, Any]:
    about = {
        "parameters_from": resolved.start.load,
        "samples": resolved.data.train_samples,
        "data": resolved.data.fingerprint,
    }
    return resolved.settings.dump() | about | {f"version of {package}": it for package, it in resolved.versions.items()}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
