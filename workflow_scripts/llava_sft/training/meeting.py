"""How several nodes without Slurm come together: the same command on every node, one experiment, one run directory.

Who does what:
- node 0 runs the workflow: it alone prepares the data, converts, validates, exports, evaluates and writes the report. These
  steps write files that all nodes share, where two writers would be one too many, and they take minutes beside a training of
  hours; a platform holds the other nodes for the length of the job in any case;
- the others wait for node 0's word, take part in the training, and end when node 0 ends, as well or as badly as it did:
  a platform takes a pod that ends early for a finished or a failed one.

Node 0 listens on MASTER_PORT from beginning to end; the connections are the state. A node that breaks down, or node 0
itself, is noticed by its connection, and the training ends on all nodes at once: no timeout of a collective is waited for.
The ranks meet at another port of node 0 (gloo and NCCL open further ones between all nodes anyway). Messages are lines of
JSON. Like torchrun's, the port knows no password: it is for a network of one's own.
"""

import ipaddress
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sft.errors import RunError, SettingsError, SftError, exits_cleanly
from llava_sft.nodes import Node, settle, this_node
from llava_sft.settings.resolved import Resolved
from llava_sft.training.connection import Connection
from llava_sft.training.launcher import Place, cut_short, free_port, launch, say
from llava_sft.training.ranks import GOES_ON, GRACE_S, Failure, note_failure, noted_failure

MEET_WITHIN_S = 1800.0  # a pod of node 0 may have to be found a place, and its image loaded
SAY_EVERY_S = 60.0
LAST_WORDS_S = 2 * GRACE_S  # for another node whose ranks failed first


