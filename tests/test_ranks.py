"""A rank that fails: all of them end, the terminal's last lines say which one it was and why, and the same command goes on."""

import os
import signal
import sys
import time

import pytest

import train
from helpers import ROOT, trainings
from helpers.trainings import same
from llava_sft.run.records import read_jsonl
from llava_sft.training import ranks

pytestmark = pytest.mark.timeout(600)
WAITS = "import time; time.sleep(100)"
FOLLOWS = """
import sys; sys.path.insert(0, "workflow_scripts")
from pathlib import Path
from llava_sft.training.ranks import note_failure
note_failure(Path(sys.argv[1]), {"problem": "rank 1 of 2 lost the others", "fix": "", "follows": True})
sys.exit(1)
"""

# --- processes -------------------------------------------------------------------------------------------------------


def processes(tmp_path, *programs: str) -> ranks.Processes:
    each = ({"RANK": str(i), "WORLD_SIZE": str(len(programs))} for i in range(len(programs)))
    started = [
        ([sys.executable, "-c", program, str(tmp_path)], one) for program, one in zip(programs, each, strict=True)
    ]
    return ranks.Processes(started, tmp_path)


def wait(started: ranks.Processes) -> tuple[int, str]:
    """Exit code, and what is noted as the cause."""
    while (code := started.poll()) is None:
        time.sleep(0.02)
    return code, (ranks.noted_failure(started.run_dir) or {"problem": ""})["problem"]


def test_a_killed_rank_is_the_cause_also_where_another_one_has_noted_that_it_lost_it(monkeypatch, tmp_path):
    started = processes(tmp_path, "import os; os.kill(os.getpid(), 9)", FOLLOWS)
    code, problem = wait(started)
    assert code and problem == "rank 0 of 2 was ended by SIGKILL"


def test_a_killed_rank_is_the_cause_also_where_its_end_is_seen_last(tmp_path):
    started = processes(tmp_path, WAITS, FOLLOWS)
    while started.processes[1].poll() is None:
        time.sleep(0.01)
    assert started.poll() is None  # it has ended, and noted that it lost the other
    started.processes[0].send_signal(signal.SIGKILL)
    assert wait(started) == (1, "rank 0 of 2 was ended by SIGKILL")


def test_ranks_that_do_not_end_by_themselves_are_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "GRACE_S", 0.5)
    began = time.monotonic()
    assert wait(processes(tmp_path, "raise SystemExit(3)", WAITS)) == (3, "")
    assert time.monotonic() < began + 5


def test_a_training_of_one_process_may_be_stopped_and_takes_its_time_to_end_after_it_has_noted_why(
    monkeypatch, tmp_path
):
    for name in ("GRACE_S", "LOOK_EVERY_S", "READ_EVERY_S"):
        monkeypatch.setattr(ranks, name, 0.01)
    started = processes(tmp_path, FOLLOWS.replace('"follows": True', '"follows": False').replace("sys.exit(1)", WAITS))
    process = started.processes[0]
    while ranks.noted_failure(tmp_path) is None:
        assert started.poll() is None
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    while time.monotonic() < began + 0.5:
        assert started.poll() is None
        time.sleep(0.01)
    process.kill()
    assert wait(started)[0] == -signal.SIGKILL


def test_the_end_of_the_log_is_shown_where_a_rank_crashed_and_could_not_say_why(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("Fatal Python error: Segmentation fault\n")
    wait(processes(tmp_path, "import os; os.kill(os.getpid(), 11)"))
    error = train.failure(tmp_path, "at step 1 of 2", -11, log)
    assert "the training was ended by SIGSEGV\n    Fatal Python error" in error.problem and str(log) in error.fix


def test_a_rank_that_has_noted_why_it_ends_and_does_not_is_killed_with_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "GRACE_S", 0.5)
    hangs = FOLLOWS.replace('"follows": True', '"follows": False').replace("sys.exit(1)", WAITS)
    began = time.monotonic()
    assert wait(processes(tmp_path, WAITS, hangs)) == (1, "rank 1 of 2 lost the others")
    assert time.monotonic() < began + 8


