"""The checkpoints of a run: which is the newest whole one, which may go, and whether the next fits on the disk.

Notable:
- after a save the size and checksum of every file, the data position included, are noted in the checkpoint itself;
- at a start they are checked, and a damaged checkpoint is set aside for the one before, loudly;
- the tracker, or best.json, is not believed where it is damaged: what is sealed counts;
- the newest whole checkpoint and the best are never deleted.
No torch: the launcher uses it too.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
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
    """The files of a checkpoint: weights and optimizer, and what is kept beside them."""
    found = (p for folder in (checkpoint_dir, data_dir) for p in folder(run_dir, iteration).rglob("*") if p.is_file())
    return sorted(p for p in found if p.name != CHECKSUMS and not TEMPORARY.fullmatch(p.name))


def checkpoint_bytes(run_dir: Path, iteration: int) -> int:
    return sum(path.stat().st_size for path in files_of(run_dir, iteration))


def seal(run_dir: Path, iteration: int) -> None:
    """Note size and checksum of each file of a checkpoint that has just been written."""
    folder = checkpoint_dir(run_dir, iteration)
    for leftover in folder.glob(f".{CHECKSUMS}.*.tmp"):
        leftover.unlink(missing_ok=True)
    write_json(folder / CHECKSUMS, note(run_dir, files_of(run_dir, iteration)), sealed=True)


def damage(run_dir: Path, iteration: int, deep: bool = True) -> str | None:
    """What is wrong with a sealed checkpoint, None if nothing. Not `deep`: files that have not changed since they were
    last found whole are not read again."""
    path = checkpoint_dir(run_dir, iteration) / CHECKSUMS
    try:
        noted = {name: of for name, of in read_json(path).items() if not TEMPORARY.fullmatch(Path(name).name)}
    except (DamagedFileError, AttributeError, OSError):
        return f"{path.relative_to(run_dir)} is damaged"
    if f"{path.parent.name}/.metadata" not in noted:
        return f"{path.relative_to(run_dir)} lacks .metadata"
    return find_damage(run_dir, noted, run_dir / VERIFIED, full=deep)


def newest_whole(run_dir: Path, deep: bool = True, say: Callable[[str], None] = print) -> int:
    """The step of the newest whole checkpoint, 0 without one; Megatron's tracker then names it.

    Newer ones that are damaged are renamed. Raises RunError when there were finished checkpoints and none is whole.
    """
    named, faults, unfinished = iterations_done(run_dir), {}, []
    again = "restore the files, or start anew: set a run_tag"
    for iteration in reversed(checkpoints(run_dir)):
        folder = checkpoint_dir(run_dir, iteration)
        if not is_sealed(run_dir, iteration):
            if iteration == named and (folder / ".metadata").is_file():  # killed before it was sealed
                seal(run_dir, iteration)
            else:
                unfinished.append(folder)
                continue
        if fault := damage(run_dir, iteration, deep):
            faults[folder] = fault
            if CHECKSUMS in fault:
                again += f"; or delete {folder / CHECKSUMS} to resume from this checkpoint unchecked"
            continue
        break
    else:
        iteration = 0
    if faults and not iteration:
        listing = "\n    ".join(f"{folder.name}: {fault}" for folder, fault in faults.items())
        raise RunError(f"{run_dir}: no whole checkpoint is left:\n    {listing}", again)
    for folder in unfinished:
        if int(folder.name[5:]) > iteration:
            say(f"{folder}: not finished when the training was killed; deleted")
            shutil.rmtree(folder)
    for folder, fault in faults.items():
        say(
            f"WARNING: {folder} IS DAMAGED: {fault}. Set aside as damaged_{folder.name}; resuming from step {iteration}"
        )
        aside = folder.with_name(f"damaged_{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    tracker = run_dir / TRACKER
    if iteration != named or (
        iteration and (not tracker.is_file() or tracker.read_bytes().strip() != b"%d" % iteration)
    ):
        write_text(tracker, str(iteration))
    return iteration


def prune(run_dir: Path, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Delete all but the `keep_last` newest checkpoints, every `keep_every`-th step and the best; returns the deleted.

    Only sealed checkpoints count and go, so that the newest whole one always stays.
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
        (checkpoint_dir(run_dir, iteration) / CHECKSUMS).unlink()  # half-deleted is not whole
        shutil.rmtree(checkpoint_dir(run_dir, iteration))
        shutil.rmtree(data_dir(run_dir, iteration), ignore_errors=True)
    return gone


def check_disk(run_dir: Path, needed: int, what: str) -> None:
    """Raise RunError unless `needed` bytes, and a hundredth more, are free where `run_dir` lies."""
    free = shutil.disk_usage(run_dir).free
    if free < needed * 1.01:
        mib = 2**20
        fix = f"free {(needed * 1.01 - free) / mib + 1:,.0f} MiB"
        if (count := sum(is_sealed(run_dir, i) for i in checkpoints(run_dir))) > 1:
            fix += f", or set keep_last to less than the {count} checkpoints there are"
        raise RunError(
            f"{run_dir}: {what} needs {needed / mib:,.0f} MiB, the disk has {free / mib:,.0f} MiB free",
            f"{fix}; the same command resumes",
        )
