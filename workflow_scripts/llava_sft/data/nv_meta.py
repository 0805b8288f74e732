"""`.nv-meta`, energon's index of a WebDataset folder, and the blend of several folders: written, and read back.

Notable: what `energon prepare` would collect from the tars is given by the caller, so that no tar is read. What others
wrote is read within limits (nv_meta_yaml.py). In `index.sqlite` a table of ours stands beside energon's.
"""

import contextlib
import sqlite3
import uuid
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import orjson
import yaml

from llava_sft.data.nv_meta_yaml import BLEND, CRUDE, check_blend, check_dataset, expand, literal, load_yaml
from llava_sft.data.tars import first_layout
from llava_sft.errors import DataError, many
from llava_sft.files import atomic_dir, read_json, write_text
from llava_sft.progress import tracked

NV_META = ".nv-meta"
META_FILES = (".info.json", "split.yaml", "dataset.yaml", "index.sqlite", "index.uuid")
FOLDER = "webdatasets"  # in EXP_DIR/data/X
METADATASET = "metadataset.yaml"  # beside the folders of several sources: energon's blend of them
ENERGON_SPLITS = {"train": "train", "heldout": "val"}  # by our names
REINDEX = (
    "delete the folder .nv-meta and run the same command, which writes it anew; by hand: inspect_webdataset.py --fix"
)

# The schema of energon's own index (megatron-energon 7.4, flavors/webdataset/indexing.py).
TABLES = (
    "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE,"
    " sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER)",
    "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,"
    " content_byte_offset INTEGER, content_byte_size INTEGER)",
    # Ours: of each sample's bytes [byte_offset, byte_offset + byte_size), as tars.sample_digest makes it.
    "CREATE TABLE sample_digests (tar_file_id INTEGER, sample_index INTEGER, digest BLOB,"
    " PRIMARY KEY (tar_file_id, sample_index)) WITHOUT ROWID",
)
INDEXES = (
    "CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index)",
    "CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset)",
    "CREATE INDEX idx_sample_parts_full ON"
    " sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size)",
)


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

    def numbers(self) -> dict[str, int]:
        """The `tar_file_id` of each tar in index.sqlite: its place in .info.json."""
        return {name: number for number, name in enumerate(self.counts)}


class Split(TypedDict):
    samples: int
    shards: int


class Dataset(TypedDict):
    """The dataset file: content alone, so that equal shards, made again, are the same data set to all that follows."""

    fingerprint: str
    train: Split
    heldout: Split
    images: int | None  # None, as the next two: not known of a folder that was indexed elsewhere
    read: int | None  # records
    rejected: int | None
    reasons: dict[str, int]
    kinds: dict[str, int]
    unread: NotRequired[dict[str, int]]  # keys of records that nothing reads
    split: NotRequired[dict[str, Any]]  # how val_fraction was carried out
    heldout_trained_on: NotRequired[dict[str, int]]
    weights: NotRequired[dict[str, float]]  # of several sources
    epoch_samples: NotRequired[int]  # of one pass over their blend: a record of weight 2 is seen twice
    packed_tars: NotRequired[list[str]]


def split_counts(metas: Collection[Meta]) -> dict[str, Split]:
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
    meta = folder / NV_META
    if not meta.is_dir() and (folder / FOLDER / NV_META).is_dir():
        raise DataError(f"{folder}: the WebDataset is in a folder of it", f"name {folder / FOLDER}")
    if not meta.is_dir() and not next(folder.rglob("*.tar"), None):
        raise DataError(
            f"{folder}: no WebDataset in it", "name a webdatasets folder: EXP_DIR/data/X/webdatasets, X the experiment"
        )
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
        tars = {str(split): expand(patterns) for split, patterns in splits["split_parts"].items()}
        exclude = set(expand(splits.get("exclude")))
        name = ".info.json"
        info = read_json(meta / name)
        counts = info.get("shard_counts") if isinstance(info, dict) else None
        if not isinstance(counts, dict) or any(type(count) is not int or count < 0 for count in counts.values()):
            raise ValueError("has no `shard_counts` of whole numbers")
    except (ValueError, OSError) as error:
        problem = str(error) if isinstance(error, OSError) else f"{meta / name}: {_first_line(error)}"
        raise DataError(f"{problem}: cannot be understood", REINDEX) from None
    return Meta(counts, tars, exclude, layout)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:400]


