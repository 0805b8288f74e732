"""What the plugin remembers of a run: its jobs, how many of each rule there are, and what went wrong."""

import logging
import time
from collections import Counter
from typing import Any

from snakemake.logging import get_event
from snakemake_interface_logger_plugins.common import LogEvent

from snakemake_logger_plugin_llava_sft.screen import Log
from snakemake_logger_plugin_llava_sft.words import duration, own_words, refusal, why

MANY = ("stage2_sftdata2webdataset",)  # rules of many short jobs: one line for all


class Job:
    """A job that was started. `name`: as people call it."""

    def __init__(self, record: Any):
        self.rule, self.logs = record.rule_name, list(record.log)
        wildcards = [str(value) for name, value in dict(record.wildcards or {}).items() if name != "exp_dir"]
        self.name = " ".join([self.rule, *wildcards])
        self.log = Log(self.logs[0], record.created) if self.logs and self.rule not in MANY else None
        self.started = self.said = time.monotonic()
        self.progress, self.erring = "", False

    def took(self) -> str:
        return duration(time.monotonic() - self.started)


class State:
    """`targets`: names of the rules that make nothing themselves."""

    def __init__(self, targets: set[str]) -> None:
        self.targets, self.began = targets, time.monotonic()
        self.jobs: dict[int, Job] = {}
        self.running: dict[int, Job] = {}
        self.failed: dict[int, list[str]] = {}  # and their logs
        self.refused: dict[int, str] = {}  # why, as the executor says it
        self.errors: list[str] = []
        self.counts: dict[str, int] = {}  # jobs of each rule that are to be done
        self.begun: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.first: dict[str, float] = {}  # when a rule's first job started
        self.reasons: dict[str, str] = {}
        self.interrupted = self.nothing = False

    def note(self, record: Any) -> None:  # a LogRecord with what Snakemake adds to it
        event, text = get_event(record), str(record.msg)
        self.interrupted |= text.startswith(("Terminating processes", "Will exit after finishing"))
        self.nothing |= text.startswith("Nothing to be done")
        if event == LogEvent.JOB_INFO and record.rule_name not in self.targets:
            self.reasons.setdefault(record.rule_name, why(str(record.reason)))
            self.begun[record.rule_name] += record.jobid not in self.jobs  # else tried again
            self.jobs[record.jobid] = self.running[record.jobid] = Job(record)
            self.first.setdefault(record.rule_name, time.monotonic())
        elif event == LogEvent.JOB_FINISHED and record.job_id in self.jobs:
            self.failed.pop(record.job_id, None)  # tried again, under Slurm
            self.running.pop(record.job_id, None)
            self.done[self.jobs[record.job_id].rule] += 1
        elif event == LogEvent.RUN_INFO:
            stats = getattr(record, "stats", None) or {}
            self.counts = {rule: n for rule, n in stats.items() if rule not in self.targets and rule != "total"}
        elif event == LogEvent.JOB_ERROR:
            if not of_group(record):
                self._fail(record.jobid, list(record.log), record)
        elif event == LogEvent.GROUP_ERROR:
            for job in record.job_error_info:
                self._fail(job["jobid"], [*job["log"], *record.aux_logs], record)
        elif text.startswith("Failed to setup log file"):
            pass  # in a read-only folder, where the next message says so
        elif event == LogEvent.ERROR or record.levelno >= logging.ERROR:
            self.errors.append(own_words(getattr(record, "exception", ""), record.getMessage(), self.targets))

    def _fail(self, number: int, logs: list[str], record: Any) -> None:
        self.failed[number] = logs
        self.refused[number] = refusal(getattr(record, "rule_msg", None) or "")
        self.running.pop(number, None)

    def far(self, rule: str) -> str:
        """How far a rule of many jobs is."""
        done, count = self.done[rule], self.counts.get(rule, 1)
        took = time.monotonic() - self.first[rule]
        left = f", {duration(took / done * (count - done))} left" if done else ""
        return f"{done:,} of {many(count)}{left}"


def of_group(record: Any) -> bool:
    """Whether an error of a job repeats what the one of its group has said."""
    return bool(getattr(record, "indent", False))


def many(count: int) -> str:
    return f"{count:,} {'job' if count == 1 else 'jobs'}"


def listing(counts: dict[str, int]) -> str:
    named = ", ".join(rule if count == 1 else f"{count:,} {rule}" for rule, count in counts.items())
    return f"{many(sum(counts.values()))}: {named}"
