"""Settings → the configurations of Megatron-Core's parts."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from llava_sft.model.config import ModelConfig
from llava_sft.settings.resolve import ResolvedSettings


def transformer_config(model: ModelConfig, values: ResolvedSettings) -> TransformerConfig:
    """The language model's TransformerConfig; the vision tower's is made from it (model/llava.py)."""
    language, on_gpu = model.language, values.on_gpu
    dtype = torch.bfloat16 if values.bf16 else torch.float32
    stages = values.pipeline_model_parallel_size
    recompute: dict[str, Any] = {}
    if values.recompute_language == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    uneven = {}
    if stages > 1 and values.first_stage_layers:
        uneven = {"num_layers_in_first_pipeline_stage": values.first_stage_layers}
    config = TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.kv_channels,
        layernorm_epsilon=language.layernorm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=False,
        tensor_model_parallel_size=values.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        **uneven,
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=True,
        bf16=values.bf16,
        params_dtype=dtype,
        calculate_per_token_loss=True,  # every answer token counts the same, over micro-batches and ranks
        hetereogenous_dist_checkpoint=True,  # one checkpoint key per layer, as converted (Megatron's spelling)
        transformer_impl="transformer_engine" if on_gpu else "local",
        gradient_accumulation_fusion=on_gpu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        persist_layer_norm=on_gpu,
        apply_rope_fusion=on_gpu,
        **recompute,
        **({} if values.fp8 == "none" else {"fp8": "hybrid", "fp8_recipe": values.fp8}),
    )
    # Batches are as long as their longest sequence. Not above: it would be refused for the sake of experts, which none has.
    config.variable_seq_lengths = stages > 1
    return config


def ddp_config(values: ResolvedSettings, replicas: int) -> DistributedDataParallelConfig:
    """How gradients are kept and reduced over `replicas` data-parallel ranks."""
    on_gpu = values.on_gpu
    # Without overlap_param_gather: it waits for weights in a module's forward, which fused layers do not call.
    overlap = on_gpu and replicas > 1
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=values.bf16 and not values.reduces_in_bf16,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=on_gpu,
        bucket_size=max(40_000_000, 1_000_000 * replicas) if overlap else None,
        check_for_nan_in_grad=False,  # it would end the run; training/loop.py leaves such a step out
    )


def optimizer_config(values: ResolvedSettings) -> OptimizerConfig:
    """AdamW. In bf16 it takes 10 bytes a parameter in place of 18: moments, gradients, and of the float32 master weight
    the 16 bits that the bf16 weight lacks."""
    names = {"lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"}
    dtype, moments = (torch.bfloat16 if on else torch.float32 for on in (values.bf16, values.reduces_in_bf16))
    config = OptimizerConfig(
        optimizer="adam",
        **values.model_dump(include=names),
        bf16=values.bf16,
        params_dtype=dtype,
        use_distributed_optimizer=values.on_gpu,
        use_precision_aware_optimizer=values.reduces_in_bf16,
        main_grads_dtype=moments,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
    )
    # With FP8 Megatron would keep a float32 master of its own beside bf16 weights: it expects FP8 weights there.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = config.use_precision_aware_optimizer
    return config
