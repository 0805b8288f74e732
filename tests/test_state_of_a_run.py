"""What a run keeps beside its weights: exact after any interruption, and damage to it is never believed. No training."""

import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import list_runs
import train
from helpers.runs import VALUES, open_run, save
from llava_sft import inputs, machine
from llava_sft.errors import RunError, SettingsError, SftError
from llava_sft.files import read_json, write_json
from llava_sft.run.checkpoints import damage, iterations_done, newest_whole, prune, seal
from llava_sft.run.coverage import sample_counts
from llava_sft.run.identity import refuse_other_run
from llava_sft.run.layout import BAD_STEPS, METRICS, VALIDATION, checkpoint_dir
from llava_sft.run.lock import is_running, lock
from llava_sft.run.records import append, forget_after, read_jsonl, read_metrics
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.settings.resolved import Resolved
from llava_sft.training import watch as watch_module
from llava_sft.training.watch import Watch

SETTINGS = VALUES.model_copy(update={"log_samples": True, "log_interval": 7, "train_iters": 30, "max_bad_steps": 4})
LOSSES = [math.sin(i) + 3 for i in range(31)]
LOSSES[12], LOSSES[13], LOSSES[20] = 30.0, math.nan, 40.0  # bad steps, two of them in a row


def steps(folder: Path, first: int, last: int, save_every: int = 3) -> None:
    """Steps `first` + 1 … `last` of a run, as Megatron takes them: step, validation, checkpoint."""
    forget_after(folder, first)
    watch = Watch(folder, SETTINGS, 0, 1, first, True, None, None)
    for i in range(first + 1, last + 1):
        watch.batch(0.0, 10 + i, 40 + i, 1.0, [f"sample{i}"])
        watch.step(i, LOSSES[i], {"learning-rate": 1e-5}, LOSSES[i], 1.0)
        if not i % 5:
            append(folder / VALIDATION, {"iteration": i, "lm loss validation": LOSSES[i]})
        if not i % save_every or i == last:
            watch.save(i)
            save(folder, i)


