"""One training process: the glue between the resolved settings and `megatron.training.pretrain`.

The launcher starts it once per rank (`__main__.py`); what it prints goes to the run's log.
"""

import functools
import inspect
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from llava_sft.training import cpu

ON_CPU = cpu.apply()

from megatron.core import mpu, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue  # noqa: E402
from megatron.core.distributed import param_and_grad_buffer  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.optimizer.optimizer_config import ParamKey  # noqa: E402
from megatron.energon import SkipSample  # noqa: E402
from megatron.training import (  # noqa: E402
    checkpointing,
    get_args,
    get_tensorboard_writer,
    initialize,
    pretrain,
    training,
)
from megatron.training.argument_utils import (  # noqa: E402
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.async_utils import maybe_finalize_async_save  # noqa: E402
from megatron.training.checkpointing import get_checkpoint_name  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from llava_sft.checkpoint.torch_dist import write_for_older_torch  # noqa: E402
from llava_sft.data.loader import VlmBatch, VlmTaskEncoder  # noqa: E402
from llava_sft.data.sizes import read_sizes  # noqa: E402
from llava_sft.data.stream import Ranks, train_loader, worker_ended  # noqa: E402
from llava_sft.data.template import ChatTemplate  # noqa: E402
from llava_sft.errors import SftError, of_file  # noqa: E402
from llava_sft.files import read_json, write_json  # noqa: E402
from llava_sft.model.attention import packed_seq_params  # noqa: E402
from llava_sft.model.config import ModelConfig  # noqa: E402
from llava_sft.model.flops import training_flops  # noqa: E402
from llava_sft.model.kernels import scale_  # noqa: E402
from llava_sft.model.llava import LlavaOneVision  # noqa: E402
from llava_sft.training import adam, remedies, validation  # noqa: E402
from llava_sft.training.arguments import megatron_arguments, part_rates  # noqa: E402
from llava_sft.training.checkpoints import (  # noqa: E402
    check_disk,
    checkpoint_bytes,
    checkpoints,
    prune,
    seal,
)
from llava_sft.training.launcher import STORE  # noqa: E402
from llava_sft.training.position import note_damaged, restore_position  # noqa: E402
from llava_sft.training.predict import checkpoint_size, state_bytes  # noqa: E402
from llava_sft.training.watch import FAILURE, PEAK_FLOPS, Watch  # noqa: E402

NO_MEMORY = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "out of memory")


