"""Seeded damage of one file, as disks, interrupted copies and people do it."""

import os
import random
from pathlib import Path

FORMS = ("flip", "digit", "run", "cut", "zero", "swap", "empty")
UNREADABLE = ("gone", "folder", "link")


def damage(path: Path, form: str, seed: int, keeps_mtime: bool, siblings: list[Path]) -> bool:
    """Damage `path`; False where this form changes nothing of it (an empty file, no sibling, no digit).

    flip: one bit. digit: one decimal digit by another, so that text still parses. run: up to 64 bytes by random ones.
    cut: the end is missing. zero: a block of up to 512 bytes. swap: the content of another of the `siblings`, files of the
    kind. gone, folder, link: the file is missing, a folder, a link to nowhere: what cannot be read.
    `keeps_mtime`: in place, as a disk does it; else as a program that writes a new file and renames it.
    """
    before, status, chance = path.read_bytes(), path.stat(), random.Random(f"{path.name} {form} {seed}")
    if form in UNREADABLE:
        path.unlink()
        if form == "folder":
            path.mkdir()
        elif form == "link":
            path.symlink_to("nowhere")
        return True
    siblings = [p for p in siblings if p.read_bytes() != before]
    if form == "swap":
        after = chance.choice(siblings).read_bytes() if siblings else None
    else:
        after = damaged(bytearray(before), form, chance)
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


def damaged(data: bytearray, form: str, chance: random.Random) -> bytearray | None:
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
