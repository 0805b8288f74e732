"""Random access to the samples of a WebDataset: the bytes at the places that energon's index names, and what they hold."""

import io
import os
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from llava_sft.data.layouts import LAYOUTS
from llava_sft.data.notes import way_out, without_images_like_it
from llava_sft.data.nv_meta import SampleIndex
from llava_sft.data.records import Sample
from llava_sft.data.rejects import Rejected
from llava_sft.data.sizes import SampleSizes
from llava_sft.data.stored import StoredShard, stored_shards
from llava_sft.data.tars import MEMBER, Extent, sample_digest
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
        self.shards = [shards[name] for name, count in sizes.shards if count]
        self.ends = np.cumsum([count for _, count in sizes.shards if count])
        self.rows = np.asarray(sizes.rows, dtype=np.int32)
        self.lengths = np.asarray(sizes.tokens, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> tuple[str, Sample[bytes]]:
        """A sample, and its key in its tar. Errors: DamagedSample."""
        shard = self.shard_of(number)
        row = int(self.rows[number])
        key = f"sample {row}"
        try:
            data = _bytes_of(shard, row)
            key, members = _members(data)
            noted = _index(shard.folder).digest(shard.number, row)
            if noted and sample_digest(data, members.values()) != noted:
                raise self.damaged(shard, key, "does not hold what was written", changed=True)
            contents = {name: data[offset : offset + size] for name, (offset, size) in members.items()}
            stored = LAYOUTS[shard.layout](key, orjson.loads(contents["json"]), set(contents) - {"json"})
            return key, stored.with_images([contents[name] for name in stored.images])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, tarfile.TarError, Rejected) as error:
            raise self.damaged(shard, key, f"cannot be read: {type(error).__name__}: {error}", changed=True) from None

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
    bounds = os.pread(_opened(Path(f"{tar}.idx")).fileno(), 16, 8 * row)
    start, stop = (int.from_bytes(bounds[at : at + 8], "little") for at in (0, 8))
    file = _opened(tar).fileno()
    if len(bounds) != 16 or not 0 <= start < stop <= os.fstat(file).st_size:
        raise ValueError(f"{tar}.idx names bytes {start:,} to {stop:,}")
    return os.pread(file, stop - start, start)


def _members(data: bytes) -> tuple[str, dict[str, Extent]]:
    """Key of a sample, and where in `data` the content of each of its members lies."""
    members: dict[str, Extent] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.isreg() and (match := MEMBER.fullmatch(member.name)):
                if key and match[1] != key:
                    raise ValueError(f"members of {key} and {match[1]} in one sample")
                key = match[1]
                members[match[2]] = member.offset_data, member.size
    return key, members


@lru_cache(OPEN_TARS)
def _index(folder: Path) -> SampleIndex:
    return SampleIndex(folder)


def forget_open_files() -> None:
    """In a process that was forked: neither a file's place nor a connection is shared with the parent."""
    _opened.cache_clear()
    _index.cache_clear()