class Trainer:
    """The functions that `pretrain` asks for, and what they share."""

    def __init__(self, resolved: dict, run_dir: Path):
        self.values, self.data = resolved["settings"], resolved["data"]
        self.sidecars = resolved["start"]["sidecars"]
        self.model_config = ModelConfig(**resolved["model"])
        self.run_dir = run_dir
        self.parts = set(self.values["trainable_modules"])
        self.watch: Watch | None = None
        self.model: torch.nn.Module | None = None
        self.text_only: torch.nn.Module | None = None  # the wrapped model, while it sees no image
        self.image_parameters: list[torch.nn.Parameter] = []  # that are trained, where reduction overlaps
        self.scheduler = None
        self.grad_norm: float | None = None
        self.saving = 0  # the step whose checkpoint was begun last
        self.sealing: threading.Thread | None = None
        self.largest = {"rows": 0, "tokens": 0, "patches": 0, "image": 0}
        self.validated = -1
        self.padding = 1 if ON_CPU else 128  # of packed sequences, in tokens: what matrix units like, and FP8 needs

    def build_model(self, pre_process=True, post_process=True, config=None, pg_collection=None, vp_stage=None):
        args = get_args()
        config = config or core_transformer_config_from_args(args)
        config.hetereogenous_dist_checkpoint = True  # one checkpoint key per layer, as converted
        config.variable_seq_lengths = args.pipeline_model_parallel_size > 1  # batches are as long as their longest
        self.model = LlavaOneVision(
            config,
            self.model_config,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.seq_length,
            transformer_impl=args.transformer_impl,
            pg_collection=pg_collection,
            pre_process=pre_process,
            post_process=post_process,
            recompute_vision=self.values["recompute_vision"] == "full",
        )
        if config.gradient_accumulation_fusion and post_process:
            # Transformer Engine's layers add weight gradients in place; Megatron's output layer (TP > 1) would need Apex.
            self.model.language_model.output_layer.gradient_accumulation_fusion = False
        for name, part in self.model.named_children():
            if name not in self.parts:
                part.requires_grad_(False)
        if pre_process and args.overlap_grad_reduce:
            parts = (self.model.vision_model, self.model.adapter)
            self.image_parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
            self.model.language_model.embedding.register_forward_hook(self.after_embedding)
        return self.model

    def datasets(self, train_val_test_num_samples):
        """(train, validation, test) loaders of this data-parallel rank; the training one goes on where it was."""
        args, values = get_args(), self.values
        sizes = ChatTemplate(self.sidecars), values["seq_length"], values["min_pixels"], values["max_pixels"]
        encoder = VlmTaskEncoder(*sizes, values["packing"], self.padding, values["seed"])
        rank, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        loader = train_loader(
            self.data["path"],
            encoder,
            Ranks(rank, replicas, values["num_workers"]),
            args.micro_batch_size,
            values["packing_buffer_size"],
            read_sizes(self.data),
            max_damaged=values["max_damaged_samples"],
            pin_memory=not ON_CPU,
            found_damaged=functools.partial(note_damaged, self.run_dir),
        )
        if args.iteration > 0:
            position = get_checkpoint_name(
                args.dataloader_save,
                args.iteration,
                pipeline_parallel=mpu.get_pipeline_model_parallel_world_size() > 1,
                tensor_rank=0,
                pipeline_rank=0,
                expert_parallel=False,
                basename=f"train_dataloader_dprank{rank:03d}.pt",
            )
            restore_position(loader, Path(position))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # Megatron listens by now (launcher.py)
        self.device = torch.device("cpu") if ON_CPU else torch.device("cuda", torch.cuda.current_device())
        self.tensorboard = get_tensorboard_writer()
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        ranks_per_replica = torch.distributed.get_world_size() // replicas
        peak = peak_flops(self.device)
        self.watch = Watch(
            self.run_dir,
            values,
            rank,
            replicas,
            args.iteration,
            last,
            peak and peak * ranks_per_replica,
            self.tensorboard,
        )
        self.held_out = None
        if args.eval_iters:
            batches = args.eval_iters * args.global_batch_size // (args.micro_batch_size * replicas)
            self.held_out = validation.HeldOut(
                self.data["path"], VlmTaskEncoder(*sizes), rank, replicas, args.micro_batch_size, batches
            )
        return loader, self.held_out, None

    def forward_step(self, data_iterator, model):
        asked = time.perf_counter()
        batch: VlmBatch = next(data_iterator)
        waited = time.perf_counter() - asked
        answers = len(batch.answer_labels)
        if model.training:
            grids = [tuple(grid) for grid in batch.grids.tolist()]
            flops = training_flops(self.model_config, self.parts, batch.lengths, grids, answers)
            self.watch.batch(waited, batch.num_tokens, batch.input_ids.numel(), flops, batch.__key__)
        chunks = [batch]
        if model.training and mpu.get_pipeline_model_parallel_world_size() == 1:
            chunks = batch.chunks(self.values["pack_chunk_tokens"], self.padding)
        done = torch.zeros((), device=self.device)  # loss of the chunks before the last
        for chunk in chunks[:-1]:
            total = self.answer_losses(model, chunk).sum()
            # In a step's last micro-batch Megatron takes every gradient for the final one, and would reduce it.
            last = model.bucket_groups[0].is_last_microbatch
            with model.no_sync() if last else nullcontext():
                total.backward()
            done += total.detach()
        output = self.answer_losses(model, chunks[-1])

        def loss(answer_losses):
            """Sum over the answer tokens, their number, and both for the log."""
            total = answer_losses.sum()
            # Filled there: a copy from the host would wait for the whole forward pass.
            count = torch.full((), answers, dtype=torch.int, device=self.device)
            logged = torch.stack((done + total.detach(), count.float()))
            return total, count, {"lm loss": logged}

        return output, loss

    def answer_losses(self, model, batch: VlmBatch) -> torch.Tensor:
        """Loss of each answer token of a batch, or what the next pipeline stage takes."""
        grids = [tuple(grid) for grid in batch.grids.tolist()]
        rows, tokens = batch.input_ids.shape
        image = max((height * width for height, width in grids), default=0)
        self.text_only = model if model.training and not grids else None
        self.largest = {"rows": rows, "tokens": tokens, "patches": len(batch.pixels), "image": image}
        on_device = lambda tensor: tensor.to(self.device, non_blocking=True)  # noqa: E731
        output = model(
            on_device(batch.input_ids),
            on_device(batch.pixels),
            grids,
            on_device(batch.image_index),
            answer_index=on_device(batch.answer_index),
            answer_labels=on_device(batch.answer_labels),
            packed_seq_params=packed_seq_params(batch.segments, self.device) if batch.segments else None,
        )
        if model.training and not output.requires_grad:  # text alone, and only parts that see images are trained
            output = output + torch.zeros((), device=output.device, requires_grad=True)
            output.register_hook(functools.partial(self.no_image_gradients, model))
        return output

    def after_embedding(self, embedding, inputs, output) -> None:
        if self.text_only is not None and output.requires_grad:
            output.register_hook(functools.partial(self.no_image_gradients, self.text_only))

    def no_image_gradients(self, model, gradient) -> None:
        """Report the image parts' gradients as complete, in the backward pass of a text without images.

        Where the reduction overlaps with it, Megatron reduces a bucket once all its parameters have reported, and every
        rank must reduce the buckets in the same order. So this is done where images report theirs: after the language
        layers and before the embedding, the last parameter first.
        """
        for param in reversed(self.image_parameters):
            model.param_to_bucket_group[param].register_grad_ready(param)

    # --- what Megatron calls, with ours before or after it ---------------------------------------------------------

    def hook(self) -> None:
        for name in ("training_log", "save_checkpoint", "evaluate", "evaluate_and_print_results"):
            setattr(training, name, functools.partial(getattr(self, name), getattr(training, name)))
        for name in ("get_megatron_optimizer_config", "get_optimizer_param_scheduler"):
            setattr(training, name, functools.partial(getattr(self, name), getattr(training, name)))
        schedule = checkpointing.schedule_async_save
        checkpointing.schedule_async_save = functools.partial(self.schedule_async_save, schedule)

    def get_megatron_optimizer_config(self, original, args):
        """Parts with a learning rate of their own."""
        config, overrides = original(args)
        # With FP8 Megatron would keep a float32 master of its own beside bf16 weights: it expects FP8 weights there.
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = config.use_precision_aware_optimizer
        for part, (lr, min_lr) in part_rates(self.values).items():
            if lr != self.values["lr"]:
                overrides[ParamKey(name=f"*{part}.*")] = {"max_lr": lr, "min_lr": min_lr}
        return config, overrides

    def get_optimizer_param_scheduler(self, original, optimizer):
        """The schedule; and an update whose gradient is not a number is left out: it would destroy the weights."""
        self.scheduler = original(optimizer)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            adam.keep_precision(part.optimizer)
            adam.round_evenly(part.optimizer, self.values["seed"])
        for name in ("get_grad_norm", "clip_grad_norm"):
            setattr(optimizer, name, functools.partial(self._note_norm, getattr(optimizer, name)))
        update = optimizer.step_with_ready_grads
        optimizer.step_with_ready_grads = lambda: math.isfinite(self.grad_norm or 0) and update()
        return self.scheduler

    def _note_norm(self, norm, *args):
        self.grad_norm = norm(*args)
        return self.grad_norm

    def rates(self) -> dict[str, float]:
        """Current learning rates under Megatron's tag, and of each trained part when they differ."""
        trained = part_rates(self.values)
        now = {part: self.scheduler.get_lr({"max_lr": lr, "min_lr": low}) for part, (lr, low) in trained.items()}
        parts = {f"learning-rate-{part}": rate for part, rate in now.items()} if len(set(now.values())) > 1 else {}
        return {"learning-rate": next(iter(now.values())), **parts}

    def training_log(self, original, *args, **named):
        flag = original(*args, **named)
        given = inspect.signature(original).bind(*args, **named).arguments
        losses, iteration, grad_norm = (given[name] for name in ("loss_dict", "iteration", "grad_norm"))
        if losses and mpu.get_tensor_model_parallel_rank() == mpu.get_tensor_model_parallel_world_size() - 1:
            self.watch.step(iteration, float(losses["lm loss"]), self.rates(), grad_norm, memory_gib())
        return flag

    def save_checkpoint(self, original, iteration, *args, **kwargs):
        """Stop before a full disk does, and when the save before could not be written."""
        maybe_finalize_async_save(blocking=True)
        if self.sealing:
            self.sealing.join()
        if torch.distributed.get_rank() == 0:
            earlier = checkpoints(self.run_dir)
            expected = checkpoint_size(self.model_config, self.values)
            needed = checkpoint_bytes(self.run_dir, earlier[-1]) if earlier else expected
            check_disk(self.run_dir, needed, f"the checkpoint of step {iteration}")
        self.saving = iteration
        self.watch.save(iteration)
        original(iteration, *args, **kwargs)
        if not self.values["async_save"]:
            self.saved(iteration)

    def schedule_async_save(self, original, request):
        """Have a forked process write the checkpoint: it has the tensors as they are now. Megatron finishes it between
        two steps, when all ranks have written, before the next save, and at the end."""
        request.add_finalize_fn(functools.partial(self.saved, self.saving))
        if request.async_fn:
            write = functools.partial(write_apart, os.getpid(), request.async_fn)
            stage = functools.partial(staged, request.preload_fn, request.async_fn_args[1])
            request = request._replace(async_fn=write, preload_fn=stage)
        original(request)

    def saved(self, iteration: int) -> None:
        """Note checksums and delete old checkpoints, beside the training."""
        if torch.distributed.get_rank() == 0:

            def finish():
                seal(self.run_dir, iteration)
                prune(self.run_dir, self.values["keep_last"], self.values["keep_every"])

            self.sealing = threading.Thread(target=finish)
            self.sealing.start()

    def evaluate_and_print_results(
        self, original, prefix, forward_step_func, data_iterator, model, iteration, *rest, **named
    ):
        """One validation of each step at most: Megatron does the last one twice."""
        if iteration == self.validated:
            return
        began, self.validated = time.perf_counter(), iteration
        self.held_out.rewind()
        original(prefix, forward_step_func, data_iterator, model, iteration, *rest, **named)
        self.watch.pause(time.perf_counter() - began)

    def evaluate(self, original, *args, **kwargs):
        losses, answers, out_of_time = original(*args, **kwargs)
        if losses and self.watch.writes:
            examples = self.held_out.examples(self.values["log_answers"])
            loss = float(losses["lm loss"])
            validation.record(self.run_dir, self.validated, loss, answers or [], examples, self.tensorboard)
        return losses, answers, out_of_time

    def answers(self, model) -> list[dict]:
        """Answers to fixed held-out samples, by the last rank, where one rank holds a whole model."""
        found = []
        if self.watch.writes and torch.distributed.get_world_size() == self.watch.replicas:
            for sample in self.held_out.examples(self.values["log_answers"]):
                try:
                    found.append(
                        validation.answer(model[0], self.held_out, sample, self.values["max_new_tokens"], self.device)
                    )
                except SkipSample:
                    continue
        return found

    def failure(self, error: BaseException) -> SftError | None:
        """The error as a person can use it; None when it is none of those that are known."""
        if isinstance(error, SftError):
            return error
        if ended := worker_ended(error):
            return ended
        full = isinstance(error, OSError) and error.errno in remedies.NO_SPACE
        if full or (isinstance(error, CheckpointException) and error.failures):  # one rank has them, the others end
            return remedies.not_written(self.run_dir, self.saving)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
            text in str(error) for text in NO_MEMORY
        ):
            return of_file(error) if isinstance(error, OSError) and error.filename is not None else None
        memory = {name: size / 2**30 for name, size in state_bytes(self.model_config, self.values).items()}
        return remedies.out_of_memory(
            self.values, memory | {"total": memory_gib()}, self.largest, self.values["gpus_per_node"]
        )


