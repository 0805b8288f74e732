"""Only one training writes to a run directory: a lock that dies with its process, and a heartbeat for other hosts."""

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from llava_sft.errors import RunError

LOCK = ".lock"
BEAT_S, DEAD_AFTER_S, ENDS_WITHIN_S = 10, 60, 15


def lock(run_dir: Path, patience_s: float = 0) -> BinaryIO:
    """Hold the run directory; raise RunError when another training does, and still does after `patience_s` seconds.

    The system frees the lock when its holders end, so a dead process leaves none on this host. File systems that do not
    share locks between hosts are covered by a heartbeat: the holder touches the file every BEAT_S seconds.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = open(run_dir / LOCK, "a+b")  # noqa: SIM115 (held until the process ends)
    locked, began = False, time.monotonic()
    while True:
        holder = lock_holder(run_dir)
        here = holder is not None and holder["host"] == platform.node()
        with contextlib.suppress(OSError):
            if not locked:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
        if locked and (not holder or here or holder["seen_s"] >= DEAD_AFTER_S):
            break
        # Loader processes outlive a training for a moment, whether it was killed or has given the lock back.
        dead = not locked and (holder is None or (here and not psutil.pid_exists(holder["pid"])))
        if time.monotonic() - began >= max(patience_s, ENDS_WITHIN_S if dead else 0):
            by = f" (pid {holder['pid']} on {holder['host']}, seen {holder['seen_s']:.0f} s ago)" if holder else ""
            raise RunError(
                f"{run_dir}: another training is running in it{by}", "wait for it, stop it, or set another run_tag"
            )
        time.sleep(1)
    if holder:
        print(f"{run_dir}: stale lock of pid {holder['pid']} on {holder['host']}: that training is dead, continuing")
    file.truncate(0)
    file.write(json.dumps({"host": platform.node(), "pid": os.getpid()}).encode())
    file.flush()

    def beat() -> None:
        while not file.closed:
            with contextlib.suppress(OSError):
                os.utime(run_dir / LOCK)
            time.sleep(BEAT_S)

    threading.Thread(target=beat, daemon=True).start()
    return file


def lock_holder(run_dir: Path) -> dict[str, Any] | None:
    """`host` and `pid` of the training that holds, or held and did not give back, the lock; `seen_s` ago."""
    try:
        holder = json.loads((run_dir / LOCK).read_bytes() or b"null")
        if not holder:
            return None
        seen_s = max(0.0, time.time() - (run_dir / LOCK).stat().st_mtime)  # another host's clock may be ahead
        return {"host": str(holder["host"]), "pid": int(holder["pid"]), "seen_s": seen_s}
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None  # damaged: the system's own lock counts alone


def is_running(run_dir: Path) -> bool:
    """Whether a training holds the lock; asks without taking it for longer than a moment."""
    try:
        with open(run_dir / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    holder = lock_holder(run_dir)
    return bool(holder and holder["host"] != platform.node() and holder["seen_s"] < DEAD_AFTER_S)


def give_back(file: BinaryIO) -> None:
    if not file.closed:
        file.truncate(0)
        file.close()
