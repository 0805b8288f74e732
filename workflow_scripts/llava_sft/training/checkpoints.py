"""The checkpoints of a run: which is the newest whole one, which may go, and whether the next fits on the disk.

Notable:
- after a save the size and checksum of every file, the data position included, are noted in the checkpoint itself;
- at a start they are checked, and a damaged checkpoint is set aside for the one before, loudly;
- the newest whole checkpoint and the best are never deleted.
No torch: the launcher uses it too.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from llava_sft.checkpoint.start import TRACKER
from llava_sft.errors import RunError
from llava_sft.files import file_hash, read_json, write_json, write_text

CHECKSUMS = "checksums.json"
BEST = "best.json"


def checkpoint_dir(run_dir: Path, iteration: int) -> Path:
    return run_dir / f"iter_{iteration:07d}"


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of all checkpoint folders, whole or not, oldest first."""
    return sorted(int(p.name[5:]) for p in run_dir.glob("iter_*") if re.fullmatch(r"iter_\d+", p.name) and p.is_dir())


def iterations_done(run_dir: Path) -> int:
    """The step that Megatron's tracker names; 0 without one. Megatron writes it when all files are there."""
    tracker = run_dir / TRACKER
    return int(tracker.read_text().strip() or 0) if tracker.is_file() else 0


def files_of(run_dir: Path, iteration: int) -> list[Path]:
    """The files of a checkpoint: weights and optimizer, and the position in the data of every rank."""
    folders = (checkpoint_dir(run_dir, iteration), run_dir / "dataloader" / f"iter_{iteration:07d}")
    return sorted(p for folder in folders for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)


def checkpoint_bytes(run_dir: Path, iteration: int) -> int:
    return sum(path.stat().st_size for path in files_of(run_dir, iteration))


def seal(run_dir: Path, iteration: int) -> None:
    """Note size and checksum of each file of a checkpoint that has just been written."""
    seals = {str(p.relative_to(run_dir)): [p.stat().st_size, file_hash(p)] for p in files_of(run_dir, iteration)}
    write_json(checkpoint_dir(run_dir, iteration) / CHECKSUMS, seals)


def damage(run_dir: Path, iteration: int, deep: bool = True) -> str | None:
    """What is wrong with a sealed checkpoint, None if nothing. `deep`: checksums too, not sizes alone."""
    for name, (size, checksum) in read_json(checkpoint_dir(run_dir, iteration) / CHECKSUMS).items():
        path = run_dir / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, {size:,} were written"
        if deep and file_hash(path) != checksum:
            return f"{name} does not hold what was written"
    return None


def newest_whole(run_dir: Path, deep: bool = True, say: Callable[[str], None] = print) -> int:
    """The step of the newest whole checkpoint, 0 without one; Megatron's tracker then names it.

    Newer ones that are damaged are renamed. Raises RunError when there were finished checkpoints and none is whole.
    """
    named, faults, unfinished = iterations_done(run_dir), {}, []
    for iteration in reversed(checkpoints(run_dir)):
        folder = checkpoint_dir(run_dir, iteration)
        if not (folder / CHECKSUMS).is_file():
            if iteration == named and (folder / ".metadata").is_file():  # killed before it was sealed
                seal(run_dir, iteration)
            else:
                unfinished.append(folder)
                continue
        if fault := damage(run_dir, iteration, deep):
            faults[folder] = fault
            continue
        break
    else:
        iteration = 0
    if faults and not iteration:
        listing = "\n    ".join(f"{folder.name}: {fault}" for folder, fault in faults.items())
        raise RunError(
            f"{run_dir}: no whole checkpoint is left:\n    {listing}", "restore the files, or start anew: set a run_tag"
        )
    for folder in unfinished:
        if int(folder.name[5:]) > iteration:
            say(f"{folder}: not finished when the training was killed; deleted")
            shutil.rmtree(folder)
    for folder, fault in faults.items():
        say(
            f"WARNING: {folder} IS DAMAGED: {fault}. Set aside as damaged_{folder.name}; going on from step {iteration}"
        )
        aside = folder.with_name(f"damaged_{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    if iteration != named:
        write_text(run_dir / TRACKER, str(iteration))
    return iteration


def prune(run_dir: Path, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Delete all but the `keep_last` newest checkpoints, every `keep_every`-th step and the best; returns the deleted.

    Only sealed checkpoints count and go, so that the newest whole one always stays.
    """
    if keep_last is None:
        return []
    sealed = [i for i in checkpoints(run_dir) if (checkpoint_dir(run_dir, i) / CHECKSUMS).is_file()]
    best = read_json(run_dir / BEST)["iteration"] if (run_dir / BEST).is_file() else None
    gone = [i for i in sealed[:-keep_last] if i != best and not (keep_every and i % keep_every == 0)]
    for iteration in gone:
        (checkpoint_dir(run_dir, iteration) / CHECKSUMS).unlink()  # half-deleted is not whole
        shutil.rmtree(checkpoint_dir(run_dir, iteration))
        shutil.rmtree(run_dir / "dataloader" / f"iter_{iteration:07d}", ignore_errors=True)
    return gone


def expected_bytes(parameters: int, trained: int, settings: dict) -> int:
    """Size of a checkpoint: weights, and of what is trained two moments and, where the weights are bf16, a float32 master
    or the 16 bits of it that bf16 lacks."""
    if not settings["bf16"]:
        return parameters * 4 + trained * 8
    reduced = settings["gpus_per_node"] and settings["optimizer_precision"] == "bf16"
    return parameters * 2 + trained * (6 if reduced else 12)


def check_disk(run_dir: Path, needed: int, what: str) -> None:
    """Raise RunError unless `needed` bytes, and a hundredth more, are free where `run_dir` lies."""
    free = shutil.disk_usage(run_dir).free
    if free < needed * 1.01:
        mib = 2**20
        raise RunError(
            f"{run_dir}: {what} needs {needed / mib:,.0f} MiB, the disk has {free / mib:,.0f} MiB free",
            f"free {(needed * 1.01 - free) / mib + 1:,.0f} MiB, or set keep_last to less than the {len(checkpoints(run_dir))} checkpoints there are; "
            "the same command goes on",
        )
