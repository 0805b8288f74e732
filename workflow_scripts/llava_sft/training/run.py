"""The run directory: which run it is, how far it got, and that only one training writes to it.

A run is one set of data, model, start checkpoint and settings (`run.json`). The same run goes on from its newest whole
checkpoint; another run in the same directory is refused with the difference named.
"""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from llava_sft.checkpoint.start import RUN_FILE, SIDECARS, copy_sidecars
from llava_sft.checkpoint.verify import SIDECARS_NOTE, require_whole, sidecars_damage
from llava_sft.checksums import note
from llava_sft.errors import DamagedFileError, RunError
from llava_sft.files import atomic_dir, fingerprint, read_json, write_json
from llava_sft.training.checkpoints import checkpoint_dir, data_dir, iterations_done, newest_whole

LOCK = ".lock"
PER_RANK = " (the position in the data is kept per rank: samples would be lost or seen twice)"
# Settings that may change while a run goes on: they change neither what is learned at a step nor its order.
FREE_SETTINGS = {
    "experiment", "exp_dir", "run_tag", "raw_data", "heldout_data", "image_root", "webdatasets", "shard_bytes", "sources",
    "max_shard_bytes", "decode_images", "max_reject_fraction", "val_fraction", "split_seed", "load", "load_parts",
    "tokenizer", "stage", "train_iters", "epochs", "lr_decay_iters", "save_interval", "keep_last", "keep_every",
    "max_minutes", "log_interval", "eval_interval", "eval_iters", "log_answers", "log_samples", "max_bad_steps",
    "num_workers", "max_damaged_samples", "evaluate_by", "evaluate_samples", "evaluate_batch_size", "max_new_tokens", "parity",
    "recompute_language", "recompute_vision", "memory_check", "pack_chunk_tokens", "async_save",
}  # fmt: skip


