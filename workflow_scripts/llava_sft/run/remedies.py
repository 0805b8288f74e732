"""Error messages with this run's numbers, and which setting to change to what value.

No torch, no Megatron.
"""

import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

from llava_sft.errors import RunError, many, verb_of
from llava_sft.model.processing import PATCH_SIZE
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.layout import BAD_STEPS, checkpoint_dir, checkpoints
from llava_sft.settings.resolve import ResolvedSettings

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SMALL_CHUNK = 2048  # tokens: smaller chunks save little


def not_written(run_dir: Path, iteration: int) -> RunError:
    """Torch does not pass on the reason; the system's own message, if any, is in the run's log."""
    free = shutil.disk_usage(run_dir).free >> 20
    return RunError(
        f"{run_dir}: the checkpoint of step {iteration} could not be written; the disk has {free:,} MiB free",
        f"free space there, or see the newest {run_dir}/run_*.log; the same command resumes from step {iterations_done(run_dir)}",
    )


def lower_lr(lr: float) -> float:
    """The guide's next lower learning rate: 5e-6, then 1e-6; a quarter of one that is far above them."""
    return lr / 4 if lr > 5e-5 else 5e-6 if lr > 5e-6 else 1e-6 if lr > 1e-6 else lr / 4


def exploded(
    values: ResolvedSettings, run_dir: Path, bad: list[dict], usual_loss: float | None, trouble: int
) -> RunError:
    """After bad steps in a row: a lower learning rate, from the last checkpoint before the trouble began.

    Args:
        bad: the records of those steps: iteration, loss, grad_norm, samples.
        usual_loss: median of the good steps before, if there were any.
        trouble: the first bad step of this bad stretch, which may have begun before `bad`.
    """
    first, last = bad[0], bad[-1]
    before = f", where the good steps before had {usual_loss:.3g}" if usual_loss is not None else ""
    done = iterations_done(run_dir)  # a newer one is still being written, and will not be finished
    older = [iteration for iteration in checkpoints(run_dir) if iteration < trouble and iteration <= done]
    lr = lower_lr(values.lr)
    load = f" load={checkpoint_dir(run_dir, older[-1])}" if older else ""
    start = f"from the start (no checkpoint is older than the first bad step, {trouble})"
    origin = "from the last checkpoint before it" if older else start
    return RunError(
        f"{many(len(bad), 'bad step')} in a row, {first['iteration']} … {last['iteration']} (max_bad_steps): loss {first['loss']:.3g} "
        f"… {last['loss']:.3g}{of_ranks(last)}{before}; grad norm {last['grad_norm'] or 0:.3g}; lr {values.lr:g}. Ids of their samples: "
        f"{run_dir / BAD_STEPS}",
        f"a lower learning rate, {origin}: --config lr={lr:g} run_tag=lr{lr:g}{load}. If it explodes again: a longer "
        f"lr_warmup_fraction (now {values.lr_warmup_fraction:g}), and look at those samples",
    )


