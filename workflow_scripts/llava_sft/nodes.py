"""The nodes of a training without Slurm: what the variables say that a platform sets on each of them.

A Kubernetes operator (PyTorchJob, TrainJob), PAI-DLC, or Volcano's pytorch plugin starts the same command once on every
node, with the address of the first, the number of nodes and this node's number; so does a person who types it. Some of
them set WORLD_SIZE to the number of nodes, others to that of all processes: names that count nodes come first.
"""

import os
import shutil
from collections.abc import Mapping
from typing import NamedTuple

from llava_sft.errors import SettingsError

# Of each fact the names that it goes by, the clearest first. PET_…: torchrun's own, which Kubeflow sets.
COUNT = ("NNODES", "PET_NNODES", "WORLD_SIZE")
RANK = ("NODE_RANK", "PET_NODE_RANK", "RANK")
ADDRESS = ("MASTER_ADDR", "PET_MASTER_ADDR")
PORT = ("MASTER_PORT", "PET_MASTER_PORT")
SETTLED = "LLAVA_SFT_NODE"  # COUNT RANK ADDRESS PORT, for what this project starts itself


class Node(NamedTuple):
    """This node's number among several; node 0 listens at `address`, as this node knows it."""

    rank: int
    nodes: int
    address: str
    port: int


def this_node(environment: Mapping[str, str] = os.environ) -> Node | None:
    """This node of several that a platform has started; None where it is the only one, or in a Slurm job.

    Raises SettingsError for variables that are half set, or do not go together.
    """
    if settled := environment.get(SETTLED):
        of_all, mine, address, at = settled.split()
        return Node(int(mine), int(of_all), address, int(at))
    if in_slurm(environment):  # whose own variables count
        return None
    counted, ranked = _first(environment, COUNT), _first(environment, RANK)
    count, rank = _number(environment, counted), _number(environment, ranked)
    if counted is None and rank:
        raise SettingsError(f"{ranked} is {rank}, and the number of nodes is not set", f"set {COUNT[0]} on every node")
    if count is None or count == 1:
        return None
    if "LOCAL_RANK" in environment:
        raise SettingsError(
            f"{counted} is {count} and LOCAL_RANK is set: torchrun, or a launcher like it, started this once for each process",
            "start it once on each node: the training starts the processes of its GPUs itself",
        )
    missing = [names[0] for names in (RANK, ADDRESS, PORT) if _first(environment, names) is None]
    if missing or rank is None:
        each = {"NODE_RANK": f"this node's number, 0 to {count - 1}", "MASTER_ADDR": "the address of node 0",
                "MASTER_PORT": "a free port there, 29500"}  # fmt: skip
        raise SettingsError(
            f"{counted} is {count}: a training on {count} nodes; {', '.join(missing)} not set",
            "; ".join(f"{name}: {each[name]}" for name in missing)
            + f"; or unset {counted} to train on this machine alone",
        )
    if rank >= count:
        raise SettingsError(
            f"{ranked} is {rank}, {counted} {count}: nodes are numbered 0 to {count - 1}", "see what the platform sets"
        )
    port = _number(environment, ported := _first(environment, PORT))
    if not 0 < (port or 0) < 1 << 16:
        raise SettingsError(f"{ported} is {port}: not a port", f"{ported}: 29500, the same on every node")
    return Node(rank, count, environment[_first(environment, ADDRESS) or ""], port or 0)


def in_slurm(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this runs in a Slurm job and can start tasks on its nodes; in a container without srun it cannot."""
    return bool(environment.get("SLURM_JOB_ID") and shutil.which("srun", path=environment.get("PATH")))


def settle(node: Node) -> None:
    """Leave one variable in place of the platform's: a process of this project is no rank because a node has one."""
    for name in (*COUNT, *RANK, *ADDRESS, *PORT):
        os.environ.pop(name, None)
    os.environ[SETTLED] = f"{node.nodes} {node.rank} {node.address} {node.port}"


def is_settled() -> bool:
    """Whether a process above this one speaks for the node."""
    return SETTLED in os.environ


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if environment.get(name, "").strip()), None)


def _number(environment: Mapping[str, str], name: str | None) -> int | None:
    if name is None:
        return None
    text = environment[name].strip()
    if not text.isdecimal():
        raise SettingsError(f"{name} is {text!r}: not a number", "see what the platform sets, or unset it")
    return int(text)
