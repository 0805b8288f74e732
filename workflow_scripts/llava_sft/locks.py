"""What becomes of runs that end otherwise than they began: locks, Slurm jobs left behind, signals.

Notable:
- a lock that a killed run left behind is recognised by the kernel's own lock, which dies with its process;
- Slurm jobs that a killed run left behind are waited for: their results are used, and none is submitted twice;
- a signal to Snakemake alone reaches the jobs it runs here.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import psutil

from llava_sft.errors import INTERRUPTED, SettingsError, exits_cleanly
from llava_sft.programs import ask
from llava_sft.training.slurm import ASK_SLURM, MY_JOBS, ask_slurm

_held = None  # keeps the shared lock for the life of the process


@exits_cleanly
def lift_stale_lock(wait: bool = True) -> None:
    """Remove Snakemake's lock files when the run that made them is dead, after the last of its Slurm jobs.

    Every Snakemake main process of this folder holds a shared kernel lock as long as it lives. Whoever can have it alone
    knows that nobody else lives, so that lock files left by a `kill -9` or a power cut mean nothing.
    `wait`: for the Slurm jobs; a dry run does not.
    """
    global _held
    directory = Path(".snakemake")
    directory.mkdir(exist_ok=True)
    _held = open(directory / "alive", "a+")  # noqa: SIM115
    try:
        fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(_held, fcntl.LOCK_SH)
        if wait:
            _note_myself()  # another that lives has lifted what there was to lift
        return
    except OSError:
        return  # a file system without locks: Snakemake's own message says what to do
    if wait:
        wait_for_jobs()
    stale = list((directory / "locks").glob("*"))
    for path in stale:
        path.unlink(missing_ok=True)
    if stale:
        print("The last run was killed and left its lock: lifted, going on where it was.", file=sys.stderr)
    if wait:
        _held.truncate(0)
        _note_myself()
    fcntl.flock(_held, fcntl.LOCK_SH)


def _note_myself() -> None:
    """Add a line about this Snakemake, for another that finds the files locked (the logger plugin)."""
    if _held:
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M")}
        _held.write(json.dumps(note | {"command": shlex.join(["snakemake", *sys.argv[1:]])}) + "\n")
        _held.flush()


# ------------------------------------------------------------------------------------------------- signals


def pass_on_signals() -> None:
    """Let SIGTERM, SIGINT and SIGHUP to this process alone reach the jobs that run here, so that a training saves and ends.

    Called once Snakemake has set its own handlers, which then end the workflow. Ctrl-C reaches the whole terminal, which
    has asked the jobs already: asked once more, they do the same.
    """

    signals = itertools.count(1)

    def pass_on(number, frame):
        for process in running_scripts():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)
        if next(signals) == 2:
            return  # it makes the jobs end at once. Snakemake, which waits for them, would leave them with a traceback
        then = previous[number] if callable(previous[number]) else previous[signal.SIGTERM]
        if callable(then):
            then(number, frame)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, pass_on)


def running_scripts() -> list[psutil.Process]:
    """The scripts of the jobs that run here, below the shells that started them; not what they started themselves."""
    found, shells = [], [psutil.Process()]
    while shells:
        with contextlib.suppress(psutil.Error):
            for child in shells.pop().children():
                name = child.name()
                if name in ("sh", "bash"):
                    shells.append(child)
                else:
                    found.append(child)
    return found


GAVE_JOBS = Path(".snakemake/slurm_jobs")  # there from the first job for Slurm until it is seen that none is left
# Of each job: number, state, comment (the plugin puts the rule there), working directory.
SQUEUE = ("squeue", *MY_JOBS, "--noheader", "--format=%A|%T|%k|%Z")


def jobs_left(listing: str) -> list[str]:
    """Number and rule of each Slurm job in squeue's list that a Snakemake of this folder submitted."""
    jobs = [line.split("|") for line in listing.splitlines() if line.count("|") == 3]
    return [
        f"{number} {comment} ({state})"
        for number, state, comment, folder in jobs
        if comment.startswith("rule_") and os.path.realpath(folder) == os.path.realpath(os.curdir)
    ]


def wait_for_jobs() -> None:
    """Wait until no Slurm job of an earlier run of this folder is left; a second one would do its work beside it.

    Raises SettingsError where a run has given jobs to Slurm, and Slurm does not say what has become of them.
    """
    if not shutil.which("squeue"):
        return
    answer = ask_slurm(*SQUEUE) if GAVE_JOBS.exists() else ask(*SQUEUE)
    if answer.trouble and GAVE_JOBS.exists():
        raise SettingsError(
            f"Slurm does not say whether jobs of an earlier run are still there: {answer.trouble}",
            f"{ASK_SLURM}; where there can be none: rm {GAVE_JOBS}",
        )
    if not (jobs := jobs_left(answer.output)):
        GAVE_JOBS.unlink(missing_ok=True)
        return
    shown = "".join(f"    {job}\n" for job in jobs[:5]) + (f"    … {len(jobs)} in all\n" if len(jobs) > 5 else "")
    print("Slurm jobs of an earlier run are still there: waiting for them, their results are used", file=sys.stderr)
    print(f"{shown}  fix: to begin without them, scancel these numbers", file=sys.stderr, flush=True)
    try:
        while (answer := ask(*SQUEUE)).trouble or jobs_left(answer.output):
            time.sleep(5)
    except KeyboardInterrupt:
        print("Stopped waiting; the jobs go on.", file=sys.stderr)
        sys.exit(INTERRUPTED)
