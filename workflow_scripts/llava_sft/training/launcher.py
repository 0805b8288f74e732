"""Start the training processes and show their progress. Imports neither torch nor Megatron: a refusal takes a second.

On one machine the processes meet in a file, and nothing listens beyond the loopback device. In a Slurm job srun starts one
task a node, `python -m llava_sft.training.launcher ADDRESS:PORT NPROC RUN_JSON RUN_DIR`, and each does the same for its
node; without Slurm the other nodes wait for the first one's word (meeting.py). Their output goes to the run's log; the
terminal gets a line per log interval, read from the same `metrics.jsonl` that the report draws.
"""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava_sft.errors import many
from llava_sft.machine import end_with_parent
from llava_sft.run.records import Tail
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.training import slurm
from llava_sft.training.ranks import Command, Failure, Processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
TERMINALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
STORE = "LLAVA_SFT_STORE"  # the file in which the processes of one machine meet
STOPPED = 128 + signal.SIGINT
AT_ONCE_S = 1.0  # one Ctrl-C may arrive twice: from the terminal, and passed on


class Place(NamedTuple):
    """Where the processes of several nodes meet, and which node this is: rank 0 listens on the node 0."""

    address: str
    port: int
    node: int
    nodes: int


def commands(count: int, arguments: list[str], store: str, place: Place | None = None) -> list[Command]:
    """The command line of each process of this machine, and what it needs in its environment besides ours.

    Args:
        count: processes of this machine.
        store: folder for the file in which they meet.
        place: of a training on several nodes, where they meet instead.
    """
    environment, first, world = python_path(), 0, count
    if place:
        environment |= {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
        first, world = place.node * count, place.nodes * count
    else:
        environment |= {
            f"{name}_SOCKET_IFNAME": os.environ.get(f"{name}_SOCKET_IFNAME", "lo") for name in ("GLOO", "NCCL")
        }
        environment[STORE] = f"{store}/store"
    if world > 1:
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    argv = [sys.executable, "-m", "llava_sft.training", *arguments]
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(count)}
    return [(argv, environment | {"RANK": str(first + i), "LOCAL_RANK": str(i)}) for i in range(count)]


def node_command(
    job: slurm.Job, nodes: int, count: int, gpus: int, options: list[str], arguments: list[str]
) -> list[str]:
    """The srun command that starts one task on each node of a Slurm job, `count` processes a node.

    One failed task ends the others. `options`: the user's, for the srun of this cluster.
    """
    task = [sys.executable, "-m", "llava_sft.training.launcher", f"{job.first_address}:{free_port()}", str(count)]
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus_per_node}",
        *([f"--gres=gpu:{gpus}"] if gpus else []),
        "--kill-on-bad-exit=1",
        "--overlap",  # with a step that somebody may have opened in the job
        *(["--label"] if nodes > 1 else []),
        *options,
        *task,
        *arguments,
    ]


def launch(
    values: ResolvedSettings,
    arguments: list[str],
    run_dir: Path,
    log: Path,
    lock: BinaryIO | None = None,
    job: slurm.Job | None = None,
    srun_options: list[str] | None = None,
    place: Place | None = None,
    trouble: Callable[[], Failure | None] = lambda: None,
) -> int:
    """Run the training to its end; return its exit code.

    The processes inherit `lock`: the run directory stays locked as long as any of them lives on this machine.
    `trouble`: asked again and again; what has happened on another node that ends the training here, too.
    """
    count, tail = values.nproc_per_node, Tail(run_dir)
    store = tempfile.TemporaryDirectory(prefix="llava_sft_", ignore_cleanup_errors=True)
    if job:
        argv = node_command(job, values.nodes, count, values.gpus_per_node, srun_options or [], arguments)
        srun = " ".join(argv[: argv.index(sys.executable)])
        print(f"{many(values.nodes, 'node')} × {many(count, 'process')}: {srun} …", flush=True)
        started = [(argv, python_path())]
    else:
        started = commands(count, arguments, store.name, place)

    def show() -> None:
        for line in tail.new() if not (place and place.node) else ():
            say(line)

    with store, open(log, "ab") as output:
        of_ranks = None if job else run_dir
        processes = Processes(started, of_ranks, output, (lock.fileno(),) if lock else (), _before_training, trouble)
        return run(processes, job.signal_steps if job else processes.ask, show)


def run(processes: Processes, ask: Callable[[], None], show: Callable[[], None] = lambda: None) -> int:
    """Wait for processes; return their exit code, or STOPPED when they were ended at once.

    After a stop signal the training processes are asked (`ask`), once a second, to save and end: they hold the signal back
    until the loop listens, and their helpers, which a batch system signals as well, ignore it. A second SIGINT ends them at
    once.
    """
    asked: list[float] = []
    at_once: list[float] = []

    def note(number, frame):
        now = time.monotonic()
        if not asked:
            say(f"{signal.Signals(number).name}: saving a checkpoint, then ending; Ctrl-C again ends without one")
        elif number == signal.SIGINT and now > asked[-1] + AT_ONCE_S and not at_once:
            say("SIGINT again: ending at once; the same command resumes from the newest checkpoint")
            at_once.append(now)
            processes.kill()
        asked.append(now)

    with _on_stop_signal(note):
        code, last = None, 0.0
        while code is None:
            time.sleep(0.2)
            code = processes.poll()
            if asked and not at_once and code is None and time.monotonic() > last + 1:
                last = time.monotonic()
                ask()
            show()
    return STOPPED if at_once and code else code


@contextlib.contextmanager
def _on_stop_signal(handler: Callable[[int, Any], None]) -> Iterator[None]:
    # A signal that nohup, or a shell that started us in the background, has set to be ignored stays ignored.
    ignored = {n for n in TERMINALS if signal.getsignal(n) is signal.SIG_IGN}
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class _EnoughError(Exception):
    """A stop signal has come where there was something to wait for."""


@contextlib.contextmanager
def cut_short() -> Iterator[None]:
    """Wait in this block for what a training need not wait for: a stop signal ends the waiting, and nothing else."""

    def end(number, frame):
        raise _EnoughError

    with contextlib.suppress(_EnoughError), _on_stop_signal(end):
        yield


def say(line: str) -> None:
    """Print a line. A closed terminal, or a full disk behind it, does not end a training."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a signal arrived while another line was printed
        print(line, flush=True)


def _before_training() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    hold_back()  # an ignored signal would be lost; this one reaches Megatron as soon as it listens
    end_with_parent()


def hold_back() -> None:
    """Block the signal that asks to save. Training processes let it through when the loop listens (loop.py); their
    helpers, loader workers among them, never do: torch's own handler would end them, and the training with them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def python_path() -> dict[str, str]:
    """PYTHONPATH with this package on it, for processes that do not start in its folder."""
    root = Path(__file__).resolve().parents[2]
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def main(place: str, count: str, run_json: str, run_dir: str) -> int:
    """One node of a training, under srun. Slurm signals every process of the step, but only once, and a training process
    ignores that until the loop listens: so the signal is caught here and passed on as on a single machine."""
    address, _, port = place.rpartition(":")
    node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    where = Place(address, int(port), node, nodes) if nodes > 1 else None
    with tempfile.TemporaryDirectory(prefix="llava_sft_", ignore_cleanup_errors=True) as store:
        started = commands(int(count), [run_json, run_dir], store, where)
        processes = Processes(started, Path(run_dir), before=_before_training)
        return run(processes, processes.ask)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
