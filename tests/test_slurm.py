"""The workflow on a cluster: a real Slurm on this machine where it can be had (as root, with slurm-wlm and munge).

Training runs over two nodes on CPUs. For GPU nodes the command lines are checked (test_run.py). The cases marked `long`
(time limits, scancel, a dead node, a killed Snakemake) are for `make test-slurm`, which notes their results.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers import mini_slurm
from helpers.projects import losses, snakemake_command
from helpers.trainings import Run
from llava_sft.run.sessions import sessions
from results import row, write_results

RUN, RESULTS = "output/stage2_sft_vqa", "output/stage2_sft_vqa_results"
# Two data-parallel ranks, over two nodes or on one machine.
BATCHES = ["log_interval=1", "micro_batch_size=8", "eval_iters=1"]
SMALL = ["train_iters=6", "save_interval=3", "global_batch_size=16", *BATCHES]
CPUS = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
# Lets torch be imported inside a Slurm job only.
NO_TORCH = """
import os, sys
if "SLURM_JOB_ID" not in os.environ:
    raise ImportError("torch is imported outside a Slurm job")
sys.path.remove(os.path.dirname(__file__))
del sys.modules["torch"]
import torch
"""
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := mini_slurm.missing():
        pytest.skip(reason)
    with mini_slurm.MiniSlurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def here(prepared_project):
    """The demo and its start checkpoint, with the profile edited as a user does for this cluster; the rest is to be made."""
    project = prepared_project
    shutil.rmtree(project / "output/data")
    shutil.rmtree(project / RESULTS)
    edit(project, auto_nodes=2, cpus_per_task=1, cores=1, conversion=3)
    edit(project, **{"slurm-init-seconds-before-status-checks": 1, "latency-wait": 10})
    profile = project / "profiles/slurm/config.yaml"
    profile.write_text(profile.read_text().replace("# slurm-status-command", "slurm-status-command"))
    (project / "no_torch").mkdir()
    (project / "no_torch/torch.py").write_text(NO_TORCH)
    return project


def edit(project, **values):
    profile = project / "profiles/slurm/config.yaml"
    text = profile.read_text()
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^([^#\n]*\b{key}: )[^,}}#\n]+?(?=\s*[,}}#\n])", rf"\g<1>{value}", text)
        assert count == 1, key
    profile.write_text(text)


def start(project, *arguments: str, **environment: str) -> subprocess.Popen:
    variables = os.environ | CPUS | {"PYTHONPATH": str(project / "no_torch")} | environment
    log = open(project / "snakemake.log", "ab")  # noqa: SIM115 (the child's)
    return subprocess.Popen(
        snakemake_command(*arguments), cwd=project, env=variables, stdout=log, stderr=log, start_new_session=True
    )


def snakemake(project, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output."""
    before = (project / "snakemake.log").stat().st_size if (project / "snakemake.log").is_file() else 0
    code = start(project, *arguments, **environment).wait()
    return code, (project / "snakemake.log").read_bytes()[before:].decode()


def trained(tag: str = "") -> str:
    """The target of a training alone, without export and evaluation."""
    return f"output/stage2_sft_vqa{tag and '_' + tag}_results/train.done.json"


# --- without Slurm ---------------------------------------------------------------------------------------------------


def test_the_profile_plans_without_slurm_and_asks_for_what_the_settings_say(project, tmp_path):
    code, output = snakemake(
        project, "--profile", "slurm", "-n", "-p", "train_vqa", "--config", "nodes=2", "gpus_per_node=4",
        "global_batch_size=256", PATH=mini_slurm.stand_ins(tmp_path / "bin"),
    )  # fmt: skip
    assert code == 0, output
    asked = re.search(r"rule train:.*?resources: (.*?)\n", output, re.DOTALL)[1]
    assert "nodes=2, tasks=0, gres=gpu:4" in asked and "--signal=TERM@300" in asked


@pytest.mark.parametrize(("reached", "code"), [(7, 75), (5, 1)])
def test_a_stopped_round_is_queued_again_unless_not_one_step_was_done(monkeypatch, tmp_path, capsys, reached, code):
    import train
    from llava_sft.training.slurm import Job

    queued, job = [], Job("4711", "10.0.0.1", nodes=1, cpus_per_node=1)
    monkeypatch.setattr(Job, "requeue", lambda self: queued.append(self.number))
    answers = {"this_job": job, "open_run": 5, "launch": 0, "iterations_done": reached}
    answers |= dict.fromkeys(
        ("check_nodes", "check_node", "check_space", "check_what_is_loaded", "prune", "forget_after", "read_run")
    )
    for name, answer in answers.items():
        monkeypatch.setattr(train, name, lambda *args, answer=answer, **named: answer)
    start = {"sidecars": "hf", "fingerprint": "s"}
    resolved = {
        "settings": {"experiment": "x", "train_iters": 9},
        "start": start,
        "data": {"fingerprint": "d"},
        "model": {},
    }
    (tmp_path / "resolved.json").write_text(json.dumps(resolved))
    arguments = [str(tmp_path / "resolved.json"), "--run-dir", str(tmp_path), "--done", str(tmp_path / "done.json")]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert (end.value.code, queued) == (code, ["4711"] if code == 75 else [])
    assert ("requeueing would not help" in capsys.readouterr().err) == (code == 1)


