"""A training on several nodes that a platform has started, without Slurm: two nodes on this machine, over the loopback device.

Each node is the same command with other variables; they share nothing but files and a port.
"""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from helpers import ROOT, trainings
from helpers.projects import snakemake_command
from helpers.trainings import ENVIRONMENT, same
from llava_sft.errors import RunError, SettingsError
from llava_sft.files import read_json
from llava_sft.nodes import SETTLED, Node, this_node
from llava_sft.run.checkpoints import iterations_done
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.training import meeting
from llava_sft.training.checks import check_nodes

pytestmark = pytest.mark.timeout(600)
STEPS = 6
HOW = {"train_iters": STEPS, "save_interval": 2, "nproc_per_node": 1}
FIRST = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}

# --- what a platform says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {"NNODES": "4", "NODE_RANK": "3", **FIRST},
        {"WORLD_SIZE": "4", "RANK": "3", **FIRST},  # PAI-DLC, Volcano, PyTorchJob
        {
            "WORLD_SIZE": "32",
            "RANK": "3",
            "PET_NNODES": "4",
            "PET_NODE_RANK": "3",
            **FIRST,
        },  # PyTorchJob, nprocPerNode: 8
        {f"PET_{name}": value for name, value in {"NNODES": "4", "NODE_RANK": "3", **FIRST}.items()},  # TrainJob
        {SETTLED: "4 3 10.0.0.1 29500"},
    ],
)
def test_each_platforms_variables_name_the_same_node(variables):
    assert this_node(variables) == Node(3, 4, "10.0.0.1", 29500)


@pytest.mark.parametrize("variables", [{}, FIRST, {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "0"}, {"NNODES": " "}])
def test_one_machine_alone_is_no_node(variables):
    assert this_node(variables) is None


@pytest.mark.parametrize("has_srun", [True, False])
def test_in_a_slurm_job_its_own_variables_count_unless_it_cannot_start_tasks(tmp_path, has_srun):
    if has_srun:  # a container may have none
        (tmp_path / "srun").touch(0o755)
    job = {"SLURM_JOB_ID": "7", "NNODES": "4", "NODE_RANK": "3", **FIRST, "PATH": str(tmp_path)}
    assert this_node(job) == (None if has_srun else Node(3, 4, "10.0.0.1", 29500))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "NODE_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT not set"),
        ({"NODE_RANK": "1", **FIRST}, "NODE_RANK is 1, and the number of nodes is not set"),
        ({"NNODES": "2", "RANK": "2", **FIRST}, "RANK is 2, NNODES 2"),
        ({"NNODES": "two", "RANK": "1", **FIRST}, "NNODES is 'two': not a number"),
        ({"NNODES": "2", "RANK": "1", **FIRST, "MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **FIRST}, "started this once for each process"),
    ],
)
def test_half_set_variables_are_one_message_with_a_fix(variables, said):
    with pytest.raises(SettingsError) as error:
        this_node(variables)
    assert said in error.value.problem and error.value.fix


