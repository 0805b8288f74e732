"""The ranks of test_parallel.py: each loads a checkpoint, takes a forward and backward pass, saves weights and gradients, for
one parallel layout after the other; then some steps of packs in chunks, with and without reduction of the gradients during
the backward pass.

    python tests/helpers/parallel_worker.py JOB_DIR RANKS

The ranks are forked from a process that has Megatron imported: that takes longer than all of it.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from llava_sft.files import read_json
from llava_sft.model.config import ModelConfig
from llava_sft.training import cpu

cpu.apply()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.training.argument_utils import core_transformer_config_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.global_vars import set_args, unset_global_variables  # noqa: E402

from helpers.conversations import VALUES, conversation, loader_batch  # noqa: E402
from llava_sft.training import loop  # noqa: E402
from llava_sft.training.arguments import megatron_arguments  # noqa: E402


def build(job: dict, tp: int, pp: int, values: dict, extra: list[str]) -> tuple[loop.Trainer, DistributedDataParallel]:
    """The trainer, and its model as Megatron wraps it, with the weights of the job's checkpoint."""
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1)
    values = VALUES | values | {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    arguments = megatron_arguments(values, ModelConfig(**job["model"]), Path(job["folder"]), None)
    sys.argv = ["train", *arguments, *extra]
    unset_global_variables()
    args = parse_and_validate_args(loop.add_arguments, args_defaults={})
    set_args(args)
    resolved = {"settings": values, "data": {}, "start": {"sidecars": ""}, "model": job["model"]}
    trainer = loop.Trainer(resolved, Path(job["folder"]))
    trainer.watch, trainer.device = SimpleNamespace(batch=lambda *counted: None), torch.device("cpu")
    config = core_transformer_config_from_args(args)
    built = trainer.build_model(
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        config=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    built.model_type = ModelType.encoder_or_decoder
    wrapped = Float16Module(config, built) if values["bf16"] else built
    state = dist_checkpointing.load({"model": built.sharded_state_dict()}, job["release"])
    built.load_state_dict(state["model"])
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=args.overlap_grad_reduce, bucket_size=args.ddp_bucket_size
    )
    ddp = DistributedDataParallel(config, reduction, wrapped)
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = ddp.no_sync
    return trainer, ddp


def forward_backward(trainer: loop.Trainer, ddp: DistributedDataParallel, batches: list) -> float:
    """One step's gradients; returns the mean loss per answer token on the ranks of the last stage, else NaN."""
    reports = get_forward_backward_func()(
        forward_step_func=trainer.forward_step,
        data_iterator=iter(batches),
        model=[ddp],
        num_microbatches=len(batches),
        seq_length=512,
        micro_batch_size=len(batches[0].input_ids),
        forward_only=False,
    )
    total = sum(report["lm loss"] for report in reports) if reports else torch.full((2,), float("nan"))
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total[0] / total[1])


def run(job: dict, tp: int, pp: int, micro_batch_size: int, bf16: bool, extra: list[str], save: Path | None) -> float:
    """Load, forward, backward; returns the mean loss.

    The four samples are shared out to the data-parallel ranks; with a micro-batch size of 4 each rank takes them all."""
    trainer, ddp = build(job, tp, pp, {"bf16": bf16, "global_batch_size": 16}, extra)
    samples = [conversation(1, 1), conversation(0, 1), conversation(3, 2), conversation(2, 4)]
    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = samples if micro_batch_size == 4 else samples[rank::replicas]
    batches = [
        loader_batch(job["source"], mine[i : i + micro_batch_size]) for i in range(0, len(mine), micro_batch_size)
    ]
    loss = forward_backward(trainer, ddp, batches)
    if save:
        save.mkdir(exist_ok=True)
        for name in ("weights", "gradients"):
            (save / name).mkdir(exist_ok=True)
            sharded = trainer.model.sharded_state_dict()
            if name == "gradients":
                for key, value in list(sharded.items()):
                    value.data = getattr(value.data, "main_grad", None)
                    if value.data is None:
                        del sharded[key]
                    elif hasattr(value, "dtype"):
                        value.dtype = value.data.dtype
            dist_checkpointing.save(sharded, str(save / name))
    parallel_state.destroy_model_parallel()
    return loss


# Numbers of images of the samples of each pack, for (step, rank): two micro-batches. Steps 1 to 3 end without an image
# on the one rank, on the other, and on both.
PACKS = [
    [[[1, 2, 0], [0, 1, 1]], [[2, 1], [0, 2]]],
    [[[1, 0], [2, 1, 0]], [[1, 1, 0], [0, 3]]],
    [[[0, 1], [1, 1]], [[2, 0], [0, 0, 0]]],
    [[[1, 0], [0, 0]], [[1, 0], [2, 0]]],
]


def steps(job: dict, tp: int, pp: int, parts: list[str], extra: list[str]) -> dict:
    """Number of buckets that gradients are reduced in, and of each step the loss and a checksum of the gradients."""
    values = {"trainable_modules": parts, "pack_chunk_tokens": 32, "packing": True, "global_batch_size": 4}
    trainer, ddp = build(job, tp, pp, values, extra)
    found = []
    for ranks in PACKS:
        packs = ranks[parallel_state.get_data_parallel_rank() % 2]
        batches = [
            loader_batch(job["source"], [conversation(n, i) for i, n in enumerate(images)], packing=True)
            for images in packs
        ]
        assert bool(len(batches[-1].chunks(values["pack_chunk_tokens"])[-1].grids)) == bool(packs[-1][-1])
        ddp.zero_grad_buffer()
        loss = forward_backward(trainer, ddp, batches)
        gradients = b"".join(buffer.grad_data.numpy().tobytes() for buffer in ddp.buffers)
        found.append([str(loss), hashlib.sha256(gradients).hexdigest()])
    buckets = len(ddp.bucket_groups)
    parallel_state.destroy_model_parallel()
    return {"buckets": buckets, "steps": found}


def rank(number: int, folder: Path, ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
    store = torch.distributed.TCPStore("127.0.0.1", port)
    torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=ranks)
    job, losses = read_json(folder / "job.json"), {}
    for name, *settings, save in job["runs"]:
        losses[name] = run(job, *settings, Path(job["folder"]) / name if save else None)
    found = [None] * ranks
    torch.distributed.all_gather_object(found, {name: steps(job, *settings) for name, *settings in job["steps"]})
    if number == ranks - 1:
        (folder / "steps.json").write_text(json.dumps(found))
        (folder / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    place, count = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    meeting = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(rank, (place, count, meeting.port), nprocs=count, start_method="fork")
