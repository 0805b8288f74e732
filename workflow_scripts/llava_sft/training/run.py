"""The run directory: which run it is, how far it got, and that only one training writes to it.

A run is one set of data, model, start checkpoint and settings (`run.json`). The same run goes on from its newest whole
checkpoint; another run in the same directory is refused with the difference named.
"""

import fcntl
import shutil
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

from llava_sft.checkpoint.start import SIDECARS, TRACKER
from llava_sft.errors import RunError
from llava_sft.files import atomic_dir, fingerprint, read_json, write_json

RUN_FILE = "run.json"
# Settings that may change while a run goes on: they change neither what is learned at a step nor its order.
FREE_SETTINGS = {
    "experiment", "exp_dir", "run_tag", "raw_data", "heldout_data", "image_root", "webdatasets", "shard_bytes", "sources",
    "max_shard_bytes", "decode_images", "max_reject_fraction", "val_fraction", "split_seed", "load", "tokenizer", "train_iters", "epochs", "save_interval", "log_interval", "num_workers",
    "evaluate_by", "evaluate_samples", "evaluate_batch_size", "max_new_tokens",
}  # fmt: skip


def identity(resolved: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this run and no other."""
    settings = {key: value for key, value in resolved["settings"].items() if key not in FREE_SETTINGS}
    return {
        "data": resolved["data"]["fingerprint"],
        "start": resolved["start"]["fingerprint"],
        **settings,
        # Not the name alone, which `settings` holds: its file may have changed.
        "model": f"{resolved['model']['name']}-{fingerprint(resolved['model'])}",
    }


def iterations_done(run_dir: Path) -> int:
    """Steps of the newest whole checkpoint; 0 without one. Megatron writes the tracker when a checkpoint is whole."""
    tracker = run_dir / TRACKER
    return int(tracker.read_text()) if tracker.is_file() else 0


def checkpoint_dir(run_dir: Path, iteration: int) -> Path:
    return run_dir / f"iter_{iteration:07d}"


def lock(run_dir: Path) -> BinaryIO:
    """Hold the run directory; raise RunError when another process does. The system frees it when its holders end."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = open(run_dir / ".lock", "ab")  # noqa: SIM115 (held until the process ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(
            f"{run_dir}: another training is running in it", "wait for it, stop it, or set another run_tag"
        ) from None
    return file


def open_run(run_dir: Path, resolved: dict[str, Any]) -> int:
    """Check that `run_dir` holds this run, or make it; returns the step it goes on from.

    On a resume, `resolved` takes the number of loader workers over: the position in the data is kept per worker.
    Raises RunError, with the difference and both ways on, when the directory holds another run.
    """
    done = iterations_done(run_dir)
    path = run_dir / RUN_FILE
    if done and not path.is_file():
        raise RunError(f"{run_dir}: checkpoints without {RUN_FILE}: not a run of this workflow", "set another run_tag")
    if done:
        earlier = read_json(path)
        before, now = identity(earlier), identity(resolved)
        differences = [f"{key}: {before.get(key)} → {now.get(key)}" for key in now if before.get(key) != now.get(key)]
        if differences:
            tag = propose_tag(run_dir, resolved, before, now)
            raise RunError(
                f"{run_dir} holds {done} steps of another run:\n    " + "\n    ".join(differences),
                f"put the old value back to go on with it, or start another run beside it: --config run_tag={tag}",
            )
        if done > resolved["settings"]["train_iters"]:
            raise RunError(
                f"train_iters {resolved['settings']['train_iters']} is below the {done} steps that {run_dir} has done",
                f"train_iters: {done} or more, or another run_tag",
            )
        workers, asked = earlier["settings"]["num_workers"], resolved["settings"]["num_workers"]
        if workers != asked:
            print(f"num_workers stays {workers} in this run, not {asked}: the position in the data is kept per worker")
        resolved["settings"]["num_workers"] = workers
    write_json(path, resolved)
    sidecars = run_dir / SIDECARS
    if not done or not sidecars.is_dir():  # before the first checkpoint they may be those of another run
        with atomic_dir(sidecars) as folder:
            weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "*.pth")
            shutil.copytree(resolved["start"]["sidecars"], folder, ignore=weights, dirs_exist_ok=True)
    return done


def propose_tag(run_dir: Path, resolved: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> str:
    """A free run_tag made of the first difference, like `lr5e-06`."""
    key = next(key for key in now if before.get(key) != now.get(key))
    value = now[key] if isinstance(now[key], int | float) else str(now[key])[:8]
    tag = f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}"
    tag = "".join(c if c.isalnum() or c in "._-" else "-" for c in tag)
    untagged = resolved["run_name"].removesuffix(f"_{resolved['settings']['run_tag']}")
    tags = chain([tag], (f"{tag}-{number}" for number in count(2)))
    return next(tag for tag in tags if not run_dir.with_name(f"{untagged}_{tag}").exists())


def start_dir(run_dir: Path, folder: str | None) -> Path | None:
    """A folder that Megatron can load `folder` from: it looks for a tracker file and ignores a bare `iter_` folder,
    with the result that it trains from random weights and says nothing."""
    if folder is None:
        return None
    source = Path(folder).resolve()
    link_dir = run_dir / "start"
    shutil.rmtree(link_dir, ignore_errors=True)
    link_dir.mkdir(parents=True)
    release = source.name == "release"
    iteration = 0 if release else int(source.name.removeprefix("iter_"))
    (link_dir / ("release" if release else f"iter_{iteration:07d}")).symlink_to(source)
    (link_dir / TRACKER).write_text("release" if release else str(iteration))
    return link_dir
