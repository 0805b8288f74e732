"""Starts the training processes of this machine and shows their progress; light, so that it can say no in a second.

One process is started directly, several through torchrun. What they print goes to the run's log; the terminal gets a
line per log interval, read from the same `metrics.jsonl` that the report draws.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from llava_sft.training.watch import METRICS, progress_line, read_metrics


def processes(values: dict) -> int:
    """Training processes of this machine: one per GPU, or on a CPU one per tensor × pipeline rank."""
    return values["gpus_per_node"] or values["tensor_model_parallel_size"] * values["pipeline_model_parallel_size"]


def command(count: int, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `count` processes, and the environment it needs on top of ours."""
    module = ["-m", "llava_sft.training", *arguments]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(_package_root()), os.environ.get("PYTHONPATH")]))}
    if count == 1:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        return [sys.executable, *module], environment | single | {"MASTER_PORT": str(_free_port())}
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [sys.executable, *torchrun, *module], environment | {"OMP_NUM_THREADS": str(threads)}


def launch(
    count: int, arguments: list[str], run_dir: Path, log: Path, lock: BinaryIO, say: Callable[[str], None]
) -> int:
    """Run the training to its end; returns its exit code. SIGTERM and SIGINT are passed on: Megatron saves and ends.

    `lock` is inherited, so that the run directory stays locked as long as any of the processes lives.
    """
    argv, environment = command(count, arguments)
    shown = len(read_metrics(run_dir))
    with open(log, "ab") as log_file:
        training = subprocess.Popen(
            argv,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            pass_fds=[lock.fileno()],
            # Ctrl-C reaches every process of the terminal; the training is told by us, once, to save and end.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        forwarded = lambda number, frame: training.send_signal(signal.SIGTERM)  # noqa: E731
        previous = {number: signal.signal(number, forwarded) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = None
            while code is None:
                time.sleep(0.2)
                code = training.poll()
                if (run_dir / METRICS).is_file():
                    records = read_metrics(run_dir)
                    for record in records[shown:]:
                        say(progress_line(record))
                    shown = max(shown, len(records))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return code


def _package_root() -> Path:
    return Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
