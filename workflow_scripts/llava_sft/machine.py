"""What the machine has: GPUs, their peak speed and memory, and the memory that is free. No torch."""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil

from llava_sft.errors import LEAST_SPACE, SettingsError, shown
from llava_sft.gpu_stack import engine_trouble, flash4_trouble, gpu_name, smi

SHARED_MEMORY = Path("/dev/shm")
MORE_TEMPORARY = "free some space there, or: export TMPDIR=FOLDER on a disk with room"
PR_SET_PDEATHSIG = 1  # prctl(2)
GIB = 2**30
# Dense bf16 peak of a GPU, FLOP/s with sums in float32, as its maker publishes it; MFU is relative to it.
PEAK_FLOPS = {
    "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A40": 150e12, "A10": 125e12,
    "H800": 989e12, "H20": 148e12, "A800": 312e12, "L20": 119.5e12, "6000 ADA": 364e12, "PRO 6000": 504e12,
    "A6000": 155e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "3090": 71e12, "4090": 165e12, "5090": 209e12,
}  # fmt: skip
GPU_MEMORY_GIB = {
    "H100": 79.1, "GH200": 94.5, "H200": 139.8, "B200": 178.4, "A100": 79.2, "A40": 44.5, "A10": 22.0,
    "H800": 79.1, "H20": 95.6, "A800": 79.2, "L20": 44.5, "6000 ADA": 47.5, "PRO 6000": 95.6,
    "A6000": 47.5, "L40S": 44.5, "L40": 44.5, "L4": 22.0, "3090": 23.6, "4090": 23.5, "5090": 31.4,
}  # fmt: skip
HOPPER = 9.0  # its compute capability
OLDEST_GPU = 8.0  # compute capability that bf16 and the kernels need; FP8 needs:
OLDEST_GPU_OF_FP8 = {"tensorwise": 8.9, "blockwise": 9.0}
HIDES = ("", "-1", "NoDevFiles")  # what stands in CUDA_VISIBLE_DEVICES for no GPU; the last as Slurm writes it
CPU_FLOPS = 3e10  # a core's share in float32; the recorded runs say how much of it is reached


class Machine(NamedTuple):
    """What one process has: `device` is CPU, or a GPU by its name in PEAK_FLOPS; `peak` in FLOP/s."""

    device: str
    memory_gib: float
    peak: float


class Gpu(NamedTuple):
    name: str
    memory_gib: float
    used_gib: float
    capability: float | None  # compute capability, 9.0 of a Hopper GPU; None where an old driver does not say


def known_gpu(name: str) -> str | None:
    """The key in PEAK_FLOPS of a GPU by its maker's name (`NVIDIA GH200 480GB`); None for one whose peak is not known."""
    longest_first = sorted(PEAK_FLOPS, key=len, reverse=True)
    # No digit after it: an RTX A4000 is no A40.
    return next((key for key in longest_first if re.search(rf"{key}(?!\d)", name.upper())), None)


def gpu(name: str, memory_gib: float | None = None) -> Machine:
    """A GPU by its maker's name, or a part of it. Raises SettingsError for one whose peak is not known."""
    known = known_gpu(name)
    if known is None:
        raise SettingsError(f"the peak speed of the GPU {name!r} is not known", f"one of {', '.join(PEAK_FLOPS)}")
    if several := re.match(r"\s*(\d+)\s*[x*×]\s*", name):
        raise SettingsError(
            f"{name!r}: the name of one GPU is asked for", f"--gpu {known} --gpus-per-node {several[1]}"
        )
    return Machine(known, memory_gib or GPU_MEMORY_GIB[known], PEAK_FLOPS[known])


