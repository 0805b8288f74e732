"""Random access to the samples of a WebDataset: the bytes at the places that energon's index names, and what they hold."""

import io
import os
import sqlite3
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from llava_sft.data.heldout import StoredShard, stored_shards
from llava_sft.data.layouts import LAYOUTS
from llava_sft.data.lengths import SampleSizes
from llava_sft.data.loader import Conversation
from llava_sft.data.records import Rejected
from llava_sft.data.tars import MEMBER, REINDEX, read_meta, sample_digest, way_out, without_images_like_it
from llava_sft.errors import SHOWN, DataError, shown

OPEN_TARS = 16  # at a time, in each process: some machines allow 256 files


class DamagedSample(DataError):
    """A stored sample cannot be read, decoded, or is not what was indexed."""


class StoredSamples:
    """Random access to the samples of the training split by number, in the order of `sizes`.

    Errors: DataError when `sizes` is of other data.
    """

    def __init__(self, folder: Path, sizes: SampleSizes):
        shards = {shard.source + shard.name: shard for shard in stored_shards(folder, "train")}
        missing = [name for name, count in sizes.shards if count and name not in shards]
        if missing or len(sizes.rows) != sum(count for _, count in sizes.shards):
            raise DataError(
                f"{folder}: its token counts are of other data ({shown(missing[:1] or 'numbers do not add up')})",
                "delete sizes.json in the results folder and run the same command: it is made again",
            )
        self.shards = [shards.get(name) for name, _ in sizes.shards]
        self.ends = np.cumsum([count for _, count in sizes.shards])
        self.rows = np.asarray(sizes.rows, dtype=np.int32)
        self.lengths = np.asarray(sizes.tokens, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> Conversation:
        """Errors: DamagedSample."""
        shard = self.shard_of(number)
        row = int(self.rows[number])
        key = f"sample {row}"
        try:
            data = _bytes_of(shard, row)
            key, parts = _members(data)
            noted = _noted_digest(shard, row)
            if noted and sample_digest(data, [(offset, size) for _, offset, size in parts]) != noted:
                raise self.damaged(shard, key, "does not hold what was written", changed=True)
            members = {name: data[offset : offset + size] for name, offset, size in parts}
            stored = LAYOUTS[shard.layout](key, orjson.loads(members["json"]), set(members) - {"json"})
            images = [members[name] for name in stored.images]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, tarfile.TarError, Rejected) as error:
            raise self.damaged(shard, key, f"cannot be read: {type(error).__name__}: {error}", changed=True) from None
        return Conversation(
            __key__=shard.source + key, __restore_key__=(), __subflavors__={"id": stored.id},
            messages=stored.messages, images=images,
        )  # fmt: skip

    def damaged(self, shard: StoredShard, key: str, what: str, changed: bool) -> DamagedSample:
        """The error of a sample. `changed`: its bytes in the tar are at fault, not what was converted."""
        again = (way_out if changed else without_images_like_it)(shard.folder, shard.name)
        return DamagedSample(
            f"{shard.folder / shard.name}: {shard.source}{key}: {what[:SHOWN]}",
            f"{again}; or leave such samples out of the training with max_damaged_samples: 10",
        )

    def shard_of(self, number: int) -> StoredShard:
        return self.shards[int(np.searchsorted(self.ends, number, side="right"))]


@lru_cache(OPEN_TARS)
def _opened(path: Path) -> BinaryIO:
    return open(path, "rb")


def _bytes_of(shard: StoredShard, row: int) -> bytes:
    """A sample's headers and members, as energon's `.tar.idx` names their place."""
    tar = shard.folder / shard.name
    places = os.pread(_opened(Path(f"{tar}.idx")).fileno(), 16, 8 * row)
    start, stop = (int.from_bytes(places[at : at + 8], "little") for at in (0, 8))
    file = _opened(tar).fileno()
    if len(places) != 16 or not 0 <= start < stop <= os.fstat(file).st_size:
        raise ValueError(f"{tar}.idx names bytes {start:,} to {stop:,}")
    return os.pread(file, stop - start, start)


def _members(data: bytes) -> tuple[str, list[tuple[str, int, int]]]:
    """Key of a sample, and of each member its name without the key, offset and size of its content."""
    found: list[tuple[str, int, int]] = []
    key = ""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.isreg() and (match := MEMBER.fullmatch(member.name)):
                if key and match[1] != key:
                    raise ValueError(f"members of {key} and {match[1]} in one sample")
                key = match[1]
                found.append((match[2], member.offset_data, member.size))
    return key, found


@lru_cache(OPEN_TARS)
def _index(folder: Path) -> tuple[sqlite3.Connection | None, dict[str, int]]:
    """The index of a folder where it notes the samples' digests, and the number of each tar in it."""
    path = (folder / ".nv-meta" / "index.sqlite").resolve()
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    noted = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'sample_digests'").fetchone()
    return (connection if noted else None), {name: number for number, name in enumerate(read_meta(folder).counts)}


def _noted_digest(shard: StoredShard, row: int) -> bytes | None:
    try:
        connection, numbers = _index(shard.folder)
        if connection is None:
            return None
        query = "SELECT digest FROM sample_digests WHERE tar_file_id = ? AND sample_index = ?"
        found = connection.execute(query, (numbers[shard.name], row)).fetchone()
    except (sqlite3.Error, ValueError) as error:  # SQLite's message may quote damaged bytes
        raise DataError(
            f"{shard.folder}/.nv-meta/index.sqlite: cannot be read: {error}",
            REINDEX,
        ) from None
    return found and found[0]


def forget_open_files() -> None:
    """In a process that was forked: neither a file's place nor a connection is shared with the parent."""
    _opened.cache_clear()
    _index.cache_clear()
