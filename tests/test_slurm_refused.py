"""What the workflow says of a Slurm that does not answer, or takes no job; in its place stand shell scripts."""

import os
import shutil
import subprocess

import pytest

from helpers import mini_slurm
from helpers.projects import snakemake_command
from llava_sft import locks, programs
from llava_sft.training import slurm


@pytest.mark.parametrize(
    ("programs", "said", "fix"),
    [
        ({}, "there is no sbatch on PATH", "without --profile slurm"),
        (
            {"sbatch": mini_slurm.GONE, "sinfo": mini_slurm.GONE},
            "Unable to contact slurm controller (connect failure)",
            "scontrol ping",
        ),
        ({"sbatch": mini_slurm.GONE, "sinfo": "exec sleep 60"}, "sinfo gave no answer within 1 s", "scontrol ping"),
        (
            {
                "sbatch": mini_slurm.GONE,
                "sinfo": "echo all",
                "sacct": "echo Slurm accounting storage is disabled >&2; exit 1",
            },
            "sacct: the end of a job would not be seen: Slurm accounting storage is disabled",
            "slurm-status-command: squeue in profiles/slurm/config.yaml",
        ),
    ],
)
def test_a_slurm_that_is_not_there_or_not_to_be_followed_is_said_at_once(
    tmp_path, monkeypatch, capsys, programs, said, fix
):
    monkeypatch.setenv("PATH", mini_slurm.stand_ins(tmp_path / "bin", **programs))
    monkeypatch.setattr(slurm, "ANSWERS_WITHIN_S", 1 if "within" in said else 60)
    monkeypatch.setattr(slurm, "TRIED_FOR_S", 0)
    with pytest.raises(SystemExit):
        slurm.require_slurm("sacct")
    problem, _, remedy = capsys.readouterr().err.partition("\n  fix: ")
    assert said in problem and fix in remedy


@pytest.mark.parametrize("words", ["Slurm accounting storage is disabled", "squeue: unrecognized option '--me'"])
def test_an_answer_that_will_not_change_is_not_waited_for(tmp_path, monkeypatch, words):
    text = f'echo >> {tmp_path}/asked; echo "{words}" >&2; exit 1'
    monkeypatch.setenv("PATH", mini_slurm.stand_ins(tmp_path / "bin", sacct=text))
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(slurm, "TRIED_FOR_S", 1)
    assert slurm.ask_slurm("sacct").trouble == words and (tmp_path / "asked").read_text() == "\n"


@pytest.mark.skipif(slurm.MY_JOBS == ("--me",), reason="this user has no name")
def test_a_squeue_without_me_is_asked_for_the_users_jobs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old = f'case "$*" in *--me*) echo "unrecognized option \'--me\'" >&2; exit 1;; *--user={os.getuid()}*) ;; *) exit 1;; esac'
    monkeypatch.setenv("PATH", mini_slurm.stand_ins(tmp_path / "bin", squeue=old, sbatch="", sinfo=""))
    (tmp_path / ".snakemake").mkdir()
    locks.GAVE_JOBS.touch()
    locks.wait_for_jobs()
    slurm.require_slurm("squeue")
    assert not locks.GAVE_JOBS.exists() and not capsys.readouterr().err


def test_a_slurm_that_answers_at_the_second_try_is_there(tmp_path, monkeypatch):
    hiccup = f"said={tmp_path}/${{0##*/}}; [ -e $said ] || {{ : > $said; {mini_slurm.GONE}; }}; echo all"
    monkeypatch.setenv("PATH", mini_slurm.stand_ins(tmp_path / "bin", sbatch="", sinfo=hiccup, sacct=hiccup))
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    slurm.require_slurm("sacct")
    assert (tmp_path / "sacct").exists()


@pytest.mark.parametrize("squeue", [mini_slurm.GONE, "exec sleep 60"])
def test_jobs_that_slurm_was_given_and_does_not_list_are_not_taken_for_none(tmp_path, monkeypatch, capsys, squeue):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", mini_slurm.stand_ins(tmp_path / "bin", squeue=squeue))
    monkeypatch.setattr(slurm, "TRIED_FOR_S", 0)
    monkeypatch.setattr(slurm, "ANSWERS_WITHIN_S", 1)
    monkeypatch.setattr(locks, "ask", lambda *command: programs.ask(*command, seconds=1))
    locks.lift_stale_lock()  # no run has come here with Slurm: that it is down is nobody's trouble
    assert not capsys.readouterr().err
    locks.GAVE_JOBS.touch()
    with pytest.raises(SystemExit):
        locks.lift_stale_lock()
    assert "Slurm does not say whether jobs of an earlier run are still there: squeue" in capsys.readouterr().err
    assert locks.GAVE_JOBS.exists()


def test_a_squeue_that_fails_meanwhile_is_asked_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "n").write_text("0\n")
    answers = f"""read n < {tmp_path}/n; n=$((n + 1)); echo $n > {tmp_path}/n
        case $n in 2) echo "7|RUNNING|rule_train|{tmp_path}";; 1|3|4) {mini_slurm.GONE};; esac"""
    monkeypatch.setenv("PATH", mini_slurm.stand_ins(tmp_path / "bin", squeue=answers))
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: None)
    (tmp_path / ".snakemake").mkdir()
    locks.GAVE_JOBS.touch()
    locks.wait_for_jobs()
    assert (tmp_path / "n").read_text() == "5\n" and "7 rule_train (RUNNING)" in capsys.readouterr().err


def test_a_slurm_that_goes_away_before_a_group_of_jobs_is_submitted_ends_the_workflow_with_its_words(
    prepared_project, tmp_path
):
    once = f"[ -e {tmp_path}/asked ] || {{ : > {tmp_path}/asked; echo all; exit; }}; {mini_slurm.GONE}"
    path = mini_slurm.stand_ins(tmp_path / "bin", sbatch=mini_slurm.GONE, sinfo=once, squeue="", sacct="")
    shutil.rmtree(prepared_project / "output/data")
    ended = subprocess.run(
        snakemake_command(
            "--profile", "slurm", "data_vqa", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1"
        ),
        cwd=prepared_project, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert (prepared_project / locks.GAVE_JOBS).exists()
    assert "error: Slurm did not take the job: Unable to contact slurm controller" in said
    assert said.count("failed") < 4, said  # one line for the group, not one for each of its jobs