def scale_gradients(buffer, factor: torch.Tensor) -> None:
    """In Megatron's place, whose way takes 19 ms for 4B: the sums over all answer tokens become means."""
    for gradients in (buffer.grad_data, *buffer.extra_main_grads):
        scale_(gradients, factor)


def meeting_place() -> torch.distributed.Store | None:
    """A file where all processes are of this machine: torch's default listens on every network, without a password."""
    path = os.environ.get(STORE)
    return torch.distributed.FileStore(path, int(os.environ["WORLD_SIZE"])) if path else None


def peak_flops(device: torch.device) -> float | None:
    name = "" if ON_CPU else torch.cuda.get_device_name(device)
    return next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)


def staged(stage, buckets: list) -> list:
    """The tensors of a checkpoint in host memory. Megatron holds on to `buckets` until all is written; on the GPU some of
    their tensors were made for the save alone."""
    copies = stage()
    for (*_, (_, tensors)), (*_, (_, copied)) in zip(buckets, copies, strict=True):
        tensors[:] = copied
    return copies


def write_apart(parent: int, write, *args) -> None:
    """What the forked process does. Its parent may be dead already: the next training must not meet it (__main__.py)."""
    if os.getppid() == parent:
        os.nice(10)
        write(*args)


def memory_gib() -> float:
    """Greatest memory of this process so far: on the GPU where there is one, else resident, in GiB."""
    if not ON_CPU:
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def add_arguments(parser):
    parser.add_argument("--dataloader-save", type=str, help="folder for the loader's state")
    return parser


