"""The training loop: batch → chunks → forward → backward → reduce → clip → step → log → validate → save."""

import gc
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from llava_sft.data.loader import VlmBatch
from llava_sft.megatron.distributed import clip, current_rates, reduce_gradients
from llava_sft.megatron.parallel import any_rank
from llava_sft.model.config import ModelConfig
from llava_sft.preflight.cost import training_flops
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.training import validation
from llava_sft.training.forward import Forward, through_stages
from llava_sft.training.saving import Saves
from llava_sft.training.validation import HeldOut
from llava_sft.training.watch import Watch

COLLECT_EVERY = 100  # steps: a garbage collection at its own time would stop the host, and the GPU with it
BEGAN = time.monotonic()  # of the process: `max_minutes` counts from here


class Loop:
    """A training in this process, from step `first` on.

    Args:
        model, optimizer, scheduler: Megatron's, set up (megatron/distributed.py).
        loader: micro-batches of this data-parallel rank, without end.
        held_out: None without validation.
    """

    def __init__(
        self, values: ResolvedSettings, model_config: ModelConfig, model: DistributedDataParallel, forward: Forward,
        optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, loader: Iterator[VlmBatch],
        watch: Watch, saves: Saves, held_out: HeldOut | None, first: int,
    ):  # fmt: skip
        self.values, self.model_config = values, model_config
        self.model, self.forward, self.optimizer, self.scheduler = model, forward, optimizer, scheduler
        self.loader, self.watch, self.saves, self.held_out, self.first = loader, watch, saves, held_out, first
        self.replicas, self.on_gpu = parallel_state.get_data_parallel_world_size(), values.on_gpu
        self.micro_batches = values.global_batch_size // (values.micro_batch_size * self.replicas)
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.asked = False  # to save and end
        signal.signal(signal.SIGTERM, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # held back until now (launcher.py)
        if self.on_gpu:
            gc.disable()

    def run(self) -> None:
        """Train to the last step, or until asked to end; every way out has a checkpoint."""
        last, interval = self.values.train_iters, self.values.save_interval
        iteration = self.first
        self.model.train()
        while iteration < last:
            self.saves.before_step()
            self.forward.begin(iteration)
            sums = self.forward_backward()
            norm = self.update()
            iteration += 1
            self.log(iteration, sums, norm)
            if self.held_out and iteration % self.values.eval_interval == 0:
                self.validate(self.held_out, iteration)
            if self.on_gpu and iteration % COLLECT_EVERY == 0:
                gc.collect()
            stop = self.must_stop()
            if stop or iteration % interval == 0:
                self.saves.save(iteration)
            if stop:
                break
        else:
            if self.held_out and last % self.values.eval_interval:
                self.validate(self.held_out, last)
            if last % interval and self.first < last:
                self.saves.save(last)
        self.saves.finish(wait=True)

    def forward_backward(self) -> Tensor:
        """Gradients of one step, as means over its answer tokens. Returns [2]: this rank's sum of losses, answer tokens."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.model.set_is_first_microbatch()  # weights are cast to FP8 once a step
        if self.stages > 1:
            return self._through_stages(self.next_batch)
        sums = []
        answers = torch.zeros((), dtype=torch.int, device=self.forward.device)
        for number in range(self.micro_batches):
            batch = self.next_batch()
            chunks = batch.chunks(self.values.pack_chunk_tokens, pad_multiple(self.on_gpu))
            loss = torch.zeros((), device=self.forward.device)
            for chunk in chunks:
                total = self.forward(chunk).sum()
                # Megatron takes the gradients of a backward pass for final, unless it is told otherwise.
                final = number == self.micro_batches - 1 and chunk is chunks[-1]
                with nullcontext() if final else self.model.no_sync():
                    total.backward()
                loss += total.detach()
            count = self.forward.count(batch)
            sums.append(torch.stack((loss, count.float())))
            answers += count
        reduce_gradients([self.model], answers)
        return torch.vstack(sums).sum(dim=0)

    def update(self) -> float:
        """Clip the gradients and take a step of the optimizer; returns their norm.

        A gradient that is not a number would destroy the weights: that step is left out, and so is its step of the schedule.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            clip(self.optimizer, self.values.clip_grad, norm)
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(increment=self.values.global_batch_size)
        return norm

    def log(self, iteration: int, sums: Tensor | None, norm: float) -> None:
        """Hand the step's loss to the watch, on one of the ranks that share the last pipeline stage."""
        if sums is None:
            return
        sums = over_replicas(sums)
        size = parallel_state.get_tensor_model_parallel_world_size()
        if parallel_state.get_tensor_model_parallel_rank() == size - 1:
            loss, rates = float(sums[0] / sums[1]), current_rates(self.scheduler, self.values)
            whose = [] if math.isfinite(loss) else sums[2:].nonzero().flatten().tolist()
            self.watch.step(iteration, loss, rates, norm, memory_gib(self.on_gpu), whose)

    @torch.no_grad()
    def validate(self, held_out: HeldOut, iteration: int) -> None:
        """The loss on the held-out samples, the same at every validation, and a few of them answered."""
        began = time.perf_counter()
        held_out.rewind()
        total = torch.zeros(2, device=self.forward.device)
        with validation.evaluating(self.model):
            for _ in range(self.values.eval_iters):
                batches = (next(held_out) for _ in range(self.micro_batches))
                sums = self._through_stages(batches.__next__) if self.stages > 1 else self.forward.evaluate(batches)
                if sums is not None:
                    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
                    total += sums
            # Of a tensor-parallel model all ranks answer together; a pipeline's stages do not (preflight says so).
            found: list[dict] = []
            if self.stages == 1 and parallel_state.get_data_parallel_rank() == self.replicas - 1:
                wanted = self.values.log_answers, self.values.max_new_tokens
                found = validation.answers(self.model, held_out, *wanted, self.forward.device)
        if sums is not None and self.watch.writes:
            examples, loss = held_out.examples(self.values.log_answers), float(total[0] / total[1])
            validation.record(self.watch.run_dir, iteration, loss, found, examples, self.watch.tensorboard)
        self.watch.pause(time.perf_counter() - began)

    def must_stop(self) -> bool:
        """Whether any rank was asked to end, or has trained for max_minutes."""
        minutes = self.values.max_minutes
        over = minutes is not None and time.monotonic() - BEGAN > 60 * minutes
        return any_rank(self.asked or over, self.forward.device)

    def next_batch(self) -> VlmBatch:
        """The next micro-batch; the watch learns how long it took and what it holds."""
        began = time.perf_counter()
        batch = next(self.loader)
        waited = time.perf_counter() - began
        grids = [tuple(grid) for grid in batch.grids.tolist()]
        trained, answers = self.values.trained, len(batch.answer_labels)
        flops = training_flops(self.model_config, trained, batch.lengths, grids, answers)
        self.watch.batch(waited, batch.num_tokens, batch.input_ids.numel(), flops, batch.__key__)
        return batch

    def _through_stages(self, next_batch: Callable[[], VlmBatch]) -> Tensor | None:
        return through_stages(self.model, self.forward, next_batch, self.micro_batches, self.values)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True


def over_replicas(sums: Tensor) -> Tensor:
    """[2 + replicas]: sum of losses and answer tokens over all data-parallel ranks, and for each of them 1 where its own
    loss is no number, which a sum does not tell."""
    lost = torch.zeros(parallel_state.get_data_parallel_world_size(), device=sums.device)
    lost[parallel_state.get_data_parallel_rank()] = ~torch.isfinite(sums[0])
    total = torch.cat((sums, lost))
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total


def pad_multiple(on_gpu: bool) -> int:
    """Packs are padded to a multiple of so many tokens: what matrix units like, and FP8 needs."""
    return 128 if on_gpu else 1


def memory_gib(on_gpu: bool) -> float:
    """Greatest memory of this process so far: on the GPU where there is one, else resident, in GiB."""
    if on_gpu:
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
