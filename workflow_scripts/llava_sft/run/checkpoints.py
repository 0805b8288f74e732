"""The checkpoints of a run: which is the newest whole one, which may be deleted, and whether the next fits on the disk.

Notable:
- after a save, the size and checksum of every file, the data position included, are noted in the checkpoint (its seal);
- at a start they are compared; a damaged checkpoint is set aside, loudly, and the one before it is used;
- a damaged tracker or best.json is not believed: what is sealed counts;
- the newest whole checkpoint and the best are never deleted.
No torch.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from llava_sft.checksums import find_damage, note
from llava_sft.errors import DamagedFileError, RunError
from llava_sft.files import read_json, write_json, write_text
from llava_sft.run.layout import BEST, CHECKSUMS, TRACKER, VERIFIED, checkpoint_dir, checkpoints, data_dir

TEMPORARY = re.compile(r"\..*\.tmp")  # files.py's, of a process that was killed


def is_sealed(run_dir: Path, iteration: int) -> bool:
    return os.path.lexists(checkpoint_dir(run_dir, iteration) / CHECKSUMS)  # a link to nowhere is damage, not a kill


def iterations_done(run_dir: Path) -> int:
    """The step of the newest finished checkpoint; 0 without one.

    Megatron's tracker names it when all files are there, a moment before it is sealed. Damaged, it may say anything.
    """
    done = max((i for i in checkpoints(run_dir) if is_sealed(run_dir, i)), default=0)
    with contextlib.suppress(OSError, ValueError):
        named = int((run_dir / TRACKER).read_bytes())
        if named > done and (checkpoint_dir(run_dir, named) / ".metadata").is_file():
            return named
    return done


def files_of(run_dir: Path, iteration: int) -> list[Path]:
    """The files of a checkpoint: weights and optimizer, and those beside it in `data_dir`."""
    folders = checkpoint_dir(run_dir, iteration), data_dir(run_dir, iteration)
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.name != CHECKSUMS and not TEMPORARY.fullmatch(path.name))


def checkpoint_bytes(run_dir: Path, iteration: int) -> int:
    return sum(path.stat().st_size for path in files_of(run_dir, iteration))


def seal(run_dir: Path, iteration: int) -> None:
    """Note size and checksum of each file of a checkpoint that has just been written."""
    folder = checkpoint_dir(run_dir, iteration)
    for leftover in folder.glob(f".{CHECKSUMS}.*.tmp"):
        leftover.unlink(missing_ok=True)
    write_json(folder / CHECKSUMS, note(run_dir, files_of(run_dir, iteration)), sealed=True)


def damage(run_dir: Path, iteration: int, deep: bool = True) -> str | None:
    """What is wrong with a sealed checkpoint, None if nothing.

    Not `deep`: files that have not changed since they were last found whole are not read again.
    """
    path = checkpoint_dir(run_dir, iteration) / CHECKSUMS
    try:
        noted = {name: entry for name, entry in read_json(path).items() if not TEMPORARY.fullmatch(Path(name).name)}
    except (DamagedFileError, AttributeError, OSError):
        return f"{path.relative_to(run_dir)} is damaged"
    if f"{path.parent.name}/.metadata" not in noted:
        return f"{path.relative_to(run_dir)} lacks .metadata"
    return find_damage(run_dir, noted, run_dir / VERIFIED, full=deep)


def newest_whole(run_dir: Path, deep: bool = True) -> int:
    """The step of the newest whole checkpoint, 0 without one; afterwards Megatron's tracker names it.

    Newer ones that are damaged are renamed, unfinished ones deleted. Raises RunError, and changes nothing, when there were
    finished checkpoints and none is whole.
    """
    tracked, newest = iterations_done(run_dir), 0
    faults: dict[Path, str] = {}
    unfinished: list[int] = []
    for iteration in reversed(checkpoints(run_dir)):
        folder = checkpoint_dir(run_dir, iteration)
        if not is_sealed(run_dir, iteration):
            if iteration != tracked or not (folder / ".metadata").is_file():
                unfinished.append(iteration)
                continue
            seal(run_dir, iteration)  # the training was killed between the last file and the seal
        fault = damage(run_dir, iteration, deep)
        if fault is None:
            newest = iteration
            break
        faults[folder] = fault
    if faults and not newest:
        listing = "\n    ".join(f"{folder.name}: {fault}" for folder, fault in faults.items())
        unchecked = [
            f"; or delete {f / CHECKSUMS} to resume from this checkpoint unchecked"
            for f in faults
            if CHECKSUMS in faults[f]
        ]
        raise RunError(
            f"{run_dir}: no whole checkpoint is left:\n    {listing}",
            "restore the files, or start anew: set a run_tag" + "".join(unchecked),
        )
    for iteration in unfinished:
        if iteration > newest:
            print(f"{checkpoint_dir(run_dir, iteration)}: not finished when the training was killed; deleted")
            shutil.rmtree(checkpoint_dir(run_dir, iteration))
    for folder, fault in faults.items():
        aside = folder.with_name(f"damaged_{folder.name}")
        print(f"WARNING: {folder} IS DAMAGED: {fault}. Set aside as {aside.name}; resuming from step {newest}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    tracker = run_dir / TRACKER
    if newest != tracked or (newest and (not tracker.is_file() or tracker.read_bytes().strip() != b"%d" % newest)):
        write_text(tracker, str(newest))
    return newest


def prune(run_dir: Path, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Delete all but the `keep_last` newest checkpoints, every `keep_every`-th step and the best; return the deleted.

    Only sealed checkpoints count and are deleted, so that the newest whole one always stays.
    """
    if keep_last is None:
        return []
    sealed = [i for i in checkpoints(run_dir) if is_sealed(run_dir, i)]
    try:
        best = read_json(run_dir / BEST, {}).get("iteration")
    except (DamagedFileError, AttributeError):
        print(f"{run_dir / BEST} is damaged: no checkpoint is deleted before the next validation writes it again")
        return []
    gone = [i for i in sealed[:-keep_last] if i != best and not (keep_every and i % keep_every == 0)]
    for iteration in gone:
        (checkpoint_dir(run_dir, iteration) / CHECKSUMS).unlink()  # first: a half-deleted one must not look whole
        shutil.rmtree(checkpoint_dir(run_dir, iteration))
        shutil.rmtree(data_dir(run_dir, iteration), ignore_errors=True)
    return gone


def check_disk(run_dir: Path, needed: int, what: str) -> None:
    """Raise RunError unless `needed` bytes, and 1 % more, are free on the disk of `run_dir`."""
    free = shutil.disk_usage(run_dir).free
    if free < needed * 1.01:
        mib = 2**20
        fix = f"free {(needed * 1.01 - free) / mib + 1:,.0f} MiB"
        if (count := sum(is_sealed(run_dir, i) for i in checkpoints(run_dir))) > 1:
            fix += f", or set keep_last to less than the {count} checkpoints that exist"
        raise RunError(
            f"{run_dir}: {what} needs {needed / mib:,.0f} MiB, the disk has {free / mib:,.0f} MiB free",
            f"{fix}; the same command resumes",
        )
