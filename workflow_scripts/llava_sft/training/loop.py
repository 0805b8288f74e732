"""One training process: the glue between the resolved settings and `megatron.training.pretrain`.

The launcher starts it once per rank (`__main__.py`); what it prints goes to the run's log.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from llava_sft.training import cpu

ON_CPU = cpu.apply()

from megatron.core import mpu  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import get_args, pretrain, print_rank_0, training  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.checkpointing import get_checkpoint_name  # noqa: E402

from llava_sft.data.loader import VlmBatch, VlmTaskEncoder, train_loader, worker_config  # noqa: E402
from llava_sft.data.template import ChatTemplate  # noqa: E402
from llava_sft.files import read_json  # noqa: E402
from llava_sft.model.config import ModelConfig  # noqa: E402
from llava_sft.model.llava import LlavaOneVision  # noqa: E402
from llava_sft.training.arguments import megatron_arguments  # noqa: E402
from llava_sft.training.watch import Watch  # noqa: E402


class Trainer:
    """The functions that `pretrain` asks for, and what they share."""

    def __init__(self, resolved: dict, run_dir: Path):
        self.values, self.data = resolved["settings"], resolved["data"]
        self.sidecars = resolved["start"]["sidecars"]
        self.model_config = ModelConfig(**resolved["model"])
        self.run_dir = run_dir
        self.watch: Watch | None = None

    def build_model(self, pre_process=True, post_process=True, config=None, pg_collection=None, vp_stage=None):
        args = get_args()
        config = config or core_transformer_config_from_args(args)
        config.hetereogenous_dist_checkpoint = True  # one checkpoint key per layer, as converted
        config.variable_seq_lengths = args.pipeline_model_parallel_size > 1  # batches are as long as their longest
        return LlavaOneVision(
            config,
            self.model_config,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.seq_length,
            transformer_impl=args.transformer_impl,
            pg_collection=pg_collection,
            pre_process=pre_process,
            post_process=post_process,
        )

    def datasets(self, train_val_test_num_samples):
        """(train, validation, test) loaders of this data-parallel rank; the training one goes on where it was."""
        args, values = get_args(), self.values
        encoder = VlmTaskEncoder(
            ChatTemplate(self.sidecars), values["seq_length"], values["min_pixels"], values["max_pixels"]
        )
        rank, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        workers = worker_config(rank, replicas, values["num_workers"], values["seed"], mpu.get_data_parallel_group())
        loader = train_loader(self.data["path"], encoder, workers, args.micro_batch_size)
        if args.iteration > 0:
            path = get_checkpoint_name(
                args.dataloader_save,
                args.iteration,
                pipeline_parallel=mpu.get_pipeline_model_parallel_world_size() > 1,
                tensor_rank=0,
                pipeline_rank=0,
                expert_parallel=False,
                basename=f"train_dataloader_dprank{rank:03d}.pt",
            )
            loader.restore_state_rank(torch.load(path, weights_only=False)["dataloader_state_dict"])
            print_rank_0(f"data position restored from {path}")
        self.watch = Watch(self.run_dir, args.train_iters, args.log_interval, replicas)
        return SavedWithCheckpoint(loader), None, None

    def forward_step(self, data_iterator, model):
        asked = time.perf_counter()
        batch: VlmBatch = next(data_iterator)
        waited = time.perf_counter() - asked
        self.watch.batch(waited, batch.num_tokens, batch.input_ids.numel())
        device = torch.device("cpu") if ON_CPU else torch.device("cuda", torch.cuda.current_device())
        on_device = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        labels, loss_mask = on_device(batch.labels), on_device(batch.loss_mask)
        output = model(
            on_device(batch.input_ids),
            on_device(batch.pixels),
            [tuple(grid) for grid in batch.grids.tolist()],
            on_device(batch.image_index),
            labels=labels,
        )

        def loss(token_losses):
            """Sum over the answer tokens, their number, and both for the log."""
            total = (token_losses.float() * loss_mask).sum()
            count = loss_mask.sum()
            report = torch.stack((total.detach(), count))
            return total, count.to(torch.int), {"lm loss": report}

        return output, loss

    def watched(self, training_log):
        """Megatron's `training_log`, with a record for people written after it."""

        def log(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            grad_norm,
            *rest,
            **named,
        ):
            flag = training_log(
                loss_dict,
                total_loss_dict,
                learning_rate,
                iteration,
                loss_scale,
                report_memory_flag,
                skipped_iter,
                grad_norm,
                *rest,
                **named,
            )
            if loss_dict and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                self.watch.step(iteration, float(loss_dict["lm loss"]), learning_rate, grad_norm, memory_gib())
            return flag

        return log


class SavedWithCheckpoint:
    """The loader as Megatron wants it: an iterator with `save_state`."""

    def __init__(self, loader):
        self.loader, self.iterator = loader, None

    def __iter__(self):
        return self

    def __next__(self):
        if self.iterator is None:
            self.iterator = iter(self.loader)
        return next(self.iterator)

    def save_state(self):
        return self.loader.save_state_rank()


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
    get_write_results_queue("fork")  # Megatron would spawn it at the first save, with seconds of imports
    args = parse_and_validate_args(add_arguments, args_defaults={})
    training.training_log = trainer.watched(training.training_log)
    trainer.datasets.__func__.is_distributed = True
    pretrain(
        pretrain_cfg_container_from_args(args),
        trainer.datasets,
        ModelType.encoder_or_decoder,
        trainer.forward_step,
        trainer.build_model,
    )
    torch.distributed.destroy_process_group()
