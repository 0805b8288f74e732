"""The cut of a raw file into jobs, made while Snakemake builds the DAG: from the file's size alone, standard library only.

Notable: ranges are fixed in bytes, so appending to the raw file changes its last range and adds new ones, and no other.
A range owns the records that *start* in it (`records.read_lines` aligns); range number = shard number.
"""

import os
from pathlib import Path
from typing import NamedTuple

from llava_sft.errors import DataError, SettingsError

DEFAULT_RANGE_BYTES = 8 << 20
TRAIN_PREFIX, HELDOUT_PREFIX = "subtaskdata", "heldout"


class Range(NamedTuple):
    """Bytes [start, end) of a raw file."""

    index: int
    start: int
    end: int


def plan_ranges(path: Path | str, range_bytes: int = DEFAULT_RANGE_BYTES) -> list[Range]:
    """Cut the raw file into ranges of `range_bytes`, the last one shorter. Errors: DataError if missing or empty."""
    if range_bytes < 1:
        raise SettingsError(f"range_bytes is {range_bytes}; it must be at least 1", "use 8388608, the default")
    size = raw_size(path)
    if size == 0:
        raise DataError(f"raw file {path} is empty", "give a file with at least one record")
    starts = range(0, size, range_bytes)
    return [Range(index, start, min(start + range_bytes, size)) for index, start in enumerate(starts)]


def raw_size(path: Path | str) -> int:
    """Size of a raw file in bytes. Errors: DataError if there is no such file."""
    if not os.path.isfile(path):
        raise DataError(f"raw file {path} does not exist", "correct the path, or put the file there")
    return os.path.getsize(path)


def shard_name(prefix: str, shard: int) -> str:
    """`subtaskdata-00003`: the name of a shard's files, without suffix."""
    return f"{prefix}-{shard:05d}"


def default_parts_dir(wds_dir: Path | str) -> Path:
    """Where the per-shard statistics, rejects and index rows lie: beside the WebDataset, not in it."""
    wds_dir = Path(wds_dir)
    return wds_dir.with_name(wds_dir.name + ".parts")