def identity(resolved: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this run and no other."""
    settings = {key: value for key, value in resolved["settings"].items() if key not in FREE_SETTINGS}
    return {
        "data": resolved["data"]["fingerprint"],
        "start": resolved["start"]["fingerprint"],
        "nodes": 1,  # of runs that are older than this setting
        **settings,
        # Not the name alone, which `settings` holds: its file may have changed.
        "model": f"{resolved['model']['name']}-{fingerprint(resolved['model'])}",
    }


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
        here = holder and holder["host"] == platform.node()
        with contextlib.suppress(OSError):
            locked = locked or fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
        if locked and (not holder or here or holder["seen_s"] >= DEAD_AFTER_S):
            break
        # Loader processes of a killed training notice after some seconds that it is dead.
        dead = here and not locked and not psutil.pid_exists(holder["pid"])
        if time.monotonic() - began >= max(patience_s, ENDS_WITHIN_S if dead else 0):
            by = f" (pid {holder['pid']} on {holder['host']}, seen {holder['seen_s']:.0f} s ago)" if holder else ""
            raise RunError(
                f"{run_dir}: another training is running in it{by}", "wait for it, stop it, or set another run_tag"
            )
        time.sleep(1)
    if holder:
        print(f"{run_dir}: stale lock of pid {holder['pid']} on {holder['host']}: that training is dead, going on")
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


def read_run(run_dir: Path, iteration: int = 0) -> dict[str, Any]:
    """What run.json holds; where that is damaged or gone, the copy that the checkpoint of `iteration` keeps.

    Errors: DamagedFileError.
    """
    path = run_dir / RUN_FILE
    try:
        found = read_json(path)
        if not all(isinstance(found.get(key), dict) for key in ("settings", "data", "start", "model")):
            raise DamagedFileError(f"{path}: damaged: not the settings of a run", "restore it from a copy")
        return found
    except (DamagedFileError, FileNotFoundError, AttributeError) as error:
        copy = data_dir(run_dir, iteration) / RUN_FILE
        if iteration and copy.is_file():
            print(f"warning: {path} is damaged or missing: {copy} is taken")
            return read_json(copy)
        if isinstance(error, FileNotFoundError):
            raise RunError(
                f"{run_dir}: checkpoints without {RUN_FILE}: not a run of this workflow", "set another run_tag"
            ) from None
        weights = f"; or move it away and start another run from the weights: --config run_tag=next load={checkpoint_dir(run_dir, iteration)}"
        raise DamagedFileError(
            f"{path}: damaged: what the run was started with is not known",
            "restore it from a copy" + (weights if iteration else ""),
        ) from None


def refuse_other_run(run_dir: Path, resolved: dict[str, Any]) -> None:
    """Raise RunError, with the difference and both ways on, when `run_dir` holds steps of another run. Changes nothing."""
    done, train_iters = iterations_done(run_dir), resolved["settings"]["train_iters"]
    if not done:
        return
    before, now = identity(read_run(run_dir, done)), identity(json.loads(json.dumps(resolved)))
    changed = [key for key in now if before.get(key) != now.get(key)]
    given = [key for key in changed if key not in resolved.get("why", {})] or changed  # not what follows from them
    per_rank = {"nodes", "gpus_per_node", "nproc_per_node"}
    differences = [f"{key}: {before.get(key)} → {now.get(key)}{PER_RANK if key in per_rank else ''}" for key in given]
    if differences:
        tag = propose_tag(run_dir, resolved, changed[0], now[changed[0]])
        raise RunError(
            f"{run_dir} holds {done} steps of another run:\n    " + "\n    ".join(differences),
            f"put the old value back to go on with it, or start another run beside it: --config run_tag={tag}",
        )
    if done > train_iters:
        raise RunError(
            f"train_iters {train_iters} is below the {done} steps that {run_dir} has done",
            f"train_iters: {done} or more, or another run_tag",
        )


def same_run(run_dir: Path, resolved: dict[str, Any]) -> tuple[Path, int] | None:
    """Another directory beside `run_dir`, which is not there yet, that holds this very run, and its steps: the experiment
    was renamed."""
    if run_dir.exists():
        return None
    now = identity(json.loads(json.dumps(resolved)))
    for path in sorted(run_dir.parent.glob(f"*/{RUN_FILE}")):
        with contextlib.suppress(DamagedFileError, OSError, RunError, KeyError, TypeError, AttributeError):
            if (
                path.parent != run_dir
                and identity(read_run(path.parent)) == now
                and (done := iterations_done(path.parent))
            ):
                return path.parent, done
    return None


def open_run(run_dir: Path, resolved: dict[str, Any]) -> int:
    """Check that `run_dir` holds this run, or make it; returns the step it goes on from.

    On a resume, unless lr_decay_iters is given, `resolved` takes over the length of the schedule: a run that is made
    longer goes on at its min_lr.
    Raises RunError when the directory holds another run; its files are then as they were.
    """
    refuse_other_run(run_dir, resolved)
    train_iters = resolved["settings"]["train_iters"]
    done = newest_whole(run_dir, deep=iterations_done(run_dir) != train_iters)
    if done:
        earlier = read_run(run_dir, done)
        length, asked = earlier["settings"]["lr_decay_iters"], resolved["settings"]["lr_decay_iters"]
        if length != asked and "lr_decay_iters" in resolved["why"]:
            print(f"the learning rate keeps its schedule of {length} steps and stays at min_lr after it")
            resolved["settings"]["lr_decay_iters"] = length
    write_json(run_dir / RUN_FILE, resolved, sealed=True)
    keep_sidecars(run_dir, resolved, done)
    return done


def keep_sidecars(run_dir: Path, resolved: dict[str, Any], done: int) -> None:
    """Copy the start checkpoint's tokenizer and config into the run, which the export takes them from."""
    sidecars, start = run_dir / SIDECARS, resolved["start"]
    if not done and start.get("folder"):
        require_whole(Path(start["folder"]))
    damage = sidecars_damage(sidecars)
    if done and sidecars.is_dir() and not damage:
        return  # before the first checkpoint they may be those of another run
    if damage and done:
        print(f"{sidecars}: {damage}: copied from {start['sidecars']} again")
    with atomic_dir(sidecars) as folder:
        copy_sidecars(Path(start["sidecars"]), folder)
        write_json(folder / SIDECARS_NOTE, note(folder, list(folder.iterdir())), sealed=True)


def propose_tag(run_dir: Path, resolved: dict[str, Any], key: str, value: Any) -> str:
    """A free run_tag made of a setting that differs, like `lr5e-06`."""
    value = value if isinstance(value, int | float) else str(value)[:8]
    tag = f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}"
    tag = "".join(c if c.isalnum() or c in "._-" else "-" for c in tag)
    untagged = resolved["run_name"].removesuffix(f"_{resolved['settings']['run_tag']}")
    tags = itertools.chain([tag], (f"{tag}-{number}" for number in itertools.count(2)))
    return next(tag for tag in tags if not run_dir.with_name(f"{untagged}_{tag}").exists())
