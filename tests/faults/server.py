"""A process that has imported what the steps import, and forks one child a step: `python -m faults.server SOCKET PRELOAD`.

Notable:
- a step's script runs unchanged, as `__main__`, in the folder and with the streams of the request;
- what a step starts as `python -m llava_sft…` (the training, the Megatron side of the parity check) is forked by a second
  server, which has Megatron imported and its CPU layer applied; everything else is started as ever;
- nothing here imports the project under test before the path says which one it is (PYTHONPATH).
"""

import array
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil

PRELOAD = {
    "steps": (
        "torch", "snakemake.cli", "snakemake.workflow", "transformers", "safetensors.torch", "tokenizers", "sqlite3", "yaml", "jinja2",
        "PIL.Image", "megatron.energon", "tqdm", "pydantic", "orjson", "xxhash", "psutil",
        "transformers.models.auto.processing_auto", "transformers.models.auto.modeling_auto", "transformers.generation.utils",
        "transformers.models.qwen2.tokenization_qwen2", "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.qwen2_vl.image_processing_qwen2_vl", "torch.distributed.checkpoint",
        "llava_sft.paths", "llava_sft.workflow", "llava_sft.data.index", "llava_sft.data.inspect", "llava_sft.data.sizes",
        "llava_sft.data.adopt", "llava_sft.checkpoint.convert", "llava_sft.evaluation.parity", "llava_sft.preflight.predict",
        "llava_sft.report.charts", "llava_sft.report.html", "llava_sft.run.identity",
    ),
    "modules": (
        "llava_sft.training.process", "llava_sft.evaluation.parity_megatron", "torch.utils.tensorboard", "megatron.energon",
        "llava_sft.checkpoint.torch_dist",
    ),
}  # fmt: skip
FIRST = "FAULTS_FIRST"
MODULES = "FAULTS_MODULES"  # the socket of the server that forks `python -m llava_sft…`


# ------------------------------------------------------------------------------------------------- asking


class Asked:
    """A child of a server: as much of `subprocess.Popen` as the steps use."""

    def __init__(self, place: str, request: dict, fds: list[int]):
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.connect(place)
        data = json.dumps(request).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = self.connection.sendmsg([data], ancillary)
        if sent < len(data):  # a short step may have ended by now, and closed the connection
            self.connection.sendall(data[sent:])
        self.answers = self.connection.makefile("r")
        self.pid, self.returncode, self.args = int(self.answers.readline()), None, request["argv"]
        self.stdin = self.stdout = self.stderr = None

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], timeout)[0]:
            self.returncode = int(self.answers.readline() or -9)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, text: str | None = None) -> tuple[str | None, None]:
        if self.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(text or "")
            self.stdin.close()
        said = self.stdout.read() if self.stdout else None
        self.wait()
        return said, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stream in (self.stdin, self.stdout):
            if stream:
                stream.close()
        self.wait()


def ask(place: str, argv: list[str], cwd: Path, output: int, first: str = "") -> Asked:
    """Have the server at `place` run a script (argv[0], in the server's environment) with its output on a descriptor.

    `first`: Python that the step, and what it starts, runs before anything else.
    """
    with open(os.devnull, "rb") as nothing:
        request = {"argv": argv, "cwd": str(cwd), "module": "", "environment": None, "first": first}
        return Asked(place, request, [nothing.fileno(), output, output])


