"""Whole files or none: everything is written under another name and renamed, so that a kill leaves no half-written file."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava_sft.errors import SHOWN, CheckpointError, DamagedFileError, SettingsError, full_disk, size_in_words


@contextlib.contextmanager
def naming_full_disk(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Give the error of a full disk the file or folder that was written, which most writers leave out, and how much of it
    there was. `temporary`: where it is written, when that is elsewhere."""
    try:
        yield
    except BaseException as error:  # torch derives the error of a checkpoint's writer from BaseException
        reason = full_disk(error)
        if not reason or getattr(error, "filename", None):
            raise
        place = temporary or path
        size = _size(place)
        number = error.errno if isinstance(error, OSError) else errno.ENOSPC
        raise OSError(number, f"{reason}: it takes more than {size_in_words(size)}", str(path)) from error


def _size(place: Path) -> int:
    """Bytes in a file or a folder, of which others may be deleting parts."""
    size = 0
    inside = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)  # without the vanished
    for path in inside if place.is_dir() else [place]:
        with contextlib.suppress(OSError):
            size += path.lstat().st_size
    return size


@contextlib.contextmanager
def atomic_file(path: Path | str, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that appears as `path` only when the block ends without an error.

    Not `durable`: without waiting for the disk, for files that count only together with one that is written later.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_full_disk(path, temporary), open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = leftover.name.split(".")[-2]  # those of dead processes go: each may be as large as a checkpoint
        if leftover == temporary or not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        with naming_full_disk(path, temporary):
            yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path | str, value: Any, indent: int | None = 1, sealed: bool = False) -> None:
    """Write `value` with sorted keys: the same value gives the same bytes.

    Args:
        indent: None writes one line, for long lists.
        sealed: begin the object with a checksum of the rest, which `read_json` compares; for files that only we read.
    """
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False) + "\n"
    if sealed and value:
        text = f'{{"seal": "{_seal(text[1:].encode())}",{text[1:]}'
    write_text(path, text)


def read_json(path: Path | str, *default: Any) -> Any:
    """The content of a JSON file without its seal; the `default`, if given, where there is no such file.

    Errors: DamagedFileError (also a ValueError) when it holds no JSON, or its seal does not match; OSError.
    """
    if default and not os.path.isfile(path):
        return default[0]
    try:
        data = Path(path).read_bytes()
        value = json.loads(data)
        seal = re.match(rb'\{"seal": "(\w+)",', data)
        if (seal and _seal(data[seal.end() :]) != seal[1].decode()) or (
            not seal and isinstance(value, dict) and "seal" in value
        ):
            raise ValueError("its content is not what was written")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DamagedFileError(
            f"{path}: damaged, or cut off: {str(error)[:SHOWN]}",
            "restore it from a copy, or delete it and run the same command, which makes it again if it made it before",
        ) from None
    if seal:
        del value["seal"]
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of predictions.jsonl, one a line. Errors: DamagedFileError."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        if not all(isinstance(row, dict) and {"id", "turns", "scores", "correct"} <= row.keys() for row in rows):
            raise ValueError
        return rows
    except (ValueError, RecursionError):
        raise DamagedFileError(
            f"{path}: damaged, or cut off", "delete it and run the same command: it is made again"
        ) from None


def _seal(rest: bytes) -> str:
    return hashlib.sha256(rest).hexdigest()[:16]


def read_object(path: Path, *default: Any) -> dict[str, Any]:
    """The JSON object in a small file of a checkpoint; the `default`, if given, where there is no such file.

    Errors: CheckpointError naming the file.
    """
    try:
        content = read_json(path, *default)
    except DamagedFileError as error:
        raise CheckpointError(error.problem, "copy the file again from where the folder came from") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", "make it readable, or copy it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged: a JSON {type(content).__name__}, no object", "copy the file again")
    return content


def refuse_others_file(path: Path, key: str, said: str, fix: str = "name a new file") -> None:
    """Raise SettingsError where a file to be written is there already and is none of ours: sealed, or a JSON object with `key` (of
    JSONL the first).

    said: names it as the user did.
    """
    try:
        with open(path, "rb") as file:
            head = file.readline() if path.suffix == ".jsonl" else file.read(1 << 20)
    except OSError:
        return  # not there; or writing it says why not
    try:
        ours = not head or head.startswith(b'{"seal": "') or key in dict(json.loads(head))
    except (ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise SettingsError(f"{said}: exists already, and is no file of this kind: it would be lost", fix)


def fingerprint(value: Any) -> str:
    """A short content hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_fingerprint(path: Path | str) -> str:
    """A short content hash of a small file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def file_hash(path: Path | str) -> str:
    """The xxh3_128 of a file of any size, in hexadecimal."""
    import xxhash  # here, because planning a conversion needs only the standard library

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
