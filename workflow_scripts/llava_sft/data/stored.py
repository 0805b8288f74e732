"""The samples of a data set, read from the tars at the places that energon's index names. No energon, no decoding."""

import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from llava_sft.data.notes import way_out
from llava_sft.data.nv_meta import METADATASET, REINDEX, SampleIndex, read_blend, read_meta, source_folders
from llava_sft.data.records import Sample
from llava_sft.data.rejects import Rejected
from llava_sft.data.tars import TarSample, read_at, sample_in, walk_tar
from llava_sft.errors import SHOWN, DataError, shown

OPEN_TARS = 16  # at a time, in each process: some machines allow 256 files


class DamagedSample(DataError):
    """A stored sample cannot be read, decoded, or is not what was indexed."""


class StoredShard(NamedTuple):
    """A tar of a split: the folder it lies in and its name there, what its samples' ids begin with (`source/` where there are
    several), its layout, and the keys in it that are not in the split."""

    folder: Path
    name: str
    source: str
    layout: str
    excluded: frozenset[str]
    number: int  # its place in .info.json
    samples: int  # in it, the excluded ones too

    def read(self) -> Iterator[tuple[int, str, Sample[bytes]]]:
        """Yield place in the tar, id as the loader names it, and sample, in order; the rules of raw records hold for each.

        Errors: DamagedSample.
        """
        tar = self.folder / self.name
        try:
            samples = walk_tar(tar)  # all headers at once: one by one they take longer
        except (OSError, tarfile.TarError) as error:
            raise self.damage("all samples", f"cannot be read: {error}") from None
        if len(samples) != self.samples:
            raise self.damage("all samples", f"there are {len(samples):,}, the index says {self.samples:,}")
        with SampleIndex(self.folder) as index:
            opened = OpenShard(self, index)
            for row, stored in enumerate(samples):
                if stored.key not in self.excluded:
                    data = read_at(opened.tar.fileno(), stored.extent)
                    yield row, self.source + stored.key, opened.content(row, data, stored, rules=True)

    def damage(self, where: str, what: str, fix: Callable[[Path, str], str] = way_out) -> DamagedSample:
        """The error of a sample; `fix`: what mends it, by folder and name of the tar."""
        return DamagedSample(f"{self.folder / self.name}: {where}: {what[:SHOWN]}", fix(self.folder, self.name))


class OpenShard:
    """A shard whose files are open: its samples by their places. Errors of all methods: DamagedSample naming tar, key and id."""

    def __init__(self, shard: StoredShard, index: SampleIndex):
        self.shard, self.index = shard, index
        tar = shard.folder / shard.name
        try:
            self.tar, self.idx = open(tar, "rb"), open(f"{tar}.idx", "rb")  # noqa: SIM115 (closed with this object)
        except OSError as error:
            raise shard.damage("all samples", f"cannot be read: {error}") from None

    def find(self, row: int) -> tuple[bytes, TarSample]:
        """The headers and members of a sample, as energon's `.tar.idx` names their place."""
        try:
            bounds = os.pread(self.idx.fileno(), 16, 8 * row)
            start, stop = (int.from_bytes(bounds[at : at + 8], "little") for at in (0, 8))
            if len(bounds) != 16 or not 0 <= start < stop <= os.fstat(self.tar.fileno()).st_size:
                raise ValueError(f"its .idx names bytes {start:,} to {stop:,}")
            data = read_at(self.tar.fileno(), (start, stop - start))
            return data, sample_in(data)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise self.shard.damage(f"sample {row}", f"cannot be read: {type(error).__name__}: {error}") from None

    def content(self, row: int, data: bytes, stored: TarSample, rules: bool = False) -> Sample[bytes]:
        """The sample that was found. Its bytes are compared with the digest in the index, where there is one."""
        try:
            sample, contents = stored.read(data, self.shard.layout, rules)
        except Rejected as error:
            raise self.shard.damage(f"sample {stored.key}", str(error)) from None
        noted = self.index.digest(self.shard.number, row)
        if noted and stored.digest(data) != noted:
            where = f"sample {stored.key} ({shown(sample.id)})"
            raise self.shard.damage(where, "does not hold what was written, by .nv-meta/index.sqlite")
        return sample.with_images([contents[image] for image in sample.images])


@lru_cache(OPEN_TARS)
def open_shard(shard: StoredShard) -> OpenShard:
    """For random access: the shards used last stay open."""
    return OpenShard(shard, _index(shard.folder))


@lru_cache(OPEN_TARS)
def _index(folder: Path) -> SampleIndex:
    return SampleIndex(folder)


def forget_open_files() -> None:
    """In a process that was forked: neither a file's place nor a connection is shared with the parent."""
    open_shard.cache_clear()
    _index.cache_clear()


def stored_shards(folder: Path, split: str) -> Iterator[StoredShard]:
    """The tars of `split` ("train", "val"), of one source after the other."""
    for path, source in _sources(folder):
        meta, excluded = read_meta(path), defaultdict(set)
        for name in meta.exclude:
            tar, _, key = name.rpartition(".tar/")
            excluded[f"{tar}.tar"].add(key)
        numbers = meta.numbers()
        for name in meta.splits.get(split, []):
            if name not in numbers:
                raise DataError(f"{path}/.nv-meta/split.yaml: {shown(name)} is not in .info.json", REINDEX)
            excluded_here = frozenset(excluded[name])
            yield StoredShard(path, name, source, meta.layout, excluded_here, numbers[name], meta.counts[name])


def read_split(folder: Path | str, split: str) -> Iterator[Sample[bytes]]:
    """Yield the samples of `split` with their images, in the order of the shards."""
    return (sample for shard in stored_shards(Path(folder), split) for _, _, sample in shard.read())


def sample_ids(folder: Path, split: str) -> dict[str, set[str]]:
    """The ids of all samples of `split`, by source, from the index alone. Errors: DataError when two samples share one."""
    ids = {}
    for path, source in _sources(folder):
        meta = read_meta(path)
        names, tars = list(meta.counts), set(meta.splits.get(split, []))
        with SampleIndex(path) as index:
            rows = index.rows("SELECT tar_file_id, sample_key FROM samples")
            here = ((names[number], key) for number, key in rows if names[number] in tars)
            ids[source] = {source + key for name, key in here if f"{name}/{key}" not in meta.exclude}
        if len(ids[source]) != meta.samples(split):
            raise DataError(
                f"{path}: keys repeat from tar to tar",
                f"make the tars of {path} again so that no sample's key stands in two of them",
            )
    return ids


def _sources(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in source_folders(folder):
        yield path, "" if path == folder else f"{path.name}/"


def source_weights(folder: Path) -> dict[str, float]:
    """How often a training sample of each source is to be seen, relative to the others'; {"": 1.0} for a single folder."""
    if not (folder / METADATASET).is_file():
        return {"": 1.0}
    blend = read_blend(folder).get("train", {})
    return {name: draws / read_meta(folder / name).samples("train") for name, draws in blend.items()}
