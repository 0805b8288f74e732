"""The model in Megatron's wrappers, its gradients, its optimizer and its schedule."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.module import Float16Module

from llava_sft.megatron import adam
from llava_sft.megatron.config import ddp_config, optimizer_config
from llava_sft.model.kernels import scale_
from llava_sft.model.llava import LlavaOneVision
from llava_sft.settings.resolve import ResolvedSettings, part_rates

SEE_IMAGES = ("vision_model.", "adapter.")


def allow_gradient_fusion() -> None:
    """Let a configuration ask for it on GPUs: Megatron looks for Apex, and Transformer Engine's layers need none."""
    layers._grad_accum_fusion_available = True


def wrap(model: LlavaOneVision, values: ResolvedSettings) -> DistributedDataParallel:
    """The model on its device, in the precision of its weights, with buffers for its gradients."""
    model.model_type = ModelType.encoder_or_decoder  # Megatron's pipeline schedules ask for it
    for parameter in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if values.on_gpu and values.tensor_model_parallel_size > 1:
        # Every rank computes the same, but some kernels of GPUs add in an order of their own: the copies would drift apart.
        for name, parameter in replicated(model):
            # In layers Megatron sums what has to be summed; of the parts that see images `sum_over_images` does.
            if "layers." not in name and not name.startswith(SEE_IMAGES):
                parameter.average_gradients_across_tp_domain = True
    config, replicas = model.config, parallel_state.get_data_parallel_world_size()
    reduction = ddp_config(values, replicas)
    module: torch.nn.Module = model.cuda()
    if values.bf16:
        module = Float16Module(config, module)
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in model.named_parameters() if group.size() > 1 else ():
        if name.startswith(SEE_IMAGES):  # random weights may be drawn by rank
            torch.distributed.broadcast(parameter.data, torch.distributed.get_global_rank(group, 0), group=group)
    layout = None
    if reduction.use_distributed_optimizer:
        first = parallel_state.is_pipeline_first_stage()
        layout = DistributedOptimizer.compute_full_param_layout(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            reduction.bucket_size if first else None,
            replicas,
            reduction,
        )
    return DistributedDataParallel(config, reduction, module, full_param_layout=layout)


def unwrapped(model: torch.nn.Module) -> LlavaOneVision:
    while hasattr(model, "module"):
        model = model.module
    return model


def replicated(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of which each tensor-parallel rank has a copy, with their names."""
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            yield name, parameter


def unlike_copies(model: torch.nn.Module) -> list[str]:
    """Names of such parameters that differ between the tensor-parallel ranks. All ranks call it together."""
    group = parallel_state.get_tensor_model_parallel_group()
    mine = {
        name: hashlib.sha256(copy.detach().cpu().view(torch.uint8).numpy()).hexdigest()
        for name, copy in replicated(model)
    }
    of_all: list[dict[str, str]] = [{}] * group.size()
    torch.distributed.all_gather_object(of_all, mine, group=group)
    return [name for name, value in mine.items() if any(each[name] != value for each in of_all)]


def reduce_gradients(model: list[DistributedDataParallel], answers: torch.Tensor, **unused: Any) -> None:
    """Sum the gradients over all ranks and divide them by the number of answer tokens of the step.

    Args:
        model: one module (Megatron's schedules hand over a list).
        answers: [] int, the answer tokens of this rank's micro-batches; the last pipeline stage knows them.
    """
    finalize_model_grads(model)
    sum_over_images(model[0])
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast(answers, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    torch.distributed.all_reduce(answers, group=parallel_state.get_data_parallel_group())
    factor = 1.0 / torch.clamp(answers, min=1)
    if not answers.is_cuda:
        model[0].scale_gradients(factor)
        return
    for buffer in model[0].buffers:  # Megatron's own way takes 19 ms for 4B
        for gradients in (buffer.grad_data, *buffer.extra_main_grads):
            scale_(gradients, factor)


def sum_over_images(model: DistributedDataParallel) -> None:
    """Sum the gradients of the parts that see images over the tensor-parallel ranks, of which each has some of the images."""
    group, module = parallel_state.get_tensor_model_parallel_group(), unwrapped(model)
    if group.size() == 1 or not module.pre_process:
        return
    parameters = [p for name, p in module.named_parameters() if name.startswith(SEE_IMAGES) and p.requires_grad]
    if parameters:  # some 300 in 4B: in one call of NCCL
        group.allreduce_coalesced([parameter.main_grad for parameter in parameters]).wait()


def report_complete(model: DistributedDataParallel, parameters: list[torch.nn.Parameter]) -> None:
    """Report the gradients of `parameters` as complete, in the backward pass of a text without images.

    Where the reduction overlaps with it, Megatron reduces a bucket once all its parameters have reported, and every rank
    must reduce the buckets in the same order. So this is done where images report theirs: after the language layers and
    before the embedding, the last parameter first.
    """
    for parameter in reversed(parameters):
        model.param_to_bucket_group[parameter].register_grad_ready(parameter)


def make_optimizer(model: DistributedDataParallel, values: ResolvedSettings) -> MegatronOptimizer:
    """AdamW over all trained parameters; parts of the model may have a learning rate of their own."""
    config = optimizer_config(values)
    overrides = get_standard_config_overrides(config)
    for part, (lr, min_lr) in part_rates(values).items():
        if lr != values.lr:
            overrides[ParamKey(name=f"*{part}.*")] = {"max_lr": lr, "min_lr": min_lr}
    optimizer = get_megatron_optimizer(config, [model], config_overrides=overrides)
    for part in optimizer.chained_optimizers:
        adam.keep_precision(part.optimizer)
        adam.round_evenly(part.optimizer, values.seed)
    return optimizer


def clip(optimizer: MegatronOptimizer, max_norm: float, norm: float) -> None:
    """Scale the gradients down to `max_norm` where their `norm` is greater; 0 leaves them as they are."""
    for part in optimizer.chained_optimizers if max_norm else ():
        if parameters := part.get_parameters():
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, max_norm, norm, decoupled)


def make_schedule(optimizer: MegatronOptimizer, values: ResolvedSettings) -> OptimizerParamScheduler:
    """The learning rates, counted in samples as Megatron does. What the settings say holds, not what a checkpoint says."""
    batch = values.global_batch_size
    decay = values.lr_decay_iters * batch
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=values.lr,
        min_lr=values.min_lr,
        lr_warmup_steps=values.lr_warmup_fraction * decay,
        lr_decay_steps=decay,
        lr_decay_style=values.lr_decay_style,
        start_wd=values.weight_decay,
        end_wd=values.weight_decay,
        wd_incr_steps=values.train_iters * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def current_rates(schedule: OptimizerParamScheduler, values: ResolvedSettings) -> dict[str, float]:
    """Learning rates now, under Megatron's tag, and of each trained part when they differ."""
    trained = part_rates(values)
    now = {part: schedule.get_lr({"max_lr": lr, "min_lr": low}) for part, (lr, low) in trained.items()}
    parts = {f"learning-rate-{part}": rate for part, rate in now.items()} if len(set(now.values())) > 1 else {}
    return {"learning-rate": next(iter(now.values())), **parts}