class Servers:
    """The servers of a project, started with `environment`; `place` is a folder for their sockets and logs."""

    def __init__(
        self, project: Path, place: Path, environment: dict[str, str], preloads: tuple[str, ...] = (*PRELOAD,)
    ):
        self.place, self.preloads = place, preloads
        place.mkdir(exist_ok=True)
        paths = (project / "workflow_scripts", Path(__file__).parents[1])
        here = {"PYTHONPATH": ":".join(map(str, paths)), MODULES: str(place / "modules")}
        self.processes = []
        for preload in preloads:
            command = [sys.executable, "-m", "faults.server", str(place / preload), preload]
            with open(place / f"{preload}.log", "w") as log:
                started = subprocess.Popen(command, cwd=project, env=environment | here, stdout=log, stderr=log)
            self.processes.append(started)

    def wait(self) -> None:
        for preload in self.preloads:
            while not (self.place / preload).exists():
                if any(process.poll() is not None for process in self.processes):
                    raise RuntimeError((self.place / f"{preload}.log").read_text())
                time.sleep(0.1)

    def ask(self, argv: list[str], cwd: Path, output: int, first: str = "") -> Asked:
        return ask(str(self.place / "steps"), argv, cwd, output, first)

    def kill_steps(self) -> None:
        for server in self.processes:
            for process in psutil.Process(server.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


_Popen = subprocess.Popen


class Popen(_Popen):
    """What a step sees as subprocess.Popen: `python -m llava_sft…` is forked by the other server."""

    def __new__(cls, argv, *args, **named):
        words = list(map(str, argv)) if isinstance(argv, list | tuple) else []
        if words[1:2] == ["-m"] and words[2].startswith("llava_sft."):
            return forked(words, **named)
        return super().__new__(cls)


def forked(argv, stdin=None, stdout=None, stderr=None, env=None, cwd=None, pass_fds=(), **named) -> Asked:
    ends, fds, close = {}, [], []
    for name, given, default in (("stdin", stdin, 0), ("stdout", stdout, 1), ("stderr", stderr, 2)):
        if given == subprocess.PIPE:
            read, write = os.pipe()
            theirs, ours = (read, write) if name == "stdin" else (write, read)
            ends[name] = open(ours, "w" if name == "stdin" else "r")  # noqa: SIM115
            fds.append(theirs)
            close.append(theirs)
        elif given == subprocess.STDOUT:
            fds.append(fds[1])
        elif given == subprocess.DEVNULL:
            fds.append(os.open(os.devnull, os.O_RDWR))
        else:
            fds.append(default if given is None else given if isinstance(given, int) else given.fileno())
    sys.stdout.flush()
    request = {
        "argv": argv[3:],
        "cwd": str(cwd or os.getcwd()),
        "module": argv[2],
        "environment": dict(env or os.environ),
    }
    asked = Asked(os.environ[MODULES], request, [*fds, *pass_fds])
    for fd in close:
        os.close(fd)
    asked.args = argv
    for name, stream in ends.items():
        setattr(asked, name, stream)
    return asked


# ------------------------------------------------------------------------------------------------- serving


def serve(place: str, preload: str) -> None:
    """Fork a child for each connection until our parent is gone; tell it the child's number, then its exit code."""
    for name in PRELOAD[preload]:
        try:
            importlib.import_module(name)
        except ImportError as error:  # an older or newer project: its steps import what they need
            print(f"not imported: {name}: {error}", file=sys.stderr)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(f"{place}.new")
    listening.listen(64)
    os.rename(f"{place}.new", place)
    parent, children = os.getppid(), {}
    while os.getppid() == parent:
        if select.select([listening], [], [], 0.01 if children else 0.5)[0]:
            connection = listening.accept()[0]
            request, fds = receive(connection)
            pid = os.fork()
            if not pid:
                listening.close()
                child(request, fds)
            for fd in fds:
                os.close(fd)
            children[pid] = connection
            connection.sendall(f"{pid}\n".encode())
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with children.pop(pid) as connection, contextlib.suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 64)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    return json.loads(data), list(fds)


def child(request: dict, fds: list[int]) -> None:
    """Run one step; never returns."""
    code = 1
    try:
        os.setsid()
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
            os.close(fd)
        sys.stdin = open(0)  # noqa: SIM115 (the process's own)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        os.chdir(request["cwd"])
        if request["environment"] is not None:
            os.environ.clear()
            os.environ.update(request["environment"])
        subprocess.Popen = Popen
        os.environ[FIRST] = request.get("first", os.environ.get(FIRST, ""))
        exec(os.environ[FIRST], {})
        code = run(request["module"], request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def run(module: str, argv: list[str]) -> int:
    """A script or module as `__main__`; returns the exit code that Python would end with."""
    try:
        if module:
            sys.argv = [module, *argv]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
