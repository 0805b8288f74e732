"""Settings → Megatron's command-line arguments. Light: the launcher shows them without importing Megatron."""

from pathlib import Path
from typing import Any

from llava_sft.model.config import ModelConfig
from llava_sft.settings.resolve import data_parallel_size


def megatron_arguments(values: dict[str, Any], model: ModelConfig, run_dir: Path, start_dir: Path | None) -> list[str]:
    """All arguments of one training process. `start_dir`: folder with a tracker file, None for random weights."""
    gpu = values["gpus_per_node"] > 0
    arguments = [
        *language_arguments(model),
        f"--seq-length={values['seq_length']}",
        f"--max-position-embeddings={values['seq_length']}",
        f"--micro-batch-size={values['micro_batch_size']}",
        f"--global-batch-size={values['global_batch_size']}",
        f"--train-iters={values['train_iters']}",
        f"--lr={values['lr']}",
        f"--min-lr={values['min_lr']}",
        f"--lr-decay-style={values['lr_decay_style']}",
        f"--lr-decay-iters={values['lr_decay_iters']}",
        f"--lr-warmup-fraction={values['lr_warmup_fraction']}",
        f"--weight-decay={values['weight_decay']}",
        f"--adam-beta1={values['adam_beta1']}",
        f"--adam-beta2={values['adam_beta2']}",
        f"--adam-eps={values['adam_eps']}",
        f"--clip-grad={values['clip_grad']}",
        f"--seed={values['seed']}",
        f"--tensor-model-parallel-size={values['tensor_model_parallel_size']}",
        f"--pipeline-model-parallel-size={values['pipeline_model_parallel_size']}",
        "--calculate-per-token-loss",  # every answer token counts the same, over micro-batches and ranks
        "--dataloader-type=external",
        "--tokenizer-type=NullTokenizer",
        f"--eval-iters={values['eval_iters']}",
        f"--eval-interval={values['eval_interval']}",
        f"--save={run_dir}",
        f"--load={run_dir}",
        f"--dataloader-save={run_dir / 'dataloader'}",
        f"--tensorboard-dir={run_dir / 'tensorboard'}",
        f"--save-interval={values['save_interval']}",
        f"--log-interval={values['log_interval']}",
        "--log-throughput",
        "--tensorboard-log-interval=1",
        "--ckpt-format=torch_dist",
        "--override-opt_param-scheduler",  # a larger train_iters goes on: the schedule is run.json's, always
        "--exit-signal-handler",
        "--no-check-for-nan-in-loss-and-grad",  # Megatron would end the run; here that step is left out (loop.py)
        "--rerun-mode=disabled",
        "--distributed-backend=" + ("nccl" if gpu else "gloo"),
        "--transformer-impl=" + ("transformer_engine" if gpu else "local"),
        "--no-masked-softmax-fusion",
    ]
    if start_dir is not None:
        arguments.append(f"--pretrained-checkpoint={start_dir}")
    if values["bf16"]:
        arguments.append("--bf16")
    if values["recompute_language"] == "selective":
        arguments += ["--recompute-granularity=selective", "--recompute-modules=core_attn"]
    elif values["recompute_language"] == "full":
        arguments += ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
    if values["fp8"] != "none":
        arguments += ["--fp8-format=hybrid", f"--fp8-recipe={values['fp8']}"]
    if gpu:
        # A collection at its own time would stop the host for tenths of a second, and the GPU with it.
        arguments += ["--use-distributed-optimizer", "--manual-gc", "--manual-gc-interval=100"]
        if data_parallel_size(values) > 1:
            # Not --overlap-param-gather: it waits for weights in a module's forward, which fused layers do not call.
            arguments.append("--overlap-grad-reduce")
        if values["optimizer_precision"] == "bf16":
            # 10 bytes a parameter instead of 18: bf16 moments and gradients, and of the float32 master what bf16 lacks
            precision = ("main-grads-dtype=bf16", "exp-avg-dtype=bf16", "exp-avg-sq-dtype=bf16")
            arguments += ["--use-precision-aware-optimizer", *(f"--{setting}" for setting in precision)]
    else:
        arguments += [
            "--no-gradient-accumulation-fusion",
            "--no-persist-layer-norm",
            "--no-rope-fusion",
            "--no-bias-swiglu-fusion",
            "--no-bias-dropout-fusion",
        ]
    return arguments


def part_rates(values: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Trained part → (lr, min_lr). Every part's rate ends at the same share of where it began."""
    rates = {"language_model": values["lr"], "adapter": values["lr_adapter"], "vision_model": values["lr_vision"]}
    share = values["min_lr"] / values["lr"]
    return {part: (rate, rate * share) for part, rate in rates.items() if part in values["trainable_modules"]}


def language_arguments(model: ModelConfig) -> list[str]:
    """The architecture of the language model. The vision tower's is set in model/llava.py."""
    language = model.language
    return [
        f"--num-layers={language.num_layers}",
        f"--hidden-size={language.hidden_size}",
        f"--ffn-hidden-size={language.ffn_hidden_size}",
        f"--num-attention-heads={language.num_attention_heads}",
        "--group-query-attention",
        f"--num-query-groups={language.num_query_groups}",
        f"--kv-channels={language.kv_channels}",
        f"--norm-epsilon={language.layernorm_epsilon}",
        f"--rotary-base={int(language.rotary_base)}",
        f"--vocab-size={language.vocab_size}",
        # Only what tensor parallelism needs: rows of padding would count in the softmax, and the loss would depend on TP.
        "--make-vocab-size-divisible-by=1",
        "--normalization=RMSNorm",
        "--position-embedding-type=rope",
        "--swiglu",
        "--qk-layernorm",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
        "--attention-dropout=0",
        "--hidden-dropout=0",
    ]
