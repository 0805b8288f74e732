"""Start the training processes and show their progress. Imports neither torch nor Megatron: a refusal takes a second.

On one machine, one process is started directly, several through torchrun; they meet in a file, and nothing listens beyond
the loopback device. In a Slurm job srun starts one task a node,
`python -m llava_sft.training.launcher ADDRESS:PORT NPROC RUN_JSON RUN_DIR`, and each does the same for its
node. Their output goes to the run's log; the terminal gets a line per log interval, read from the same `metrics.jsonl` that
the report draws.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import psutil

from llava_sft.run.records import Tail
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.training import slurm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
TERMINALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
STORE = "LLAVA_SFT_STORE"  # the file in which the processes of one machine meet
STOPPED = 128 + signal.SIGINT
AT_ONCE_S = 1.0  # one Ctrl-C may arrive twice: from the terminal, and passed on


def command(
    count: int, arguments: list[str], store: str, rendezvous: list[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts the processes of this machine, and what it needs in its environment besides ours.

    Args:
        count: processes of this machine.
        store: folder for the file in which they meet.
        rendezvous: torchrun's options for a training on several nodes, which meet at an address instead.
    """
    module = ["-m", "llava_sft.training", *arguments]
    environment = python_path()
    if not rendezvous:
        loopback = {f"{name}_SOCKET_IFNAME": os.environ.get(f"{name}_SOCKET_IFNAME", "lo") for name in ("GLOO", "NCCL")}
        environment |= loopback | {STORE: f"{store}/store", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={store}/rendezvous", "--rdzv-conf=store_type=file"]
        if count == 1:
            return [sys.executable, *module], environment | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count))
    # torchrun kills the training at any signal that it handles, and it has to handle one: nobody sends this one.
    options = [*rendezvous, f"--nproc-per-node={count}", "--signals-to-handle=SIGRTMAX"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*torchrun, *module], environment | {"OMP_NUM_THREADS": threads}


def node_command(
    job: slurm.Job, nodes: int, count: int, gpus: int, options: list[str], arguments: list[str]
) -> list[str]:
    """The srun command that starts one task on each node of a Slurm job, `count` processes a node.

    One failed task ends the others. `options`: the user's, for the srun of this cluster.
    """
    task = [sys.executable, "-m", "llava_sft.training.launcher", f"{job.first_address}:{_free_port()}", str(count)]
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
    lock: BinaryIO,
    job: slurm.Job | None,
    srun_options: list[str],
) -> int:
    """Run the training to its end; return its exit code.

    The processes inherit `lock`: the run directory stays locked as long as any of them lives on this machine.
    """
    count, tail = values.nproc_per_node, Tail(run_dir)
    store = tempfile.TemporaryDirectory(prefix="llava_sft_", ignore_cleanup_errors=True)
    if job:
        argv = node_command(job, values.nodes, count, values.gpus_per_node, srun_options, arguments)
        environment, ask = python_path(), lambda training: job.signal_steps()
        srun = " ".join(argv[: argv.index(sys.executable)])
        print(f"{values.nodes} nodes × {count} processes: {srun} …", flush=True)
    else:
        argv, environment = command(count, arguments, store.name)
        ask = lambda training: ask_workers(training, count)  # noqa: E731

    def show() -> None:
        for line in tail.new():
            say(line)

    with store, open(log, "ab") as log_file:
        return run(argv, environment, ask, show, log_file, (lock.fileno(),))


def run(
    argv: list[str],
    environment: dict[str, str],
    ask: Callable[[subprocess.Popen], None],
    show: Callable[[], None] = lambda: None,
    output: BinaryIO | None = None,
    pass_fds: tuple[int, ...] = (),
) -> int:
    """Run a command to its end; return its exit code, or STOPPED when it was ended at once.

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
            training.kill()
        asked.append(now)

    errors = subprocess.STDOUT if output else None
    environment = os.environ | environment
    training = subprocess.Popen(
        argv, env=environment, pass_fds=pass_fds, preexec_fn=_before_training, stdout=output, stderr=errors
    )
    # A signal that nohup, or a shell that started us in the background, has set to be ignored stays ignored.
    ignored = {n for n in TERMINALS if signal.getsignal(n) is signal.SIG_IGN}
    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS if number not in ignored}
    try:
        code, last = None, 0.0
        while code is None:
            time.sleep(0.2)
            code = training.poll()
            if asked and not at_once and code is None and time.monotonic() > last + 1:
                last = time.monotonic()
                ask(training)
            show()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return STOPPED if at_once and code else code


def say(line: str) -> None:
    """Print a line. A closed terminal, or a full disk behind it, does not end a training."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a signal arrived while another line was printed
        print(line, flush=True)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux): training processes that outlived a killed launcher or
    torchrun would keep writing into a run directory that the next start believes to be its own."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _before_training() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    hold_back()  # an ignored signal would be lost; this one reaches Megatron as soon as it listens
    die_with_parent()


def hold_back() -> None:
    """Block the signal that asks to save. Training processes let it through when the loop listens (loop.py); their
    helpers, loader workers among them, never do: torch's own handler would end them, and the training with them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def ask_workers(training: subprocess.Popen, count: int) -> None:
    """Signal the training processes directly: torchrun, if signalled, kills them after half a minute."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(training.pid)
        children = parent.children()
        # Without torchrun the process is the training itself, and its children are loader processes.
        alone = count == 1 and "torch.distributed.run" not in parent.cmdline()
        for process in [parent] if alone else [p for p in children if "llava_sft.training" in p.cmdline()]:
            process.send_signal(signal.SIGTERM)


def python_path() -> dict[str, str]:
    """PYTHONPATH with this package on it, for processes that do not start in its folder."""
    root = Path(__file__).resolve().parents[2]
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def rendezvous(place: str, environment: Mapping[str, str]) -> list[str]:
    """torchrun's options, from the address of the first node and Slurm's variables of this task; none for a single node."""
    nodes, rank = environment["SLURM_NNODES"], environment["SLURM_NODEID"]
    address, _, port = place.rpartition(":")
    if nodes == "1":
        return []
    return [f"--nnodes={nodes}", f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={port}"]


def main(place: str, count: str, *arguments: str) -> int:
    """One node of a training, under srun. Slurm signals every process of the step, but only once, and a training process
    ignores that until the loop listens: so the signal is caught here and passed on as on a single machine."""
    with tempfile.TemporaryDirectory(prefix="llava_sft_", ignore_cleanup_errors=True) as store:
        argv, environment = command(int(count), list(arguments), store, rendezvous(place, os.environ))
        return run(argv, environment, lambda training: ask_workers(training, int(count)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
