"""What the workflow says of a Slurm that does not answer, or takes no job; in its place stand shell scripts."""

import os
import shutil
import subprocess

import pytest

from helpers import mini_slurm
from helpers.projects import snakemake_command
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
        ({"sbatch": mini_slurm.GONE, "sinfo": "exec sleep 60"}, "sinfo heard nothing for 1 s", "scontrol ping"),
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
    monkeypatch.setattr(slurm, "ANSWERS_WITHIN_S", 1 if "heard" in said else 60)
    with pytest.raises(SystemExit):
        slurm.require_slurm("sacct")
    problem, _, remedy = capsys.readouterr().err.partition("\n  fix: ")
    assert said in problem and fix in remedy


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
        cwd=prepared_project, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert "error: Slurm did not take the job: Unable to contact slurm controller" in said
    assert said.count("failed") < 4, said  # one line for the group, not one for each of its jobs
