"""What the terminal shows: what runs and how far it is; at last what came out, or the job's own message and how to go on."""

import ast
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from snakemake_interface_logger_plugins.common import LogEvent

import snakemake_logger_plugin_llava_sft as terminal
from helpers import ROOT
from helpers.projects import snakemake
from llava_sft import locks, workflow
from llava_sft.progress import Progress
from snakemake_logger_plugin_llava_sft import ending, screen, words

SCRIPTS = Path(__file__).resolve().parents[1] / "workflow_scripts"
SETTINGS = SimpleNamespace(
    verbose=False, dryrun=False, debug_dag=False, stdout=False, nocolor=True, quiet=set(), show_failed_logs=True,
    printshellcmds=False,
)  # fmt: skip


@pytest.fixture
def handler(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["snakemake", "train_vqa"])
    handler = terminal.LogHandler(SimpleNamespace(**vars(SETTINGS)), None)
    handler.printed = lambda: capsys.readouterr().err
    handler.on_stdout = lambda: capsys.readouterr().out.splitlines()
    yield handler
    handler.ended.set()  # else it would speak when Python ends


def say(handler, event, message="", level=logging.INFO, **facts):
    record = logging.makeLogRecord({"msg": message, "levelno": level, "levelname": "INFO", "event": event, **facts})
    handler.emit(record)


def start(handler, number=1, rule="train", log="train.log", reason="Missing output files: a.tar"):
    wildcards = {"exp_dir": "output", "run_name": "stage2_sft_vqa"}
    say(handler, LogEvent.JOB_INFO, jobid=number, rule_name=rule, wildcards=wildcards, log=[log], reason=reason)


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
        f"  then: {ending.RERUN}",
    ]  # fmt: skip
    assert not any("CalledProcessError" in line or "Exiting" in line for line in lines)


def test_a_log_without_a_message_shows_its_end_and_an_empty_one_says_so(handler, tmp_path, monkeypatch):
    (tmp_path / "train.log").write_text("\n".join(map(str, range(1000))))
    (tmp_path / "index.log").touch()
    start(handler), fail(handler), start(handler, 2, "index", "index.log"), fail(handler, 2, "index", "index.log")
    assert "999" in (lines := last_lines(handler)) and "900" not in lines
    monkeypatch.setattr(words.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert "no space left" in words.disk_full("index.log")


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "slurm_account",
        ),
        ("sbatch: error: invalid partition specified: gpux", "slurm_partition"),
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "runtime",
        ),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", "mem_mb"),
        (
            "sinfo: error: fetch_config: DNS SRV lookup failed\nsinfo: fatal: Could not establish a configuration source",
            "ping",
        ),
        ("SLURM-job '5' failed, SLURM status is: 'TIMEOUT'. Reason: Unknown.", "runtime"),
        ("sbatch: unrecognized option '--nosuch'\nTry \"sbatch --help\" for more information", "slurm_extra"),
    ],
)
@pytest.mark.parametrize("group", [False, True])
def test_a_job_that_slurm_does_not_take_ends_with_slurms_reason_and_where_to_mend_it(handler, said, fix, group):
    text = f"SLURM sbatch failed. The error message was '{said}'.\n    sbatch call:\n        sbatch -p cpu -A lab"
    if "TIMEOUT" not in said:
        Path("train.log").write_text("what an earlier job said\n")
    start(handler)
    if group:
        job = {"jobid": 1, "log": ["train.log"]}
        facts = {"groupid": "x", "aux_logs": [], "job_error_info": [job]}
        say(handler, LogEvent.GROUP_ERROR, "Error in group", logging.ERROR, rule_msg=text, **facts)
        facts = {"jobid": 1, "rule_name": "train", "log": ["train.log"], "indent": True}
        say(handler, LogEvent.JOB_ERROR, "Error in rule", logging.ERROR, **facts)  # which repeats it without the reason
    else:
        facts = {"jobid": 1, "rule_name": "train", "log": ["train.log"]}
        say(handler, LogEvent.JOB_ERROR, "Error in rule", logging.ERROR, rule_msg=text, **facts)
    lines = last_lines(handler)
    at = next(number for number, line in enumerate(lines) if line.startswith("error: Slurm "))
    assert lines[at].split(": ")[-1] in text and lines[at + 1].startswith("  fix: ") and fix in lines[at + 1]
    assert not any("an earlier job" in line for line in lines)


def test_a_job_that_succeeds_when_it_is_tried_again_has_not_failed(handler):
    start(handler), fail(handler)
    say(handler, LogEvent.JOB_FINISHED, job_id=1)
    handler.state.errors.clear()
    assert "failed:" not in "\n".join(last_lines(handler))


