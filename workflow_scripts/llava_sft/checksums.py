"""Checksums that are noted when files are written, and compared before they are used.

Notable: a file is hashed again only if its size, mtime, ctime or inode has changed since it was last found whole, so that a
finished target is not read twice; `full` compares every byte. No torch.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llava_sft.errors import DamagedFileError
from llava_sft.files import file_hash, read_json, write_json

Noted = Mapping[str, Any]  # path below the root → [size in bytes, xxh3_128 in hexadecimal]


def note(root: Path, files: Iterable[Path]) -> dict[str, list]:
    """Size and checksum of each of `files`, by its path below `root`."""
    return {str(path.relative_to(root)): [path.stat().st_size, file_hash(path)] for path in sorted(files)}


class HashingFile:
    """A binary file that is written from beginning to end and hashed on the way."""

    def __init__(self, file: BinaryIO):
        import xxhash

        self.file, self.digest, self.size = file, xxhash.xxh3_128(), 0

    def write(self, data) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def noted(self) -> list:
        """The entry that `note` makes for a file."""
        return [self.size, self.digest.hexdigest()]


class Memo:
    """A file that keeps the state (size, dates, …) in which each file was last found whole, by absolute path. One that is
    damaged, or cannot be written, costs time alone; None keeps nothing."""

    def __init__(self, path: Path | None):
        self.path, self.states, self._changed = path, dict[str, Any](), False
        if path is not None:
            with contextlib.suppress(DamagedFileError, OSError):
                self.states = found if isinstance(found := read_json(path, {}), dict) else {}

    def knows(self, path: Path, state: list[int]) -> bool:
        return self.states.get(str(path.absolute())) == state

    def add(self, path: Path, state: list[int]) -> None:
        self._changed |= not self.knows(path, state)
        self.states[str(path.absolute())] = state

    def save(self) -> None:
        if self.path is not None and self._changed:
            with contextlib.suppress(OSError):  # a folder that we may not write to
                write_json(self.path, self.states, indent=None)


def find_damage(root: Path, noted: Noted, memo: Path | None = None, full: bool = False) -> str | None:
    """The first of `damages` in words; None when all files hold what was written."""
    return next((f"{name} {what}".strip() for name, what in damages(root, noted, memo, full)), None)


def damages(root: Path, noted: Noted, memo: Path | None = None, full: bool = False) -> Iterator[tuple[str, str]]:
    """Name and fault of each file of `noted` below `root` that does not hold what was written.

    Args:
        memo: where the files are noted that were found whole; they are not read again unless `full`.
    """
    try:
        entries = [(str(name), int(size), str(checksum)) for name, (size, checksum) in noted.items()]
    except (TypeError, ValueError, AttributeError):
        yield "", "the list of checksums is damaged"
        return
    whole = Memo(memo)
    for name, size, checksum in entries:
        path = root / name
        try:
            status = os.stat(path)
            # ctime too: a copying tool can set mtime back.
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            if status.st_size != size:
                yield name, f"has {status.st_size:,} bytes, {size:,} were written"
            elif full or not whole.knows(path, state):
                if file_hash(path) == checksum:
                    whole.add(path, state)
                else:
                    yield name, "does not hold what was written"
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            yield name, "is missing" if missing else f"cannot be read: {error.strerror}"
    whole.save()