# --- the short chain -------------------------------------------------------------------------------------------------


def test_raw_data_to_a_training_on_two_nodes_equals_the_same_on_one_machine(cluster, here):
    code, output = snakemake(here, "--profile", "slurm", trained(), "--config", *SMALL)
    assert code == 0, output
    assert (
        "2 nodes × 1 process: srun --nodes=2 --ntasks=2" in (here / "output/logs/train/stage2_sft_vqa.log").read_text()
    )
    where = {}
    for job in cluster.jobs("--states=all"):
        where.setdefault(job["comment"], set()).add(job["nodes"])
    assert any(nodes == {"node[1-2]"} for comment, nodes in where.items() if comment.startswith("rule_train"))
    assert not any("preflight" in comment for comment in where)  # small: on the login node, on whose terminal it prints
    converted = set().union(*(nodes for comment, nodes in where.items() if "conversion" in comment))
    assert converted == {"node1", "node2"}, where

    local = ["--config", *SMALL, "run_tag=local", "nproc_per_node=2"]
    code, output = snakemake(here, "--cores", "2", trained("local"), *local, PYTHONPATH="")
    assert code == 0, output
    assert losses(here, RUN) == losses(here, f"{RUN}_local")
    assert weights(here, RUN, 6) == weights(here, f"{RUN}_local", 6)

    code, output = snakemake(here, "--profile", "slurm", trained(), "--config", *SMALL)
    assert code == 0 and "Nothing to be done" in output, output


def weights(project, run: str, step: int) -> dict[str, bytes]:
    read = object.__new__(Run)
    read.folder = project / run
    return read.weights(step)


def test_jobs_that_a_killed_snakemake_left_are_waited_for(cluster, tmp_path):
    job = ["sbatch", "--parsable", "--comment=rule_train_wildcards_x", "--wrap=sleep 4"]
    number = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    wait = "from llava_sft.locks import lift_stale_lock; lift_stale_lock(); print('gone on')"
    waiting = subprocess.run([sys.executable, "-c", wait], cwd=tmp_path, capture_output=True, text=True)
    assert f"{number} rule_train_wildcards_x" in waiting.stderr and "gone on" in waiting.stdout
    assert number not in [job["id"] for job in cluster.jobs()]


# --- what happens in weeks of training: `make test-slurm` ------------------------------------------------------------

STEPS = 24
LONG = [f"train_iters={STEPS}", "save_interval=4", "global_batch_size=16", *BATCHES]


@pytest.fixture(scope="module")
def undisturbed(here):
    code, output = snakemake(
        here,
        "--cores",
        "2",
        trained("undisturbed"),
        "--config",
        *LONG,
        "run_tag=undisturbed",
        "nproc_per_node=2",
        PYTHONPATH="",
    )
    assert code == 0, output
    return f"{RUN}_undisturbed"


class Disturbed:
    """A training over two nodes that something happens to."""

    def __init__(self, cluster, project, tag: str, *settings: str):
        self.cluster, self.project, self.tag = cluster, project, tag
        self.folder = project / f"{RUN}_{tag}"
        self.command = ("--profile", "slurm", trained(tag), "--config", *LONG, f"run_tag={tag}", *settings)
        self.main = start(project, *self.command)

    def until_step(self, step: int) -> None:
        def logged():
            assert self.main.poll() is None, (self.project / "snakemake.log").read_text()[-3000:]
            path = self.folder / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.is_file() else []
            return len(lines) > step

        self.cluster.wait(f"step {step}", logged, 240)

    def job(self) -> dict[str, str]:
        (job,) = [job for job in self.cluster.jobs() if job["comment"].startswith("rule_train")]
        return job

    def finish(self, rounds: int = 0) -> int:
        """Exit code. Slurm's two minutes before a job is started again are cut short; after `rounds`, so is the wait for
        the end: then the time limit is lifted."""
        while self.main.poll() is None:
            for job in self.cluster.jobs():
                if job["reason"] == "BeginTime":
                    rounds -= 1
                    more = ["timelimit=30"] if rounds == 0 else []
                    self.cluster.ask("scontrol", "update", f"jobid={job['id']}", "starttime=now", *more)
            time.sleep(1)
        return self.main.returncode

    def starts(self) -> list[int]:
        """The step that each start of the training went on from."""
        return [session["iteration"] for session in sessions(self.folder)]

    def ends_like(self, undisturbed: str, interruption: str, rounds: int = 0) -> None:
        code = self.finish(rounds)
        assert code == 0, (self.project / "snakemake.log").read_text()[-3000:]
        equal = losses(self.project, f"{RUN}_{self.tag}") == losses(self.project, undisturbed)
        equal &= weights(self.project, f"{RUN}_{self.tag}", STEPS) == weights(self.project, undisturbed, STEPS)
        note = f"starts from step {', '.join(map(str, self.starts()))}; losses and weights, bit for bit"
        what = row("slurm_recovery_is_exact", equal, "", 1, "higher", note, interruption=interruption)
        write_results("slurm_recovery", [what], "make test-slurm")
        assert equal