def is_finished(folder: Path) -> bool:
    """Whether this folder is used as it is: its index says nothing but what we know, and its first sample lies as it says.

    Else the folder has to be indexed, or adopted.
    """
    if not (folder / NV_META).is_dir() or (folder / METADATASET).exists():
        return False
    try:
        meta = read_meta(folder)
    except (DataError, OSError):
        return False
    first = next((name for name in meta.splits.get("train", []) if meta.counts.get(name)), None)
    return first is None or not (folder / first).is_file() or first_layout(folder / first) == meta.layout


# --------------------------------------------------------------------------------------------- index.sqlite


class SampleIndex:
    """`index.sqlite` of a folder, read only; `number` is that of a tar (Meta.numbers). Errors of all methods: DataError for
    an index that cannot be read."""

    def __init__(self, folder: Path):
        self.path = (folder / NV_META / "index.sqlite").resolve()
        try:
            # Immutable: without locks. An index is replaced as a whole, and never written in its place.
            self._database = sqlite3.connect(f"{self.path.as_uri()}?mode=ro&immutable=1", uri=True)
        except sqlite3.Error as error:
            raise self._unreadable(error) from None
        list(self.rows("SELECT 1 FROM samples LIMIT 1"))  # damage shows here
        self.has_digests = any(self.rows("SELECT 1 FROM sqlite_master WHERE name = 'sample_digests'"))

    def __enter__(self) -> "SampleIndex":
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    def rows(self, query: str, *values: Any) -> Iterator[tuple]:
        try:
            yield from self._database.execute(query, values)
        except (sqlite3.Error, ValueError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.path}: cannot be read: {_first_line(error)}", REINDEX)  # it may quote damaged bytes

    def digests(self, number: int) -> dict[int, bytes]:
        """The digest of each sample of a tar, by its place; empty for an index without them."""
        query = "SELECT sample_index, digest FROM sample_digests WHERE tar_file_id = ?"
        return dict(self.rows(query, number)) if self.has_digests else {}

    def digest(self, number: int, row: int) -> bytes | None:
        query = "SELECT digest FROM sample_digests WHERE tar_file_id = ? AND sample_index = ?"
        return next((digest for (digest,) in self.rows(query, number, row)), None) if self.has_digests else None

    def members(self, number: int) -> Iterator[tuple[int, str, int, int]]:
        """Of each member in a tar, sample by sample: the sample's place, the member's name, offset and size of its content."""
        columns = "sample_index, part_name, content_byte_offset, content_byte_size"
        query = f"SELECT {columns} FROM sample_parts WHERE tar_file_id = ? ORDER BY sample_index, content_byte_offset"
        return self.rows(query, number)


class Tar(NamedTuple):
    """A tar to be indexed: its name without `.tar`, how many samples it has, and their rows {key, offset, size, parts, digest}."""

    name: str
    samples: int
    rows: Iterable[dict[str, Any]]


