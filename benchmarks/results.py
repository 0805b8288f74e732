"""The one format of all benchmark results: `benchmarks/results/<name>.json`, figures with where they come from."""

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_sft.files import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "snakemake")


def row(
    metric: str, value: float, unit: str, goal: float | None, better: str, note: str = "", **settings: Any
) -> dict[str, Any]:
    """One figure. `better`: "higher" or "lower"."""
    return {
        "metric": metric,
        "value": round(value, 4),
        "unit": unit,
        "goal": goal,
        "better": better,
        "settings": settings,
        "note": note,
    }


def write_results(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows, each beside its goal on the terminal too; returns the file."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True)
    result = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git.stdout.strip() or os.environ.get("COMMIT", "unknown"),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **versions()},
        "rows": rows,
    }
    for each in rows:
        print(f"{each['metric']:24} {each['value']:>10} {each['unit']:6} goal {each['goal']}  {each['settings']}")
    path = RESULTS / f"{name}.json"
    write_json(path, result)
    return path


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def hardware() -> dict[str, Any]:
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]) / 2**20
    gpus = subprocess.run(
        "nvidia-smi --query-gpu=name --format=csv,noheader || true", shell=True, capture_output=True, text=True
    )
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpus": gpus.stdout.split("\n")[:-1],
    }
