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
from collections.abc import Callable
from typing import Any

import snakemake.cli
from snakemake.common.argparse import ArgumentParser
from snakemake.jobs import GroupJob
from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter, get_event
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from snakemake_logger_plugin_llava_sft.ending import NOISE, NOTHING, failure, plan
from snakemake_logger_plugin_llava_sft.screen import Screen
from snakemake_logger_plugin_llava_sft.state import MANY, Job, State, listing, many, of_group
from snakemake_logger_plugin_llava_sft.words import command_line_mistake, duration, profile_missed

SHOWN_WHOLE = ("index_webdataset", "preflight", "train", "evaluate")  # rules whose whole log is shown
NOTE = re.compile(r" *(warning|note): ")
PROGRESS = re.compile(r"  ([\d,]+ of [\d,]+ \S+), \S+/s(, \S+ left)$")  # llava_sft.progress
TICK_S, SAID_EVERY_S = 0.5, 10

# Set by the Snakefile: names of its target rules, and what to say when they are there; `shown`: whose logs were shown.
targets: set[str] = set()
closing: Callable[[set[str]], list[str]] | None = None


def print_of_cli(*words: Any, **options: Any) -> None:
    """In place of `print` in snakemake.cli, which names its profiles, or misses one, before there is any logger."""
    text = str(words[0]) if words else ""
    if not (text.startswith("Using ") and "profile" in text):
        print(profile_missed(text), *words[1:], **options)


def say_interrupted(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """In place of the traceback of a Ctrl-C while Snakemake plans: once a job runs it catches that itself."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("\ninterrupted before the first job: nothing was run", file=sys.stderr)


def log_error_with_reason(self: GroupJob, msg: str | None = None, aux_logs: list | None = None, **facts: Any) -> None:
    """In place of GroupJob.log_error, which leaves out why the executor failed the group."""
    log_group_error(self, msg, aux_logs, **facts, rule_msg=msg)


if "--verbose" not in sys.argv:
    vars(snakemake.cli)["print"] = print_of_cli
    sys.excepthook = say_interrupted
log_group_error, GroupJob.log_error = GroupJob.log_error, log_error_with_reason
# The Slurm executor asks for it where a job cannot be submitted; without, its thread ends and the workflow waits for ever.
GroupJob.rule = property(lambda self: next(iter(self.jobs)).rule)
ArgumentParser.print_usage = lambda *_: None  # a hundred lines before the one that says which option is wrong


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
        self.screen, self.state = Screen(), State(targets)
        self.turn, self.ended = threading.RLock(), threading.Event()
        if mistake := command_line_mistake(sys.argv[1:]):
            print(f"error: {mistake}", file=sys.stderr, flush=True)
            sys.exit(1)

    def emit(self, record: logging.LogRecord) -> None:
        with self.turn:
            if get_event(record) in (LogEvent.JOB_FINISHED, LogEvent.JOB_ERROR) and (job := self._job(record)):
                self._read(job, ended=True)
            if get_event(record) == LogEvent.JOB_INFO and not self.state.jobs and not self.common_settings.dryrun:
                threading.Thread(target=self._watch, daemon=True).start()
            self.state.note(record)
            if not self.shown.filter(record):
                return
            if self.plain:
                self.default.emit(record)
            elif not self.common_settings.dryrun and (line := self._line(record)):
                self.screen.say(line, sys.stderr if get_event(record) in (LogEvent.SHELLCMD, None) else sys.stdout)
                self._look()

    def _job(self, record: Any) -> Job | None:
        return self.state.jobs.get(getattr(record, "jobid", getattr(record, "job_id", -1)))

    def _line(self, record: Any) -> str:
        event, clock, job = get_event(record), time.strftime("%H:%M:%S"), self._job(record)
        counts, done = self.state.counts, self.state.done
        if event == LogEvent.RUN_INFO and counts:
            return f"{clock}  {listing(counts)}"
        if event == LogEvent.JOB_INFO and job:
            if job.rule not in MANY:
                return f"{clock}  {job.name}"
            return f"{clock}  {job.rule}: {many(counts.get(job.rule, 1))}" if self.state.begun[job.rule] == 1 else ""
        if event == LogEvent.JOB_FINISHED and job:
            of = f", {done.total():,} of {sum(counts.values()):,}"
            if job.rule not in MANY:
                return f"{clock}  {job.name}: done in {job.took()}{of}"
            took = duration(time.monotonic() - self.state.first[job.rule])
            last = done[job.rule] == counts.get(job.rule)
            return f"{clock}  {job.rule}: {many(done[job.rule])} done in {took}{of}" if last else ""
        if event in (LogEvent.JOB_ERROR, LogEvent.GROUP_ERROR):
            how = "stopped" if self.state.interrupted else "failed"
            name = job.name if job else f"a group of {many(len(getattr(record, 'job_error_info', ())))}"
            return "" if of_group(record) else f"{clock}  {name}: {how}"
        text = str(record.msg or "").rstrip()
        passed_on = event in (LogEvent.SHELLCMD, None) and record.levelno < logging.ERROR
        return text if passed_on and not NOISE.match(text.strip()) else ""

    def _watch(self) -> None:
        while not self.ended.wait(TICK_S):
            with self.turn:
                if not self.ended.is_set():
                    self._look()

    def _look(self) -> None:
        """Show what is new in the logs, and how far the jobs are."""
        states = {}
        for job in list(self.state.running.values()):
            self._read(job)
            if job.rule in MANY:
                states[job.rule] = f"{job.rule} {self.state.far(job.rule)}"
            else:
                states[job.name] = f"{job.rule} {job.progress or job.took()}"
        if not self.plain:
            self.screen.show("  " + " | ".join(states.values()) if states else "")

    def _read(self, job: Job, ended: bool = False) -> None:
        for line in job.log.lines(ended) if job.log else ():
            if found := PROGRESS.match(line):
                job.progress = found[1] + found[2]
                if not self.screen.rewrites and time.monotonic() - job.said >= SAID_EVERY_S:
                    job.said = time.monotonic()
                    self.screen.say(f"{line}  {job.name}")
            elif line.startswith("error: "):
                job.erring = True  # shown at the end
            elif not job.erring and (job.rule in SHOWN_WHOLE or NOTE.match(line)):
                self.screen.say(line)

    def close(self) -> None:
        """Snakemake's last act: nothing of its own comes after these lines."""
        with self.turn:
            if not self.ended.is_set():
                self.ended.set()
                for job in self.state.running.values():
                    self._read(job, ended=True)
                self.screen.show("")
                if lines := failure(self.state):
                    self.screen.say("\n".join(lines), sys.stderr)
                elif lines := self._success():
                    self.screen.say("\n".join(lines))
        super().close()

    def _success(self) -> list[str]:
        state = self.state
        quiet = "ALL" in (each.name for each in self.common_settings.quiet or ())
        if state.errors or state.interrupted or self.plain or quiet:
            return []
        if self.common_settings.dryrun:
            return plan(state)
        if not state.nothing and not state.jobs:  # neither worked nor looked, as for --unlock
            return []
        shown = {job.rule for job in state.jobs.values()}.intersection(SHOWN_WHOLE)
        head = NOTHING if state.nothing else f"done in {duration(time.monotonic() - state.began)}"
        return ["", head, *(closing(shown) if closing else ())]