def less_memory(values: ResolvedSettings, tokens: int) -> dict[str, list]:
    """Per setting that memory depends on, the values that need less of it, nearest first.

    Preflight tries their combinations, an out-of-memory error proposes the nearest. `tokens`: of the longest sequence that
    goes through the model.
    """
    parallel, batch, length = values.tensor_model_parallel_size, values.micro_batch_size, values.seq_length
    of_replica = values.model_parallel_size
    chunk, chunked = min(tokens, values.pack_chunk_tokens), values.chunk_tokens < math.inf
    smaller: dict[str, list] = {
        "pack_chunk_tokens": [chunk // 2, chunk // 4] if chunked and chunk > SMALL_CHUNK else [],
        "micro_batch_size": [max(1, batch // 2), 1],
        "recompute_vision": ["full"],
        "recompute_language": ["full"],
        "tensor_model_parallel_size": [n * parallel for n in (2, 4) if values.gpus_per_node % (n * of_replica) == 0],
        "optimizer_precision": ["bf16"],
        "seq_length": [length // 2, length // 4],
    }
    if not values.on_gpu:  # processes of a CPU share its memory, and keep the optimizer in float32
        smaller |= {"tensor_model_parallel_size": [], "optimizer_precision": []}
    return {
        name: [value for value in dict.fromkeys(found) if value != getattr(values, name)]
        for name, found in smaller.items()
    }


def with_lora(values: ResolvedSettings) -> dict[str, Any]:
    """What trains the language model alone, by LoRA, where it is trained whole; empty where it cannot."""
    if "language_model" not in values.trained.whole or values.load == "random":
        return {}
    return {"lora_rank": 32, "trainable_modules": ["language_model"], "lr": max(values.lr, 1e-4)}


def in_yaml(value: Any) -> str:
    return (
        f"[{', '.join(value)}]" if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def out_of_memory(values: ResolvedSettings, memory: dict[str, float], largest: dict[str, int]) -> RunError:
    """The memory in use, and the settings that need less of what took most.

    Args:
        memory: GiB of weights, gradients, optimizer, and the `total` in use.
        largest: rows, tokens and patches of the micro-batch, and the patches of its largest image.
    """
    state = {part: gib for part, gib in memory.items() if part != "total"}
    rest = max(0.0, memory["total"] - sum(state.values()))
    parts = ", ".join(f"{part} {gib:.2f}" for part, gib in {**state, "activations and the rest": rest}.items())
    smaller = less_memory(values, largest["tokens"]) | {"max_pixels": [values.max_pixels // 2]}
    mostly_state, mostly_images = rest < sum(state.values()), largest["patches"] > largest["tokens"]
    large_image = largest["image"] * PATCH_SIZE**2 > values.max_pixels / 2
    helps = {
        "tensor_model_parallel_size": mostly_state,
        "pack_chunk_tokens": True,
        "micro_batch_size": True,
        "recompute_vision": mostly_images,
        "recompute_language": not mostly_images,
        "optimizer_precision": mostly_state,
        "max_pixels": mostly_images and large_image,
        "seq_length": values.micro_batch_size == 1,
    }
    notes = {"pack_chunk_tokens": " (the same gradients)", "recompute_vision": " (slower, the same gradients)"}
    notes |= {"recompute_language": notes["recompute_vision"]}
    notes |= {"micro_batch_size": f" (global_batch_size stays {values.global_batch_size})"}
    ways = [f"{name}: {smaller[name][0]}{notes.get(name, '')}" for name in helps if helps[name] and smaller[name]]
    if mostly_state and (lora := with_lora(values)):
        ways.append("LoRA: " + ", ".join(f"{name}: {in_yaml(value)}" for name, value in lora.items()))
    return RunError(
        f"out of memory at a micro-batch of {largest['rows']} × {largest['tokens']} tokens and {largest['patches']} image "
        f"patches. GiB in use: {parts}",
        " or ".join(ways) + "; also look for other processes (nvidia-smi, top)",
    )


def of_ranks(step: dict) -> str:
    """Whose loss is not a number, where it is not that of all."""
    ranks = step.get("ranks", ())
    return f" of data-parallel rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} alone" if ranks else ""


def slow_loading(values: ResolvedSettings, tokens_per_s: float, wait_share: float) -> str:
    """The measured rates, and the number of workers that would keep up: in proportion to the time not spent waiting."""
    workers = values.num_workers
    busy = max(0.05, 1 - wait_share)
    needed = math.ceil(workers / busy)
    cores = len(os.sched_getaffinity(0)) // max(1, values.nproc_per_node)
    enough = f"num_workers: {needed} would keep up (in a new run: a run keeps its number)"
    if needed > cores:
        enough = f"{many(needed, 'worker')} would keep up, there {verb_of(cores, 'are')} {many(cores, 'core')}: "
        enough += "a local disk, smaller max_pixels, or more cores"
    return (
        f"slow loading: steps wait {wait_share:.0%} of their time for data. num_workers {workers} load {tokens_per_s:,.0f} "
        f"tokens/s, the model would take {tokens_per_s / busy:,.0f}. {enough}"
    )
