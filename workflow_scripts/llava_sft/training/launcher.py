"""Starts the training processes of this machine and shows their progress; light, so that it can say no in a second.

One process is started directly, several through torchrun. What they print goes to the run's log; the terminal gets a
line per log interval, read from the same `metrics.jsonl` that the report draws.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import psutil

from llava_sft.training.watch import Tail

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def command(count: int, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `count` processes, and the environment it needs on top of ours."""
    module = ["-m", "llava_sft.training", *arguments]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(_package_root()), os.environ.get("PYTHONPATH")]))}
    if count == 1:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        return [sys.executable, *module], environment | single | {"MASTER_PORT": str(_free_port())}
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        "--signals-to-handle=SIGHUP",
    ]
    return [sys.executable, *torchrun, *module], environment | {"OMP_NUM_THREADS": str(threads)}


def launch(
    count: int, arguments: list[str], run_dir: Path, log: Path, lock: BinaryIO, say: Callable[[str], None]
) -> int:
    """Run the training to its end; returns its exit code.

    SIGTERM, SIGINT and SIGUSR1 ask the training processes, once a second, to save and end: they ignore it until Megatron
    listens, and so do their helpers, which a batch system signals as well.
    `lock` is inherited, so that the run directory stays locked as long as any of the processes lives.
    """
    argv, environment = command(count, arguments)
    tail, asked = Tail(run_dir), []

    def ask(number, frame):
        if not asked:
            say(f"{signal.Signals(number).name}: saving a checkpoint and ending")
        asked.append(number)

    with open(log, "ab") as log_file:
        training = subprocess.Popen(
            argv,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            pass_fds=[lock.fileno()],
            preexec_fn=_before_training,
        )
        previous = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
        try:
            code, last = None, 0.0
            while code is None:
                time.sleep(0.2)
                code = training.poll()
                if asked and code is None and time.monotonic() > last + 1:
                    last = time.monotonic()
                    for process in _workers(training.pid, count):
                        process.send_signal(signal.SIGTERM)
                for line in tail.new():
                    say(line)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return code


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: training processes that outlived a killed launcher or
    torchrun would go on writing into a run directory that the next start believes to be its own (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _before_training() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def _workers(pid: int, count: int) -> list[psutil.Process]:
    """The training processes themselves: torchrun would kill them half a minute after a signal of its own."""
    try:
        parent = psutil.Process(pid)
        return [parent] if count == 1 else [p for p in parent.children() if "llava_sft.training" in p.cmdline()]
    except psutil.NoSuchProcess:
        return []


def _package_root() -> Path:
    return Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