def test_a_stopped_rank_is_named_after_a_minute_and_a_short_stop_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "LOOK_EVERY_S", 0.1)
    started = processes(tmp_path, WAITS, WAITS)
    process = started.processes[1]
    for _ in range(2):
        process.send_signal(signal.SIGSTOP)
        for _ in range(10):
            assert started.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGCONT)
        for _ in range(5):
            assert started.poll() is None
            time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    code, problem = wait(started)
    assert code == 1 and problem.startswith(f"rank 1 of 2 (pid {process.pid}) has been stopped (SIGSTOP) for")


# --- a training of two ranks -----------------------------------------------------------------------------------------

STEPS = 8
HOW = {"train_iters": STEPS, "save_interval": 2, "nproc_per_node": 2, "max_bad_steps": 2}
LOADER = """
import os
if os.environ.get("RANK") == "1":
    from llava_sft.data import stream
    read = stream.MicroBatches.__getitem__
    def broken(self, packs, left=[3]):
        left[0] -= 1
        return read(self, packs) if left[0] > 0 else {}["a sample of rank 1"]
    stream.MicroBatches.__getitem__ = broken
"""
NAN = """
import os
if os.environ.get("RANK") == "1":
    from llava_sft.training import forward
    call = forward.Forward.__call__
    def spoiled(self, batch, left=[6]):
        left[0] -= self.model.training
        return call(self, batch) * (float("nan") if left[0] < 0 else 1)
    forward.Forward.__call__ = spoiled
"""
IMPATIENT = "from llava_sft.training import ranks; ranks.LOOK_EVERY_S = 0.1"


@pytest.fixture(scope="module")
def base(prepared_project):
    return trainings.demo(prepared_project)


def start(servers, run, first: str = ""):
    with open(run.folder.with_suffix(".log"), "ab") as log:
        return servers.ask(run.script(), ROOT, log.fileno(), first)


@pytest.fixture(scope="module")
def undisturbed(base, servers, tmp_path_factory):
    run = trainings.Run(base, tmp_path_factory.mktemp("runs") / "undisturbed", **HOW)
    assert start(servers, run).wait() == 0, run.said()
    return run


def test_a_rank_that_is_killed_or_stopped_is_named_and_the_run_goes_on_as_if_nothing_had_been(
    base, undisturbed, servers, tmp_path
):
    run, pid = trainings.Run(base, tmp_path / "signals", **HOW), tmp_path / "pid"
    noted = f"import os; os.environ.get('RANK') == '1' and open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
    for number, step, first, said in (
        (signal.SIGKILL, 3, "", "rank 1 of 2 was ended by SIGKILL"),
        (signal.SIGSTOP, 5, IMPATIENT, "has been stopped (SIGSTOP) for"),
    ):
        process = start(servers, run, noted + first)
        while process.poll() is None and not run.logged(step):
            time.sleep(0.01)
        os.kill(int(pid.read_text()), number)
        began = time.monotonic()
        assert process.wait(60) == 1 and time.monotonic() < began + 40
        last = run.said().splitlines()[-2:]
        assert said in last[0] and "rank 1 of 2" in last[0] and "fix: " in last[1] and "goes on" in last[1], run.said()
    assert start(servers, run).wait() == 0, run.said()
    assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)


def test_a_loader_that_raises_on_one_rank_is_shown_with_its_own_exception(base, undisturbed, servers, tmp_path):
    run = trainings.Run(base, tmp_path / "loader", **HOW, num_workers=1)
    assert start(servers, run, LOADER).wait(60) == 1
    last = run.said().partition("error: ")[2]
    assert "rank 1 of 2: KeyError" in last.splitlines()[0] and "a sample of rank 1" in last, run.said()
    assert "rank 0" not in last and "lost the others" not in last
    assert start(servers, run).wait() == 0, run.said()
    assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)


def test_nan_on_one_rank_is_left_out_on_all_and_the_rank_is_named(base, undisturbed, servers, tmp_path):
    run = trainings.Run(base, tmp_path / "nan", **HOW)
    assert start(servers, run, NAN).wait(60) == 1
    last = run.said().partition("error: ")[2]
    assert "2 bad steps in a row" in last and "of data-parallel rank 1 alone" in last, run.said()
    bad = read_jsonl(run.folder / "bad_steps.jsonl")
    assert {step["iteration"] for step in bad} == {7, 8} and all(step["ranks"] == [1] for step in bad)
    assert start(servers, run).wait() == 0, run.said()
    assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)
