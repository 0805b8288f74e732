"""What the terminal shows at last: the job's own message, its log and how to go on, whatever Snakemake says before."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

import snakemake_logger_plugin_llava_sft as terminal
from helpers.projects import snakemake
from llava_sft import locks

SETTINGS = SimpleNamespace(
    verbose=False, dryrun=False, debug_dag=False, stdout=False, nocolor=True, quiet=set(), show_failed_logs=True,
    printshellcmds=False,
)  # fmt: skip


@pytest.fixture
def handler(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["snakemake", "train_vqa"])
    handler = terminal.LogHandler(SETTINGS, None)
    handler.printed = lambda: capsys.readouterr().err
    return handler


def say(handler, event, message="", level=logging.INFO, **facts):
    record = logging.makeLogRecord({"msg": message, "levelno": level, "levelname": "INFO", "event": event, **facts})
    handler.emit(record)


def start(handler, number=1, rule="train", log="train.log"):
    wildcards = {"exp_dir": "output", "run_name": "stage2_sft_vqa"}
    say(handler, LogEvent.JOB_INFO, jobid=number, rule_name=rule, wildcards=wildcards, log=[log])


def fail(handler, number=1, rule="train", log="train.log"):
    say(handler, LogEvent.JOB_ERROR, "Error in rule", logging.ERROR, jobid=number, rule_name=rule, log=[log])
    wall = "RuleException:\nCalledProcessError in file Snakefile, line 7:\nCommand 'set -euo pipefail; …'"
    say(handler, LogEvent.ERROR, wall, logging.ERROR, exception="RuleException")


def last_lines(handler) -> list[str]:
    handler.close()
    return handler.printed().rstrip().splitlines()


def test_a_failed_job_ends_the_terminal_with_its_message_its_log_and_how_to_go_on(handler, tmp_path):
    (tmp_path / "train.log").write_text("chatter\nerror: first\nmore\nerror: lr: 7: too high\n  fix: lr: 1e-5\n")
    start(handler), fail(handler)
    say(handler, None, "Exiting because a job execution failed. Look below for error messages", logging.ERROR)
    lines = last_lines(handler)
    assert lines[-5:] == [
        "train stage2_sft_vqa failed:", "error: lr: 7: too high", "  fix: lr: 1e-5", "  log: train.log",
        f"  then: {terminal.RERUN}",
    ]  # fmt: skip
    assert not any("CalledProcessError" in line or "Exiting" in line for line in lines)


def test_a_log_without_a_message_shows_its_end_and_an_empty_one_says_so(handler, tmp_path, monkeypatch):
    (tmp_path / "train.log").write_text("\n".join(map(str, range(1000))))
    (tmp_path / "index.log").touch()
    start(handler), fail(handler), start(handler, 2, "index", "index.log"), fail(handler, 2, "index", "index.log")
    assert "999" in (lines := last_lines(handler)) and "900" not in lines
    monkeypatch.setattr(terminal.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert "no space left" in terminal.disk_full("index.log")


def test_a_job_that_succeeds_when_it_is_tried_again_has_not_failed(handler):
    start(handler), fail(handler)
    say(handler, LogEvent.JOB_FINISHED, job_id=1)
    handler.errors.clear()
    assert "failed:" not in "\n".join(last_lines(handler))


@pytest.mark.parametrize("failed", [True, False])
def test_a_stopped_training_says_last_that_it_has_saved(handler, tmp_path, failed):
    (tmp_path / "train.log").write_text("x\nrun: stopped at step 7 of 9; the same command resumes from there\n")
    start(handler)
    say(handler, None, "Terminating processes on user request, this might take some time.")
    if failed:
        fail(handler)
    lines = last_lines(handler)
    assert lines[-3:] == [
        "train stage2_sft_vqa was stopped and has saved:",
        "run: stopped at step 7 of 9; the same command resumes from there",
        "  log: train.log",
    ]


def test_a_locked_folder_names_who_works_there_and_advises_no_unlock_while_it_lives(handler, tmp_path):
    (tmp_path / ".snakemake").mkdir()
    note = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": "2026-11-27 18:02",
        "command": "snakemake train_x",
    }
    (tmp_path / ".snakemake/alive").write_text(json.dumps(note))
    advice = "Error: Directory cannot be locked. … It can be removed with the --unlock argument."
    say(handler, LogEvent.ERROR, advice, logging.ERROR, exception="LockException")
    said = "\n".join(last_lines(handler))
    assert f"process {os.getpid()} on {note['host']}, since 2026-11-27 18:02: snakemake train_x" in said
    assert "fix: wait until it has ended" in said and "--unlock" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "lr=1e-3", "train_vqa"], "fix: targets first: snakemake train_vqa --config lr=1e-3"),
        (["train_vqa", "--config", "lr", "=", "1e-3"], "without spaces"),
        (["train_vqa", "--config", "lr=", "1e-3", "-n"], "'1e-3' is not KEY=VALUE"),
        (["train_vqa", "-C", "fast"], "'fast' is not KEY=VALUE"),
        (["train_vqa", "--config", "lr=1e-3", "--cores", "2"], None),
    ],
)
def test_what_stands_wrongly_after_config_is_named(words, said):
    mistake = terminal.command_line_mistake(words)
    assert mistake is None if said is None else said in mistake


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_snakemake_alone_reaches_the_script_below_the_shells(number):
    script = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print(0, flush=True); signal.pause()"
    job = subprocess.Popen(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -c '{script}' | tee -i /dev/stderr; exit $?"],
        stderr=subprocess.PIPE,
    )
    kept = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    ended = []
    try:
        job.stderr.readline()
        signal.signal(signal.SIGTERM, lambda *_: ended.append("gracefully"))  # as Snakemake does
        locks.pass_on_signals()
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            ended.append("at once")
        assert job.wait(300) == 75
        assert ended == ["at once" if number == signal.SIGINT else "gracefully"]
    finally:
        job.kill()
        for each, handler in kept.items():
            signal.signal(each, handler)


def test_the_end_of_a_failed_run_through_snakemake_is_the_jobs_message(project):
    (project / "mine.jsonl").write_text('{"id": 1, "caption": "a"}\n{"id": 2, "caption": "b"}\n')
    (project / "config/experiments/bad.yaml").write_text("raw_data: mine.jsonl\nload: x\nmodel: tiny\n")
    done = snakemake(project, "inspect_bad")
    lines = done.stdout.rstrip().splitlines()
    assert done.returncode == 1 and lines[-1] == f"  then: {terminal.RERUN}", done.stdout
    assert "error: 2 of 2 records were rejected" in done.stdout and "output/logs/index_webdataset/bad.log" in lines[-2]
    assert "CalledProcessError" not in done.stdout and "Traceback" not in done.stdout

    graph = subprocess.run(
        [shutil.which("snakemake", path=os.path.dirname(sys.executable)), "inspect_bad", "--rulegraph"],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert graph.returncode == 0 and graph.stdout.startswith("digraph") and graph.stdout.rstrip().endswith("}")
