"""What Snakemake shows on the terminal: a line where a job starts and ends, and at the very end what failed and what to do.

`profiles/default` chooses it (`logger: llava-sft`), so that `snakemake`, `snakemake --profile slurm` and `make` show the same.
Jobs of a cluster are Snakemakes of their own without a profile, and print as Snakemake does. With --verbose nothing is left
out. Imported by every call of Snakemake: nothing heavy.
"""

import json
import logging
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter, get_event
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

STEPS = ("data", "inspect", "preflight", "train", "export", "evaluate", "report")
# Printed on every run, or printed again, better, at the end.
NOISE = re.compile(
    r"Building DAG|Assuming unrestricted|Using shell|Provided |Using (workflow specific )?profile|Select jobs|Execute \d+ jobs"
    r"|Complete log|host: |Job counts|Rules claiming|singularity|Finished job|Conda env|Shutting down|Exiting because"
    r"|At least one job did not|Removing output files of failed|Terminating processes|Workflow finished|WorkflowError"
    r"|Elapsed time|Waiting at most|Will exit after|\[|Trying to restart"
)
SHOWN_LINES, SHOWN_BYTES = 25, 1 << 16
SAVED = "same command resumes"  # of train.py's last line
RERUN = "fix it and run the same command again: finished steps are kept"


class LogHandler(LogHandlerBase):
    """Prints records as they come and, when Snakemake closes it at the very end, what the user has to know."""

    writes_to_stream, writes_to_file = True, False
    has_filter, has_formatter, needs_rulegraph = True, True, False

    def __post_init__(self) -> None:
        settings = self.common_settings
        self.plain = settings.verbose or settings.dryrun or settings.debug_dag
        self.default = ColorizingTextHandler(settings.nocolor, sys.stdout if settings.stdout else sys.stderr)
        self.default.setFormatter(DefaultFormatter(settings.quiet, settings.show_failed_logs and self.plain))
        self.shown = DefaultFilter(
            settings.quiet, settings.debug_dag, settings.verbose, settings.dryrun, settings.printshellcmds
        )
        self.names: dict[int, str] = {}  # of jobs, as people call them
        self.logs: dict[int, list[str]] = {}
        self.started: dict[int, float] = {}
        self.failed: dict[int, list[str]] = {}  # and their logs
        self.errors: list[str] = []
        self.finished: set[int] = set()
        self.total, self.done, self.interrupted, self.closed = 0, 0, False, False
        if mistake := command_line_mistake(sys.argv[1:]):
            print(f"error: {mistake}", file=sys.stderr, flush=True)
            sys.exit(1)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._note(record)
            if self.plain:
                if self.shown.filter(record):
                    self.default.emit(record)
            elif self.shown.filter(record) and (line := self._line(record)):
                print(line, file=sys.stdout if self.common_settings.stdout else sys.stderr, flush=True)
        except BrokenPipeError:
            pass  # the reader has gone; the work continues

    # --- what is remembered ---------------------------------------------------------------------------------------------

    def _note(self, record: Any) -> None:  # a LogRecord with what Snakemake adds to it
        event = get_event(record)
        self.interrupted |= str(record.msg).startswith(("Terminating processes", "Will exit after finishing"))
        if event == LogEvent.JOB_INFO:
            wildcards = [str(value) for name, value in dict(record.wildcards or {}).items() if name != "exp_dir"]
            self.names[record.jobid] = " ".join([record.rule_name, *wildcards])
            self.logs[record.jobid] = list(record.log)
            self.started[record.jobid] = time.monotonic()
        elif event == LogEvent.JOB_FINISHED:
            self.failed.pop(record.job_id, None)  # tried again, under Slurm
            self.finished.add(record.job_id)
            self.done += 1
        elif event == LogEvent.RUN_INFO:
            self.total = (getattr(record, "stats", None) or {}).get("total", 0)
        elif event == LogEvent.JOB_ERROR:
            self.names.setdefault(record.jobid, record.rule_name)
            self.failed[record.jobid] = list(record.log)
        elif event == LogEvent.GROUP_ERROR:
            for job in record.job_error_info:
                self.failed[job["jobid"]] = [*job["log"], *record.aux_logs]
        elif event == LogEvent.ERROR or record.levelno >= logging.ERROR:
            self.errors.append(self._own_words(getattr(record, "exception", ""), record.getMessage()))

    @staticmethod
    def _own_words(kind: str, text: str) -> str:
        """Snakemake's error as ours, where it is one that people meet."""
        if kind == "LockException":
            return locked()
        if found := re.search(r"No rule to produce (.+?) \(if", text):
            return (
                f"error: {found[1][:200]}: neither a target nor a file that a rule makes\n"
                "  fix: `snakemake` alone lists the targets, as train_vqa; settings stand after --config as KEY=VALUE"
            )
        return text.strip()

    # --- what is printed ------------------------------------------------------------------------------------------------

    def _line(self, record: Any) -> str:
        event, clock = get_event(record), time.strftime("%H:%M:%S")
        if event == LogEvent.JOB_INFO:
            return f"{clock}  {self.names[record.jobid]}" if record.rule_name != "targets" else ""
        if event == LogEvent.JOB_FINISHED:
            if self.names.get(record.job_id) == "targets":
                return ""
            took = duration(time.monotonic() - self.started.get(record.job_id, time.monotonic()))
            of = f", {self.done} of {self.total}" if self.total else ""
            return f"{clock}  {self.names.get(record.job_id, 'job')}: done in {took}{of}"
        if event in (LogEvent.JOB_ERROR, LogEvent.GROUP_ERROR):
            name = self.names.get(getattr(record, "jobid", -1), "a group of jobs")
            return f"{clock}  {name}: failed"
        if event in (LogEvent.SHELLCMD, LogEvent.RUN_INFO, None) and record.levelno < logging.ERROR:
            text = str(record.msg or "").rstrip()
            listing = event == LogEvent.RUN_INFO and "targets" in (getattr(record, "stats", None) or {})
            return "" if listing or NOISE.match(text.strip()) else text
        return ""

    def close(self) -> None:
        """Snakemake's last act: nothing of its own comes after these lines."""
        if not self.closed:
            self.closed = True
            try:
                for line in self._end():
                    print(line, file=sys.stderr, flush=True)
            except OSError:
                pass  # no terminal any more
        super().close()

    def _end(self) -> list[str]:
        jobs = list(self.failed.items())
        # Ended by Ctrl-C, Snakemake waits for its jobs and names none.
        jobs = jobs or [(job, self.logs[job]) for job in self.started if job not in self.finished and self.interrupted]
        told = [(job, *message(logs)) for job, logs in jobs]
        told = [entry for entry in told if entry[2]] or told[:1]  # of a group, those that say something
        if not told:
            ours = [text for text in self.errors if text and not NOISE.match(text)]
            return ["", *ours[-1:]] if ours else []
        lines: list[str] = []
        for job, log, text in told[:3]:
            saved = next((line for line in text.splitlines() if SAVED in line), "")
            text = saved or text
            lines += ["", f"{self.names.get(job, 'a job')} {'was stopped and has saved' if saved else 'failed'}:"]
            lines += [text or f"error: it says nothing{disk_full(log)}"]
            lines += [f"  log: {log}"] if log else []
        if len(told) > 3:
            lines.append(f"… and {len(told) - 3} more")
        if SAVED not in told[-1][2]:
            lines.append(f"  then: {RERUN}")
        return lines


