"""A run in Weights & Biases and its like: what is sent, once and to the same run; and that none of them can harm a training.

Stand-ins for the packages write down how they are called; where a package is installed, it is tried too, offline.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import train
from llava_sft.errors import SettingsError
from llava_sft.files import write_json
from llava_sft.run.records import append
from llava_sft.training import trackers

# One text stands in for all four: each takes the calls that its package is documented to take.
STAND_IN = """
import json, os, sys, time
from types import SimpleNamespace
def note(what, **given):
    with open(os.environ["NOTED"], "a") as file:
        file.write(json.dumps([__name__, what, given], default=str) + "\\n")
    if os.environ.get("BREAKS") == what:
        print("a long story"); raise ConnectionError("no way\\nto the server")
    if os.environ.get("HANGS") == what:
        time.sleep(60)
class Run:
    url, info = f"https://{__name__}.example/run", SimpleNamespace(run_id="given-there")
    define_metric = lambda self, *_, **given: None
    log = lambda self, values, **given: note("log", values=values, **given)
    finish = lambda self: note("finish")
def init(**given):
    note("init", **given); return Run()
log, finish = Run().log, Run().finish
def start_run(**given):
    note("init", **given); return Run()
log_metrics, end_run = Run().log, Run().finish
log_params = lambda config: note("params", config=config)
set_experiment = lambda project: note("experiment", project=project)
"""


@pytest.fixture
def run_dir(tmp_path, resolved, monkeypatch):
    run_dir = tmp_path / "output/stage2_sft_x"
    run_dir.mkdir(parents=True)
    write_json(run_dir / "run.json", resolved | {"run_name": "stage2_sft_x"})
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in trackers.DOORS:
        (packages / f"{name}.py").write_text(STAND_IN)
        for variable in trackers.VARIABLES[name]:
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("NOTED", str(tmp_path / "noted.jsonl"))
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for step in (10, 20):
        log_step(run_dir, step)
    return run_dir


def log_step(run_dir: Path, step: int) -> None:
    append(run_dir / "metrics.jsonl", {"iteration": step, "train_iters": 40, "lm loss": 1 / step, "grad-norm": None})


def validate(run_dir: Path, step: int) -> None:
    append(run_dir / "validation.jsonl", {"iteration": step, "lm loss validation": 0.5, "best": True, "answers": [{}]})


def noted(run_dir: Path, what: str, tracker: str) -> list[dict]:
    path = run_dir.parents[1] / "noted.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [given for name, called, given in lines if (name, called) == (tracker, what)]


def wait_for(there, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_records_are_sent_while_the_run_goes_on_once_and_after_a_resume_to_the_same_run(run_dir, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    names = list(trackers.DOORS)
    with trackers.followed(run_dir, names):
        wait_for(lambda: all(len(noted(run_dir, "log", name)) == 2 for name in names))
        log_step(run_dir, 30)
        validate(run_dir, 30)
    with trackers.followed(run_dir, names):  # a resume from step 20: step 30 is taken again
        log_step(run_dir, 40)
    for name in names:
        logged = noted(run_dir, "log", name)
        steps = [given["values"].get("iteration", given.get("step")) for given in logged]
        assert sorted(steps) == [10, 20, 30, 30, 40], name
        assert logged[0]["values"]["lm loss"] == 0.1 and "grad-norm" not in logged[0]["values"]
        assert {"lm loss validation": 0.5}.items() <= next(g for g in logged if "lm loss validation" in str(g))[
            "values"
        ].items()
        first, second = noted(run_dir, "init", name)
        if name == "mlflow":
            assert (first, second) == ({"run_name": "stage2_sft_x"}, {"run_id": "given-there"})
        else:
            assert first.get("id", first["name"]) == second.get("id", second["name"])
            assert first["resume"] == "allow" and first["config"]["lr"] == 1e-4
    assert noted(run_dir, "init", "wandb")[0]["name"] == "mine"
    assert noted(run_dir, "init", "swanlab")[0]["project"] == "llava-sft"
    assert noted(run_dir, "experiment", "mlflow")[0] == {"project": "ours"}
    assert "wandb: https://wandb.example/run" in capfd.readouterr().out


@pytest.mark.parametrize(
    "trouble",
    [{"BREAKS": "init"}, {"BREAKS": "log"}, {"HANGS": "init"}, {"HANGS": "log"}, {"HANGS": "finish"}],
)
def test_a_broken_or_hanging_tracker_costs_the_run_nothing_and_the_next_start_sends_the_rest(
    run_dir, monkeypatch, capfd, trouble
):
    monkeypatch.setattr(trackers, "PATIENCE_S", 1.5)
    [(variable, what)] = trouble.items()
    monkeypatch.setenv(variable, what)
    began = time.monotonic()
    with trackers.followed(run_dir, ["swanlab"]):
        inside = time.monotonic() - began
        wait_for(lambda: noted(run_dir, "log" if what == "finish" else what, "swanlab"))
    assert inside < 1
    said = capfd.readouterr().out
    if "BREAKS" in trouble:
        assert "warning: swanlab: ConnectionError: no way to the server" in said
        assert "Traceback" not in said and "a long story" in (run_dir / "trackers/swanlab.log").read_text()
    else:
        assert "swanlab has not taken everything within 2 s" in said
    assert f"llava_sft.training.trackers {run_dir} swanlab < /dev/null" in said
    monkeypatch.delenv(variable)
    monkeypatch.setattr(trackers, "PATIENCE_S", 30)
    with trackers.followed(run_dir, ["swanlab"]):
        pass
    steps = [given["step"] for given in noted(run_dir, "log", "swanlab")]
    assert set(steps) == {10, 20} and len(steps) == (4 if what == "finish" else len(steps))  # it may not have sent them
    assert len({given["id"] for given in noted(run_dir, "init", "swanlab")}) == (2 if what == "init" else 1)


def test_a_stop_signal_ends_the_wait_for_a_tracker_and_not_the_run(run_dir, monkeypatch, capfd):
    monkeypatch.setenv("HANGS", "finish")
    with trackers.followed(run_dir, ["wandb"]):
        wait_for(lambda: noted(run_dir, "log", "wandb"))
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
    assert time.monotonic() < began + 10
    assert "wandb has not taken everything within 1 s" in capfd.readouterr().out


def test_a_package_that_is_missing_is_said_before_anything_runs(monkeypatch):
    trackers.require_packages([])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(SettingsError) as error:
        trackers.require_packages(["wandb"])
    assert "trackers: wandb" in error.value.problem and "pip install wandb" in error.value.fix


def test_a_training_is_followed_from_its_start_to_its_end(run_dir, resolved, monkeypatch, tmp_path):
    happened = []

    @contextlib.contextmanager
    def followed(folder, names):
        happened.append((folder, names))
        yield
        happened.append("over")

    answers = {"open_run": 5, "iterations_done": 7, "launch": 0} | dict.fromkeys(
        (
            "check_nodes",
            "check_node",
            "read_run",
            "check_space",
            "check_what_is_loaded",
            "prune",
            "forget_after",
            "require_packages",
        )
    )
    for name, answer in answers.items():
        monkeypatch.setattr(
            train, name, lambda *args, name=name, answer=answer, **named: happened.append(name) or answer
        )
    monkeypatch.setattr(train, "followed", followed)
    write_json(tmp_path / "resolved.json", resolved | {"settings": resolved["settings"] | {"trackers": ["wandb"]}})
    monkeypatch.setattr(
        sys, "argv", ["train.py", str(tmp_path / "resolved.json"), "--run-dir", str(run_dir), "--done", "d"]
    )
    with pytest.raises(SystemExit):
        train.main()
    following = happened.index((run_dir, ("wandb",)))
    assert happened.index("require_packages") < following
    assert happened[following + 1 : following + 3] == ["launch", "over"]


@pytest.mark.parametrize("name", list(trackers.DOORS))
def test_the_real_package_takes_a_run_offline(name, run_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("PYTHONPATH")
    if not find_spec(name):
        pytest.skip(f"{name} is not installed")
    for variable, value in {
        "WANDB_MODE": "offline",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(variable, value)
    for _ in range(2):
        with trackers.followed(run_dir, [name]):
            log_step(run_dir, 30)
    assert "warning" not in capfd.readouterr().out
    assert json.loads((run_dir / f"trackers/{name}.json").read_text())["metrics.jsonl"] == 30