def main(resolved_path: str, run_dir: str, start_dir: str) -> None:
    resolved = read_json(resolved_path)
    trainer = Trainer(resolved, Path(run_dir))
    arguments = megatron_arguments(
        resolved["settings"], trainer.model_config, trainer.run_dir, Path(start_dir) if start_dir else None
    )
    sys.argv = [sys.argv[0], *arguments]
    # The index builder of datasets that are not used here: Megatron would compile it, but the wheel has no Makefile.
    initialize._compile_dependencies = lambda: None
    write_for_older_torch()
    get_write_results_queue("fork")  # Megatron would spawn it at the first save, with seconds of imports
    if resolved["settings"]["deterministic"]:
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
        torch.use_deterministic_algorithms(True, warn_only=True)
    if not ON_CPU:
        tensor_parallel.layers._grad_accum_fusion_available = True  # of Transformer Engine's layers, see build_model
        param_and_grad_buffer._ParamAndGradBuffer.scale_gradients = scale_gradients
    args = parse_and_validate_args(add_arguments, args_defaults={})
    args.exit_duration_in_mins = resolved["settings"]["max_minutes"]  # Megatron's argument takes whole minutes only
    if resolved["settings"]["async_save"]:
        # The command line takes Megatron's persistent writer alone. It shares the tensors of a CPU with the training, which
        # goes on changing them, and those of a GPU through a CUDA context of its own.
        args.async_save, args.async_strategy, args.use_persistent_ckpt_worker = True, "mcore", False
    trainer.hook()
    trainer.datasets.__func__.is_distributed = True
    try:
        pretrain(
            pretrain_cfg_container_from_args(args),
            trainer.datasets,
            ModelType.encoder_or_decoder,
            trainer.forward_step,
            trainer.build_model,
            non_loss_data_func=trainer.answers,
            store=meeting_place(),
        )
    except (Exception, CheckpointException) as error:  # torch derives the second from BaseException
        if failure := trainer.failure(error):
            with suppress(OSError):  # a full disk: train.py says it
                write_json(trainer.run_dir / FAILURE, {"problem": failure.problem, "fix": failure.fix})
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher asks until we have ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a loader worker that ends
        for child in multiprocessing.active_children():  # they hear no SIGTERM, with which Python would end them
            child.kill()
    torch.distributed.destroy_process_group()
