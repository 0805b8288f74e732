"""What this machine has for training, what it lacks, and the fix of each: `make doctor`.

Exit code 1: training cannot run here. On a machine without a GPU that is no fault: it says what can be done.
"""

import json
import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from llava_sft.command_line import Parser
from llava_sft.errors import SftError, exits_cleanly, many
from llava_sft.gpu_stack import (
    FLASH4,
    compiler_trouble,
    driver,
    driver_trouble,
    engine_trouble,
    flash4_trouble,
    gpu_name,
)
from llava_sft.machine import (
    GIB,
    HOPPER,
    OLDEST_GPU,
    SHARED_MEMORY,
    free_memory,
    gpu_count,
    gpus,
    known_gpu,
    require_shared_memory,
    require_visible_gpus,
)
from llava_sft.programs import said
from set_up import system

PROJECT = Path(__file__).parents[1]
PACKAGES = ("torch", "megatron-core", "megatron-energon", "transformers", "snakemake")
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
LEAST_DISK, LEAST_FILES = 20 * GIB, 4096
# What torch and Transformer Engine say of a GPU, in a process of its own: they may crash, and import for half a minute.
ASK_TORCH = (
    "import json, torch; print(json.dumps([torch.version.cuda, torch.cuda.is_available(), torch.cuda.nccl.version()]))"
)
ASK_ENGINE = """
import torch, transformer_engine, transformer_engine.pytorch as te
from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as attention
q = torch.randn(128, 8, 128, device="cuda", dtype=torch.bfloat16)
lengths = torch.tensor([0, 64, 128], device="cuda", dtype=torch.int32)
te.DotProductAttention(8, 128, qkv_format="thd", attn_mask_type="padding_causal")(
    q, q, q, cu_seqlens_q=lengths, cu_seqlens_kv=lengths, max_seqlen_q=64, max_seqlen_kv=64)
chosen = attention._attention_backends
print(transformer_engine.__version__, next((k.split("_")[1] for k in chosen if k.startswith("use_") and chosen[k]), "unfused"))
"""


class Finding(NamedTuple):
    """`state`: ok; no (absent, and not needed for a training here); bad (training cannot run)."""

    state: str
    what: str
    fix: str = ""


def ok(what: str) -> Finding:
    return Finding("ok", what)


def bad(what: str, fix: str) -> Finding:
    return Finding("bad", what, fix)


def no(what: str, fix: str = "") -> Finding:
    return Finding("no", what, fix)


def find_system() -> Finding:
    return ok(system())


def find_python() -> Finding:
    pinned = dict(re.findall(r"^([\w.-]+)==([^ \\]+)", (PROJECT / "requirements.lock").read_text("utf-8"), re.M))
    wrong = []
    for package in PACKAGES:
        try:
            found = version(package).partition("+")[0]
        except PackageNotFoundError:
            found = "missing"
        if found != pinned[package]:
            wrong.append(f"{package} {found} (pinned: {pinned[package]})")
    here = f"{sys.version.split()[0]} in {sys.prefix}"
    return bad(f"{here}: {', '.join(wrong)}", "touch requirements.lock && make setup") if wrong else ok(here)


def find_gpu() -> Finding:
    require_visible_gpus()
    if not gpu_name():
        return no(
            "none: the demo, your data's checks, conversions and `model: tiny` run here on the CPU; 4B and 8B need a GPU"
        )
    if not gpu_count():
        return bad("there is one, and none can be used", "CUDA_VISIBLE_DEVICES hides it, or its driver does not answer")
    if not (found := gpus()):
        return bad(
            "nvidia-smi does not describe it", "`nvidia-smi` must list it, and those that CUDA_VISIBLE_DEVICES names"
        )
    names = [f"{gpu.name} ({gpu.memory_gib:.0f} GiB, {gpu.used_gib:.0f} in use)" for gpu in found]
    if old := [gpu.name for gpu in found if gpu.capability and gpu.capability < OLDEST_GPU]:
        return bad(
            f"{old[0]} is too old to train (compute capability below {OLDEST_GPU})",
            "choose others with CUDA_VISIBLE_DEVICES",
        )
    unknown = "" if known_gpu(found[0].name) else "; its speed is not known: no prediction, no MFU"
    return ok(", ".join(names) + unknown)


def find_driver() -> Finding:
    trouble = driver_trouble()
    return bad(trouble.what, trouble.fix) if trouble else ok(str(driver()))


def find_cuda() -> Finding:
    answer = said(sys.executable, "-c", ASK_TORCH, seconds=120)
    if not answer:
        return bad(
            "torch cannot be imported, or cannot reach the driver", f"{sys.executable} -c 'import torch' shows why"
        )
    cuda, available, nccl = json.loads(answer.splitlines()[-1])
    what = f"torch is built for CUDA {cuda}, NCCL {'.'.join(map(str, nccl))}"
    return (
        ok(what)
        if available
        else bad(f"{what}; it cannot use the GPU", "a newer driver; in a container: --gpus all, or --nv")
    )