# --- the nodes among themselves --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def variables(rank: int, port: int, nodes: int = 2) -> dict[str, str]:
    each = {"WORLD_SIZE": str(nodes), "RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return each | {"GLOO_SOCKET_IFNAME": "lo"}


def join(rank: int, port: int, nodes: int = 2) -> subprocess.Popen:
    return subprocess.Popen(
        [os.sys.executable, ROOT / "workflow_scripts/join_training.py"], cwd=ROOT, text=True,
        env=ENVIRONMENT | variables(rank, port, nodes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 75, None])
def test_a_node_ends_as_node_0_does_and_waits_for_its_start(code):
    port = free_port()
    waiting = join(1, port)
    assert "waiting for node 0" in waiting.stdout.readline()
    time.sleep(0.6)
    host = meeting.Host(Node(0, 2, "localhost", port))
    while not host.nodes:
        time.sleep(0.05)
    if code is None:  # it breaks down
        for connection in host.nodes.values():
            connection.close()
    else:
        with pytest.raises(SystemExit):
            host.until_end(sys.exit)(code)
    assert waiting.wait(20) == (1 if code is None else code)
    said = waiting.stdout.read()
    assert ("node 0 (localhost) is gone" if code is None else "node 0 has ended") in said and "Traceback" not in said
    host.listening.close()


def test_a_node_that_does_not_fit_is_refused_and_a_taken_port_is_named():
    port = free_port()
    host = meeting.Host(Node(0, 2, "localhost", port))
    refused = join(1, port, nodes=3)
    assert refused.wait(20) == 1
    assert "node 1 of 3" in (said := refused.stdout.read()) and "there are 2 nodes" in said, said
    with pytest.raises(SettingsError, match=f"MASTER_PORT {port}"):
        meeting.Host(Node(0, 2, "localhost", port))
    host.listening.close()


@pytest.fixture
def host():
    host = meeting.Host(Node(0, 2, "localhost", free_port()))
    yield host
    host.over(0)


def test_a_node_takes_part_in_one_training_after_the_other(host, monkeypatch, tmp_path):
    """The second begins while the node still waits for the end of its ranks of the first."""
    monkeypatch.setattr(meeting.Resolved, "read", lambda path: SimpleNamespace(settings=None))
    monkeypatch.setattr("llava_sft.training.checks.check_node", lambda resolved: None)
    (run_json := tmp_path / "run.json").touch()
    ran, second_begun = list[str](), threading.Event()

    def launch(settings, arguments, run_dir, log, place, trouble):
        ran.append(run_dir.name)
        while not second_begun.is_set():
            assert trouble() is None
        for _ in range(20):
            trouble()
        return 0

    monkeypatch.setattr(meeting, "launch", launch)
    ended = list[int]()
    node = threading.Thread(target=lambda: ended.append(meeting.join(host.node._replace(rank=1))), daemon=True)
    node.start()
    with meeting.Meeting(host.node, tmp_path / "first", run_json):
        pass
    second = meeting.Meeting(host.node, tmp_path / "second", run_json)
    threading.Timer(0.3, second_begun.set).start()
    met = threading.Thread(target=second.__enter__, daemon=True)
    met.start()
    met.join(20)
    assert not met.is_alive() and ran == ["first", "second"]
    second.__exit__()
    host.over(0)
    node.join(20)
    assert ended == [0]


@pytest.mark.parametrize(
    ("address", "local"), [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.2", False)]
)
def test_only_this_machine_begins_a_training(host, monkeypatch, address, local):
    monkeypatch.setattr(meeting.Connection, "peer", lambda self: address)
    connection = meeting.Connection(socket.create_connection(("localhost", host.node.port)))
    connection.send({"training": {"run_dir": "/x", "run_json": "/x", "port": 1}})
    if local:
        assert connection.read(0.5) is None and host.training
    else:
        with pytest.raises(ConnectionError):
            connection.read(20)
        assert host.training is None
    connection.close()


def test_what_was_sent_to_a_node_that_has_vanished_is_waited_for_a_minute(host):
    connection = meeting.Connection(socket.create_connection(("localhost", host.node.port)))
    assert connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
    connection.close()


def test_node_0_goes_on_listening_after_a_connection_that_could_not_be_accepted(monkeypatch):
    def create_server(*args, **options):
        listening = socket.socket()
        listening.bind(("localhost", port))
        listening.listen()
        accept, troubles = listening.accept, [OSError(errno.EMFILE, "Too many open files")]

        def accepted():
            if troubles:
                raise troubles.pop()
            return accept()

        return SimpleNamespace(accept=accepted, fileno=listening.fileno, close=listening.close)

    port = free_port()
    monkeypatch.setattr(meeting.socket, "create_server", create_server)
    host, waiting = meeting.Host(Node(0, 2, "localhost", port)), join(1, port)
    while not host.nodes:
        assert waiting.poll() is None, waiting.stdout.read()
        time.sleep(0.05)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(20) == 130 and "Traceback" not in waiting.stdout.read()
    host.over(0)


# --- a training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(prepared_project):
    return trainings.demo(prepared_project)


def start(servers, run, rank: int, port: int, more: str = ""):
    """train.py on one of two nodes; its ranks are forked from a process that has imported Megatron."""
    with open(run.folder.with_name(f"{run.folder.name}.node{rank}.log"), "ab") as log:
        first = f"import os; [os.environ.setdefault(*each) for each in {list(variables(rank, port).items())}]"
        return servers.ask(run.script(), ROOT, log.fileno(), first + more)


def said(run, rank: int) -> str:
    return run.folder.with_name(f"{run.folder.name}.node{rank}.log").read_text()


def test_two_nodes_train_what_one_machine_does_also_after_one_of_them_broke_down(base, servers, tmp_path):
    alone = trainings.Run(base, tmp_path / "alone", **HOW | {"nproc_per_node": 2})
    with open(tmp_path / "alone.log", "ab") as log:
        assert servers.ask(alone.script(), ROOT, log.fileno()).wait() == 0, alone.said()
    run, port = trainings.Run(base, tmp_path / "nodes", **HOW, nodes=2), free_port()
    nodes = [start(servers, run, rank, port) for rank in (1, 0)]
    while all(node.poll() is None for node in nodes) and iterations_done(run.folder) < 2:
        time.sleep(0.02)
    for process in psutil.Process(nodes[0].pid).children(recursive=True):
        process.kill()
    nodes[0].kill()
    began = time.monotonic()
    assert nodes[1].wait(60) == 1 and time.monotonic() < began + 45
    assert "node 1 (" in (first := said(run, 0)) and "is gone" in first and "goes on from the last" in first, first
    nodes = [start(servers, run, rank, port) for rank in (0, 1)]
    for node in nodes:
        assert node.wait(120) == 0, said(run, 0) + said(run, 1)
    assert "resuming from step" in said(run, 0)
    assert same(run, alone, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)


BROKEN = """
if os.environ.get("LOCAL_RANK") and os.environ["RANK"] == "1":
    from llava_sft.data import stream
    stream.MicroBatches.__getitem__ = lambda self, packs: {}["a sample of node 1"]
"""


def test_what_a_rank_of_another_node_raises_stands_on_node_0s_terminal(base, servers, tmp_path):
    run, port = trainings.Run(base, tmp_path / "raises", **HOW, nodes=2), free_port()
    nodes = [start(servers, run, rank, port, "\n" + BROKEN) for rank in (1, 0)]
    assert [node.wait(60) for node in nodes] == [1, 1]
    last = said(run, 0).partition("error: ")[2]
    assert "rank 1 of 2 on " in last and "KeyError: 'a sample of node 1'" in last, last


def on_both_nodes(project, *words: str) -> list[str]:
    """What the same snakemake command says on the nodes 1 and 0, where it is to succeed."""
    port = free_port()
    nodes = [
        subprocess.Popen(
            snakemake_command("--cores", "1", *words), cwd=project, text=True, env=ENVIRONMENT | variables(rank, port),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (1, 0)
    ]  # fmt: skip
    out = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], out
    return out


def test_a_run_prepared_for_one_machine_is_prepared_anew_for_two_once(prepared_project):
    resolved = prepared_project / "output/stage2_sft_vqa_results/resolved.json"
    assert read_json(resolved)["settings"]["nodes"] == 1
    on_both_nodes(prepared_project, "preflight_vqa")
    assert read_json(resolved)["settings"]["nodes"] == 2
    out = on_both_nodes(prepared_project, "preflight_vqa")
    assert "node 0 has ended" in out[0] and "Nothing to be done" in out[1]


@pytest.mark.long
def test_the_same_snakemake_command_on_both_nodes_trains_once(prepared_project):
    target = "output/stage2_sft_vqa_nodes_results/train.done.json"
    words = [
        "run_tag=nodes",
        "train_iters=4",
        "save_interval=2",
        "eval_iters=0",
        "global_batch_size=16",
        "micro_batch_size=8",
    ]
    out = on_both_nodes(prepared_project, target, "--config", *words)
    assert "node 1 of 2: training" in out[0] and "node 0 has ended" in out[0] and "rule" not in out[0]
    assert read_json(prepared_project / target)["iteration"] == 4
    assert read_json(prepared_project / "output/stage2_sft_vqa_nodes/run.json")["settings"]["nodes"] == 2


@pytest.mark.parametrize(
    ("nodes", "started", "said"), [(1, 2, "the platform started 2"), (2, 1, "outside a Slurm job")]
)
def test_another_number_of_nodes_than_was_started_is_refused(shipped_settings, nodes, started, said):
    values = ResolvedSettings(**shipped_settings | {"nodes": nodes})
    with pytest.raises(RunError, match=said) as error:
        check_nodes(values, None, Node(0, started, "a", 1) if started > 1 else None)
    assert f"nodes: {started}" in error.value.fix
