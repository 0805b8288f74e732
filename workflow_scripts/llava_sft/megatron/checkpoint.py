"""Megatron's `torch_dist` checkpoints of a training: weights, optimizer and schedule, written beside the training.

Notable: a forked process writes, and has the tensors as they were; Megatron's persistent writer would share the tensors
of a CPU with the training, which goes on changing them, and those of a GPU through a CUDA context of its own. No random
state is kept: nothing draws from it after the weights are made (no dropout; the order of the data has its own).
"""

import functools
import itertools
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from llava_sft.checkpoint.torch_dist import TorchDistReader, write_for_older_torch
from llava_sft.megatron.distributed import unwrapped
from llava_sft.model.lora import A, B

PAIR = (A, B)
NICE = 10  # of the process that writes
HOST = "cpu"


class Checkpoints:
    """Saves and loads what is trained. `in_background`: the training goes on while a checkpoint is written.

    `trained_only`: a checkpoint holds the weights that are trained; the others are those of `load_weights`, before `load`.
    """

    def __init__(
        self, model: DistributedDataParallel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler,
        in_background: bool, trained_only: bool = False,
    ):  # fmt: skip
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.trained_only = trained_only
        self.queue = AsyncCallsQueue() if in_background else None
        self.pinning: threading.Thread | None = None
        self.ending = threading.Event()
        write_for_older_torch()
        get_write_results_queue("fork")  # Megatron would spawn it at the first save, with seconds of imports

    def load_weights(self, folder: Path, those_there: bool = False) -> None:
        """Begin from the weights in a folder (`release/`, or `iter_…` of another run): all of the model but LoRA's pairs; or
        `those_there`, of a checkpoint of LoRA."""
        module = unwrapped(self.model)
        metadata = self._metadata(folder)
        wanted = module.sharded_state_dict(metadata=metadata)
        stored = TorchDistReader(folder).tensors() if those_there else {}
        wanted = {
            key: entry
            for key, entry in wanted.items()
            if (entry.key in stored if those_there else not key.endswith(PAIR))
        }
        state = dist_checkpointing.load({"model": wanted}, str(folder))
        module.load_state_dict(state["model"], strict=not self.trained_only)
        self.optimizer.reload_model_params()  # its float32 masters
        self._loaded()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint of this run."""
        state = dist_checkpointing.load(self._state(self._metadata(folder), loading=True), str(folder))
        unwrapped(self.model).load_state_dict(state["model"], strict=not self.trained_only)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
        self._loaded()

    def save(self, folder: Path, iteration: int, done: Callable[[], None]) -> None:
        """Write a checkpoint into `folder`; `done` is called on every rank when all ranks have written: at once, or by
        `finish`."""
        if torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        if self.pinning:
            self.pinning.join()
        metadata, group = self._how_to_save()
        request = dist_checkpointing.save(
            self._state(metadata | {"dp_cp_group": group}) | {"iteration": iteration},
            str(folder),
            FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), group),
            async_sharded_save=self.queue is not None,
            content_metadata=metadata,
            async_strategy="mcore",
        )
        if self.queue is None:
            torch.distributed.barrier()
            done()
            return
        request.add_finalize_fn(done)
        self.queue.schedule_async_request(_written_apart(request))

    def pin_ahead(self) -> None:
        """Take the host memory that a save copies the GPU's tensors to, beside the training: 40 GB take half a minute.

        Once the optimizer has its state. With several replicas, which share out the weights, only for that state.
        """
        if self.queue is None or self.pinning:
            return
        parts = [] if self.optimizer.is_stub_optimizer else self.optimizer.chained_optimizers
        if not all(part.optimizer.state for part in parts if not part.is_stub_optimizer):
            return  # steps whose gradient was not finite leave none
        metadata, group = self._how_to_save()
        state = self._state(metadata | {"dp_cp_group": group})
        if group.size() > 1:
            del state["model"]
        apply_factories(state)
        copied = [part.data for part in nested_values(state) if isinstance(part, ShardedTensor)]
        sizes = [tensor.nbytes for tensor in copied if tensor.device.type != HOST]
        self.pinning = threading.Thread(target=pin, args=(sizes, self.ending), daemon=True)
        self.pinning.start()

    def stop_pinning(self) -> None:
        """A thread that still calls CUDA when the interpreter ends would abort it."""
        self.ending.set()
        if self.pinning:
            self.pinning.join()

    def _how_to_save(self) -> tuple[dict[str, Any], torch.distributed.ProcessGroup]:
        metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if self.model.ddp_config.use_distributed_optimizer:
            metadata["distrib_optim_sharding_type"] = "dp_reshardable"
        return metadata, parallel_state.get_data_parallel_group(with_context_parallel=True)

    def finish(self, wait: bool = False) -> None:
        """Let a checkpoint that all ranks have written count; `wait` until they have. All ranks call it together."""
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=wait)

    def _metadata(self, folder: Path) -> dict[str, Any]:
        noted = dist_checkpointing.load_content_metadata(str(folder)) or {}
        return noted | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def _state(self, metadata: dict[str, Any], loading: bool = False) -> dict[str, Any]:
        state: dict[str, Any] = {"checkpoint_version": 3.0}
        state["model"] = unwrapped(self.model).sharded_state_dict(metadata=metadata)
        if self.trained_only:
            state["model"] = {key: entry for key, entry in state["model"].items() if entry.data.requires_grad}
        if not self.optimizer.is_stub_optimizer:  # this rank trains nothing
            state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
        state["opt_param_scheduler"] = self.scheduler.state_dict()
        return state

    def _loaded(self) -> None:
        torch.distributed.barrier()
        torch.cuda.empty_cache()  # loading holds the state twice


def pin(sizes: list[int], ending: threading.Event) -> None:
    """PyTorch keeps memory that it has pinned for what is copied next, whose size is the same power of two. Not on when the
    training is `ending`."""
    with suppress(RuntimeError):  # a save would say so, and the training may never come to one
        wanted = itertools.takewhile(lambda size: not ending.is_set(), sizes)
        taken = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in wanted]
        del taken


def _written_apart(request: AsyncRequest) -> AsyncRequest:
    if not request.async_fn:  # another rank writes
        return request
    write = functools.partial(_write, os.getpid(), request.async_fn)
    stage = functools.partial(_staged, request.preload_fn, request.async_fn_args[1])
    return request._replace(async_fn=write, preload_fn=stage)


def _staged(stage: Callable[[], list], buckets: list) -> list:
    """Copy the checkpoint to host memory, and let go of the GPU tensors in `buckets`, which Megatron keeps until the write
    is done: some of them were made for the save alone."""
    copies = stage()
    for (*_, (_, tensors)), (*_, (_, copied)) in zip(buckets, copies, strict=True):
        tensors[:] = copied
    return copies


def _write(parent: int, write: Callable, *args: Any) -> None:
    """What the forked process does. Its parent may be dead already: the next training must not meet it."""
    if os.getppid() == parent:
        os.nice(NICE)
        write(*args)