def find_engine() -> Finding:
    if trouble := engine_trouble():
        return bad(trouble.what, trouble.fix)
    answer = said(sys.executable, "-c", ASK_ENGINE, seconds=240)
    if not answer:
        return bad(
            "installed, and does not run",
            "make gpu, which compiles it again; its traceback: python -c 'import transformer_engine.pytorch'",
        )
    number, backend = answer.splitlines()[-1].split()
    if backend == "unfused":
        return no(
            f"{number}, attention: unfused, which is slow and large",
            "two versions of cuDNN mix: CUDNN_HOME=folder of torch's",
        )
    return ok(f"{number}, attention: {backend}")


def find_flash4() -> Finding:
    if any(gpu.capability != HOPPER for gpu in gpus()):
        return no("of Hopper GPUs alone; attention is Transformer Engine's or PyTorch's")
    trouble = flash4_trouble()
    return no(f"{trouble.what}: attention is cuDNN's, which is slower", trouble.fix) if trouble else ok(FLASH4)


def find_compiler() -> Finding:
    trouble = None if shutil.which("cc") or shutil.which("gcc") else compiler_trouble()
    return bad(f"{trouble.what}, which Triton's kernels need", trouble.fix) if trouble else ok("there")


def find_memory() -> Finding:
    return ok(f"{free_memory() / GIB:,.0f} GiB free for this process, {many(len(os.sched_getaffinity(0)), 'core')}")


def find_disk() -> Finding:
    place = next(folder for folder in (Path("output"), Path(".")) if folder.exists())
    free = shutil.disk_usage(place).free
    what = f"{free / GIB:,.0f} GiB free for output/"
    return (
        ok(what)
        if free >= LEAST_DISK
        else no(f"{what}; a checkpoint of 4B has 47", "exp_dir: a folder on a larger disk")
    )


def find_shared_memory() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return bad("there is no /dev/shm, in which loader processes hand batches over", "mount -t tmpfs tmpfs /dev/shm")
    require_shared_memory()
    return ok(f"{shutil.disk_usage(SHARED_MEMORY).free / GIB:,.1f} GiB free")


def find_limits() -> Finding:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    lock = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked >> 10:,} KiB"
    what = f"open files {files:,}, locked memory {lock} (InfiniBand wants unlimited)"
    return ok(what) if files >= LEAST_FILES else no(what, f"ulimit -n {min(most, 65536)}")


def find_slurm() -> Finding:
    if not shutil.which("sbatch"):
        return no("none: training runs on this machine, or on several that a platform starts")
    answer = said("scontrol", "ping", seconds=15)
    return (
        ok(answer.splitlines()[0])
        if answer and "UP" in answer
        else no("sbatch is here, its controller does not answer", "scontrol ping")
    )


def find_git() -> Finding:
    commit = said("git", "rev-parse", "--short", "HEAD")
    return ok(f"commit {commit}") if commit else no("no git, or no checkout: reports cannot name the commit")


def find_hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return no("HF_HUB_OFFLINE=1: `load` takes folders only", "unset it to load from the hub")
    url = urlsplit(HUB)
    if url.scheme not in ("http", "https") or not url.hostname:
        return no(f"HF_ENDPOINT is {HUB!r}: not an address", f"export HF_ENDPOINT=https://{HUB.rpartition('/')[2]}")
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError as error:
        proxy = "; a proxy is set, and may do" if os.environ.get("https_proxy") else ""
        return no(
            f"{url.hostname} cannot be reached ({error}){proxy}",
            "`load`: a folder; or HF_ENDPOINT=a mirror, https_proxy=…",
        )
    return ok(f"{url.hostname} answers")


ALWAYS: dict[str, Callable[[], Finding]] = {
    "system": find_system, "Python": find_python, "memory": find_memory, "disk": find_disk, "shared memory": find_shared_memory,
    "limits": find_limits, "compiler": find_compiler, "git": find_git, "hub": find_hub, "Slurm": find_slurm, "GPU": find_gpu,
}  # fmt: skip
ON_GPUS = {"driver": find_driver, "CUDA": find_cuda, "Transformer Engine": find_engine, "FlashAttention-4": find_flash4}


@exits_cleanly
def main() -> None:
    Parser(description=__doc__).parse_args()
    worst = []
    for name, find in (ALWAYS | (ON_GPUS if gpu_name() else {})).items():
        try:
            finding = find()
        except SftError as error:
            finding = bad(error.problem, error.fix)
        print(f"{finding.state:4} {name:20} {finding.what}", flush=True)
        if finding.fix:
            print(f"{'':25} fix: {finding.fix}", flush=True)
        worst += [name] if finding.state == "bad" else []
    if worst:
        raise SftError(
            f"training cannot run here: {', '.join(worst)}", "as it says above, from the top; then make doctor again"
        )
    print("training can run here" + ("" if gpu_name() else ", on the CPU"))


if __name__ == "__main__":
    main()
