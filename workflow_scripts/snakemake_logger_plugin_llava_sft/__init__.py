"""What Snakemake shows on the terminal: a line where a rule starts and ends, how far it is, and at the very end what came
out, or what failed and what to do.

`profiles/default` chooses it (`logger: llava-sft`), so that `snakemake`, `snakemake --profile slurm` and `make` show the same.
Rules write into their logs alone; what is worth it is shown from there, for jobs of a cluster too. With --verbose or
--debug-dag Snakemake says all that it says without this. Imported by every call of Snakemake: nothing heavy.
"""

import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import snakemake.cli
from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter, get_event
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from snakemake_logger_plugin_llava_sft.screen import Log, Screen
from snakemake_logger_plugin_llava_sft.words import command_line_mistake, disk_full, duration, message, own_words, why

# Printed on every run, or printed again, better, at the end.
NOISE = re.compile(
    r"Building DAG|Assuming unrestricted|Using shell|Provided |Using (workflow specific )?profile|Select jobs|Execute \d+ jobs"
    r"|Complete log|host: |Job counts|Rules claiming|singularity|Finished job|Conda env|Shutting down|Exiting because"
    r"|At least one job did not|Removing output files of failed|Terminating processes|Workflow finished|WorkflowError"
    r"|Elapsed time|Waiting at most|Will exit after|\[|Trying to restart|Nothing to be done|This was a dry-run|Some jobs were"
    r"|Rules with provenance|\d+ jobs have|Group jobs|Job \S+ has been submitted|Job \d+ has been submitted"
)
SAVED = "same command resumes"  # of train.py's last line
RERUN = "fix it and run the same command again: finished steps are kept"
TOLD = ("index_webdataset", "preflight", "train", "evaluate")  # rules whose whole log is shown
MANY = ("stage2_sftdata2webdataset",)  # rules of many short jobs: one line for all
NOTE = re.compile(r" *(warning|note): ")
PROGRESS = re.compile(r"  ([\d,]+ of [\d,]+ \S+), \S+/s(, \S+ left)$")  # llava_sft.progress
TICK_S, SAID_EVERY_S = 0.5, 10

# Set by the Snakefile: names of its target rules, and what to say when they are there; `told`: whose logs were shown.
targets: set[str] = set()
closing: Callable[[set[str]], list[str]] | None = None


def print_unless_profile(*words: Any, **options: Any) -> None:
    """In place of `print` in snakemake.cli, which names its profiles before there is any logger."""
    if not (words and str(words[0]).startswith("Using ") and "profile" in str(words[0])):
        print(*words, **options)


if "--verbose" not in sys.argv:
    vars(snakemake.cli)["print"] = print_unless_profile


class Job:
    """A job that was started. `name`: as people call it."""

    def __init__(self, record: Any):
        self.rule, self.logs = record.rule_name, list(record.log)
        wildcards = [str(value) for name, value in dict(record.wildcards or {}).items() if name != "exp_dir"]
        self.name = " ".join([self.rule, *wildcards])
        self.started = time.monotonic()
        self.log = Log(self.logs[0], record.created) if self.logs and self.rule not in MANY else None
        self.progress, self.said = "", time.monotonic()


