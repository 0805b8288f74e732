"""What a machine needs before it can train on its GPU: driver, compiler, Transformer Engine. Standard library only: set-up asks
here before anything is installed."""

import os
import shutil
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from llava_sft.programs import ask

CUDA = 13  # major version that the locked torch is built for; a test compares it with requirements.lock
OLDEST_DRIVER = 580  # of that CUDA
ENGINE = [f"transformer-engine[pytorch,core-cu{CUDA}]>=2.20.2,<3"]
# Its extension is compiled against the installed torch and the CUDA that came with it: no toolkit of the machine is asked.
BUILDS_ENGINE = ["setuptools", "wheel", "nvidia-cudnn-frontend"]
CUDA_COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt")  # of the version of torch's nvidia-cuda-runtime
FLASH4 = "4.0.0b36"  # of flash-attn-4, whose kernels are called with arguments that may change (model/flash4.py)


class Missing(NamedTuple):
    what: str
    fix: str


def gpu_name() -> str | None:
    """Of the first NVIDIA GPU of this machine; where no program names it, that there is one."""
    if first := _first_gpu():
        return first[0]
    devices = (device for name in ("nvidia[0-9]*", "dxg") for device in Path("/dev").glob(name))  # dxg: as WSL has it
    return "a GPU that nvidia-smi does not name" if any(devices) else None


def driver() -> str | None:
    first = _first_gpu()
    return first[1] if first else None


def smi(*options: str) -> str | None:
    """What nvidia-smi says of the GPUs, one a line: its list (`-L`) or a query; None where it fails and names none.

    Asked once for each thing, for it may take half a minute to fail.
    """
    return _smi(os.environ.get("PATH"), options)


@cache
def _smi(path: str | None, options: tuple[str, ...]) -> str | None:
    answer = ask("nvidia-smi", *options)
    # A fault of one GPU, such as a corrupted infoROM, is a line of warning and an exit code beside all that was asked for.
    mark, times = ("(UUID: ", 1) if "-L" in options else (", ", options[0].count(","))
    lines = [line for line in answer.output.splitlines() if line.count(mark) >= times]
    return None if answer.trouble and not lines else "\n".join(lines)


def _first_gpu() -> list[str] | None:
    """Its name and its driver."""
    listing = smi("--query-gpu=name,driver_version", "--format=csv,noheader")
    return [each.strip() for each in listing.splitlines()[0].rsplit(",", 1)] if listing else None


def driver_trouble() -> Missing | None:
    found = driver()
    if found is None:
        return Missing(
            "the driver does not answer (nvidia-smi)",
            "load or install NVIDIA's driver; in a container: --gpus all, --nv",
        )
    if int(found.partition(".")[0] or 0) < OLDEST_DRIVER:
        return Missing(f"driver {found} is too old for CUDA {CUDA}", f"install driver {OLDEST_DRIVER} or newer")
    return None


def compiler_trouble() -> Missing | None:
    if shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"):
        return None
    return Missing("no C++ compiler", "apt install build-essential, or module load gcc")


def engine_trouble() -> Missing | None:
    """Whether this interpreter lacks Transformer Engine, which Megatron's layers need on GPUs."""
    if not find_spec("transformer_engine") or not (find_spec("transformer_engine_torch") or _extension()):
        return Missing("Transformer Engine is not installed, and training on GPUs needs it", "make gpu")
    note, here = engine_note(), torch_version()
    if note.is_file() and (built := note.read_text("utf-8").strip()) != here:
        return Missing(f"Transformer Engine was compiled for torch {built}, and torch {here} is installed", "make gpu")
    return None


def engine_note() -> Path:
    """The file in which set-up notes the torch that Transformer Engine was compiled for."""
    return Path(sys.prefix, ".transformer_engine_of_torch")


def torch_version() -> str | None:
    return _version("torch")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def flash4_version() -> str | None:
    return _version("flash-attn-4")


def flash4_trouble() -> Missing | None:
    """Whether this interpreter lacks FlashAttention-4, or has another version than the one that is known."""
    found = flash4_version()
    if found == FLASH4:
        return None
    what = f"flash-attn-4 is {found}, and {FLASH4} is needed" if found else "flash-attn-4 is not installed"
    return Missing(what, f'.venv/bin/uv pip install "flash-attn-4[cu{CUDA}]=={FLASH4}"')


def _extension() -> bool:
    """Newer versions keep their compiled half inside the package."""
    spec = find_spec("transformer_engine")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return any(any(folder.rglob("transformer_engine_torch*.so")) for folder in folders)
