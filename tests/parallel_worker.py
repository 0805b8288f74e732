"""One rank of test_parallel.py: loads a checkpoint, takes a forward and backward pass, saves weights and gradients, for
one parallel layout after the other in the same process (importing Megatron takes longer than all of it).

    torchrun --nproc-per-node=4 tests/parallel_worker.py JOB_DIR
"""

import json
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

from llava_sft.training import loop  # noqa: E402
from llava_sft.training.arguments import megatron_arguments  # noqa: E402
from test_megatron_model import VALUES, conversation, loader_batch  # noqa: E402


def run(job: dict, tp: int, pp: int, micro_batch_size: int, bf16: bool, extra: list[str], save: Path | None) -> float:
    """Load, forward, backward; returns the mean loss per answer token on the ranks of the last stage, else NaN.

    The four samples are shared out to the data-parallel ranks; with a micro-batch size of 4 each rank takes them all."""
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1)
    model = ModelConfig(**job["model"])
    values = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "bf16": bf16,
        "global_batch_size": 16,
    }
    sys.argv = ["train", *megatron_arguments(VALUES | values, model, Path(job["folder"]), None), *extra]
    unset_global_variables()
    args = parse_and_validate_args(loop.add_arguments, args_defaults={})
    set_args(args)
    trainer = loop.Trainer(
        {"settings": VALUES, "data": {}, "start": {"sidecars": ""}, "model": job["model"]}, Path(job["folder"])
    )
    trainer.watch, trainer.device = SimpleNamespace(batch=lambda *counted: None), torch.device("cpu")
    config = core_transformer_config_from_args(args)
    built = trainer.build_model(
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        config=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    built.model_type = ModelType.encoder_or_decoder
    wrapped = Float16Module(config, built) if bf16 else built
    state = dist_checkpointing.load({"model": built.sharded_state_dict()}, job["release"])
    built.load_state_dict(state["model"])
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), wrapped)
    config.finalize_model_grads_func = finalize_model_grads
    samples = [conversation(1, 1), conversation(0, 1), conversation(3, 2), conversation(2, 4)]
    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = samples if micro_batch_size == 4 else samples[rank::replicas]
    batches = [
        loader_batch(job["source"], mine[i : i + micro_batch_size]) for i in range(0, len(mine), micro_batch_size)
    ]
    reports = get_forward_backward_func()(
        forward_step_func=trainer.forward_step,
        data_iterator=iter(batches),
        model=[ddp],
        num_microbatches=len(batches),
        seq_length=512,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )
    if save:
        save.mkdir(exist_ok=True)
        for name in ("weights", "gradients"):
            (save / name).mkdir(exist_ok=True)
            sharded = built.sharded_state_dict()
            if name == "gradients":
                for key, value in list(sharded.items()):
                    value.data = getattr(value.data, "main_grad", None)
                    if value.data is None:
                        del sharded[key]
                    elif hasattr(value, "dtype"):
                        value.dtype = value.data.dtype
            dist_checkpointing.save(sharded, str(save / name))
    total = sum(report["lm loss"] for report in reports) if reports else torch.full((2,), float("nan"))
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    parallel_state.destroy_model_parallel()
    return float(total[0] / total[1])


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    job, losses = read_json(folder / "job.json"), {}
    for name, *settings, save in job["runs"]:
        losses[name] = run(job, *settings, Path(job["folder"]) / name if save else None)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        (folder / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
