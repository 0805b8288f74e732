"""Train with Megatron what preflight resolved. Started again, it goes on from the newest whole checkpoint.

When the run has already done all its steps with the same settings and data it says so within a second. In a Slurm job it
trains on the job's nodes; before the time limit it saves, and has the job queued again as long as there is progress.

Exit codes: 0 all steps are done; 75 stopped in good order by a signal or max_minutes, with a checkpoint; 130 ended at once
by a second Ctrl-C, without; 1 an error, which is said.
"""

import argparse
import datetime
import os
import platform
import shlex
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import psutil

from llava_sft.config import gpu_count
from llava_sft.data.tars import METADATASET
from llava_sft.data.verify import require_whole
from llava_sft.errors import DamagedFileError, RunError, exits_cleanly
from llava_sft.files import fingerprint, read_json, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.training import predict
from llava_sft.training.checkpoints import check_disk, checkpoint_dir, iterations_done, prune
from llava_sft.training.coverage import SAMPLE_COUNTS, count_samples
from llava_sft.training.launcher import STOPPED, launch
from llava_sft.training.run import DEAD_AFTER_S, RUN_FILE, give_back, identity, lock, open_run
from llava_sft.training.slurm import Job, this_job
from llava_sft.training.watch import FAILURE, METRICS, forget_after, read_metrics

GPU_IDLE_GIB = 2.0  # more than this in use before the training starts is somebody else's

EXIT_GO_ON = 75  # stopped in good order before the last step: the same command goes on


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("resolved", type=Path, help="resolved.json, written by preflight.py")
    parser.add_argument("--run-dir", type=Path, required=True, help="Megatron's run directory (SAVE_CKPT_PATH)")
    parser.add_argument("--done", type=Path, required=True, help="written when all steps are done")
    parser.add_argument("--srun-options", default="", help="of this cluster, for the srun that starts the nodes' tasks")
    args = parser.parse_args()

    resolved = read_json(args.resolved)
    job = this_job()
    # A job that Slurm starts again may meet the last processes of its predecessor.
    held = lock(args.run_dir, patience_s=2 * DEAD_AFTER_S if job else 0)
    try:
        train(args, resolved, job, held)
    finally:  # a run that is refused leaves no lock of a dead one
        give_back(held)


def train(args: argparse.Namespace, resolved: dict, job: Job | None, held: BinaryIO) -> None:
    settings, run_dir = resolved["settings"], args.run_dir
    train_iters = settings["train_iters"]
    start = open_run(run_dir, resolved)
    if start == train_iters:
        print(f"{run_dir}: all {train_iters} steps are done, with the same data and settings: nothing to train")
        if settings["log_samples"] and not (run_dir / SAMPLE_COUNTS).is_file():
            count_samples(run_dir, resolved)
        finish(args.done, run_dir, resolved)
        return

    if dataset := resolved["data"].get("dataset_file"):
        data = Path(resolved["data"]["path"])
        require_whole(data.parent if data.name == METADATASET else data, Path(dataset))
    check_machine(resolved, job)
    prune(run_dir, settings["keep_last"], settings["keep_every"])
    check_space(run_dir, resolved)
    (run_dir / FAILURE).unlink(missing_ok=True)
    forget_after(run_dir, start)
    log = run_dir / f"run_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{platform.node()}.log"
    print(f"{run_dir}: " + (f"going on from step {start} of {train_iters}" if start else f"{train_iters} steps"))
    print(f"everything that Megatron prints: {log}", flush=True)
    began = time.monotonic()
    check_what_is_loaded(run_dir, start, resolved["start"]["folder"])
    arguments = [str(run_dir / RUN_FILE), str(run_dir)]
    code = launch(settings, arguments, run_dir, log, held, job, shlex.split(args.srun_options))
    reached = iterations_done(run_dir)
    if reached == train_iters:
        print(f"{run_dir}: {train_iters} steps done in {time.monotonic() - began:.0f} s")
        finish(args.done, run_dir, resolved)
        count_samples(run_dir, resolved)
    elif code == 0:
        if job and reached == start:
            raise RunError(
                f"{run_dir}: stopped at step {reached} of {train_iters}, where this round began: another would do no better",
                "a longer `runtime` for train in the profile, or fewer seconds in its --signal=TERM@SECONDS",
            )
        print(f"{run_dir}: stopped at step {reached} of {train_iters}; the same command goes on from there", flush=True)
        if job:
            give_back(held)
            job.requeue()
        sys.exit(EXIT_GO_ON)
    elif code == STOPPED:
        sys.exit(STOPPED)
    elif known := failure(run_dir):
        raise RunError(f"training stopped at step {reached} of {train_iters}: {known['problem']}", known["fix"])
    elif (free := shutil.disk_usage(run_dir).free) < 1 << 20:  # the message itself could not be written
        raise RunError(
            f"training stopped at step {reached} of {train_iters}: {run_dir} lies on a full disk: {free >> 10} KiB free",
            "free space there; the same command goes on from the newest checkpoint",
        )
    else:
        raise RunError(
            f"training ended with exit code {code} at step {reached} of {train_iters}.\n{last_lines(log)}", f"see {log}"
        )


def failure(run_dir: Path) -> dict | None:
    """The cause as the training noted it, if it knew one."""
    try:
        return read_json(run_dir / FAILURE, None)
    except DamagedFileError:  # the disk was full
        return None


