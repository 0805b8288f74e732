"""Split raw files into conversion jobs while Snakemake builds the DAG: by sizes and Parquet footers; a JSON array or a
table is scanned once and its plan cached. Text whose first records are short and name images is cut finer, by images.

Notable: appending to a raw file changes its last range and adds new ones, and no other. The number of a shard is
100,000 × its file's place among the source's files + the number of the range: when one file grows, the others' shards
keep their names. Imports only the standard library as long as there are JSON lines only.
"""

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from llava_sft.errors import DamagedFileError, DataError, SettingsError
from llava_sft.files import read_json, write_json

TRAIN_PREFIX, HELDOUT_PREFIX = "subtaskdata", "heldout"
FILE_STEP = 100_000  # shard numbers a raw file has to itself
HEAD_BYTES = 256 << 10  # at the beginning of a raw file, where images are counted
IMAGES_PER_RANGE = 10_000  # at most, as far as the beginning of the file tells: minutes of a slow disk
NAMED_IMAGE = re.compile(rb'"image(?:s|_url)?"\s*:(?!\s*(?:null|""|\[\s*\]))')
SHARDS_ASKED = 4  # the first of a file, of which one tells how it was cut


class Range(NamedTuple):
    """Bytes [start, end) of a raw file, and the number of the shard that they become."""

    number: int
    start: int
    end: int


def plan_ranges(
    path: Path | str,
    range_bytes: int | None = None,
    file_number: int = 0,
    cache: Path | None = None,
    stats_of: Callable[[int], Path] | None = None,
) -> list[Range]:
    """Cut a raw file into ranges of about `range_bytes` (None: the format's own size).

    `cache` is the folder where the plan of a JSON array or a table is kept. `stats_of` says where the statistics of a shard lie, by
    its number: with it and without `range_bytes`, text is cut by images too, unless its shards are cut otherwise already.
    Errors: DataError if missing, empty, or in too many.
    """
    from llava_sft.data.formats import FORMATS, format_of

    size = raw_size(path)
    if size == 0:
        raise DataError(f"raw file {path} is empty", "give a file with at least one record")
    name = format_of(path)
    step = range_bytes or FORMATS[name].range_bytes
    if stats_of and not range_bytes and name in ("jsonl", "json", "table"):
        step = _step_by_images(path, name, step, [stats_of(file_number * FILE_STEP + n) for n in range(SHARDS_ASKED)])
    if step < 1:
        raise SettingsError(f"range_bytes is {step}; it must be at least 1", "leave it out for the default")
    status = os.stat(path)
    key = [size, status.st_mtime_ns, status.st_ctime_ns, step]
    name_hash = sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    cached = cache / f"{name_hash}.json" if cache and name in ("json", "table") else None
    plan = None
    if cached:
        with contextlib.suppress(DamagedFileError):  # it is only found anew
            plan = read_json(cached, None)
    if isinstance(plan, dict) and plan.get("key") == key:
        starts = plan["starts"]
    else:
        with open(path, "rb") as file:
            starts = FORMATS[name].starts(file, size, step)
        if cached:
            write_json(cached, {"path": str(path), "key": key, "starts": starts}, sealed=True)
    return ranges_of(starts, size, file_number)


def _step_by_images(path: Path | str, name: str, step: int, stats: Sequence[Path]) -> int:
    """The power of two of bytes that holds IMAGES_PER_RANGE, at most `step`; `step` for a file cut by it already.

    The beginning of the file decides: appending changes nothing.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    images = head.count(b"\n") if name == "table" else max(head.count(b"<image>"), len(NAMED_IMAGE.findall(head)))
    if not images or len(head) < HEAD_BYTES:
        return step
    finer = 1 << (HEAD_BYTES * IMAGES_PER_RANGE // images).bit_length() - 1
    for shard in stats if finer < step else ():
        with contextlib.suppress(DamagedFileError, OSError, KeyError, TypeError):
            raw = read_json(shard)["raw"]
            if raw["path"] == str(path):
                return step if raw["end"] - raw["start"] > 1.5 * finer else finer
    return min(finer, step)


def ranges_of(starts: Sequence[int], size: int, file_number: int = 0) -> list[Range]:
    """The ranges that begin at `starts`; the last ends with the file."""
    if len(starts) > FILE_STEP:
        raise DataError(f"a raw file would be cut into {len(starts):,} shards", "raise shard_bytes")
    first = file_number * FILE_STEP
    return [Range(first + i, a, b) for i, (a, b) in enumerate(zip(starts, [*starts[1:], size], strict=True))]


def raw_size(path: Path | str) -> int:
    """Size of a raw file in bytes. Errors: DataError if there is no such file."""
    if not os.path.isfile(path):
        raise DataError(f"raw file {path} does not exist", "correct the path, or put the file there")
    return os.path.getsize(path)


def shard_name(prefix: str, shard: int) -> str:
    """`subtaskdata-00003`: the name of a shard's files, without suffix."""
    return f"{prefix}-{shard:05d}"


def default_notes_dir(wds_dir: Path | str) -> Path:
    """Where the conversion notes statistics, rejects and index rows of each shard: beside the WebDataset, not in it."""
    wds_dir = Path(wds_dir)
    return wds_dir.with_name(wds_dir.name + ".parts")


def notes_of(wds_dir: Path, named: Path | None) -> Path:
    """The folder of those notes, which need not be there; DataError where the user has `named` one that is not."""
    if named and not named.is_dir():
        raise DataError(
            f"--parts-dir {named}: no such folder", "name what the conversion noted, or leave --parts-dir out"
        )
    return named or default_notes_dir(wds_dir)
