"""What a machine needs before it can train on its GPU: driver, compiler, CUDA toolkit, Transformer Engine. Standard library only:
set-up asks here before anything is installed."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

CUDA = 13  # major version that the locked torch is built for; a test compares it with requirements.lock
OLDEST_DRIVER = 580  # of that CUDA
ENGINE = [f"transformer-engine[pytorch,core-cu{CUDA}]>=2.20.2,<3"]
BUILDS_ENGINE = [
    "setuptools",
    "wheel",
    "nvidia-cudnn-frontend",
]  # its extension is compiled against the installed torch


class Missing(NamedTuple):
    what: str
    fix: str


def gpu_name() -> str | None:
    """Of the first NVIDIA GPU of this machine; where no program names it, that there is one."""
    listing = said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if listing:
        return listing.splitlines()[0].strip()
    return "a GPU that nvidia-smi does not name" if any(Path("/dev").glob("nvidia[0-9]*")) else None


def said(*command: str, seconds: float = 30) -> str | None:
    """What a program prints; None where it is not there, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def driver() -> str | None:
    listing = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listing.splitlines()[0].strip() if listing else None


def driver_trouble() -> Missing | None:
    version = driver()
    if version is None:
        return Missing(
            "the driver does not answer (nvidia-smi)",
            "load or install NVIDIA's driver; in a container: --gpus all, --nv",
        )
    if int(version.partition(".")[0] or 0) < OLDEST_DRIVER:
        return Missing(f"driver {version} is too old for CUDA {CUDA}", f"install driver {OLDEST_DRIVER} or newer")
    return None


def compiler_trouble() -> Missing | None:
    if shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"):
        return None
    return Missing("no C++ compiler", "apt install build-essential, or module load gcc")


def toolkit_trouble() -> Missing | None:
    places = [
        os.environ.get("CUDA_HOME"),
        shutil.which("nvcc") and Path(str(shutil.which("nvcc"))).parents[1],
        "/usr/local/cuda",
    ]
    fix = f"apt install cuda-toolkit-{CUDA}-0 (or module load cuda/{CUDA}), and CUDA_HOME=/usr/local/cuda if it is elsewhere"
    for nvcc in (Path(place) / "bin/nvcc" for place in places if place):
        if nvcc.is_file():
            release = re.search(r"release (\d+)", said(str(nvcc), "--version") or "")
            if release and int(release[1]) == CUDA:
                return None
            return Missing(f"{nvcc} is of CUDA {release[1] if release else '?'}, torch of CUDA {CUDA}", fix)
    return Missing("no CUDA toolkit (nvcc)", fix)


def cudnn_trouble(site_packages: Path) -> Missing | None:
    """torch brings cuDNN along; a machine's own torch may not."""
    places = [site_packages / "nvidia/cudnn/include", Path(os.environ.get("CUDNN_HOME", "/usr")) / "include"]
    if any((place / "cudnn.h").is_file() for place in (*places, Path("/usr/include/x86_64-linux-gnu"))):
        return None
    return Missing("no cuDNN headers", f"pip install nvidia-cudnn-cu{CUDA}, or CUDNN_HOME=/folder/of/cudnn")


def engine_trouble() -> Missing | None:
    """Whether this interpreter lacks Transformer Engine, which Megatron's layers need on GPUs."""
    if find_spec("transformer_engine") and (find_spec("transformer_engine_torch") or _extension()):
        return None
    return Missing("Transformer Engine is not installed, and training on GPUs needs it", "make gpu")


def _extension() -> bool:
    """Newer versions keep their compiled half inside the package."""
    spec = find_spec("transformer_engine")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return any(any(folder.rglob("transformer_engine_torch*.so")) for folder in folders)
