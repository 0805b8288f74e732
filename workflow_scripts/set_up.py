"""Fill .venv: uv, what requirements.lock pins, this project, and on a machine with a GPU Transformer Engine. `make` runs it.

Nothing is ever removed: what you add with `.venv/bin/uv pip install` stays. Without a network: `make WHEELS=/folder`, a folder
of wheels that `make wheels` fills on a machine that has one. Runs with any Python ≥ 3.12, before anything is installed.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from llava_sft.errors import SftError, exits_cleanly
from llava_sft.gpu_stack import (
    BUILDS_ENGINE,
    CUDA_COMPILER,
    ENGINE,
    Missing,
    compiler_trouble,
    driver_trouble,
    engine_note,
    engine_trouble,
    gpu_name,
    torch_version,
)
from llava_sft.programs import said

LOCK = Path("requirements.lock")
BUILD = {"NVTE_FRAMEWORK": "pytorch", "NVTE_BUILD_USE_NVIDIA_WHEELS": "1", "NVTE_WITH_NCCL_EP": "0"}
SUPPORTED = "Linux on x86-64; on aarch64 and in WSL 2 the same packages exist, but nobody has tried"
SHOWN = re.compile(
    r"\s*(Resolved|Prepared|Installed|Downloading|Building|Built|Audited|Downloaded)\b"
)  # of what uv prints
OFFLINE = re.compile(r"dns error|lookup address|connection refused|Network is unreachable|timed out|tunnel|ConnectError|"
                     r"client error \(Connect\)|Failed to establish|disabled|No matching distribution found for uv", re.I)  # fmt: skip


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install from, without a network")
    parser.add_argument("--engine", action="store_true", help="install Transformer Engine, or fail")
    args = parser.parse_args()
    print(f"system: {system()}", flush=True)
    if args.wheels and not any(args.wheels.glob("*.whl")):
        raise SftError(
            f"WHEELS={args.wheels}: no wheels there", "fill it with `make wheels WHEELS=…` where there is a network"
        )
    before = torch_version()
    if engine_trouble() is None and before and not engine_note().exists():  # installed without a note of it
        engine_note().write_text(before)
    if not args.engine:
        count = len(re.findall(r"^[\w.-]+==", LOCK.read_text("utf-8"), re.M))
        bootstrap(args.wheels)
        print(
            f"{count} packages of {LOCK} (with CUDA's libraries up to 3.5 GB to download, 7 GB on disk) …", flush=True
        )
        install(["-r", str(LOCK)], args.wheels)
        install(["--no-deps", "--no-build-isolation", "--editable", "."], args.wheels)
    gpu = gpu_name()
    if gpu or args.engine:
        engine(gpu, args.wheels, needed=args.engine)
    else:
        print(
            "no NVIDIA GPU here: training runs on the CPU; Transformer Engine is left out (on a GPU machine: make gpu)"
        )


def system() -> str:
    """What this runs on. Raises SftError where it cannot work."""
    name, machine = platform.system(), platform.machine()
    if name != "Linux":
        raise SftError(
            f"{name or sys.platform} is not supported: Megatron-Core and its kernels need Linux",
            "use a Linux machine, WSL 2 on Windows, or the container (docs/cluster.md)",
        )
    if machine not in ("x86_64", "aarch64"):
        raise SftError(f"Linux on {machine} is not supported: torch has no wheels for it", f"supported: {SUPPORTED}")
    wsl = "microsoft" in platform.release().lower()
    tried = machine == "x86_64" and not wsl
    return f"Linux on {machine}{', WSL 2' if wsl else ''}: {'supported' if tried else f'not tried ({SUPPORTED})'}"


def bootstrap(wheels: Path | None) -> None:
    if Path(sys.prefix, "bin/uv").exists():
        return
    print("uv, which installs the rest (20 MB) …", flush=True)
    offline = ["--no-index", "--find-links", str(wheels)] if wheels else []
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *offline, "uv"],
        wheels,
    )


def install(what: Iterable[str], wheels: Path | None, **environment: str) -> None:
    offline = ["--offline", "--no-index", "--find-links", str(wheels)] if wheels else []
    uv = [str(Path(sys.prefix, "bin/uv")), "pip", "install", "--python", sys.executable, "--no-progress", *offline]
    run([*uv, *what], wheels, **environment)


def run(command: list[str], wheels: Path | None, **environment: str) -> None:
    """Run an installer; show its steps, with sizes, as it goes. Raises SftError with its own words where it fails."""
    kept: list[str] = []
    env = os.environ | environment
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            kept.append(line.rstrip())
            if SHOWN.match(line):
                print(f"  {line.strip()}", flush=True)
    if process.returncode:
        raise explained(kept, wheels)


def explained(lines: list[str], wheels: Path | None) -> SftError:
    wrong = [
        line.strip(" ×╰─▶├│") for line in lines if line.strip() and not SHOWN.match(line) and "WARNING" not in line
    ]
    causes = [line for line in wrong if "fatal error:" in line or "CUDA error" in line]  # of a compiler, amid its story
    text = "\n    ".join((causes or wrong)[:6])
    if wheels:
        return SftError(
            f"WHEELS={wheels} lacks a package:\n    {text}",
            "fill it again with `make wheels` on the same system and Python",
        )
    if any(OFFLINE.search(line) for line in wrong):
        return SftError(
            f"the package index cannot be reached:\n    {text}",
            "connect, or name your mirror (UV_DEFAULT_INDEX and PIP_INDEX_URL), or bring the wheels along: `make wheels "
            "WHEELS=folder` on a machine with a network, `make WHEELS=folder` here",
        )
    return SftError(f"the packages could not be installed:\n    {text}", "mend that, then run the same command again")


def _runs() -> bool:
    return said(sys.executable, "-c", "import transformer_engine.pytorch", seconds=240) is not None


def engine(gpu: str | None, wheels: Path | None, needed: bool) -> None:
    """Install Transformer Engine, or say in one line what it lacks. Raises SftError where it is `needed`, or its build fails."""
    if engine_trouble() is None and (not (gpu and needed) or _runs()):
        print(f"{gpu or 'no GPU'}: Transformer Engine is installed")
        return
    troubles = [driver_trouble()] if gpu else []
    if wheels and not any(wheels.glob("transformer_engine_torch-*")):
        fix = "make its wheel where there are a network and a C++ compiler (docs/hardware.md)"
        troubles.append(Missing(f"{wheels} has no wheel transformer_engine_torch", fix))
    elif not (wheels and any(wheels.glob("transformer_engine_torch-*.whl"))):  # its extension is compiled here
        troubles.append(compiler_trouble())
    missing = [trouble for trouble in troubles if trouble]
    if missing:
        what = "; ".join(trouble.what for trouble in missing)
        fix = "; ".join(trouble.fix for trouble in missing) + "; then make gpu"
        if needed:
            raise SftError(f"Transformer Engine cannot be installed: {what}", fix)
        print(f"warning: {gpu}: Transformer Engine, which training on it needs, is not installed: {what}\n  fix: {fix}")
        return
    print(
        f"{gpu or 'no GPU here'}: Transformer Engine (500 MB to download; its extension is compiled: 3 to 20 minutes) …",
        flush=True,
    )
    cuda = re.findall(r"^nvidia-cuda-runtime==(\d+\.\d+)", LOCK.read_text("utf-8"), re.M)[0]
    install([*BUILDS_ENGINE, *(f"{package}=={cuda}.*" for package in CUDA_COMPILER)], wheels)
    # No cache: it may hold what was compiled for another torch.
    again = [f"--reinstall-package={package}" for package in ("transformer-engine", "transformer-engine-torch")]
    install(["--no-build-isolation", "--no-cache", *again, *ENGINE], wheels, **BUILD)
    engine_note().write_text(torch_version() or "")


if __name__ == "__main__":
    main()
