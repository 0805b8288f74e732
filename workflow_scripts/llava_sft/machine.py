"""What this machine has, without importing torch."""

import os
import subprocess
from functools import cache


def gpu_count() -> int:
    """GPUs of this machine (`CUDA_VISIBLE_DEVICES` is respected)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    return _installed_gpus()


@cache
def _installed_gpus() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