def _write_index(path: Path, tars: list[Tar]) -> None:
    database = sqlite3.connect(path)
    # The file is thrown away with its folder when this fails, so it needs no journal.
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    for statement in TABLES:
        database.execute(statement)
    for number, tar in enumerate(tracked(tars, len(tars), "shards")):
        samples: list[tuple] = []
        members: list[tuple] = []
        digests: list[tuple] = []
        for row, sample in enumerate(tar.rows):
            samples.append((number, sample["key"], row, sample["offset"], sample["size"]))
            members += ((number, row, *member) for member in sample["parts"])
            if digest := sample.get("digest"):  # shards of earlier versions have none
                digests.append((number, row, bytes.fromhex(digest)))
        if len(samples) != tar.samples:
            raise DataError(
                f"{tar.name}.samples.jsonl has {many(len(samples), 'row')}, {many(tar.samples, 'sample', 'were')} written",
                f"delete {tar.name}.stats.json and convert that shard again",
            )
        # Keys of ours are unique; packs of the original's hosts may bear the same ones.
        database.executemany("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?)", samples)
        database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", members)
        database.executemany("INSERT INTO sample_digests VALUES (?, ?, ?)", digests)
    for statement in INDEXES:
        database.execute(statement)
    database.commit()
    database.close()


@contextlib.contextmanager
def write_meta(
    wds_dir: Path, tars: Iterable[Tar], splits: dict[str, list[str]], exclude: list[str], content: str,
    layout: str = "own",
) -> Iterator[Path]:  # fmt: skip
    """Write `.nv-meta` beside its place, yield it there, then put it in its place.

    `splits`: names of tars by ENERGON_SPLITS; `exclude`: `tar/key`; `content` names what is in the set.
    """
    tars = sorted(tars, key=lambda tar: tar.name)  # as energon numbers them
    dataset = CRUDE | ({"subflavors": {"layout": layout}} if layout != "own" else {})
    info = {
        "energon_version": version("megatron-energon"),
        "shard_counts": {f"{tar.name}.tar": tar.samples for tar in tars},
    }
    named = {ENERGON_SPLITS[split]: [literal(name) for name in names] for split, names in splits.items()}
    split_yaml = {"split_parts": named | {"test": []}, "exclude": [literal(name) for name in exclude]}
    with atomic_dir(wds_dir / NV_META) as meta:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        write_text(meta / "split.yaml", yaml.dump(split_yaml, Dumper=dumper, sort_keys=False))
        write_text(meta / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False))
        write_text(meta / ".info.json", orjson.dumps(info, option=orjson.OPT_INDENT_2).decode())
        write_text(meta / "index.uuid", str(uuid.uuid5(uuid.NAMESPACE_OID, content)))
        _write_index(meta / "index.sqlite", tars)
        yield meta


# ---------------------------------------------------------------------------------------- several sources


def write_blend(wds_dir: Path, weights: dict[str, float], metas: dict[str, Meta]) -> None:
    """Energon's metadataset: `weight` is how often a record is drawn, so a source is drawn by weight × samples."""
    splits = {}
    for split in ENERGON_SPLITS.values():
        draws = {name: weight * metas[name].samples(split) for name, weight in weights.items()}
        blend = [{"path": name, "weight": n, "subflavors": {"source": name}} for name, n in draws.items() if n]
        if blend:
            splits[split] = {"blend": blend}
    write_text(wds_dir / METADATASET, yaml.safe_dump(BLEND | {"splits": splits}, sort_keys=False))


def read_blend(wds_dir: Path) -> dict[str, dict[str, float]]:
    """By split, the sources of a blend and how many samples are drawn from each."""
    path = wds_dir / METADATASET
    try:
        return check_blend(load_yaml(path))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: {_first_line(error)}: cannot be understood", REINDEX) from None


def folder_of(path: Path) -> Path:
    """The WebDataset folder of the path passed to energon, which is the blend's file where there are several sources."""
    return path.parent if path.name == METADATASET else path


def source_folders(path: Path) -> list[Path]:
    """The folders of several sources, or the folder itself."""
    wds_dir = folder_of(path)
    if not (wds_dir / METADATASET).is_file():
        return [wds_dir]
    # In order, each once: all records of a small source may be held out.
    return [wds_dir / name for name in dict.fromkeys(name for blend in read_blend(wds_dir).values() for name in blend)]
