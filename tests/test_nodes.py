"""A training on several nodes that a platform has started, without Slurm: two nodes on this machine, over the loopback device.

Each node is the same command with other variables; they share nothing but files and a port.
"""

import os
import socket
import subprocess
import time

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


def test_in_a_slurm_job_its_own_variables_count():
    assert this_node({"SLURM_JOB_ID": "7", "WORLD_SIZE": "4"}) is None


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


@pytest.mark.parametrize("code", [0, 1, None])
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
        host.over(code)
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


@pytest.mark.long
def test_the_same_snakemake_command_on_both_nodes_trains_once(prepared_project):
    port, target = free_port(), "output/stage2_sft_vqa_nodes_results/train.done.json"
    words = ["--cores", "1", target, "--config", "run_tag=nodes", "train_iters=4", "save_interval=2", "eval_iters=0"]

    def workflow(rank: int, *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            snakemake_command(*words, "global_batch_size=16", "micro_batch_size=8", *more), cwd=prepared_project, text=True,
            env=ENVIRONMENT | variables(rank, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    nodes = [workflow(rank) for rank in (1, 0)]
    out = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], out
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
