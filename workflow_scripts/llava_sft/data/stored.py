"""Samples of one split, read in order straight from the tars, for evaluation and parity. No energon, no decoding."""

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from llava_sft.data.notes import way_out
from llava_sft.data.nv_meta import METADATASET, REINDEX, SampleIndex, read_blend, read_meta, source_folders
from llava_sft.data.records import Sample
from llava_sft.data.rejects import Rejected
from llava_sft.data.tars import Extent, read_at, walk_tar
from llava_sft.errors import SHOWN, DataError, shown


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

    def rows(self) -> Iterator[tuple[int, str, Sample[str], int, dict[str, Extent]]]:
        """Yield (place in the tar, id as the loader names it, sample, file descriptor, place of each member) in order, no
        image taken out. Every sample's bytes are compared with the digest in the index, where there is one.

        Errors: DataError naming tar, key and id for anything that cannot be read or is not what was written.
        """
        tar = self.folder / self.name
        with SampleIndex(self.folder) as index:
            digests = index.digests(self.number)
        try:
            samples = walk_tar(tar)
            file = open(tar, "rb")  # noqa: SIM115 (closed below)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise self.damage("", f"cannot be read: {error}") from None
        if len(samples) != self.samples:
            raise self.damage("", f"holds {len(samples):,} samples, the index says {self.samples:,}")
        with file:
            for row, stored in enumerate(samples):
                if stored.key in self.excluded:
                    continue
                try:
                    changed = row in digests and stored.digest(file.fileno()) != digests[row]
                    sample, members = stored.read(file.fileno(), self.layout)
                except (Rejected, OSError) as error:
                    raise self.damage(stored.key, str(error)) from None
                if changed:
                    raise self.damage(f"{stored.key} ({shown(sample.id)})", "its bytes are not those that were written")
                yield row, self.source + stored.key, sample, file.fileno(), members

    def damage(self, sample: str, what: str) -> DataError:
        """The error of a tar, or of a sample in it."""
        where = f"sample {sample}: " if sample else ""
        return DataError(f"{self.folder / self.name}: {where}{what[:SHOWN]}", way_out(self.folder, self.name))


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


def read_split(folder: Path | str, split: str) -> Iterator[Sample[bytes]]:
    """Yield the samples of `split` with their images, in the order of the shards."""
    return chain.from_iterable(map(read_shard, stored_shards(Path(folder), split)))


def read_shard(shard: StoredShard) -> Iterator[Sample[bytes]]:
    for _, _, sample, file, members in shard.rows():
        yield sample.with_images([read_at(file, members[image]) for image in sample.images])