def this_machine(gpus_per_node: int, processes: int) -> Machine | None:
    """What one of the `processes` of a training on this machine has; None for a GPU whose peak is not known."""
    if gpus_per_node:
        first = next(iter(gpus()), None)
        return gpu(first.name, first.memory_gib) if first and known_gpu(first.name) else None
    memory = psutil.virtual_memory().total / GIB
    return Machine("CPU", memory / processes, CPU_FLOPS * max(1, len(os.sched_getaffinity(0)) // processes))


def gpu_count() -> int:
    """GPUs of this machine that `CUDA_VISIBLE_DEVICES` leaves, as CUDA reads it."""
    chosen = _chosen_gpus()[0]
    return len(_whole_gpus(_installed_gpus() or []) if chosen is None else chosen)


def require_visible_gpus() -> None:
    """Raise SettingsError for what CUDA would pass over without a word, with all that follows it, in `CUDA_VISIBLE_DEVICES`:
    a GPU that is not here, one that is named twice, any other text."""
    if problem := _chosen_gpus()[1]:
        raise SettingsError(problem, _visible_fix(_installed_gpus()))


def _chosen_gpus() -> tuple[list[str] | None, str | None]:
    """What `CUDA_VISIBLE_DEVICES` names, up to a -1 or a mistake, as CUDA reads it, and that mistake; None where it is not
    set."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None, None
    entries = [entry.strip() for entry in given.split(",")]
    entries = entries[: next((place for place, entry in enumerate(entries) if entry in HIDES), None)]
    installed = _installed_gpus() if entries else []
    for place, entry in enumerate(entries):
        if rule := _not_here(entry, installed) or ("named twice" if entry in entries[:place] else None):
            which = f"{shown(entry)[1:-1]}: " if len(entries) > 1 else ""
            return entries[:place], f"CUDA_VISIBLE_DEVICES is {shown(given)}: {which}{rule}"
    return entries, None


def _not_here(entry: str, installed: list[str] | None) -> str | None:
    """Why an entry of CUDA_VISIBLE_DEVICES is no GPU of this machine."""
    if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", entry):
        return "neither the number of a GPU nor its UUID"
    if installed is None or "/" in entry:  # the old name of a part of a GPU, which nothing lists
        return None
    if not installed:
        return "there is no GPU here (nvidia-smi lists none)"
    if entry.isdecimal():
        count = len(_whole_gpus(installed))
        return None if int(entry) < count else f"this machine has {count}, numbered from 0"
    return None if any(uuid.startswith(entry) for uuid in installed) else "no such GPU here: nvidia-smi -L lists them"


def _visible_fix(installed: list[str] | None) -> str:
    if installed == []:
        return "unset CUDA_VISIBLE_DEVICES to train on the CPU; if there is a GPU, `make doctor` says what its driver lacks"
    every = ",".join(map(str, range(len(_whole_gpus(installed or ["GPU-"])))))
    return f"export CUDA_VISIBLE_DEVICES={every}, or unset it to take all"


def _whole_gpus(installed: list[str]) -> list[str]:
    return [uuid for uuid in installed if uuid.startswith("GPU-")]


@cache
def _installed_gpus() -> list[str] | None:
    """UUIDs of the GPUs, and after each those of its parts (MIG); None where there are GPUs that no program lists."""
    listing = smi("-L")
    if listing is None:
        return None if gpu_name() else []
    return re.findall(r"\(UUID: ([\w/-]+)\)", listing)


def gpus() -> list[Gpu]:
    """The GPUs of this machine that `CUDA_VISIBLE_DEVICES` leaves."""
    query = ["--query-gpu=name,memory.total,memory.used,compute_cap", "--format=csv,noheader,nounits"]
    chosen = _chosen_gpus()[0]
    if chosen == []:
        return []
    query += ["-i", ",".join(chosen)] if chosen else []
    rows = [line.rsplit(", ", 3) for line in (smi(*query) or "").splitlines()]
    return [
        Gpu(name, float(total) / 1024, float(used) / 1024, float(says) if says.replace(".", "").isdecimal() else None)
        for name, total, used, says in rows
    ]


def require_gpus(count: int, fp8: str, attention: str) -> None:
    """Raise SettingsError unless this machine has `count` GPUs, and all that a training on them needs."""
    require_visible_gpus()
    if count > (found := gpu_count()):
        raise SettingsError(
            f"gpus_per_node is {count}, {platform.node()} has {found}",
            f"gpus_per_node: {found}{'' if found else ' trains on the CPU'}, or make train_X ARGS='--profile slurm'",
        )
    require_able_gpus(count, fp8, attention)
    require_engine(count)


def require_engine(gpus: int) -> None:
    """Raise SettingsError where a training on GPUs lacks Transformer Engine in this environment."""
    if gpus and (missing := engine_trouble()):
        raise SettingsError(
            f"gpus_per_node is {gpus}: {missing.what}", f"{missing.fix}; gpus_per_node: 0 trains on the CPU"
        )


def require_able_gpus(count: int, fp8: str, attention: str = "auto") -> None:
    """Raise SettingsError where one of the first `count` GPUs here is too old to train, or for `fp8`, or where `attention:
    flash4` cannot be had."""
    for number, gpu in enumerate(gpus()[:count]):
        if gpu.capability is None:
            continue
        who = f"GPU {number} ({gpu.name}) has compute capability {gpu.capability}"
        if gpu.capability < OLDEST_GPU:
            raise SettingsError(
                f"{who}; training needs {OLDEST_GPU} or newer",
                "choose other GPUs with CUDA_VISIBLE_DEVICES, or gpus_per_node: 0, which trains on the CPU",
            )
        if gpu.capability < OLDEST_GPU_OF_FP8.get(fp8, 0):
            raise SettingsError(f"{who}; fp8: {fp8} needs {OLDEST_GPU_OF_FP8[fp8]} or newer", "fp8: none")
        if attention == "flash4" and gpu.capability != HOPPER:
            raise SettingsError(f"{who}; attention: flash4 needs {HOPPER} (Hopper)", "attention: auto")
    if count and attention == "flash4" and (missing := flash4_trouble()):
        raise SettingsError(f"attention: flash4, and {missing.what}", f"{missing.fix}; or attention: auto")


def require_shared_memory() -> None:
    """Raise SettingsError where loader processes could not hand over their batches."""
    if SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < 64 << 20:
        raise SettingsError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, the data loader needs 64",
            f"in Docker: --shm-size=8g or --ipc=host; else delete what ended programs left there (ls -la {SHARED_MEMORY}), or "
            f"as root: mount -o remount,size=8g {SHARED_MEMORY}",
        )


def require_temporary_folder() -> None:
    """Raise SettingsError where no program could write its temporary files: each says so in another traceback."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise SettingsError(
            "no folder for temporary files can be written: neither TMPDIR nor /tmp", MORE_TEMPORARY
        ) from None
    if (free := shutil.disk_usage(folder).free) < LEAST_SPACE:
        raise SettingsError(f"{folder}, for temporary files, has {free >> 10:,} KiB left", MORE_TEMPORARY)


def free_memory() -> int:
    """Bytes that this process may still take, of the machine and of its Slurm job or container."""
    free = psutil.virtual_memory().available
    if job := os.environ.get("SLURM_MEM_PER_NODE"):
        free = min(free, int(job) << 20)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (most := limit.read_text("utf-8").strip()) != "max":
        free = min(free, int(most) - int(used.read_text("utf-8")))
    return free


# As settings, and as options of evaluate.py.
WITH_VLLM = "vllm_python: ENVIRONMENT/bin/python of an environment with vLLM (evaluate.py: --vllm-python)"
WITHOUT_VLLM = "evaluate_with: transformers (evaluate.py: --with transformers)"


def vllm_interpreter(choice: str | None, python: Path | None) -> Path | None:
    """The interpreter whose vLLM answers, as the settings evaluate_with and vllm_python choose; None: transformers do.

    Without a choice, vLLM does where there are both it and a GPU. Raises SettingsError where it is asked for and not there.
    """
    if python and not (python.is_file() and os.access(python, os.X_OK)):
        raise SettingsError(f"vllm_python: {python}: no such program", WITH_VLLM)
    if choice == "transformers" or (choice is None and not gpu_count()):
        return None
    if python is None and find_spec("vllm"):
        return Path(sys.executable)
    if python and _has_vllm(python):
        return python
    if choice is None and python is None:
        return None
    raise SettingsError(
        f"{'evaluate_with: vllm, and' if choice else 'vllm_python:'} {python or sys.executable} has no vLLM",
        f"{WITH_VLLM}; or {WITHOUT_VLLM}",
    )


def _has_vllm(python: Path) -> bool:
    look = "import importlib.util; print('vLLM' * (importlib.util.find_spec('vllm') is not None))"
    try:
        said = subprocess.run(
            [python, "-c", look], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise SettingsError(f"vllm_python: {python} cannot be run: {error.strerror}", WITH_VLLM) from None
    return said.stdout.strip() == "vLLM"  # any other program may end with exit code 0


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it does (Linux): training processes that outlived a
    killed launcher would keep writing into a run directory that the next start believes to be its own."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