def test_a_refusal_whose_fix_resumes_is_no_training_that_has_saved(handler, tmp_path):
    said = (
        "error: run: a checkpoint needs 12 MiB, the disk has 2 MiB free\n  fix: free 10 MiB; the same command resumes"
    )
    (tmp_path / "train.log").write_text(f"run: 40 steps\n{said}\n")
    start(handler), fail(handler)
    assert said in (lines := "\n".join(last_lines(handler))) and "failed:" in lines and "has saved" not in lines


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
        "pid": os.getppid(),
        "host": socket.gethostname(),
        "since": "2026-11-27 18:02",
        "command": "snakemake train_x",
    }
    others = [
        note | {"pid": os.getpid(), "command": "snakemake mine"},
        note | {"pid": 2**22 + 1, "command": "snakemake dead"},
    ]
    (tmp_path / ".snakemake/alive").write_text("".join(json.dumps(each) + "\n" for each in [note, *others]))
    advice = "Error: Directory cannot be locked. … It can be removed with the --unlock argument."
    say(handler, LogEvent.ERROR, advice, logging.ERROR, exception="LockException")
    said = "\n".join(last_lines(handler))
    assert f"process {os.getppid()} on {note['host']}, since 2026-11-27 18:02: snakemake train_x" in said
    assert "snakemake mine" not in said and "snakemake dead" not in said
    assert "fix: wait until it has ended" in said and "--unlock" not in said


def test_a_rule_of_many_jobs_has_one_line_where_it_starts_and_one_where_it_ends(handler, monkeypatch):
    rule = "stage2_sftdata2webdataset"
    monkeypatch.setattr(terminal, "targets", {"train_vqa"})
    handler.state.targets = terminal.targets
    say(handler, LogEvent.RUN_INFO, "Job stats", stats={rule: 3, "train": 1, "train_vqa": 1, "total": 5})
    for number in range(3):
        start(handler, number, rule), say(handler, LogEvent.JOB_FINISHED, job_id=number)
    start(handler, 3), start(handler, 4, "train_vqa")
    lines = [line[10:] for line in handler.on_stdout()]
    assert lines == [
        f"4 jobs: 3 {rule}, train", f"{rule}: 3 jobs", f"{rule}: 3 jobs done in 0 s, 3 of 4", "train stage2_sft_vqa"
    ]  # fmt: skip


def test_what_a_job_writes_is_shown_while_it_runs_and_nothing_of_the_job_before(handler, tmp_path, monkeypatch):
    log = tmp_path / "train.log"
    log.write_text("of yesterday\n")
    os.utime(log, (1, 1))
    start(handler)
    handler._look()
    log.write_text("output/run: 8 steps\nstep 1/8")
    handler._look()
    monkeypatch.setattr(terminal, "SAID_EVERY_S", 0)
    progress = Progress(4800, "samples")
    progress.began -= 10
    progress.done = 1200
    with log.open("a") as file:
        file.write(f"  loss 1\n{progress}\nlast words")
    say(handler, LogEvent.JOB_FINISHED, job_id=1)
    lines = [line.removesuffix("  train stage2_sft_vqa") for line in handler.on_stdout()]
    assert lines[1:5] == ["output/run: 8 steps", "step 1/8  loss 1", str(progress), "last words"]
    assert str(progress) == "  1,200 of 4,800 samples, 120/s, 0:30 left" and "done in" in lines[5]
    assert handler.state.jobs[1].progress == "1,200 of 4,800 samples, 0:30 left"


def test_a_line_that_ends_as_on_windows_is_shown_and_of_a_rewritten_one_the_last(tmp_path):
    (tmp_path / "x.log").write_bytes(b"warning: one\r\n10 %\r20 %\n")
    assert screen.Log(str(tmp_path / "x.log"), 0).lines() == ["warning: one", "20 %"]


def test_of_other_rules_only_warnings_are_shown(handler, tmp_path):
    start(handler, rule="inspect_webdataset")
    (tmp_path / "train.log").write_text("tokens: median 41\nnote: not read: the key x of 3 records\n")
    handler._look()
    start(handler, 2, "evaluate", "evaluate.log")
    (tmp_path / "evaluate.log").write_text("600 questions\nerror: at the end\n  fix: that\n")
    handler._look()
    shown = [line for line in handler.on_stdout() if "stage2_sft_vqa" not in line]
    assert shown == ["note: not read: the key x of 3 records", "600 questions"]


def test_success_ends_with_what_came_out_and_a_stop_with_what_is_left(handler, monkeypatch):
    monkeypatch.setattr(terminal, "closing", lambda told: [f"report: {sorted(told)}"])
    start(handler, rule="evaluate", log="none.log"), say(handler, LogEvent.JOB_FINISHED, job_id=1)
    handler.close()
    assert handler.on_stdout()[-2:] == ["done in 0 s", "report: ['evaluate']"]