class LogHandler(LogHandlerBase):
    """Prints records as they come and, when Snakemake closes it at the very end, what the user has to know."""

    writes_to_stream, writes_to_file = True, False
    has_filter, has_formatter, needs_rulegraph = True, True, False

    def __post_init__(self) -> None:
        settings = self.common_settings
        self.plain = settings.verbose or settings.debug_dag or (settings.dryrun and settings.printshellcmds)
        no_color = settings.nocolor or bool(os.environ.get("NO_COLOR"))
        self.default = ColorizingTextHandler(no_color, sys.stdout if settings.stdout else sys.stderr)
        self.default.setFormatter(DefaultFormatter(settings.quiet, settings.show_failed_logs and self.plain))
        self.shown = DefaultFilter(
            settings.quiet, settings.debug_dag, settings.verbose, settings.dryrun, settings.printshellcmds
        )
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        self.screen, self.turn, self.ended = Screen(), threading.RLock(), threading.Event()
        self.jobs: dict[int, Job] = {}
        self.running: dict[int, Job] = {}
        self.begun: Counter[str] = Counter()  # jobs of each rule
        self.done: Counter[str] = Counter()
        self.first: dict[str, float] = {}  # when a rule's first job started
        self.failed: dict[int, list[str]] = {}  # and their logs
        self.errors: list[str] = []
        self.counts: dict[str, int] = {}  # jobs of each rule
        self.reasons: dict[str, str] = {}
        self.began, self.interrupted, self.nothing, self.closed = time.monotonic(), False, False, False
        if mistake := command_line_mistake(sys.argv[1:]):
            print(f"error: {mistake}", file=sys.stderr, flush=True)
            sys.exit(1)

    def emit(self, record: logging.LogRecord) -> None:
        with self.turn:
            self._note(record)
            if not self.shown.filter(record):
                return
            if self.plain:
                self.default.emit(record)
            elif not self.common_settings.dryrun:
                self._tell(record)
                self._look()

    # --- what is remembered ---------------------------------------------------------------------------------------------

    def _note(self, record: Any) -> None:  # a LogRecord with what Snakemake adds to it
        event = get_event(record)
        text = str(record.msg)
        self.interrupted |= text.startswith(("Terminating processes", "Will exit after finishing"))
        self.nothing |= text.startswith("Nothing to be done")
        if event == LogEvent.JOB_INFO and record.rule_name not in targets:
            self.reasons.setdefault(record.rule_name, why(str(record.reason)))
            if not self.jobs and not self.common_settings.dryrun:
                threading.Thread(target=self._watch, daemon=True).start()
            self.begun[record.rule_name] += record.jobid not in self.jobs  # else tried again
            self.jobs[record.jobid] = self.running[record.jobid] = Job(record)
            self.first.setdefault(record.rule_name, time.monotonic())
        elif event == LogEvent.JOB_FINISHED and record.job_id in self.jobs:
            self.failed.pop(record.job_id, None)  # tried again, under Slurm
            self._read(self.jobs[record.job_id], ended=True)
            self.running.pop(record.job_id, None)
            self.done[self.jobs[record.job_id].rule] += 1
        elif event == LogEvent.RUN_INFO:
            stats = getattr(record, "stats", None) or {}
            self.counts = {rule: count for rule, count in stats.items() if rule not in targets and rule != "total"}
        elif event == LogEvent.JOB_ERROR:
            self.failed[record.jobid] = list(record.log)
            self.running.pop(record.jobid, None)
        elif event == LogEvent.GROUP_ERROR:
            for job in record.job_error_info:
                self.failed[job["jobid"]] = [*job["log"], *record.aux_logs]
                self.running.pop(job["jobid"], None)
        elif event == LogEvent.ERROR or record.levelno >= logging.ERROR:
            self.errors.append(own_words(getattr(record, "exception", ""), record.getMessage()))

    # --- what is printed while jobs run ---------------------------------------------------------------------------------

    def _tell(self, record: Any) -> None:
        event, clock = get_event(record), time.strftime("%H:%M:%S")
        if event == LogEvent.RUN_INFO and self.counts:
            self.screen.say(f"{clock}  {listing(self.counts)}")
        elif event == LogEvent.JOB_INFO and (job := self.jobs.get(record.jobid)):
            if job.rule not in MANY:
                self.screen.say(f"{clock}  {job.name}")
            elif self.begun[job.rule] == 1:
                self.screen.say(f"{clock}  {job.rule}: {many(self.counts.get(job.rule, 1))}")
        elif event == LogEvent.JOB_FINISHED and (job := self.jobs.get(record.job_id)):
            of = f", {self.done.total():,} of {sum(self.counts.values()):,}"
            if job.rule not in MANY:
                self.screen.say(f"{clock}  {job.name}: done in {duration(time.monotonic() - job.started)}{of}")
            elif self.done[job.rule] == self.counts.get(job.rule):
                took = duration(time.monotonic() - self.first[job.rule])
                self.screen.say(f"{clock}  {job.rule}: {many(self.done[job.rule])} done in {took}{of}")
        elif event in (LogEvent.JOB_ERROR, LogEvent.GROUP_ERROR):
            job = self.jobs.get(getattr(record, "jobid", -1))
            self.screen.say(f"{clock}  {job.name if job else 'a group of jobs'}: failed")
        elif event in (LogEvent.SHELLCMD, None) and record.levelno < logging.ERROR:
            text = str(record.msg or "").rstrip()
            if text and not NOISE.match(text.strip()):
                self.screen.say(text, sys.stderr)

    def _watch(self) -> None:
        while not self.ended.wait(TICK_S):
            with self.turn:
                if not self.closed:
                    self._look()

    def _look(self) -> None:
        """Show what is new in the logs, and how far the jobs are."""
        states = {}
        for job in list(self.running.values()):
            if job.rule in MANY:
                states[job.rule] = f"{job.rule} {self._far(job.rule)}"
            else:
                self._read(job)
                states[job.name] = f"{job.rule} {job.progress or duration(time.monotonic() - job.started)}"
        if not self.plain:
            self.screen.show("  " + " | ".join(states.values()) if states else "")

    def _far(self, rule: str) -> str:
        """How far a rule of many jobs is."""
        done, count = self.done[rule], self.counts.get(rule, 1)
        took = time.monotonic() - self.first[rule]
        left = f", {duration(took / done * (count - done))} left" if done else ""
        return f"{done:,} of {count:,} jobs{left}"

    def _read(self, job: Job, ended: bool = False) -> None:
        for line in job.log.lines(ended) if job.log else ():
            if found := PROGRESS.match(line):
                job.progress = found[1] + found[2]
                if not self.screen.rewrites and time.monotonic() - job.said >= SAID_EVERY_S:
                    job.said = time.monotonic()
                    self.screen.say(f"{line}  {job.name}")
            elif job.rule in TOLD or NOTE.match(line):
                self.screen.say(line)

    # --- the end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Snakemake's last act: nothing of its own comes after these lines."""
        with self.turn:
            if not self.closed:
                self.closed = True
                self.ended.set()
                for job in self.running.values():
                    self._read(job, ended=True)
                self.screen.show("")
                if lines := self._end():
                    self.screen.say("\n".join(lines), sys.stderr)
                elif lines := self._success():
                    self.screen.say("\n".join(lines))
        super().close()

    def _success(self) -> list[str]:
        quiet = "ALL" in (each.name for each in self.common_settings.quiet or ())
        if self.errors or self.interrupted or self.plain or quiet:
            return []
        if self.common_settings.dryrun:
            width = max(map(len, self.counts), default=0)
            rows = [f"{n:6,}  {rule:{width}}  {self.reasons.get(rule, '')}" for rule, n in self.counts.items()]
            last = "Nothing was run (-n); -n -p shows the commands, -n --verbose all that Snakemake says."
            return (
                [f"{many(sum(self.counts.values()))} would run:", *rows, last]
                if rows
                else ["Nothing to be done: all is there."]
            )
        if not self.nothing and not self.jobs:  # neither worked nor looked, as for --unlock
            return []
        head = (
            "Nothing to be done: all is there."
            if self.nothing
            else f"done in {duration(time.monotonic() - self.began)}"
        )
        return ["", head, *(closing({job.rule for job in self.jobs.values()} & set(TOLD)) if closing else ())]

    def _end(self) -> list[str]:
        jobs = list(self.failed.items())
        # Ended by Ctrl-C, Snakemake waits for its jobs and names none.
        jobs = jobs or [(number, job.logs) for number, job in self.running.items() if self.interrupted]
        told = [(number, *message(logs)) for number, logs in jobs]
        told = [entry for entry in told if entry[2]] or told[:1]  # of a group, those that say something
        if not told:
            ours = [text for text in self.errors if text and not NOISE.match(text)]
            return ["", *ours[-1:]] if ours else []
        lines: list[str] = []
        for number, log, text in told[:3]:
            name = self.jobs[number].name if number in self.jobs else "a job"
            saved = next((line for line in text.splitlines() if SAVED in line), "")
            text = saved or text
            lines += ["", f"{name} {'was stopped and has saved' if saved else 'failed'}:"]
            lines += [text or f"error: it says nothing{disk_full(log)}"]
            lines += [f"  log: {log}"] if log else []
        if len(told) > 3:
            lines.append(f"… and {len(told) - 3} more")
        if SAVED not in told[-1][2]:
            lines.append(f"  then: {RERUN}")
        return lines


def many(count: int) -> str:
    return f"{count:,} {'job' if count == 1 else 'jobs'}"


def listing(counts: dict[str, int]) -> str:
    named = ", ".join(rule if count == 1 else f"{count:,} {rule}" for rule, count in counts.items())
    return f"{many(sum(counts.values()))}: {named}"
