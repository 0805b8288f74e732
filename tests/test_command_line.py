"""What is answered to a mistake on the command line of `snakemake` and `make`."""

import os
import subprocess
import sys

import pytest

import snakemake_logger_plugin_llava_sft as plugin
from helpers import ROOT
from snakemake_logger_plugin_llava_sft import words


def test_a_profile_that_is_not_there_is_answered_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "mine"))
    for name in ("profiles/default", "profiles/slurm", "profiles/lab", "slurm", "mine/snakemake/own"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    line = "Error: profile directory given (slrum), but no profile.yaml (or config.yaml) found. Profile has …"
    assert words.profile_missed(line) == (
        "error: --profile slrum: there is no such profile\n  fix: --profile profiles/lab or slurm or own"
    )
    assert words.profile_missed("another line") == "another line"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--config", "lr=1e-3", "train_vqa"], "fix: targets first: snakemake train_vqa --config lr=1e-3"),
        (["train_vqa", "--config", "lr", "=", "1e-3"], "without spaces"),
        (["train_vqa", "--config", "lr=", "1e-3", "-n"], "'1e-3' is not KEY=VALUE"),
        (["train_vqa", "-C", "fast"], "'fast' is not KEY=VALUE"),
        (["train_vqa", "--config", "lr=1e-3", "--cores", "2"], None),
    ],
)
def test_what_stands_wrongly_after_config_is_named(typed, said):
    mistake = words.command_line_mistake(typed)
    assert mistake is None if said is None else said in mistake


def test_two_config_options_and_what_is_near_a_wrong_target_are_named(monkeypatch):
    assert "drop the first" in words.command_line_mistake(["train_x", "--config", "lr=1", "--config", "seed=2"])
    targets = ["train_vqa", "train_mine", "data_vqa"]
    missing = "Missing: No rule to produce trian_vqa (if you use input functions …)"
    assert "did you mean train_vqa? " in words.own_words("", missing, targets)
    denied = "WorkflowError:\nFailed to create output directory out/data.\nPermissionError: [Errno 13] Permission denied: 'out'"
    assert words.own_words("", denied).startswith("error: out: Permission denied\n  fix: make it writable for you")
    monkeypatch.setattr(sys, "argv", ["snakemake", "train"])
    said = words.own_words("", "WorkflowError:\nTarget rules may not contain wildcards. Please …", targets)
    assert "of which experiment?" in said and "train_mine or train_vqa" in said


def test_make_takes_settings_as_its_variables():
    command = ["make", "--dry-run", "--old-file=.venv/.ready", "train_vqa", "lr=1e-3", "run_tag=a", "ARGS=-n"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert (
        all(each in said for each in ("snakemake train_vqa -n --config", "'lr=1e-3'", "'run_tag=a'"))
        and "ARGS" not in said
    )


@pytest.mark.parametrize(
    ("flags", "ignored", "code", "last"),
    [((), "", 1, "  fix: lr: 1e-5\n"), (("-k",), "", 2, "Error 1\n"), ((), "trap '' QUIT; ", 2, "Error 1\n")],
)
def test_under_make_too_the_last_line_is_the_mistakes_own(tmp_path, flags, ignored, code, last):
    """A shell script that ends its line with `&` has what it starts ignore SIGQUIT."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/snakemake").write_text("#!/bin/sh\nprintf 'error: lr: 7\\n  fix: lr: 1e-5\\n' >&2; exit 1\n")
    (tmp_path / "bin/snakemake").chmod(0o755)
    command = ["make", *flags, f"--old-file={tmp_path}/.ready", f"VENV={tmp_path}", "train_vqa"]
    command = ["bash", "-c", f'{ignored}exec "$@"', "bash", *command]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True)
    assert ended.returncode == code and ended.stderr.endswith(last), ended.stderr


def test_an_interrupted_plan_says_so_and_any_other_end_keeps_its_traceback(capsys):
    plugin.say_interrupted(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "\ninterrupted before the first job: nothing was run\n"
    plugin.say_interrupted(ValueError, ValueError("why"), None)
    assert "ValueError: why" in capsys.readouterr().err
