"""Finished WebDataset folders, read without energon: the samples in a tar, and what `.nv-meta` says."""

import contextlib
import itertools
import os
import re
import sqlite3
import tarfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash

from llava_sft.data.foreign import check_blend, check_dataset, expand, load_yaml
from llava_sft.data.formats import other_kind
from llava_sft.data.layouts import LAYOUTS, layout_of
from llava_sft.data.records import Rejected, Sample, check_sample
from llava_sft.errors import DataError
from llava_sft.files import read_json

MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # energon's: the key ends at the first dot of the file's name
ENERGON_SPLITS = {"train": "train", "heldout": "val"}  # by our names
PACKED = re.compile(r".*\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)")
FIRST_MEMBERS = 1000  # of a tar, among which its first JSON stands
REINDEX = (
    "delete the folder .nv-meta and run the same command, which writes it anew; by hand: inspect_webdataset.py --fix"
)
METADATASET = "metadataset.yaml"  # beside the folders of several sources: energon's blend of them


class TarSample(NamedTuple):
    """Consecutive members of a tar that share a key: what energon takes for one sample."""

    key: str
    offset: int  # bytes, of its first header
    size: int  # bytes, to the next sample
    parts: list[tuple[str, int, int]]  # member name without the key; offset and size of the content in bytes

    def digest(self, file: int) -> bytes:
        """The digest of its bytes as they are now, as the table sample_digests of our index has it."""
        places = [(offset - self.offset, size) for _, offset, size in self.parts]
        return sample_digest(read_at(file, (self.offset, self.size)), places)

    def read(self, file: int, layout: str) -> tuple[Sample, dict[str, tuple[int, int]]]:
        """Its content under the rules of raw records, and where its members lie. Errors: `Rejected`."""
        members = {part: (offset, size) for part, offset, size in self.parts}
        if len(members) != len(self.parts):
            raise Rejected("a member stands twice", ", ".join(part for part, _, _ in self.parts))
        if "json" not in members:
            raise Rejected("no json member", f"has {', '.join(members)}")
        try:
            sample = LAYOUTS[layout](self.key, orjson.loads(read_at(file, members["json"])), members)
            check_sample(sample)
            if sorted([*sample.images, "json"]) != sorted(members):
                differ = "members differ from the images that the JSON names"
                raise Rejected(differ, f"{sample.images}, {list(members)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Rejected("not the expected JSON", f"{type(error).__name__}: {error}") from None
        return sample, members


def sample_digest(data: bytes, places: Iterable[tuple[int, int]]) -> bytes:
    """The xxh3_64 of a sample's bytes in a tar, in which the xxh3_128 of each member's content stands for the content.

    A conversion knows these already, as the images' hashes, so that noting a sample's digest costs next to nothing.
    `places`: offset and size in `data` of each content, in order.
    """
    view, known, at = memoryview(data), bytearray(), 0
    for offset, size in places:
        known += view[at:offset]
        known += xxhash.xxh3_128_digest(view[offset : offset + size])
        at = offset + size
    known += view[at:]
    return xxhash.xxh3_64_digest(known)


def read_at(file: int, place: tuple[int, int]) -> bytes:
    """The content of a member that lies at (offset, size)."""
    return os.pread(file, place[1], place[0])


def walk_tar(path: Path, odd: Callable[[str], Any] = lambda name: None) -> list[TarSample]:
    """The samples of a tar, in order. `odd` gets the members that energon leaves out.

    Errors: `tarfile.TarError`, OSError for a tar that is damaged or cut off.
    """
    samples: list[TarSample] = []
    with tarfile.open(path, "r:") as tar:
        for member in _members(tar):
            tar.members = []  # tarfile would keep them all
            if not member.isreg():
                continue
            match = MEMBER.fullmatch(member.name)
            if not match:
                odd(member.name)
                continue
            key, part = match.groups()
            if not samples or samples[-1].key != key:
                samples.append(TarSample(key, member.offset, 0, []))
            samples[-1].parts.append((part, member.offset_data, member.size))
        end = tar.offset
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(1024) != bytes(1024):
            raise tarfile.ReadError("the end of the archive is missing: it was cut off, or a header is damaged")
    ends = [sample.offset for sample in samples[1:]] + [end]
    # An empty tar has an end and no sample.
    return [sample._replace(size=stop - sample.offset) for sample, stop in zip(samples, ends, strict=False)]


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    try:
        yield from tar
    except (
        ValueError,
        ArithmeticError,
        LookupError,
        MemoryError,
        RecursionError,
    ) as error:  # a field of a damaged header
        raise tarfile.ReadError(f"a header is damaged: {type(error).__name__}: {error}") from None


def find_layout(tar: Path, samples: list[TarSample]) -> str | None:
    """The layout of a tar, by the first sample whose JSON can be read."""
    with open(tar, "rb") as file:
        for sample in samples:
            places = [part[1:] for part in sample.parts if part[0] == "json"]
            try:
                if places and (layout := layout_of(orjson.loads(read_at(file.fileno(), places[0])))):
                    return layout
            except ValueError:
                continue
    return None


def first_layout(tar: Path) -> str | None:
    """The layout of a tar by its first JSON, read from its beginning alone; None for an unknown one, or a damaged tar."""
    try:
        with tarfile.open(tar, "r:") as members:
            for member in itertools.islice(members, FIRST_MEMBERS):
                match = MEMBER.fullmatch(member.name)
                if member.isreg() and match and match[2] == "json":
                    return layout_of(orjson.loads(members.extractfile(member).read()))
    except (OSError, tarfile.TarError, ValueError):
        pass
    return None


def is_finished(folder: Path) -> bool:
    """Whether this folder is used as it is: its index says nothing but what we know, and its first sample lies as it says.

    Else the folder has to be indexed, or adopted.
    """
    if not (folder / ".nv-meta").is_dir() or (folder / METADATASET).exists():
        return False
    try:
        meta = read_meta(folder)
    except (DataError, OSError):
        return False
    first = next((name for name in meta.splits.get("train", []) if meta.counts.get(name)), None)
    return first is None or not (folder / first).is_file() or first_layout(folder / first) == meta.layout


def packed_tars(folder: Path) -> list[Path]:
    """The compressed tars in a folder, by their names."""
    return [path for path in sorted(folder.rglob("*.t*")) if PACKED.fullmatch(path.name) and path.is_file()]


def no_tar(setting: str, folder: Path) -> DataError:
    """What is wrong with a folder without any .tar; `setting` names what the folder was given as."""
    packed = next(iter(packed_tars(folder)), None)
    if other := packed and other_kind(packed):
        where = f"{setting}{folder} holds no .tar file, and {packed.name} is {other[0]}"
        return DataError(f"{where}: samples are read at their places, which only a plain tar has", other[1])
    return DataError(
        f"{setting}{folder}: no such folder, or no .tar file (and .nv-meta) in it",
        "name the folder that holds the tars, or set raw_data to convert your own records",
    )


def way_out(folder: Path, name: str) -> str:
    """How a damaged tar of `folder` is made whole: who made it can make it again."""
    places = (
        folder.with_name(f"{folder.name}.parts"),
        folder.parent.with_name(f"{folder.parent.name}.parts") / folder.name,
    )
    shard, tar = name.removesuffix(".tar"), folder / name
    if any((place / f"{shard}.stats.json").exists() for place in places):
        return f"delete {tar} and run the same command (snakemake data_EXPERIMENT), which converts it again"
    if any(place.is_dir() for place in places):  # merged by val_fraction
        return f"delete {folder}/.nv-meta and run the same command (snakemake data_EXPERIMENT), which makes it again"
    return f"copy or make {tar.resolve()} again, and run the same command"


def without_images_like_it(folder: Path, name: str) -> str:
    """The way out where a tar holds what was written, and an image in it was damaged before."""
    again = way_out(folder, name)
    if again.startswith("delete"):
        return f"mend that image, or set decode_images: true and a max_reject_fraction, which reject it; then {again}"
    return "run the data step again with a max_reject_fraction, which leaves such samples out; by hand: index_webdataset.py"


def noted_digests(folder: Path, number: int) -> dict[int, bytes]:
    """The digest of each sample of a tar, by its place; empty for an index without them. `number`: place in .info.json.

    Errors: DataError for an index that cannot be read.
    """
    if _of_index(folder, "SELECT 1 FROM sqlite_master WHERE name = ?", "sample_digests"):
        return dict(_of_index(folder, "SELECT sample_index, digest FROM sample_digests WHERE tar_file_id = ?", number))
    _of_index(folder, "SELECT 1 FROM samples WHERE tar_file_id = ? LIMIT 1", number)  # damage shows here
    return {}


def noted_places(folder: Path, number: int) -> dict[int, list[tuple[int, int]]]:
    """Where the members of each sample of a tar lie, by the sample's place: offset and size, in order.

    Errors: DataError for an index that cannot be read.
    """
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    query = "SELECT sample_index, content_byte_offset, content_byte_size FROM sample_parts WHERE tar_file_id = ?"
    for row, *place in _of_index(folder, f"{query} ORDER BY sample_index, content_byte_offset", number):
        places[row].append(tuple(place))
    return places


def _of_index(folder: Path, query: str, value: int | str) -> list[tuple]:
    path = (folder / ".nv-meta" / "index.sqlite").resolve()
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as index:
            return index.execute(query, (value,)).fetchall()
    except (sqlite3.Error, ValueError) as error:  # SQLite's message may quote damaged bytes
        raise DataError(f"{path}: can not be read: {error}", REINDEX) from None


class Meta(NamedTuple):
    """What `.nv-meta` says: samples of each tar, tars of each split, excluded `tar/key`, and the layout."""

    counts: dict[str, int]
    splits: dict[str, list[str]]
    exclude: set[str]
    layout: str

    def samples(self, split: str) -> int:
        """Samples of a split, the excluded ones left out."""
        tars = set(self.splits.get(split, []))
        return sum(self.counts[tar] for tar in tars) - sum(
            name.rpartition(".tar/")[0] + ".tar" in tars for name in self.exclude
        )


def split_counts(metas: Collection[Meta]) -> dict[str, dict[str, int]]:
    """Samples and shards of "train" and "heldout", of several sources together."""
    return {
        split: {
            "samples": sum(meta.samples(name) for meta in metas),
            "shards": sum(len(meta.splits.get(name, [])) for meta in metas),
        }
        for split, name in ENERGON_SPLITS.items()
    }


def read_meta(folder: Path) -> Meta:
    """Errors: DataError when a file of `.nv-meta` is missing, or holds anything that is not known."""
    meta = folder / ".nv-meta"
    for name in (".info.json", "split.yaml", "dataset.yaml"):
        if not (meta / name).is_file():
            raise DataError(f"{meta / name} is missing", REINDEX)
    try:
        name = "dataset.yaml"
        layout = check_dataset(load_yaml(meta / name)) or "own"
        name = "split.yaml"
        splits = load_yaml(meta / name)
        if not isinstance(splits, dict) or not isinstance(splits.get("split_parts"), dict):
            raise ValueError("has no mapping `split_parts`")
        parts = {str(split): expand(patterns) for split, patterns in splits["split_parts"].items()}
        exclude = set(expand(splits.get("exclude")))
        name = ".info.json"
        info = read_json(meta / name)
        counts = info.get("shard_counts") if isinstance(info, dict) else None
        if not isinstance(counts, dict) or any(type(count) is not int or count < 0 for count in counts.values()):
            raise ValueError("has no `shard_counts` of whole numbers")
    except (ValueError, OSError) as error:
        problem = str(error) if isinstance(error, OSError) else f"{meta / name}: {_first_line(error)}"
        raise DataError(f"{problem}: can not be understood", REINDEX) from None
    return Meta(counts, parts, exclude, layout)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:400]


def source_folders(wds_dir: Path) -> list[Path]:
    """The folders of several sources, or the folder itself; `wds_dir` may also be the blend's own file."""
    if wds_dir.name == METADATASET:
        wds_dir = wds_dir.parent
    if not (wds_dir / METADATASET).is_file():
        return [wds_dir]
    # In order, each once: all records of a small source may be held out.
    blends = _read_blends(wds_dir / METADATASET).values()
    return [wds_dir / name for name in dict.fromkeys(name for blend in blends for name in blend)]


def read_blend(metadataset: Path, split: str) -> dict[str, float]:
    """The sources of a split of a blend, and how many samples are drawn from each."""
    return _read_blends(metadataset).get(split, {})


def _read_blends(metadataset: Path) -> dict[str, dict[str, float]]:
    try:
        return check_blend(load_yaml(metadataset))
    except (ValueError, OSError) as error:
        raise DataError(f"{metadataset}: {_first_line(error)}: can not be understood", REINDEX) from None
