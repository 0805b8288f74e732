"""What went wrong, said with the values of this run, and the guide's remedies worked out: the number to change and to what.

Light: no torch, no Megatron.
"""

import errno
import math
import os
import shutil
from pathlib import Path

from llava_sft.errors import RunError
from llava_sft.model.processing import PATCH_SIZE
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.layout import BAD_STEPS, checkpoint_dir, checkpoints

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def not_written(run_dir: Path, iteration: int) -> RunError:
    """Torch does not hand on why; the system's words, if any, are in the run's log."""
    free = shutil.disk_usage(run_dir).free >> 20
    return RunError(
        f"{run_dir}: the checkpoint of step {iteration} could not be written; the disk has {free:,} MiB free",
        f"free space there, or see the newest {run_dir}/run_*.log; the same command resumes from step {iterations_done(run_dir)}",
    )


def lower_lr(lr: float) -> float:
    """The guide's next lower learning rate: 5e-6, then 1e-6; a quarter of one that is far above them."""
    return lr / 4 if lr > 5e-5 else 5e-6 if lr > 5e-6 else 1e-6 if lr > 1e-6 else lr / 4


def exploded(values: dict, run_dir: Path, bad: list[dict], usual_loss: float | None, trouble: int) -> RunError:
    """After `bad` steps in a row, each {iteration, loss, grad_norm, samples}: which lr, from which checkpoint: one that
    is older than `trouble`, the first bad step of this time."""
    first, last = bad[0], bad[-1]
    before = f", where the good steps before had {usual_loss:.3g}" if usual_loss is not None else ""
    done = iterations_done(run_dir)  # a newer one is still being written, and is given up
    whole = [iteration for iteration in checkpoints(run_dir) if iteration < trouble and iteration <= done]
    lr = lower_lr(values["lr"])
    load = f" load={checkpoint_dir(run_dir, whole[-1])}" if whole else ""
    start = f"from the start (no checkpoint is older than the first bad step, {trouble})"
    origin = "from the last checkpoint before it" if whole else start
    return RunError(
        f"{len(bad)} bad steps in a row, {first['iteration']} … {last['iteration']} (max_bad_steps): loss {first['loss']:.3g} "
        f"… {last['loss']:.3g}{before}; grad norm {last['grad_norm'] or 0:.3g}; lr {values['lr']:g}. Ids of their samples: "
        f"{run_dir / BAD_STEPS}",
        f"a lower learning rate, {origin}: --config lr={lr:g} run_tag=lr{lr:g}{load}. If it explodes again: longer "
        f"lr_warmup_fraction (now {values['lr_warmup_fraction']:g}), and look at those samples",
    )


def out_of_memory(values: dict, memory: dict[str, float], largest: dict[str, int], gpus: int) -> RunError:
    """`memory`: GiB of weights, gradients, optimizer, and `total` in use; `largest`: rows, tokens, patches of the batch,
    and patches of its largest image."""
    state = {part: gib for part, gib in memory.items() if part != "total"}
    rest = max(0.0, memory["total"] - sum(state.values()))
    parts = ", ".join(f"{part} {gib:.2f}" for part, gib in {**state, "activations and the rest": rest}.items())
    mbs, parallel = values["micro_batch_size"], values["tensor_model_parallel_size"]
    ways = []
    if values["packing"] and largest["tokens"] > 2048 and values["pipeline_model_parallel_size"] == 1:
        # Of what was in the model, which may have been one long sample.
        chunk = min(values["pack_chunk_tokens"], largest["tokens"])
        ways.append(f"pack_chunk_tokens: {chunk // 2} (the same gradients)")
    if mbs > 1:
        ways.append(f"micro_batch_size: {mbs // 2} (global_batch_size stays {values['global_batch_size']})")
    if largest["image"] * PATCH_SIZE**2 > values["max_pixels"] / 2 and largest["patches"] > largest["tokens"]:
        ways.append(f"max_pixels: {values['max_pixels'] // 2}")
    if mbs == 1:
        ways.append(f"seq_length: {values['seq_length'] // 2}")
    if gpus >= 2 * parallel and rest < sum(state.values()):
        ways.insert(0, f"tensor_model_parallel_size: {2 * parallel}")
    return RunError(
        f"out of memory at a micro-batch of {largest['rows']} × {largest['tokens']} tokens and {largest['patches']} image "
        f"patches. GiB in use: {parts}",
        " or ".join(ways) + "; also look for other processes (nvidia-smi, top)",
    )


def slow_loading(values: dict, tokens_per_s: float, wait_share: float) -> str:
    """The measured rates, and the number of workers that would keep up: in proportion to the time not waited."""
    workers = values["num_workers"]
    busy = max(0.05, 1 - wait_share)
    needed = math.ceil(workers / busy)
    cores = len(os.sched_getaffinity(0)) // max(1, values["nproc_per_node"])
    enough = f"num_workers: {needed} would keep up (in a new run: a run keeps its number)"
    if needed > cores:
        enough = f"{needed} workers would keep up, there are {cores} cores: "
        enough += "a local disk, smaller max_pixels, or more cores"
    return (
        f"slow loading: steps wait {wait_share:.0%} of their time for data. num_workers {workers} load {tokens_per_s:,.0f} "
        f"tokens/s, the model would take {tokens_per_s / busy:,.0f}. {enough}"
    )