class Host:
    """Node 0's ear, in a thread: passes messages between the training here and the other nodes."""

    def __init__(self, node: Node):
        self.node, self.nodes, self.lock = node, dict[int, Connection](), threading.Lock()
        self.met, self.one_at_a_time = set[int](), threading.Lock()
        self.training: tuple[Connection, dict[str, Any]] | None = None
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            self.listening = socket.create_server(("", node.port), family=family, backlog=1024, dualstack_ipv6=both)
        except OSError as error:
            raise SettingsError(
                f"MASTER_PORT {node.port}: {error.strerror}", "another MASTER_PORT, the same on every node"
            ) from None
        threading.Thread(target=self._accept, daemon=True).start()

    def until_end(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, after which the other nodes are sent home, however it ends."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            code: Any = 1
            try:
                result = work(*args, **kwargs)
                self._meet_all()
                code = 0
            except SystemExit as end:
                code = end.code
                raise
            finally:
                self.over(code if isinstance(code, int) else 0 if code is None else 1)
            return result

        return watched

    def _meet_all(self) -> None:
        """Wait for the nodes that have not been here yet, where there was too little to do: each would look for this one."""
        began = time.monotonic()
        said = began - SAY_EVERY_S + 5
        with cut_short():
            while (missing := set(range(1, self.node.nodes)) - self.met) and time.monotonic() < began + MEET_WITHIN_S:
                time.sleep(0.1)
                said = _waiting_for(missing, self.node, said)

    def over(self, code: int) -> None:
        """Send the other nodes home."""
        with self.lock:
            for connection in self.nodes.values():
                connection.send({"over": code})
        self.listening.close()

    def _accept(self) -> None:
        while self.listening.fileno() >= 0:  # not closed
            try:
                connected = Connection(self.listening.accept()[0])
            except OSError:  # given up before it was accepted; too many open files, for now
                time.sleep(0.1)
                continue
            threading.Thread(target=self._serve, args=(connected,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            hello = connection.read(SAY_EVERY_S) or {}
        except ConnectionError:
            return
        if "training" in hello and ipaddress.ip_address(connection.peer().removeprefix("::ffff:")).is_loopback:
            with self.one_at_a_time:
                self._serve_training(connection, hello)
        elif isinstance(rank := hello.get("node"), int):
            self._serve_node(connection, rank, str(hello.get("host")), hello.get("count"))
        connection.close()

    def _serve_training(self, connection: Connection, hello: dict[str, Any]) -> None:
        with self.lock:
            self.training = connection, hello
            for node in self.nodes.values():
                node.send(hello)
        for _ in connection.messages():
            pass
        with self.lock:
            self.training = None
            for node in self.nodes.values():
                node.send({"stop": True})

    def _serve_node(self, connection: Connection, rank: int, host: str, count: Any) -> None:
        with self.lock:
            if count != self.node.nodes or not 0 < rank < self.node.nodes or rank in self.nodes:
                known = f"there are {self.node.nodes} nodes" + (f", and a node {rank}" if rank in self.nodes else "")
                connection.send({"refused": f"node {rank} of {count} ({host}), for node 0 {known}"})
                return
            self.nodes[rank] = connection
            self.met.add(rank)
            if self.training:
                connection.send(self.training[1])
        for message in connection.messages():
            self._tell_training(message | {"node": rank, "host": host})
        with self.lock:
            self.nodes.pop(rank, None)
        self._tell_training({"gone": True, "node": rank, "host": host})

    def _tell_training(self, message: dict[str, Any]) -> None:
        with self.lock:
            if self.training:
                self.training[0].send(message)


def _waiting_for(missing: set[int], node: Node, said: float) -> float:
    """Say now and then which nodes node 0 waits for; returns when that was `said` last."""
    if time.monotonic() < said + SAY_EVERY_S:
        return said
    say(f"waiting for nodes {', '.join(map(str, sorted(missing)))} of {node.nodes} (MASTER_PORT {node.port})")
    return time.monotonic()


class Meeting:
    """The training on node 0, together with those of the other nodes. Leaving the `with` block sends them away."""

    def __init__(self, node: Node, run_dir: Path, run_json: Path):
        self.node, self.port = node, free_port()
        self.connection = Connection(socket.create_connection(("localhost", node.port)))
        names = {"run_dir": os.path.abspath(run_dir), "run_json": os.path.abspath(run_json)}
        self.connection.send({"training": names | {"port": self.port}})

    def __enter__(self) -> Place:
        """Wait until all nodes are ready. Errors: RunError when one of them cannot take part."""
        missing, said = set(range(1, self.node.nodes)), time.monotonic() - SAY_EVERY_S + 5
        while missing:
            said = _waiting_for(missing, self.node, said)
            message = self.connection.read(1.0)
            if message and "ready" in message:
                missing.discard(message["node"])
            elif message:
                missing.add(message["node"])
                if "problem" in message:
                    raise RunError(f"node {message['node']} ({message['host']}): {message['problem']}", message["fix"])
        return Place("localhost", self.port, 0, self.node.nodes)

    def __exit__(self, *_: Any) -> None:
        self.connection.close()

    def trouble(self, timeout: float = 0.001) -> Failure | None:
        """What has befallen another node, as its ranks know it."""
        try:
            message = self.connection.read(timeout)
        except ConnectionError:
            return {"problem": "the process that speaks for node 0 is gone", "fix": GOES_ON}
        if message and (message.get("gone") or message.get("ended")):
            what = "is gone" if message.get("gone") else f"ended with exit code {message['ended']}"
            said = {"problem": f"node {message['node']} ({message['host']}) {what}", "fix": GOES_ON}
            return message.get("failure") or said | {"follows": not message.get("gone")}
        return None

    def last_words(self, run_dir: Path) -> None:
        """After ranks here have lost others: note what those say of it, as soon as they do."""
        began = time.monotonic()
        while time.monotonic() < began + LAST_WORDS_S and (noted_failure(run_dir) or {"follows": True}).get("follows"):
            if failure := self.trouble(1.0):
                note_failure(run_dir, failure)
                return


@exits_cleanly
def role_of_node(words: list[str]) -> Host | None:
    """Asked by the workflow with its command line: node 0 begins to listen; another node becomes join_training.py, and does
    not return. None where there is one node, or nothing is to be done."""
    node = None if {"-n", "--dry-run", "--dryrun"} & set(words) else this_node()
    if node is None or not any("_" in word or "/" in word for word in words if not word.startswith("-")):
        return None
    settle(node)
    if node.rank:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, str(Path(__file__).parents[2] / "join_training.py")])
    return Host(node)


def connected(node: Node) -> Connection:
    """Node 0's ear. Errors: RunError when nobody listens for half an hour."""
    began = said = time.monotonic()
    say(f"node {node.rank} of {node.nodes}: waiting for node 0 at {node.address}:{node.port}, which runs the workflow")
    while True:
        try:
            return Connection(socket.create_connection((node.address, node.port), timeout=10))
        except OSError as error:
            if time.monotonic() > began + MEET_WITHIN_S:
                raise RunError(
                    f"node 0 does not answer at {node.address}:{node.port} (MASTER_ADDR, MASTER_PORT): {error}",
                    "look at node 0's output: was the same command started there?",
                ) from None
            if time.monotonic() > said + SAY_EVERY_S:
                said = time.monotonic()
                say(f"node 0 does not answer yet: {error}")
            time.sleep(0.5)


def join(node: Node) -> int:
    """What a node other than the first does; returns node 0's exit code. Errors: RunError."""
    connection = connected(node)
    connection.send({"node": node.rank, "count": node.nodes, "host": platform.node()})
    for message in connection.messages():
        if "refused" in message:
            raise RunError(
                str(message["refused"]), "see what the platform sets on each node: NNODES, NODE_RANK or RANK"
            )
        if "over" in message:
            say(f"node {node.rank} of {node.nodes}: node 0 has ended")
            return int(message["over"])
        if "training" in message:
            try:
                code = take_part(node, connection, message["training"])
                failure = noted_failure(Path(message["training"]["run_dir"])) if code else None
            except SftError as error:
                connection.send({"problem": error.problem, "fix": error.fix})
                raise
            connection.send({"ended": code, "failure": failure})
    raise RunError(f"node 0 ({node.address}) is gone", "look at its output; the same command on all nodes goes on")


def take_part(node: Node, connection: Connection, training: dict[str, Any]) -> int:
    """Run this node's ranks of a training; returns their exit code. Errors: SftError when they cannot run here."""
    from llava_sft.training.checks import check_node  # with numpy, for which no start of Snakemake need wait

    run_dir, run_json = Path(training["run_dir"]), Path(training["run_json"])
    if not run_json.is_file():
        raise RunError(
            f"{run_json}: not there", "the project and exp_dir on a file system that all nodes share, at the same path"
        )
    resolved = Resolved.read(run_json)
    check_node(resolved)
    connection.send({"ready": True})
    stopped: list[float] = []

    def trouble() -> Failure | None:
        try:
            message = None if stopped else connection.read(0.001)
        except ConnectionError:
            return {"problem": f"node 0 ({node.address}) is gone", "fix": GOES_ON}
        if message:  # whatever it says: node 0 has done with this training
            stopped.append(time.monotonic())
            connection.unread(message)
        if stopped and time.monotonic() > stopped[0] + GRACE_S:  # at a good end ours are just ending, too
            return {"problem": "node 0 has ended its training", "fix": GOES_ON, "follows": True}
        return None

    log = run_dir / f"run_{time.strftime('%Y-%m-%d_%H-%M-%S')}_{platform.node()}_node{node.rank}.log"
    say(
        f"node {node.rank} of {node.nodes}: training {run_dir}, progress is on node 0; what Megatron prints here: {log}"
    )
    place = Place(node.address, int(training["port"]), node.rank, node.nodes)
    return launch(resolved.settings, [str(run_json), str(run_dir)], run_dir, log, place=place, trouble=trouble)