@pytest.mark.long
def test_time_limits_requeue_the_training_until_it_is_done(cluster, here, undisturbed):
    profile = here / "profiles/slurm/config.yaml"
    before = profile.read_text()
    profile.write_text(before.replace("runtime: 1440", "runtime: 1").replace("TERM@300", "TERM@55"))
    try:
        run = Disturbed(cluster, here, "limits")
        run.ends_like(undisturbed, "time limits of one minute", rounds=2)
        # Slurm may be half a minute late with the signal: a quick machine gets to the end in two rounds.
        assert len(run.starts()) >= 2, run.starts()
    finally:
        profile.write_text(before)


@pytest.mark.long
def test_a_cancelled_training_is_submitted_again(cluster, here, undisturbed):
    run = Disturbed(cluster, here, "scancel")
    run.until_step(9)
    cluster.ask("scancel", run.job()["id"])
    run.ends_like(undisturbed, "scancel")
    assert run.starts()[1] >= 8


@pytest.mark.long
@pytest.mark.parametrize("dead", ["slurmd", "node"])
def test_a_training_survives_the_death_of_a_slurmd_or_its_node(cluster, here, undisturbed, dead):
    run = Disturbed(cluster, here, dead)
    run.until_step(6)
    number = run.job()["id"]
    cluster.kill_node("node1", everything=dead == "node")
    # Slurm notices after a while; what is left of a short training may end before.
    cluster.wait("the requeue", lambda: not any(job["state"] == "RUNNING" for job in cluster.jobs()), 180)
    cluster.start_node("node1")
    # Slurm gives them half a minute to save and end; the job started there before, as no cluster does, it drains the node.
    cluster.wait("the end of what ran there", lambda: not cluster.tasks("node1"))
    assert {job["id"] for job in cluster.jobs()} <= {number}
    run.ends_like(undisturbed, "kill -9 of a slurmd" + (" and all processes of its node" if dead == "node" else ""))


@pytest.mark.long
def test_a_killed_snakemake_started_again_takes_over_its_running_training(cluster, here, undisturbed):
    run = Disturbed(cluster, here, "main")
    run.until_step(6)
    job = run.job()
    os.killpg(run.main.pid, signal.SIGKILL)
    run.main.wait()
    assert run.job() == job
    run.main = start(here, *run.command)
    run.ends_like(undisturbed, "kill -9 of snakemake")
    assert run.starts() == [0]
    assert f"{job['id']} rule_train" in (here / "snakemake.log").read_text()


@pytest.mark.long
def test_eight_ranks_over_two_nodes_learn_what_one_does_also_after_scancel(cluster, here):
    batches = ["micro_batch_size=2", "train_iters=12"]  # given later than LONG's: they count
    code, output = snakemake(
        here, "--cores", "2", trained("one"), "--config", *LONG, "run_tag=one", *batches, PYTHONPATH=""
    )
    assert code == 0, output
    run = Disturbed(cluster, here, "eight", *batches, "nproc_per_node=4")
    run.until_step(6)
    cluster.ask("scancel", run.job()["id"])
    assert run.finish() == 0, (here / "snakemake.log").read_text()[-3000:]
    assert len(run.starts()) == 2 and run.starts()[1] >= 4
    log = (here / "output/logs/train/stage2_sft_vqa_eight.log").read_text()
    assert "2 nodes × 4 processes" in log
    for (step, loss), (_, expected) in zip(losses(here, f"{RUN}_eight"), losses(here, f"{RUN}_one"), strict=True):
        assert loss == pytest.approx(expected, rel=2e-4), step


@pytest.mark.long
def test_the_whole_chain_reaches_its_report_without_torch_on_the_login_node(cluster, here):
    code, output = snakemake(
        here, "--profile", "slurm", "train_vqa", "--config", *SMALL, "run_tag=chain", "evaluate_samples=40"
    )
    assert code == 0, output
    assert "<svg" in (here / f"{RUN}_chain_results/report.html").read_text()
    write_results(
        "slurm_recovery", [row("slurm_chain", 1, "", 1, "higher", "raw data to report, two nodes")], "make test-slurm"
    )


@pytest.mark.long
def test_a_failed_job_shows_the_end_of_its_log_and_the_path(cluster, here):
    # Damaged as a disk does it: only who reads the samples finds it.
    for tar in (here / "output/data/vqa/webdatasets").glob("subtaskdata-*.tar"):
        status = tar.stat()
        with open(tar, "r+b") as file:
            file.seek(status.st_size // 4)
            file.write(bytes(status.st_size // 2))
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    code, output = snakemake(here, "--profile", "slurm", trained("broken"), "--config", *SMALL, "run_tag=broken")
    assert code != 0
    assert re.search(r"output/logs/(measure_webdataset|train)/stage2_sft_vqa_broken\.log", output)
    assert re.search(r"error: .*subtaskdata-\d+\.tar", output)
