"""Finished WebDataset folders, read without energon: the samples in a tar, and what `.nv-meta` says."""

import os
import re
import tarfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash
import yaml
from braceexpand import braceexpand

from llava_sft.data.layouts import LAYOUTS, layout_of
from llava_sft.data.records import Rejected, Sample, check_sample
from llava_sft.errors import DataError
from llava_sft.files import read_json

MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # energon's: the key ends at the first dot of the file's name
ENERGON_SPLITS = {"train": "train", "heldout": "val"}  # by our names
METADATASET = "metadataset.yaml"  # beside the folders of several sources: energon's blend of them


class TarSample(NamedTuple):
    """Consecutive members of a tar that share a key: what energon takes for one sample."""

    key: str
    offset: int  # bytes, of its first header
    size: int  # bytes, to the next sample
    parts: list[tuple[str, int, int]]  # member name without the key; offset and size of the content in bytes

    def checksum(self, file: int) -> bytes:
        """The xxh3_64 of its bytes as they are now, as the table sample_hashes of our index has it."""
        return xxhash.xxh3_64_digest(read_at(file, (self.offset, self.size)))

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


def read_at(file: int, place: tuple[int, int]) -> bytes:
    """The content of a member that lies at (offset, size)."""
    return os.pread(file, place[1], place[0])


def walk_tar(path: Path, odd: Callable[[str], Any] = lambda name: None) -> list[TarSample]:
    """The samples of a tar, in order. `odd` gets the members that energon leaves out.

    Errors: `tarfile.TarError`, OSError for a tar that is damaged or cut off.
    """
    samples: list[TarSample] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
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
            raise tarfile.ReadError("the end of the archive is missing: it was cut off")
    ends = [sample.offset for sample in samples[1:]] + [end]
    # An empty tar has an end and no sample.
    return [sample._replace(size=stop - sample.offset) for sample, stop in zip(samples, ends, strict=False)]


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


def is_finished(folder: Path) -> bool:
    """Whether energon and our cookers open this folder as it is; else it has to be indexed, or adopted."""
    try:
        config = (folder / ".nv-meta" / "dataset.yaml").read_text()
    except OSError:
        return False
    return "__class__: CrudeWebdataset" in config and (folder / ".nv-meta" / ".info.json").is_file()


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
    """Errors: DataError when a file of `.nv-meta` is missing or can not be understood."""
    meta = folder / ".nv-meta"
    for name in (".info.json", "split.yaml", "dataset.yaml"):
        if not (meta / name).is_file():
            raise DataError(f"{meta / name} is missing", "index the folder with index_webdataset.py")
    try:
        config, splits = (_yaml(meta / name) for name in ("dataset.yaml", "split.yaml"))
        counts = {name: int(count) for name, count in read_json(meta / ".info.json")["shard_counts"].items()}
        return Meta(
            counts,
            {split: expand(patterns) for split, patterns in splits["split_parts"].items()},
            set(expand(splits.get("exclude"))),
            (config.get("subflavors") or {}).get("layout", "own"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(
            f"{meta} can not be understood: {type(error).__name__}: {error}", "index the folder again"
        ) from None


def expand(patterns: list[str] | None) -> list[str]:
    return [name for pattern in patterns or [] for name in (braceexpand(pattern) if "{" in pattern else [pattern])]


def _yaml(path: Path) -> Any:
    return yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def source_folders(wds_dir: Path) -> list[Path]:
    """The folders of several sources, or the folder itself; `wds_dir` may also be the blend's own file."""
    if wds_dir.name == METADATASET:
        wds_dir = wds_dir.parent
    if not (wds_dir / METADATASET).is_file():
        return [wds_dir]
    splits = _yaml(wds_dir / METADATASET)["splits"]
    # In order, each once: all records of a small source may be held out.
    return [
        wds_dir / path
        for path in dict.fromkeys(name for split in splits for name in read_blend(wds_dir / METADATASET, split))
    ]


def read_blend(metadataset: Path, split: str) -> dict[str, float]:
    """The sources of a split of a blend, and how many samples are drawn from each."""
    entries = _yaml(metadataset)["splits"].get(split, {"blend": []})["blend"]
    return {entry["path"]: entry["weight"] for entry in entries}
