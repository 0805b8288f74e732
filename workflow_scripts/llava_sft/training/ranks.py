"""The processes of a training on this machine: if one of them fails the others end too, and it is said which one it was.

No launcher of torch's: its closing table would stand where the cause belongs, and it would wait half a minute for ranks
that wait for a dead one. What a rank knows of its own failure it notes itself (process.py, `note_failure`); what it cannot
say is noted here: that it was killed, or stopped. A rank that only lost the others is not the cause.
"""

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from llava_sft.errors import DamagedFileError
from llava_sft.files import read_json, write_json
from llava_sft.run.layout import FAILURE, LOST_RANKS

GRACE_S = 20.0  # for ranks that have lost another: a save in the background may end, and a rank says what it has seen
STOPPED_LOOKS, LOOK_EVERY_S = 12, 5.0  # so many looks in a row find a process stopped; a debugger's short stop is none
READ_EVERY_S = 1.0  # of what the ranks have noted
GOES_ON = "the same command goes on from the last checkpoint"

Command = tuple[list[str], dict[str, str]]  # argv, and variables on top of our environment
# problem, fix; `lines` of a traceback, or where it `crashed` without one; whether it `follows` from another rank's end
Failure = dict[str, Any]


class Processes:
    """Processes that work together.

    Args:
        commands: one a process.
        run_dir: where the failure of a rank is noted; None where they are no ranks.
        before: called in each process before its program starts.
        trouble: asked again and again; what another node says that ends them, to be noted.
    """

    def __init__(
        self, commands: list[Command], run_dir: Path | None = None, output: BinaryIO | None = None,
        pass_fds: tuple[int, ...] = (), before: Callable[[], None] | None = None,
        trouble: Callable[[], Failure | None] = lambda: None,
    ):  # fmt: skip
        self.run_dir, self.trouble, self.names = run_dir, trouble, [rank_name(each) for _, each in commands]
        self.alone = run_dir is None or all(each.get("WORLD_SIZE", "1") == "1" for _, each in commands)
        self.failed_at: float | None = None
        self.killed, self.ended = False, set[int]()
        self.code, self.looked, self.stopped, self.read = 0, time.monotonic(), Counter[int](), 0.0
        errors = subprocess.STDOUT if output else None
        self.processes: list[subprocess.Popen] = []
        for argv, environment in commands:
            environment = os.environ | environment
            self.processes.append(
                subprocess.Popen(
                    argv, env=environment, pass_fds=pass_fds, preexec_fn=before, stdout=output, stderr=errors
                )
            )

    def poll(self) -> int | None:
        """The first exit code that is not 0, or 0, when all have ended; until then None."""
        codes, now = [process.poll() for process in self.processes], time.monotonic()
        failed = [number for number, code in enumerate(codes) if code]
        if self.failed_at is None and failed:
            self.failed_at, self.code = now, codes[failed[0]] or 1
        if not self.killed:  # one that dies may be seen to end after those that lost it
            self._note_end([number for number in failed if number not in self.ended])
        self.ended.update(failed)
        if None not in codes:
            return self.code
        if self.alone:  # nobody waits for it: it may be stopped, and take its time to end
            return None
        if self.failed_at is None and (trouble := self.trouble() or self._long_stopped(now)):
            self.failed_at, self.code = now, 1
            self._note(trouble)
            self.kill()
        if self.failed_at is None and self._has_noted(now):
            self.failed_at, self.code = now, 1
        if self.failed_at is not None and now >= self.failed_at + GRACE_S:
            self.kill()
        return None

    def ask(self) -> None:
        """Ask all of them to save and end."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.failed_at is None:  # asked for from without: no rank has failed
            self.failed_at, self.code = time.monotonic(), 1
        self.killed = True
        for process in self.processes:
            process.kill()

    def _note_end(self, failed: list[int]) -> None:
        """Note which of them a signal ended."""
        for number in failed:
            code = self.processes[number].returncode
            if code >= 0:
                continue
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            why = "if nobody did it, the system did for want of memory (dmesg | tail); " if name == "SIGKILL" else ""
            # NCCL aborts a rank that has waited for another one too long.
            waited = name == "SIGABRT" and not self.alone
            found = {"problem": f"{self.names[number]} was ended by {name}", "fix": why + GOES_ON, "follows": waited}
            self._note(found if name in ("SIGKILL", "SIGTERM") else found | {"crashed": platform.node()})

    def _has_noted(self, now: float) -> bool:
        """Whether a rank, of any node, has noted why it ends: it may wait for a collective of NCCL's before it does."""
        if self.run_dir is None or now < self.read + READ_EVERY_S:
            return False
        self.read = now
        return noted_failure(self.run_dir) is not None

    def _long_stopped(self, now: float) -> Failure | None:
        """The first process, of the ranks and their loaders, that has long been stopped: the others wait for it."""
        if now < self.looked + LOOK_EVERY_S:
            return None
        self.looked = now
        stopped = Counter[int]()
        for name, process in zip(self.names, self.processes, strict=True):
            for pid in _stopped_processes(process.pid):
                stopped[pid] = self.stopped[pid] + 1
                if stopped[pid] >= STOPPED_LOOKS:
                    seconds, whose = STOPPED_LOOKS * LOOK_EVERY_S, "" if pid == process.pid else "a loader process of "
                    long = f"has been stopped (SIGSTOP) for {seconds:.0f} s, the others wait for it"
                    return {"problem": f"{whose}{name} (pid {pid}) {long}", "fix": GOES_ON}
        self.stopped = stopped
        return None

    def _note(self, failure: Failure) -> None:
        if self.run_dir:
            note_failure(self.run_dir, failure)


def _stopped_processes(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return [member.pid for member in family if member.status() == psutil.STATUS_STOPPED]
    return []


def rank_name(environment: Mapping[str, str]) -> str:
    """`rank 1 of 2`, on several nodes also which machine it is of; `the training` where there is one rank."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return "the training"
    where = f" on {platform.node()}" if "MASTER_ADDR" in environment else ""
    return f"rank {environment['RANK']} of {environment['WORLD_SIZE']}{where}"


def note_failure(run_dir: Path, failure: Failure) -> None:
    """Note why a training ends. Of several causes the first stays; what only `follows` from one is kept apart: neither who
    is faster nor how late a file system shows a file of another node decides what is said."""
    with contextlib.suppress(OSError):  # a full disk: train.py says it
        path = run_dir / (LOST_RANKS if failure.get("follows") else FAILURE)
        if not path.is_file():
            write_json(path, failure)


def forget_failure(run_dir: Path) -> None:
    for name in (FAILURE, LOST_RANKS):
        (run_dir / name).unlink(missing_ok=True)


def noted_failure(run_dir: Path) -> Failure | None:
    """Why the training ended, where that is known."""
    for name in (FAILURE, LOST_RANKS):
        with contextlib.suppress(DamagedFileError, OSError):  # the disk was full; another node has deleted it just now
            if known := read_json(run_dir / name, None):
                return known
    return None