def written(folder: Path) -> dict[str, list]:
    """The records of a run, without what time decides."""
    names = (METRICS, VALIDATION, BAD_STEPS, "events.jsonl", "samples/rank000.jsonl")
    timed = ("step_s", "tokens_per_s", "data_wait_share")
    records = {name: read_jsonl(folder / name) for name in names}
    return {name: [repr({k: v for k, v in r.items() if k not in timed}) for r in records[name]] for name in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    steps(folder, 0, 30)
    assert [r["iteration"] for r in read_metrics(folder)] == [7, 14, 21, 28, 30]
    return written(folder)


@pytest.mark.parametrize("stops", [[1], [6], [8, 9, 10], [13], [20, 21, 22], [29], list(range(1, 30))])
def test_records_after_an_interruption_at_any_step_are_those_of_an_undisturbed_run(tmp_path, undisturbed, stops):
    for first, last in zip([0, *stops], [*stops, 30], strict=True):
        steps(tmp_path, first, last)
    assert written(tmp_path) == undisturbed


def test_records_after_a_return_to_an_older_checkpoint_are_those_of_an_undisturbed_run(tmp_path, undisturbed):
    steps(tmp_path, 0, 23)
    (checkpoint_dir(tmp_path, 23) / ".metadata").write_bytes(b"METADATA")
    (checkpoint_dir(tmp_path, 21) / "checksums.json").write_bytes(b"{}")
    assert newest_whole(tmp_path) == 18
    steps(tmp_path, 18, 30)
    assert written(tmp_path) == undisturbed


# --- damage at rest --------------------------------------------------------------------------------------------------


def zero(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at : at + 5] = bytes(len(data[at : at + 5]))


def digit(data: bytearray, chance: random.Random) -> None:
    at = chance.choice([i for i, byte in enumerate(data) if chr(byte).isdigit()] or [0])
    data[at] = ord("7") if data[at] != ord("7") else ord("3")


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def lines_gone(data: bytearray, chance: random.Random) -> None:
    data[:] = b"\n".join(bytes(data).split(b"\n")[: chance.randrange(2)]) + b"\n"


def foreign(data: bytearray, chance: random.Random) -> None:
    data[:] = chance.choice([b"[]", b"null", b'"text"', b"{}", b"12", b"\xff\xfe\x00", b"[" * 100_000])


DAMAGED = (
    "latest_checkpointed_iteration.txt", "iter_0000030/checksums.json", "run.json", "best.json", ".lock", ".verified.json",
    METRICS, VALIDATION, BAD_STEPS, "events.jsonl", "samples/rank000.jsonl",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shipped_settings):
    """A run of 30 steps, and its settings."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.mkdir()
    (folder.parent / "config.json").write_text("{}")
    values = {
        "run_name": "run", "why": {}, "settings": shipped_settings | {"train_iters": 40}, "model": {"name": "tiny"},
        "data": {"fingerprint": "d"}, "start": {"fingerprint": "s", "sidecars": str(folder.parent)},
    }  # fmt: skip
    assert open_run(folder, values) == 0
    steps(folder, 0, 30)
    write_json(folder / "best.json", {"iteration": 15}, sealed=True)
    write_json(folder / ".lock", {"host": platform.node(), "pid": 4_000_000}, indent=None)
    return folder, values


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_a_run_is_neither_believed_nor_in_the_way(tmp_path, whole, undisturbed, name):
    folder, values = whole
    folder = Path(shutil.copytree(folder, tmp_path / "run"))
    damage(folder, 30)  # which leaves .verified.json
    data = (folder / name).read_bytes()
    for harm, seed in itertools.product((zero, digit, cut, lines_gone, foreign, bytearray.clear), range(2)):
        hurt = bytearray(data)
        harm(*(hurt, random.Random(f"{name}{seed}"))[: 1 if harm is bytearray.clear else 2])
        (folder / name).write_bytes(hurt)
        os.utime(folder / name, (1, 1))
        assert iterations_done(folder) == 30
        assert list_runs.describe(folder)[0] == "run"
        lock(folder).close()
        prune(folder, 20, None)
        set_aside = folder / "damaged_iter_0000030"
        assert open_run(folder, values) == (27 if "checksums" in name and hurt != data else 30)
        if set_aside.is_dir():
            set_aside.rename(folder / "iter_0000030")
        else:
            found, wanted = written(folder), dict(undisturbed)
            if name.startswith("samples") and hurt != data:  # of these there is no copy: fewer, and none is wrong
                assert set(found.pop(name)) < set(wanted.pop(name))
            assert found == wanted
        (folder / name).write_bytes(data)


def test_counts_of_samples_are_unknown_rather_than_wrong_when_a_step_is_lost(tmp_path):
    steps(tmp_path, 0, 10)
    path = tmp_path / "samples/rank000.jsonl"
    path.write_bytes(path.read_bytes().replace(b"sample4", b"sample5"))
    with pytest.raises(RunError, match="9 of 10 steps"):
        sample_counts(tmp_path, tmp_path, 10)


def test_what_a_killed_process_left_while_sealing_is_no_part_of_the_checkpoint(tmp_path):
    folder = save(tmp_path, 10, sealed=False)
    (folder / ".checksums.json.4711.tmp").write_text("{")
    seal(tmp_path, 10)
    assert not (folder / ".checksums.json.4711.tmp").exists() and damage(tmp_path, 10) is None
    noted = read_json(folder / "checksums.json")
    noted["iter_0000010/.checksums.json.1.tmp"] = [1, "0"]  # as earlier versions sealed it
    write_json(folder / "checksums.json", noted)
    assert damage(tmp_path, 10) is None


def test_a_finished_checkpoint_is_read_again_only_where_it_may_have_changed(tmp_path, monkeypatch):
    save(tmp_path, 10)
    assert damage(tmp_path, 10, deep=False) is None
    monkeypatch.setattr("llava_sft.checksums.file_hash", lambda path: pytest.fail(f"{path} is read again"))
    assert damage(tmp_path, 10, deep=False) is None
    monkeypatch.undo()
    path = checkpoint_dir(tmp_path, 10) / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)
    assert "does not hold what was written" in damage(tmp_path, 10, deep=False)


def test_the_settings_of_a_run_that_keeps_no_copy_of_them_are_asked_for(whole, tmp_path):
    folder, values = whole
    folder = Path(shutil.copytree(folder, tmp_path / "run"))
    for path in folder.glob("dataloader/*/run.json"):
        path.unlink()
    (folder / "run.json").write_text("{")
    with pytest.raises(SftError, match=r"run.json: damaged(.|\n)*load=.*iter_0000030"):
        open_run(folder, values)


# --- another run, other machines -------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_refused_run_changes_nothing_and_leaves_no_lock(whole, tmp_path, monkeypatch, capsys):
    folder, values = whole
    other = values | {"settings": values["settings"] | {"global_batch_size": 64}}
    before = state(folder)
    with pytest.raises(RunError, match="global_batch_size"):
        refuse_other_run(folder, Resolved.model_validate(other))
    write_json(tmp_path / "resolved.json", other, sealed=True)
    done = tmp_path / "train.done.json"
    done.write_text("of the finished run")
    monkeypatch.setattr(
        sys, "argv", ["train", str(tmp_path / "resolved.json"), "--run-dir", str(folder), "--done", str(done)]
    )
    with pytest.raises(SystemExit):
        train.main()
    assert "global_batch_size" in capsys.readouterr().err
    assert state(folder) | {str(folder / ".lock"): b""} == before | {str(folder / ".lock"): b""}
    assert not (folder / ".lock").read_bytes() and not is_running(folder) and done.read_text() == "of the finished run"


def test_gpus_that_cannot_train_as_asked_are_refused_before_anything_is_written(monkeypatch):
    def gpus(count: int, bf16: bool) -> ResolvedSettings:
        return ResolvedSettings(experiment="x", gpus_per_node=count, bf16=bf16)

    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    monkeypatch.setattr(machine, "require_engine", lambda gpus: None)
    inputs.check_gpus(gpus(2, bf16=True), 2, cluster=False)
    inputs.check_gpus(gpus(8, bf16=True), 8, cluster=True)
    inputs.check_gpus(gpus(0, bf16=False), 0, cluster=False)
    with pytest.raises(SettingsError, match="bf16 is false"):
        inputs.check_gpus(gpus(1, bf16=False), 1, cluster=True)
    with pytest.raises(SettingsError, match=r"gpus_per_node is 8, .* has 2"):
        inputs.check_gpus(gpus(8, bf16=True), 8, cluster=False)


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_records_that_a_full_disk_does_not_take_follow_when_it_has_room(tmp_path, capsys):
    path = tmp_path / METRICS
    path.symlink_to("/dev/full")
    append(path, {"iteration": 1})
    append(path, {"iteration": 2})
    assert capsys.readouterr().out.count("cannot be written: No space left on device") == 1
    path.unlink()
    append(path, {"iteration": 3})
    assert [record["iteration"] for record in read_jsonl(path)] == [1, 2, 3]


def test_tensorboard_forgets_the_steps_that_are_taken_again_and_may_fail(tmp_path, capsys):
    for first, value in ((0, 1.0), (3, 2.0)):
        writer = SummaryWriter(tmp_path)
        watch_module.purge(writer, first)
        for step in range(first + 1, 7):
            writer.add_scalar("lm loss", value, step)
        writer.close()
        time.sleep(1.1)  # the second is part of the file's name, by which TensorBoard orders them
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("lm loss")
    assert [(event.step, event.value) for event in events] == [(i, 1.0 if i < 4 else 2.0) for i in range(1, 7)]
    writer = SummaryWriter(tmp_path / "full")
    writer._get_file_writer().event_writer.add_event = lambda *args: (_ for _ in ()).throw(OSError(28, "No space"))
    watch_module.purge(writer, 0)
    writer.add_scalar("lm loss", 1.0, 1)
    assert "TensorBoard's file cannot be written" in capsys.readouterr().out


# --- signals ---------------------------------------------------------------------------------------------------------

TRAINER = """
import os, signal, sys, time
from llava_sft.training.launcher import end_with_parent, hold_back
os.register_at_fork(after_in_child=hold_back)
print("importing", flush=True)
if "stuck" in sys.argv: time.sleep(60)
time.sleep(0.7)
worker = os.fork()
if not worker:
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(60)
saved = []
signal.signal(signal.SIGTERM, lambda *args: saved.append(1))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
while not saved: time.sleep(0.05)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the trainer: it may be asked again while it ends
assert os.waitpid(worker, os.WNOHANG) == (0, 0), "the worker is dead"
os.kill(worker, signal.SIGKILL)
print("saved", flush=True)
"""
LAUNCHER = """
import sys
from llava_sft.training.launcher import _before_training, python_path, run
from llava_sft.training.ranks import Processes
processes = Processes([([sys.executable, *sys.argv[1:]], python_path())], before=_before_training)
sys.exit(run(processes, processes.ask))
"""


@pytest.fixture
def training(tmp_path):
    """A launcher with a process that saves when it is asked to, as soon as it listens."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    started = []

    def start(*words):
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "trainer.py"), *words]
        environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout.readline() == "importing\n"
        return process

    yield start
    for process in started:
        process.stdout.close()
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR2"])
def test_a_signal_to_all_processes_of_a_training_that_does_not_listen_yet_still_saves_once(training, name):
    process = training()
    os.killpg(process.pid, signal.Signals[name])
    os.killpg(process.pid, signal.Signals[name])
    said = process.communicate()[0]
    assert process.returncode == 0 and said.count("saved") == 1 and f"{name}: saving a checkpoint" in said, said


def test_a_second_ctrl_c_ends_at_once_and_says_so(training):
    process = training("stuck")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        process.stdout.readline()
        time.sleep(1.2)  # a Ctrl-C that is handed on as well counts once
    assert process.wait() == 130


def test_records_are_one_line_of_json_each(tmp_path):
    append(tmp_path / METRICS, {"iteration": 1, "lm loss": 0.5})
    assert json.loads((tmp_path / METRICS).read_text())["lm loss"] == 0.5  # as other tools read them