def test_a_stopped_job_that_said_nothing_of_use_is_done_again(handler, tmp_path):
    (tmp_path / "train.log").write_text("Traceback (most recent call last):\nKeyboardInterrupt\n")
    start(handler, rule="inspect_webdataset")
    say(handler, None, "Terminating processes on user request, this might take some time.")
    assert last_lines(handler) == ["", "inspect_webdataset stage2_sft_vqa was stopped; the same command does it again"]


def test_a_dry_run_names_rules_numbers_and_reasons(handler, monkeypatch):
    monkeypatch.setattr(handler.common_settings, "dryrun", True)
    say(handler, LogEvent.RUN_INFO, "Job stats", stats={"train": 2, "total": 2})
    start(handler, reason="Params have changed since last execution: before: 1 now: 2"), handler.close()
    first, row, last = handler.on_stdout()
    assert (first, row) == ("2 jobs would run:", "     2  train  its settings have changed") and "-n -p" in last


def test_the_last_line_on_a_terminal_is_cut_to_it_and_gives_way(monkeypatch, capsys):
    assert [screen.fitting("报告 report", columns) for columns in (1, 4, 6, 40)] == [
        "",
        "报告",
        "报告 r",
        "报告 report",
    ]
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: SimpleNamespace(columns=20))
    shown = screen.Screen()
    assert not shown.rewrites  # neither a pipe nor a dumb terminal
    shown.rewrites = True
    shown.show("  train 1 min 2 s, and more"), shown.say("step 1"), shown.show("")
    assert capsys.readouterr().out == "  train 1 min 2 s, " + "\r\x1b[Kstep 1\n" + "  train 1 min 2 s, " + "\r\x1b[K"


def test_no_terminal_or_locale_ends_a_message_in_a_traceback():
    shows = (
        r"import llava_sft, sys; print('3 \xd7 \u2192 \u2265 \u56fe\u7247 \udcff'); print('\u2026', file=sys.stderr)"
    )
    for variables in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}):
        done = subprocess.run([sys.executable, "-c", shows], env=os.environ | variables, capture_output=True)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", shows], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (done.stdout, done.stderr) == (b"3 x -> >= \\u56fe\\u7247 \\udcff\n", b"...\n")


def test_a_python_that_is_too_old_is_told_so_by_every_script():
    paths = [*SCRIPTS.glob("*.py"), SCRIPTS / "llava_sft/__init__.py"]
    syntax = [Path(sys.executable).with_name("ruff"), "check", "--isolated", "--target-version=py38", "--select=F632"]
    done = subprocess.run([*syntax, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for path in paths:
        tree = ast.parse(path.read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        named = [(getattr(node, "module", None) or node.names[0].name).partition(".")[0] for node in imports]
        foreign = [name for name in named if name not in sys.stdlib_module_names]
        assert foreign[:1] in ([], ["llava_sft"]), f"{path.name}: {foreign[0]} is imported before llava_sft"
    code = "import sys; sys.version_info = (3, 11, 7); import llava_sft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "(Python 3.11): 3.12 or newer is needed\n  fix: .venv/bin/python" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_snakemake_alone_reaches_the_script_below_the_shells(number, monkeypatch):
    script = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print(0, flush=True); signal.pause()"
    shells = f"set -o pipefail; {sys.executable} -c '{script}' >&2; exit $?"
    job = subprocess.Popen(["bash", "-c", shells], stderr=subprocess.PIPE)
    kept = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    ended = []
    try:
        job.stderr.readline()
        signal.signal(signal.SIGTERM, lambda *_: ended.append("gracefully"))  # as Snakemake does
        locks.pass_on_signals()
        # Not to what else this process has started: the servers of other tests.
        found, mine = locks.running_scripts, psutil.Process(job.pid).children(recursive=True)
        monkeypatch.setattr(locks, "running_scripts", lambda: [process for process in found() if process in mine])
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            ended.append("at once")
        assert job.wait(300) == 75
        os.kill(os.getpid(), number)  # again: for the jobs alone, whose end is waited for
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
    assert done.returncode == 1 and lines[-1] == f"  then: {ending.RERUN}", done.stdout
    assert "error: 2 of 2 records were rejected" in done.stdout and "output/logs/index_webdataset/bad.log" in lines[-2]
    assert "CalledProcessError" not in done.stdout and "Traceback" not in done.stdout
    graph = subprocess.run(
        [shutil.which("snakemake", path=os.path.dirname(sys.executable)), "inspect_bad", "--rulegraph"],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert graph.returncode == 0 and graph.stdout.startswith("digraph") and graph.stdout.rstrip().endswith("}")


def test_the_terminal_and_make_know_the_targets_of_the_workflow():
    of_make = re.search(r"^STEPS := (.*)", (ROOT / "Makefile").read_text(), re.M)
    assert words.STEPS == tuple(workflow.STEPS) == tuple(workflow.OUTCOME) == tuple(of_make[1].split())
