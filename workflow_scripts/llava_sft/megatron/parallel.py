"""Process groups and random seeds of a training process."""

import os
import random
from datetime import timedelta

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel

from llava_sft.settings.resolve import ResolvedSettings

TIMEOUT = timedelta(minutes=10)  # without progress in a collective: another rank is dead or hangs
SEED_OF_STAGE = 100  # Megatron's: between the seeds of two pipeline stages


def start(values: ResolvedSettings, store: torch.distributed.Store | None = None) -> torch.device:
    """Join the training, and return this process's device. RANK, LOCAL_RANK and WORLD_SIZE are in the environment.

    `store`: where the processes meet; None: at MASTER_ADDR and MASTER_PORT.
    """
    on_gpu = values.on_gpu
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    parallel_state.initialize_model_parallel(
        values.tensor_model_parallel_size,
        values.pipeline_model_parallel_size,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )
    seed(values.seed)
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def seed(number: int) -> None:
    """Seed every generator of this process: random weights are the same on all data-parallel ranks."""
    number += SEED_OF_STAGE * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    tensor_parallel.model_parallel_cuda_manual_seed(number)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank of the training. All ranks call it together."""
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)
