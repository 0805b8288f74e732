"""Checks of the machine right before a training starts: GPUs, memory and disk. No torch."""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from llava_sft.errors import RunError, many
from llava_sft.machine import (
    GIB,
    free_memory,
    gpus,
    require_gpus,
    require_shared_memory,
    this_machine,
)
from llava_sft.nodes import Node
from llava_sft.preflight.cost import MicroBatch, checkpoint_size, checkpoints_kept, host_bytes_for_save
from llava_sft.preflight.predict import Case
from llava_sft.preflight.proposals import forecast_of, proposal_lines
from llava_sft.run.checkpoints import check_disk
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.settings.resolved import Resolved
from llava_sft.training.slurm import Job

GPU_IDLE_GIB = 2.0  # more than this in use before the training starts is another process's


def check_nodes(settings: ResolvedSettings, job: Job | None, node: Node | None) -> None:
    """Raise RunError unless there are as many nodes as the settings ask for."""
    nodes, available = settings.nodes, job.nodes if job else node.nodes if node else 1
    if nodes > available:
        where = f"Slurm job {job.number} has {available}" if job else f"the platform started {available}"
        where = where if job or node else "outside a Slurm job there is one"
        several = "start the same command on each node, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set"
        raise RunError(
            f"nodes is {nodes}, {where}", f"make train_X ARGS='--profile slurm', or {several}, or nodes: {available}"
        )
    if node and nodes < available:
        raise RunError(f"nodes is {nodes}, the platform started {available}", f"nodes: {available}")


def check_node(resolved: Resolved) -> None:
    """Raise SftError when this machine cannot train as asked; warn where it differs from preflight's."""
    settings = resolved.settings
    if settings.gpus_per_node:
        require_gpus(settings.gpus_per_node, settings.fp8, settings.attention)
    for number, gpu in enumerate(gpus()[: settings.gpus_per_node] if settings.on_gpu else []):
        if gpu.used_gib > GPU_IDLE_GIB:
            stop_or_warn(
                settings,
                f"GPU {number} of {platform.node()} ({gpu.name}) already has {gpu.used_gib:.1f} of "
                f"{gpu.memory_gib:.1f} GiB in use",
                "end the other process (nvidia-smi names it), or choose other GPUs with CUDA_VISIBLE_DEVICES",
            )
    check_memory(resolved)
    for package, planned in resolved.versions.items():
        if (installed := version(package)) != planned:
            print(f"warning: {package} is {installed} here, preflight ran with {planned}")
    require_shared_memory()


def check_memory(resolved: Resolved) -> None:
    """Stop a run that is predicted to need more memory than a process, or a save, has here."""
    settings, model = resolved.settings, resolved.architecture
    copied, free = host_bytes_for_save(model, settings), free_memory()
    if copied > free:
        stop_or_warn(
            settings,
            f"saving needs {copied / GIB:,.1f} GiB of host memory for a copy of the GPU state; {free / GIB:,.1f} GiB are free",
            "more memory for the job (mem_mb of train in the profile), fewer trainable_modules, or more nodes",
        )
    machine = this_machine(settings.gpus_per_node, settings.nproc_per_node)
    if machine is None:
        return
    batch = [MicroBatch(*resolved.batch[name]) for name in ("mean", "largest")]
    forecast = forecast_of(Case(model, settings, machine, *batch))
    if forecast.prediction.memory_gib > machine.memory_gib:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in forecast.prediction.memory.items())
        stop_or_warn(
            settings,
            f"each process is predicted to need {forecast.prediction.memory_gib:.1f} GiB ({parts}), and has "
            f"{machine.memory_gib:.1f}",
            " or ".join(proposal_lines(forecast.would_fit))
            or "a smaller model, or more GPUs and a larger tensor_model_parallel_size",
        )


def stop_or_warn(settings: ResolvedSettings, problem: str, fix: str) -> None:
    """Raise RunError; with `memory_check: warn` only print a warning."""
    if settings.memory_check == "stop":
        raise RunError(problem, f"{fix}; memory_check: warn starts it all the same")
    print(f"warning: {problem}")


def check_space(run_dir: Path, resolved: Resolved) -> None:
    """Raise RunError when not even one checkpoint fits on the disk; warn when not all of them do."""
    settings = resolved.settings
    size = checkpoint_size(resolved.architecture, settings)
    check_disk(run_dir, size, "a checkpoint")
    kept = checkpoints_kept(settings)
    free = shutil.disk_usage(run_dir).free
    if free < kept * size:
        print(
            f"warning: {many(kept, 'checkpoint')} may take {kept * size / GIB:,.1f} GiB, the disk has {free / GIB:,.1f} GiB free: "
            "set keep_last"
        )
