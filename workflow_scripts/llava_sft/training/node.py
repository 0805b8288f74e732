"""`python -m llava_sft.training.node ADDRESS:PORT NPROC RUN_JSON RUN_DIR START_DIR`: one node of a training, under srun.

Slurm signals every process of the step, but only once, and a training process ignores it until Megatron listens: so the
signal is taken here and handed on as on one machine.
"""

import os
import sys

from llava_sft.training.launcher import ask_workers, command, run


def rendezvous(place: str, environment: dict[str, str]) -> list[str]:
    """torchrun's options, from the address of the first node and what Slurm tells its tasks; none for a single node."""
    nodes, rank = environment["SLURM_NNODES"], environment["SLURM_NODEID"]
    address, _, port = place.rpartition(":")
    if nodes == "1":
        return []
    return [f"--nnodes={nodes}", f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={port}"]


def main(place: str, count: str, *arguments: str) -> int:
    argv, environment = command(int(count), list(arguments), rendezvous(place, os.environ))
    return run(argv, environment, lambda training: ask_workers(training, int(count)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
