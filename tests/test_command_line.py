"""What is answered to a mistake on the command line of `snakemake` and `make`."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_make_passes_on_what_was_typed_whatever_the_shell_and_make_would_read_in_it(tmp_path):
    command = make_with(tmp_path, 'printf "%s\\n" "$@"', "train_vqa", "run_tag=it's", "load=$HOME/a b", "ARGS=-n")
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert sorted(said.splitlines()) == sorted(["train_vqa", "-n", "--config", "run_tag=it's", "load=$HOME/a b"])


def test_runs_of_another_folder_are_asked_for_as_in_training():
    for target, option in (("runs", '"other"'), ("compare", '--exp-dir "other"'), ("tensorboard", '--logdir "other"')):
        command = ["make", "--dry-run", "--old-file=.venv/.ready", target, "exp_dir=other"]
        assert option in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", ["-x", ".x", "a" * 101, "new.yaml", "a b", "a/b", 'a"b', ""])
def test_make_gives_no_file_for_a_name_that_no_experiment_can_have(tmp_path, name):
    (tmp_path / "config/experiments").mkdir(parents=True)
    (tmp_path / "config/experiments/TEMPLATE.yaml").touch()
    command = ["make", "--silent", f"--file={ROOT}/Makefile", "experiment", f"NAME={name}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith(f"error: NAME={name}: letters")
    assert [path.name for path in (tmp_path / "config/experiments").iterdir()] == ["TEMPLATE.yaml"]


def make_with(folder: Path, snakemake: str, *words: str) -> list[str]:
    """make, with lines of a shell script in the place of Snakemake."""
    (folder / "bin").mkdir()
    (folder / "bin/snakemake").write_text(f"#!/bin/bash\n{snakemake}\n")
    (folder / "bin/snakemake").chmod(0o755)
    (folder / ".ready").touch()
    return ["make", f"VENV={folder}", *words]


@pytest.mark.parametrize(
    ("flags", "ignored", "code", "last"),
    [
        ((), "", 1, "  fix: lr: 1e-5\n"),
        (("-j2",), "", 1, "  fix: lr: 1e-5\n"),
        (("-k",), "", 2, "Error 1\n"),
        (("-i",), "", 0, "Error 1 (ignored)\n"),
        ((), "trap '' QUIT; ", 2, "Error 1\n"),
    ],
)
def test_under_make_too_the_last_line_is_the_mistakes_own(tmp_path, flags, ignored, code, last):
    """A shell script that ends its line with `&` has what it starts ignore SIGQUIT."""
    command = make_with(tmp_path, "printf 'error: lr: 7\\n  fix: lr: 1e-5\\n' >&2; exit 1", *flags, "train_vqa")
    command = ["bash", "-c", f'{ignored}exec "$@"', "bash", *command]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code and ended.stderr.endswith(last), ended.stderr


SAVES = """
save() { sleep 0.5; echo saved $1; exit ${code:-130}; }
trap "save $1" INT TERM
echo training $1; for (( n = 0; n < 80; n++ )); do sleep 0.1; done"""


@pytest.mark.parametrize(
    "script",
    [
        'for x in a b; do "$@" train_$x; done; echo goes on',
        '"$@" train_a; "$@" train_b',
        'while ! "$@" -k train_a; do echo goes on; done',
        'for x in a b; do "$@" -j2 train_$x export_$x; done',
        'for x in a b; do "$@" -i train_$x; done',
        'export code=0; for x in a b; do "$@" train_$x; done',
        'for x in a b; do "$@" no_such_step_$x; done',
    ],
)
def test_ctrl_c_ends_the_shells_loop_too_when_every_recipe_has_ended(tmp_path, script):
    command = make_with(tmp_path, SAVES)
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.execvp("bash", ["bash", "-c", script, "bash", *command])
    said, pressed, began = "", False, 1 + ("-j2" in script)
    with open(terminal, "rb", 0) as reader:
        try:
            while read := reader.read(1000):
                said += read.decode()
                if said.count("training") == began and not pressed:
                    pressed = bool(os.write(terminal, b"\x03"))
        except OSError:  # nobody has the terminal any more
            pass
    assert os.waitpid(child, 0)[1] == signal.SIGINT, said
    assert said.count("saved") == began and "goes on" not in said and "Error" not in said, said


@pytest.mark.parametrize(
    "steps", [("train_a",), ("-k", "train_a"), ("-j2", "train_a", "export_a"), ("no_such_step_a",)]
)
def test_a_supervisors_sigterm_to_make_alone_ends_what_it_runs_and_waits_for_it(tmp_path, steps):
    command = make_with(tmp_path, SAVES, *steps)
    made = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    began = [made.stdout.readline() for _ in range(1 + ("-j2" in steps))]
    time.sleep(0.5)  # in the first milliseconds of a recipe bash may die without its trap
    made.terminate()
    assert made.stdout.read().count("saved") == len(began) and made.wait() == -signal.SIGTERM


def test_an_interrupted_plan_says_so_and_any_other_end_keeps_its_traceback(capsys):
    plugin.say_interrupted(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "\ninterrupted before the first job: nothing was run\n"
    plugin.say_interrupted(ValueError, ValueError("why"), None)
    assert "ValueError: why" in capsys.readouterr().err
