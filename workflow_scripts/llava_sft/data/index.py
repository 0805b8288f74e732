"""Many shards → one energon data set: checks what the conversion jobs report, and writes `.nv-meta` in one go.

Notable: no tar is read; what `energon prepare` would collect from them was noted while they were written. Only shards
of the present plan enter. Several sources are a folder each, and a blend of them. The dataset file names content alone
(hashes, counts), so that equal shards, made again, are the same data set to all that follows.
"""

import contextlib
import itertools
import math
import os
import re
import shutil
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash
import yaml

from llava_sft.checksums import find_damage
from llava_sft.data.foreign import literal
from llava_sft.data.plan import FILE_STEP, HELDOUT_PREFIX, TRAIN_PREFIX, shard_name
from llava_sft.data.records import FORMS, read_lines
from llava_sft.data.shards import FORMAT_VERSION, MOST_UNREAD
from llava_sft.data.split import bound_by, choose_heldout, merge_heldout
from llava_sft.data.tars import ENERGON_SPLITS, METADATASET, Meta, read_meta, split_counts
from llava_sft.errors import DataError
from llava_sft.files import atomic_dir, atomic_file, fingerprint, read_json, write_json, write_text

FIRST_REASONS = 10
REJECTS = "rejects.jsonl"  # beside the shards' own: all of them, with their lines in the raw files
HELDOUT_RECORD = "heldout.json"  # in .nv-meta: how val_fraction was carried out

# The schema of energon's own index (megatron-energon 7.4, flavors/webdataset/indexing.py).
TABLES = (
    "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE,"
    " sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER)",
    "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,"
    " content_byte_offset INTEGER, content_byte_size INTEGER)",
)
# Beside energon's tables: of each sample's bytes [byte_offset, byte_offset + byte_size), as tars.sample_digest makes it.
DIGESTS = (
    "CREATE TABLE sample_digests (tar_file_id INTEGER, sample_index INTEGER, digest BLOB,"
    " PRIMARY KEY (tar_file_id, sample_index)) WITHOUT ROWID"
)
INDEXES = (
    "CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index)",
    "CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset)",
    "CREATE INDEX idx_sample_parts_full ON"
    " sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size)",
)


class Source:
    """The shards of one folder: statistics of its planned ones by split, and what is excluded and added by val_fraction."""

    def __init__(self, wds_dir: Path, parts_dir: Path, plan: dict[str, Any]):
        self.name, self.weight = plan["name"], plan["weight"]
        self.wds_dir, self.parts_dir = wds_dir / self.name, parts_dir / self.name
        self.train = self._read_parts(TRAIN_PREFIX, plan.get(TRAIN_PREFIX))
        self.heldout = self._read_parts(HELDOUT_PREFIX, plan.get(HELDOUT_PREFIX, [] if TRAIN_PREFIX in plan else None))
        self.parts = self.train + self.heldout
        self.chosen: list[tuple[str, bytes]] = []  # (shard, row) of the samples that val_fraction holds out

    def rows(self, stats: dict[str, Any]) -> Iterator[bytes]:
        with open(self.parts_dir / f"{stats['shard']}.samples.jsonl", "rb") as file:
            yield from file

    def parsed(self, stats: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows of a shard. Errors: DataError for one that is damaged."""
        try:
            for row in self.rows(stats):
                yield orjson.loads(row)
        except ValueError:
            raise self._not_noted([stats["shard"]]) from None

    def _not_noted(self, shards: list[str]) -> DataError:
        return DataError(
            f"{self.parts_dir}: the lines of .samples.jsonl are not those that the conversion wrote: {_some(shards)}",
            f"delete {self.wds_dir}/{shards[0]}.tar (and the same for each) and run the same command, which converts"
            " them again",
        )

    def filled(self, split: str) -> list[dict[str, Any]]:
        return [stats for stats in getattr(self, split) if stats["written"]]

    def _read_parts(self, prefix: str, planned: list[int] | None) -> list[dict[str, Any]]:
        """The statistics of a split's shards in order, each checked against its files."""
        if planned is None:
            found = (re.fullmatch(rf"{prefix}-(\d+)\.stats\.json", p.name) for p in self.parts_dir.glob(f"{prefix}-*"))
            numbers = sorted(int(match[1]) for match in found if match)
        else:
            numbers = [file * FILE_STEP + n for file, count in enumerate(planned) for n in range(count)]
        names = [shard_name(prefix, number) for number in numbers]
        missing = [name for name in names if not (self.parts_dir / f"{name}.stats.json").exists()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(names)} {prefix} shards are not converted: {_some(missing)}",
                "run stage2_sftdata2webdataset.py for them",
            )
        parts = [read_json(self.parts_dir / f"{name}.stats.json") for name in names]
        bad = [n for n, stats in zip(names, parts, strict=True) if not is_whole(self.wds_dir, self.parts_dir, stats)]
        if bad:
            raise DataError(
                "shards do not match their statistics (tar, .tar.idx or .samples.jsonl missing or changed, or of an older"
                f" format): {_some(bad)}",
                f"delete {self.wds_dir}/{bad[0]}.tar (and the same for each) and run the same command, which converts"
                " them again",
            )
        if odd := [stats["shard"] for stats in parts if find_damage(self.parts_dir, stats.get("samples", {}))]:
            raise self._not_noted(odd)
        return parts