def check_what_is_loaded(run_dir: Path, step: int, start: str | None) -> None:
    """Raise CheckpointError unless Megatron and energon can open what they go on from without running code in it."""
    from llava_sft.checkpoint.pickles import check_pickles  # imports torch, which a finished run need not wait for

    if step:
        positions = sorted((run_dir / "dataloader" / f"iter_{step:07d}").rglob("*.pt"))
        check_pickles(checkpoint_dir(run_dir, step), *positions)
    elif start:
        check_pickles(Path(start))


def finish(done: Path, run_dir: Path, resolved: dict) -> None:
    """Write the marker: the same bytes for the same run, whenever and however often it was interrupted."""
    train_iters = resolved["settings"]["train_iters"]
    metrics = read_metrics(run_dir)
    if metrics and metrics[-1]["iteration"] != train_iters:
        print(f"warning: {run_dir / METRICS}: the record of step {train_iters} is lost, and its loss with it")
        metrics = []
    marker = {
        "run_dir": str(run_dir),
        "checkpoint": str(checkpoint_dir(run_dir, train_iters)),
        "iteration": train_iters,
        "lm loss": metrics[-1]["lm loss"] if metrics else None,
        "fingerprint": fingerprint([identity(resolved), train_iters]),
    }
    write_json(done, marker, sealed=True)


def check_machine(resolved: dict, job: Job | None) -> None:
    """Raise RunError when this machine, or this Slurm job, can not train as asked; say what differs from preflight."""
    settings = resolved["settings"]
    nodes, there = settings["nodes"], job.nodes if job else 1
    if nodes > there:
        where = f"Slurm job {job.number} has {there}" if job else "outside a Slurm job there is one"
        raise RunError(f"nodes is {nodes}, {where}", f"snakemake --profile slurm, or nodes: {there}")
    found = gpu_count()
    if settings["gpus_per_node"] > found:
        raise RunError(
            f"gpus_per_node is {settings['gpus_per_node']}, {platform.node()} has {found}",
            f"gpus_per_node: {found}" + ("" if found else " trains on the CPU"),
        )
    gpus = predict.gpus_of_this_machine()[: settings["gpus_per_node"]] if settings["gpus_per_node"] else []
    for number, (name, total, used) in enumerate(gpus):
        if used > GPU_IDLE_GIB:
            complain(
                settings,
                f"GPU {number} of {platform.node()} ({name}) has {used:.1f} of {total:.1f} GiB in use already",
                "end the other process (nvidia-smi names it), or choose others with CUDA_VISIBLE_DEVICES",
            )
    check_memory(resolved)
    for package, planned in resolved["versions"].items():
        if (here := version(package)) != planned:
            print(f"warning: {package} is {here} here, preflight ran with {planned}")
    if Path("/dev/shm").is_dir() and (free := shutil.disk_usage("/dev/shm").free) < 64 << 20:
        raise RunError(f"/dev/shm has {free >> 20} MiB free, the loader needs 64", "free it, or mount it larger")


def check_memory(resolved: dict) -> None:
    """Stop a run that is predicted to need more memory than a process, or a save, has here."""
    settings, model = resolved["settings"], ModelConfig(**resolved["model"])
    copied, free = predict.save_copy(model, settings), free_memory()
    if copied > free:
        complain(
            settings,
            f"a save copies the GPUs' state to the memory of this machine: {copied / predict.GIB:,.1f} GiB, of "
            f"{free / predict.GIB:,.1f} GiB that are free",
            "more memory for the job (mem_mb of train in the profile), fewer trainable_modules, or more nodes",
        )
    machine = predict.this_machine(settings)
    batch = [predict.Load(*resolved["batch"][name]) for name in ("mean", "largest")]
    forecast = predict.forecast(model, settings, machine, *batch)
    if forecast is None:
        return
    prediction = forecast.prediction
    if prediction.memory_gib > machine.memory_gib:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in prediction.memory.items())
        complain(
            settings,
            f"a process is predicted to need {prediction.memory_gib:.1f} GiB ({parts}), and has {machine.memory_gib:.1f}",
            " | ".join(predict.proposal_lines(forecast.would_fit))
            or "a smaller model, or more GPUs and a tensor_model_parallel_size",
        )


def free_memory() -> float:
    """Bytes that this process may still take: of the machine, and of its Slurm job or container."""
    free = psutil.virtual_memory().available
    if job := os.environ.get("SLURM_MEM_PER_NODE"):
        free = min(free, int(job) << 20)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def complain(settings: dict, problem: str, fix: str) -> None:
    """Stop, or warn where memory_check says so."""
    if settings["memory_check"] == "stop":
        raise RunError(problem, f"{fix}; memory_check: warn starts it all the same")
    print(f"warning: {problem}")


def check_space(run_dir: Path, resolved: dict) -> None:
    """Raise RunError when not one checkpoint fits on the disk; warn when not all of them do."""
    settings = resolved["settings"]
    size = predict.checkpoint_size(ModelConfig(**resolved["model"]), settings)
    check_disk(run_dir, size, "a checkpoint")
    kept = predict.checkpoints_kept(settings)
    free = shutil.disk_usage(run_dir).free
    if free < kept * size:
        need, have = (f"{number / 2**30:,.1f} GiB" for number in (kept * size, free))
        print(f"warning: {kept} checkpoints may take {need}, the disk has {have} free: set keep_last")


def last_lines(log: Path, count: int = 12) -> str:
    """The end of the log, where the cause stands: the traceback's last frames and its message."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"    {line[:200]}" for line in lines[-count:])


if __name__ == "__main__":
    main()