def message(logs: list[str]) -> tuple[str, str]:
    """Of the first log that says something: its path, and its `error:` lines or, without any, its last lines."""
    for wanted in ("error", "any"):
        for log in logs:
            try:
                with open(log, "rb") as file:
                    file.seek(max(0, os.path.getsize(log) - SHOWN_BYTES))
                    lines = file.read().decode(errors="replace").rstrip().splitlines()
            except OSError:
                continue
            starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
            if starts:
                return log, "\n".join(lines[starts[-1] :][:SHOWN_LINES])
            if lines and wanted == "any":
                return log, "\n".join(lines[-12:])
    return (logs[0] if logs else ""), ""


def disk_full(log: str) -> str:
    folder = next((path for path in Path(log or ".").absolute().parents if path.is_dir()), Path("."))
    if shutil.disk_usage(folder).free > 1 << 20:
        return f"; its log ({log or 'none'}) is empty"
    return f": no space left in {folder}, for the log neither\n  fix: make room there"


def locked() -> str:
    """Who works in this folder, as `lift_stale_lock` noted it."""
    try:
        holder = json.loads(Path(".snakemake/alive").read_text())
        here = holder["host"] == socket.gethostname()
        if not here or os.path.exists(f"/proc/{holder['pid']}"):
            return (
                f"error: another Snakemake works in this folder: process {holder['pid']} on {holder['host']}, since "
                f"{holder['since']}: {holder['command'][:200]}\n"
                "  fix: wait until it has ended, or end it with Ctrl-C there (it saves); then give this command again"
            )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return (
        "error: this folder is locked by a Snakemake that left no note of itself\n"
        "  fix: look for it with `ps ax | grep snakemake` on the machines that use this folder and wait for its end; when there "
        "is none, `snakemake --unlock`"
    )


def command_line_mistake(words: list[str]) -> str | None:
    """What Snakemake answers with a traceback: what stands after --config and is no KEY=VALUE."""
    for start, word in enumerate(words):
        if word not in ("--config", "-C"):
            continue
        for number, entry in enumerate(words[start + 1 :], start + 1):
            if entry.startswith("-"):
                break
            key, equals, _ = entry.partition("=")
            if equals and key:
                continue
            spaced = [*words[number + 1 :], ""][0].startswith("=") or entry.startswith("=")
            if entry.partition("_")[0] in STEPS and not spaced:
                rest = [other for other in words if other != entry]
                return (
                    f"{entry[:200]} stands after --config, where settings stand as KEY=VALUE\n"
                    f"  fix: targets first: snakemake {entry[:200]} {' '.join(rest)[:300]}"
                )
            near = "without spaces, as in --config lr=1e-3" if spaced else "as in --config lr=1e-3 seed=7"
            return f"--config: {entry[:200]!r} is not KEY=VALUE\n  fix: write it {near}"
    return None


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