def index_webdataset(
    wds_dir: Path, parts_dir: Path, max_reject_fraction: float = 0.0, plan: list[dict[str, Any]] | None = None,
    val_fraction: float = 0.0, split_seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Check the parts, write `.nv-meta` (of each source, and their blend), return what the dataset file holds.

    `plan` names the sources with their weights and numbers of shards (None: all that are there). `max_reject_fraction`
    is the share of records, 0 to 1, that may be rejected. `val_fraction` holds out a share of the training
    records when there are no others.
    Errors: DataError for missing or foreign parts, a changed raw file, too many rejects, no samples.
    """
    sources = [Source(wds_dir, parts_dir, entry) for entry in plan or _plan_of(parts_dir)]
    everything = [stats for source in sources for stats in source.parts]
    for source in sources:
        if not source.train:
            raise DataError(
                f"{source.parts_dir} knows of no {TRAIN_PREFIX} shard", "run stage2_sftdata2webdataset.py first"
            )
        for _, parts in itertools.groupby(source.parts, lambda stats: stats["raw"]["path"]):
            _check_raw(list(parts))
    _check_rejects(sources, parts_dir, max_reject_fraction)
    for source in sources:
        for split in ("train", "heldout"):
            parts = getattr(source, split)
            if parts and not source.filled(split):
                raise DataError(
                    f"not one sample was written for {split}: {parts[0]['raw']['path']} has no usable record",
                    f"look into {source.parts_dir} for the reasons (*.rejects.jsonl)",
                )
    record = None
    if val_fraction and not any(source.heldout for source in sources):
        record = _hold_out(sources, val_fraction, split_seed)
    contents = {source.name: _write_source(source, record) for source in sources}
    metas = {source.name: read_meta(source.wds_dir) for source in sources}
    weights = {source.name: source.weight for source in sources}
    if len(sources) > 1:
        _write_blend(wds_dir, weights, metas)
    else:
        (wds_dir / METADATASET).unlink(missing_ok=True)  # of an earlier plan: readers would follow it
    epoch = sum(weight * metas[name].samples("train") for name, weight in weights.items())
    return {
        "fingerprint": contents[""] if len(sources) == 1 else fingerprint([contents, weights]),
        **split_counts(metas.values()),
        **{key: _total(everything, key) for key in ("images", "read", "rejected")},
        **{key: dict(sum((Counter(stats[key]) for stats in everything), Counter())) for key in ("reasons", "kinds")},
        "unread": dict(
            sum((Counter(stats.get("unread", {})) for stats in everything), Counter()).most_common(MOST_UNREAD)
        ),
        **({"split": record} if record else {}),
        **_leak(sources),
        # One pass over the blend: a record of weight 2 is seen twice.
        **({"weights": weights, "epoch_samples": round(epoch)} if len(sources) > 1 else {}),
    }


def _plan_of(parts_dir: Path) -> list[dict[str, Any]]:
    """Of parts that were made by hand: one source, or one in each sub-folder."""
    names = sorted(path.name for path in parts_dir.glob("*/") if next(path.glob("*.stats.json"), None))
    return [{"name": name, "weight": 1.0} for name in names or [""]]


def _hold_out(sources: list[Source], fraction: float, seed: int) -> dict[str, Any]:
    """Choose the held-out samples of all sources together; return what is recorded of it."""
    places = [(source, stats) for source in sources for stats in source.filled("train")]
    names = (bound_by(row) for source, stats in places for row in source.parsed(stats))
    sides, groups = choose_heldout(names, fraction, seed)
    side = iter(sides)
    for source, stats in places:
        source.chosen += ((stats["shard"], row) for row in source.rows(stats) if next(side))
    return {"val_fraction": fraction, "split_seed": seed, "groups": groups, "samples": sum(sides), "of": len(sides)}


def _leak(sources: list[Source]) -> dict[str, Any]:
    """How many of the held-out records that the user brought are trained on as well; empty when none is.

    `records` share images and question with a training record, `images` at least one image.
    """
    held = [row for source in sources for stats in source.filled("heldout") for row in source.parsed(stats)]
    if not held:
        return {}
    images, records = set(), set()
    for source in sources:
        for stats in source.filled("train"):
            for row in source.parsed(stats):
                images.update(image["hash"] for image in row["images"])
                records.add(_asked(row))
    counts = {
        "records": sum(_asked(row) in records for row in held if "asked" in row),
        "images": sum(any(image["hash"] in images for image in row["images"]) for row in held),
    }
    return {"heldout_trained_on": counts | {"of": len(held)}} if any(counts.values()) else {}


def _asked(row: dict[str, Any]) -> int:
    return hash((row.get("asked"), *(image["hash"] for image in row["images"])))


def told_leak(dataset: dict[str, Any]) -> str | None:
    """What dataset.json says of held-out samples that are trained on, in words."""
    if not (leak := dataset.get("heldout_trained_on")):
        return None
    return (
        f"{leak['records']:,} of {leak['of']:,} held-out samples are trained on (same images, same question),"
        f" {leak['images']:,} share an image with the training data: the held-out accuracy says less than it seems"
    )


def read_finished(wds_dir: Path) -> dict[str, Any]:
    """What the dataset file holds for a folder that is indexed already: counts from its `.nv-meta`, nothing is written.

    Errors: DataError when `.nv-meta` is not whole, a shard it names is missing, or nothing is there to train on.
    """
    meta = read_meta(wds_dir)
    content: list[Any] = sorted(meta.exclude)
    for name in meta.splits.get("train", []) + meta.splits.get("val", []):
        tar, idx = wds_dir / name, wds_dir / f"{name}.idx"
        if not (tar.is_file() and idx.is_file() and name in meta.counts):
            raise DataError(
                f"{tar}: named in split.yaml, but the tar, its .idx or its count is missing", "copy the folder again"
            )
        content.append([name, tar.stat().st_size, xxhash.xxh3_128_hexdigest(idx.read_bytes())])
    if not meta.samples("train"):
        raise DataError(f"{wds_dir}: the training split holds no samples", "name another folder")
    return {
        "fingerprint": fingerprint(content),
        **split_counts([meta]),
        "reasons": {},
        "kinds": {},
        **dict.fromkeys(("images", "read", "rejected")),
    }


def read_rejects(parts_dir: Path, parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rejects of shards in order, each with its `line` in the raw file (1-based)."""
    lines_before: Counter[str] = Counter()
    for stats in parts:
        if stats["rejected"]:
            path = parts_dir / f"{stats['shard']}.rejects.jsonl"
            try:
                rejects = [orjson.loads(row) | {} for row in path.read_bytes().splitlines()]
            except (OSError, ValueError, TypeError):
                raise DataError(
                    f"{path}: missing or damaged",
                    f"delete {stats['shard']}.tar and run the same command, which converts it again",
                ) from None
            for reject in rejects:
                yield reject | {"line": lines_before[reject["file"]] + reject["line_in_range"]}
        lines_before[stats["raw"]["path"]] += stats["lines"]


def _total(parts: Iterable[dict[str, Any]], key: str) -> int:
    return sum(stats[key] for stats in parts)


def is_whole(wds_dir: Path, parts_dir: Path, stats: dict[str, Any]) -> bool:
    """Whether a shard's files are there, in the sizes that its conversion noted."""
    try:
        tar, rows = wds_dir / f"{stats['shard']}.tar", parts_dir / f"{stats['shard']}.samples.jsonl"
        sizes = tar.stat().st_size, tar.with_suffix(".tar.idx").stat().st_size
        noted = [size for size, _ in stats.get("samples", {}).values()] or [rows.stat().st_size]
        return (
            stats["format_version"] == FORMAT_VERSION
            and sizes == (stats["tar"]["bytes"], 8 * (stats["written"] + 1))
            and noted == [rows.stat().st_size]
            and (not stats["rejected"] or (parts_dir / f"{stats['shard']}.rejects.jsonl").is_file())
            and stats["read"] == stats["written"] + stats["rejected"]
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return False


def _check_raw(parts: list[dict[str, Any]]) -> None:
    """The parts must be made from all of one raw file, once, as it is now."""
    path, due = parts[0]["raw"]["path"], 0
    for stats in parts:
        if stats["raw"]["start"] != due:
            raise DataError(
                f"{stats['shard']} begins at byte {stats['raw']['start']} of {path}, byte {due} was due:"
                " shards of several plans lie in one folder",
                f"delete the folder of {stats['shard']}.tar and its .parts, and run the same command",
            )
        due = stats["raw"]["end"]
    if not os.path.exists(path):
        return  # the raw data may be gone once it is converted
    status = os.stat(path)
    if status.st_size != due:
        raise DataError(
            f"{path} has {status.st_size} bytes now, the shards were made from its first {due}",
            "convert the last range and the new ones again; where the file has shrunk, delete the shards beyond its end",
        )
    touched = [stats for stats in parts if stats["raw"]["mtime_ns"] != status.st_mtime_ns]
    if changed := [stats["shard"] for stats in touched if hash_range(path, stats["raw"]) != stats["raw"]["hash"]]:
        raise DataError(
            f"{path} has changed within the ranges of {len(changed)} shards: {_some(changed)}",
            "run the same command (snakemake data_EXPERIMENT), which converts these again; by hand: convert these ranges",
        )


def hash_range(path: str, raw: dict[str, Any]) -> str:
    """The hash of a range's bytes, as its conversion took it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=1 << 20) as file:
        if raw["format"] == "jsonl":  # from line to line
            for _ in read_lines(file, raw["start"], raw["end"], digest.update):
                pass
        else:
            file.seek(raw["start"])
            left = raw["end"] - raw["start"]
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def _check_rejects(sources: list[Source], parts_dir: Path, allowed: float) -> None:
    """Write all rejects with their true lines to REJECTS; raise DataError when there are more than allowed."""
    rejected, read = (sum(_total(source.parts, key) for source in sources) for key in ("rejected", "read"))
    first: list[str] = []
    with atomic_file(parts_dir / REJECTS) as file:
        for reject in itertools.chain(*(read_rejects(source.parts_dir, source.parts) for source in sources)):
            file.write(orjson.dumps(reject, option=orjson.OPT_APPEND_NEWLINE))
            if len(first) < FIRST_REASONS:
                name = f", id {reject['id']}" if reject["id"] is not None else ""
                detail = f" ({reject['detail']})" if reject["detail"] else ""
                first.append(f"  {reject['file']}, {reject['word']} {reject['line']}{name}: {reject['reason']}{detail}")
    if rejected > allowed * read:
        raise too_many_rejects(rejected, read, allowed, first, f"{parts_dir / REJECTS}")


def too_many_rejects(rejected: int, read: int, allowed: float, first: list[str], where: str) -> DataError:
    """The message; `where` all of them stand. That nothing is left is never advised."""
    problem = (
        f"{rejected:,} of {read:,} records were rejected; max_reject_fraction {allowed:g} allows"
        f" {int(allowed * read):,}. The first:\n" + "\n".join(first)
    )
    if rejected == read:
        return DataError(
            problem, f"not one record can be used: it is their form. Read are {FORMS}; all rejects: {where}"
        )
    shares = (math.ceil(rejected / read * 10**digits) / 10**digits for digits in range(1, 18))
    enough = next((share for share in shares if 1 > share >= rejected / read), rejected / read)
    return DataError(
        problem,
        f"mend these records (all: {where}), or accept that they are left out with"
        f" max_reject_fraction: {enough!r} (by hand: --max-reject-fraction {enough!r})",
    )


class Tar(NamedTuple):
    """A tar as the index knows it: its name without `.tar`, its samples' number and rows {key, offset, size, parts}."""

    name: str
    count: int
    rows: Iterable[dict[str, Any]]


def _write_source(source: Source, record: dict[str, Any] | None) -> str:
    """Write a source's `.nv-meta` and its merged held-out tars; return the fingerprint."""
    filled = {split: source.filled(split) for split in ("train", "heldout")}
    with atomic_dir(source.wds_dir / ".heldout.new") as staged:
        merged = merge_heldout(source.wds_dir, staged, source.chosen)
    staged = source.wds_dir / ".heldout.new"
    exclude = [f"{shard}.tar/{orjson.loads(row)['key']}" for shard, row in source.chosen]
    content = {split: [[p["shard"], p["tar"]["hash"]] for p in parts] for split, parts in filled.items()}
    content["heldout"] += [[name, tar_hash] for name, _, tar_hash in merged]
    tars = [Tar(p["shard"], p["written"], source.parsed(p)) for parts in filled.values() for p in parts] + [
        Tar(name, len(rows), rows) for name, rows, _ in merged
    ]
    splits = {split: [f"{name}.tar" for name, _ in named] for split, named in content.items()}
    tar_names = [f"{name}.tar" for name, _, _ in merged]
    own = fingerprint([content, exclude] if exclude else content)
    before = read_json(source.wds_dir / ".nv-meta" / HELDOUT_RECORD, {"tars": []})
    stale = set(before["tars"]) - set(splits["heldout"])
    with write_meta(source.wds_dir, tars, splits["train"], splits["heldout"], exclude, own) as meta:
        if merged and record:
            write_json(meta / HELDOUT_RECORD, record | {"tars": tar_names}, sealed=True)
            shutil.rmtree(source.wds_dir / ".nv-meta", ignore_errors=True)  # the old index ends with the old tars
            for path in staged.iterdir():
                os.replace(path, source.wds_dir / path.name)
    shutil.rmtree(staged)
    for name in stale:
        for path in (source.wds_dir / name, source.wds_dir / f"{name}.idx"):
            path.unlink(missing_ok=True)
    return own


def _write_blend(wds_dir: Path, weights: dict[str, float], metas: dict[str, Meta]) -> None:
    """Energon's metadataset: `weight` is how often a record is drawn, so a source is drawn by weight × samples."""
    splits = {}
    for split in ENERGON_SPLITS.values():
        draws = {name: weight * metas[name].samples(split) for name, weight in weights.items()}
        blend = [{"path": name, "weight": n, "subflavors": {"source": name}} for name, n in draws.items() if n]
        if blend:
            splits[split] = {"blend": blend}
    config = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    write_text(wds_dir / METADATASET, yaml.safe_dump(config, sort_keys=False))


@contextlib.contextmanager
def write_meta(
    wds_dir: Path, tars: Iterable[Tar], train: list[str], heldout: list[str], exclude: list[str], content: str,
    layout: str = "own",
) -> Iterator[Path]:  # fmt: skip
    """Write `.nv-meta` beside its place, yield it there, then put it in its place. `content` names what is in the set."""
    # tar_file_id is the place in .info.json; energon numbers tars in the order of their names.
    tars = sorted(tars, key=lambda tar: tar.name)
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    if layout != "own":
        dataset["subflavors"] = {"layout": layout}
    counts = {f"{tar.name}.tar": tar.count for tar in tars}
    info = {"energon_version": version("megatron-energon"), "shard_counts": counts}
    parts = {split: [literal(name) for name in names] for split, names in (("train", train), ("val", heldout))}
    parts["test"] = []
    splits = {"split_parts": parts, "exclude": [literal(name) for name in exclude]}
    with atomic_dir(wds_dir / ".nv-meta") as meta:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        write_text(meta / "split.yaml", yaml.dump(splits, Dumper=dumper, sort_keys=False))
        write_text(meta / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False))
        write_text(meta / ".info.json", orjson.dumps(info, option=orjson.OPT_INDENT_2).decode())
        write_text(meta / "index.uuid", str(uuid.uuid5(uuid.NAMESPACE_OID, content)))
        _write_sqlite(meta / "index.sqlite", tars)
        yield meta


def _write_sqlite(path: Path, tars: list[Tar]) -> None:
    database = sqlite3.connect(path)
    # The file is thrown away with its folder when this fails, so it needs no journal.
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    for statement in (*TABLES, DIGESTS):
        database.execute(statement)
    for tar_id, tar in enumerate(tars):
        samples: list[tuple] = []
        members: list[tuple] = []
        digests: list[tuple] = []
        for row, sample in enumerate(tar.rows):
            samples.append((tar_id, sample["key"], row, sample["offset"], sample["size"]))
            members += ((tar_id, row, *part) for part in sample["parts"])
            if digest := sample.get("digest"):  # shards of earlier versions have none
                digests.append((tar_id, row, bytes.fromhex(digest)))
        if len(samples) != tar.count:
            raise DataError(
                f"{tar.name}.samples.jsonl has {len(samples)} rows, {tar.count} samples were written",
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
