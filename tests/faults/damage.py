"""Seeded damage of one file, as disks, interrupted copies and people do it."""

import os
import random
from pathlib import Path

FORMS = ("flip", "digit", "run", "cut", "zero", "swap", "empty")


def damage(path: Path, form: str, seed: int, keeps_mtime: bool) -> bool:
    """Damage `path`; False where this form changes nothing of it (an empty file, no sibling, no digit).

    flip: one bit. digit: one decimal digit by another, so that text still parses. run: up to 64 bytes by random ones.
    cut: the end is missing. zero: a block of up to 512 bytes. swap: the content of another file of the kind beside it.
    `keeps_mtime`: in place, as a disk does it; else as a program that writes a new file and renames it.
    """
    before, status, chance = path.read_bytes(), path.stat(), random.Random(f"{path.name} {form} {seed}")
    after = damaged(path, bytearray(before), form, chance)
    if after is None or bytes(after) == before:
        return False
    if keeps_mtime:
        with open(path, "r+b") as file:
            file.write(after)
            file.truncate()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        beside = path.with_name(f".{path.name}.damaged")
        beside.write_bytes(after)
        os.replace(beside, path)
    return True


def damaged(path: Path, data: bytearray, form: str, chance: random.Random) -> bytearray | None:
    if form == "swap":
        siblings = [p for p in siblings_of(path) if p != path and p.read_bytes() != data]
        return bytearray(chance.choice(siblings).read_bytes()) if siblings else None
    if not data:
        return None
    where = chance.randrange(len(data))
    if form == "flip":
        data[where] ^= 1 << chance.randrange(8)
    elif form == "digit":
        digits = [n for n, byte in enumerate(data) if 48 <= byte <= 57]
        if not digits:
            return None
        where = chance.choice(digits)
        data[where] = chance.choice([48 + n for n in range(10) if 48 + n != data[where]])
    elif form == "run":
        length = min(len(data) - where, chance.randint(2, 64))
        data[where : where + length] = chance.randbytes(length)
    elif form == "cut":
        del data[where:]
    elif form == "zero":
        length = min(len(data) - where, chance.randint(1, 512))
        data[where : where + length] = bytes(length)
    else:
        data.clear()
    return data


def siblings_of(path: Path) -> list[Path]:
    """Files of the same kind: beside it, or under the same name in a folder like its own (another step's checkpoint)."""
    beside = [p for p in path.parent.iterdir() if p.is_file() and p.suffix == path.suffix and not p.is_symlink()]
    cousins = [p for up in (path.parent.parent, path.parent.parent.parent) for p in up.glob(f"*/{path.name}")]
    return sorted(set(beside if path.suffix in (".tar", ".idx", ".jsonl", ".json") else []) | set(cousins))
