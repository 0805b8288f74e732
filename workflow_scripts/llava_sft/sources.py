"""The raw data of an experiment and the plan of its conversion, while Snakemake builds its DAG. No torch."""

import glob
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from llava_sft.data.plan import HELDOUT_PREFIX, TRAIN_PREFIX, Range, plan_ranges, ranges_of, shard_name
from llava_sft.embedded import DEMO_BYTES
from llava_sft.errors import MEND_LINK, DataError, dead_link, shown
from llava_sft.settings.data import SourceSettings
from llava_sft.settings.schema import Settings

DEFAULT_SHARD_BYTES = 8 << 20  # of the demo, which is planned before it is there


@dataclass(frozen=True)
class Source:
    """Raw data with one image root and one weight; `name` is its folder, empty when it is the only one."""

    name: str
    files: dict[str, list[Path]]  # by prefix of the shards
    image_root: Path
    weight: float
    columns: dict[str, str]


@dataclass(frozen=True)
class Shard:
    """One conversion job: a range of a raw file, and the shard it writes."""

    source: Source
    raw: Path
    prefix: str
    range: Range

    @property
    def name(self) -> str:
        return str(Path(self.source.name) / shard_name(self.prefix, self.range.number))


def find_sources(settings: Settings, made_here: Callable[[Path], bool]) -> list[Source]:
    """The raw data; empty for a finished webdatasets folder. `made_here`: whether a rule makes a file, which need not be
    there then.

    Raises DataError for files that are missing.
    """
    entries = settings.sources
    if settings.raw_data:
        heldout = str(settings.heldout_data) if settings.heldout_data else None
        entries = (SourceSettings(path=str(settings.raw_data), heldout=heldout, image_root=settings.image_root),)
    sources = [_source(settings, entry, alone=len(entries) == 1, made_here=made_here) for entry in entries]
    if len({source.name for source in sources}) < len(sources):
        sources = _renamed(sources, entries)
    (name, count), *_ = Counter(source.name for source in sources).most_common(1) or [("", 0)]
    if count > 1:
        raise DataError(f"sources: {count} would be named {name!r}", "give each entry a `name` of its own")
    return sources


def _source(settings: Settings, entry: SourceSettings, alone: bool, made_here: Callable[[Path], bool]) -> Source:
    def files_of(key: str, pattern: str) -> list[Path]:
        key = "sources" if settings.sources else key
        found = sorted(Path(path) for path in glob.glob(pattern, recursive=True)) or [Path(pattern)]
        for path in found:
            if path.is_dir():
                raise DataError(f"{key}: {path}: is a folder", _files_in(path, key))
            if not path.is_file() and not made_here(path):
                if dead := dead_link(path):
                    raise DataError(f"{key}: {path}: {dead}", MEND_LINK)
                raise DataError(
                    f"{key}: {path}: no such file",
                    f"put the file there, or set {key} in config/experiments/{settings.experiment}.yaml",
                )
        return found

    files = {TRAIN_PREFIX: files_of("raw_data", entry.path)}
    if entry.heldout:
        files[HELDOUT_PREFIX] = files_of("heldout_data", entry.heldout)
    path = Path(entry.path)
    name = path.parent.name if glob.has_magic(path.name) else path.stem
    name = entry.name or re.sub(r"[^\w.-]+", "_", name)  # what the rules' wildcard takes
    both = set.intersection(*({path.resolve() for path in paths} for paths in files.values())) if entry.heldout else ()
    if both:
        raise DataError(
            f"{shown(str(min(both)))}: is training data and held-out data at once",
            "name another file as heldout_data (of `sources`: heldout), or leave it out and set val_fraction: 0.05",
        )
    columns: dict[str, str] = dict((entry.columns or settings.columns).items())
    image_root = entry.image_root or files[TRAIN_PREFIX][0].parent
    return Source("" if alone else name, files, image_root, entry.weight, columns)


def _files_in(folder: Path, key: str) -> str:
    """What to write in place of a folder's name."""
    for pattern in (
        "data-*.arrow",
        "**/data-*.arrow",
        "**/*.parquet",
        "**/*.jsonl*",
        "**/*.json",
        "**/*.csv",
        "**/*.tsv",
    ):
        if found := list(islice(folder.glob(pattern), 2)):
            return f"name what in it: {key}: {found[0] if len(found) == 1 else folder / pattern}"
    if next(folder.rglob("*.tar"), None):
        return f"it holds a WebDataset: webdatasets: {folder}, in place of {key}"
    return f"name a file of records, or a pattern of several: {key}: {folder}/*.jsonl"


def _renamed(sources: list[Source], entries: tuple[SourceSettings, ...]) -> list[Source]:
    """Sources of equal names, named by the folders in which their patterns differ."""
    counts = Counter(source.name for source in sources)
    paths = [Path(entry.path).parts for entry in entries]
    renamed = []
    for source, entry, parts in zip(sources, entries, paths, strict=True):
        others = [set(other) for other in paths if other != parts]
        own = [part for part in parts if others and not any(part in other for other in others)]
        if counts[source.name] > 1 and not entry.name and own and glob.has_magic(Path(entry.path).parent.name):
            source = replace(source, name=re.sub(r"[^\w.-]+", "_", "_".join(own)).strip("_.") or source.name)
        renamed.append(source)
    return renamed


def plan_shards(sources: list[Source], settings: Settings, demo: Path | None, notes: Path) -> dict[str, Shard]:
    """The plan of the conversion by name of the shard, training shards first; empty for a finished folder.

    `demo`: the folder of the embedded data set; `notes`: the folder of what is noted about shards that exist.
    Raises DataError for a raw file that is missing or empty.
    """
    shards = [
        Shard(source, raw, prefix, part)
        for prefix in (TRAIN_PREFIX, HELDOUT_PREFIX)
        for source in sources
        for number, raw in enumerate(source.files.get(prefix, []))
        for part in _ranges(raw, number, prefix, settings, demo, notes / source.name)
    ]
    return {shard.name: shard for shard in shards}


def _ranges(raw: Path, number: int, prefix: str, settings: Settings, demo: Path | None, notes: Path) -> list[Range]:
    step = settings.shard_bytes
    if raw.parent == demo and raw.name in DEMO_BYTES:
        size = DEMO_BYTES[raw.name]
        if raw.is_file():
            return plan_ranges(raw, step, number)
        return ranges_of(range(0, size, step or DEFAULT_SHARD_BYTES), size)
    cache = settings.exp_dir / "data" / ".plans"
    return plan_ranges(raw, step, number, cache, lambda shard: notes / f"{shard_name(prefix, shard)}.stats.json")


def plan_of(sources: list[Source], shards: dict[str, Shard]) -> list[dict]:
    """For the index: of each source its name, weight and, by prefix, the number of shards of each raw file."""
    counts = Counter((shard.source.name, shard.prefix, shard.raw) for shard in shards.values())
    return [
        {"name": source.name, "weight": source.weight}
        | {prefix: [counts[source.name, prefix, raw] for raw in files] for prefix, files in source.files.items()}
        for source in sources
    ]
