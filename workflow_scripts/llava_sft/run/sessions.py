"""When, where and with what a run was trained: a record as a training starts and one as it ends, for the report."""

import datetime
import os
import platform
import shlex
from pathlib import Path
from typing import Any

import psutil

from llava_sft.machine import gpus
from llava_sft.programs import said
from llava_sft.run.layout import SESSIONS
from llava_sft.run.records import append, read_jsonl

ROOT = Path(__file__).resolve().parents[3]


def note_start(run_dir: Path, step: int, on_gpu: bool, nodes: int) -> None:
    record: dict[str, Any] = {"iteration": step, "began": _now(), "host": platform.node(), "nodes": nodes}
    append(run_dir / SESSIONS, record | {"gpus": [gpu.name for gpu in gpus()] if on_gpu else [], "commit": commit()})


def note_end(run_dir: Path, step: int) -> None:
    append(run_dir / SESSIONS, {"iteration": step, "ended": _now()})


def sessions(run_dir: Path) -> list[dict[str, Any]]:
    """A record for each start, with `ended` and `reached` where it lived to note its end."""
    found: list[dict[str, Any]] = []
    for record in read_jsonl(run_dir / SESSIONS):
        if "began" in record:
            found.append(record)
        elif found:
            found[-1] |= {"ended": record["ended"], "reached": record["iteration"]}
    return found


def seconds(found: list[dict[str, Any]]) -> float | None:
    """How long they took together; None where one does not say when it ended."""
    if not found or any("ended" not in each for each in found):
        return None
    times = [tuple(datetime.datetime.fromisoformat(each[key]) for key in ("began", "ended")) for each in found]
    return sum((ended - began).total_seconds() for began, ended in times)


def commit() -> str:
    """The commit of this program's checkout, with a + where files were changed since; "" without Git."""
    return said("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+") or ""


def command_line() -> str:
    """The command that this process belongs to: Snakemake's, where it runs within it, else its own."""
    processes = [psutil.Process(os.getpid()), *psutil.Process(os.getpid()).parents()]
    lines = [words for process in processes if (words := _words(process))]
    named = [words for words in lines if any(os.path.basename(word) == "snakemake" for word in words[:2])]
    words = named[-1] if named else lines[0]
    if os.path.basename(words[0]).startswith("python"):
        words = words[1:]
    return shlex.join([os.path.basename(words[0]), *words[1:]])


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # of another user, or ended meanwhile
        return []


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
