"""Many shards → one energon data set: checks what the conversion jobs report, and writes `.nv-meta` in one go.

Notable: no tar is read; what `energon prepare` would collect from them was noted while they were written. Only shards
of the present plan enter. The dataset file names content alone (hashes, counts), so that equal shards, made again, are
the same data set to all that follows.
"""

import os
import re
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import xxhash
import yaml

from llava_sft.data.plan import HELDOUT_PREFIX, TRAIN_PREFIX, shard_name
from llava_sft.data.records import read_lines
from llava_sft.data.shards import FORMAT_VERSION
from llava_sft.errors import DataError
from llava_sft.files import atomic_dir, fingerprint, read_json, write_text

FIRST_REASONS = 10

# The schema of energon's own index (megatron-energon 7.4, flavors/webdataset/indexing.py).
TABLES = (
    "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE,"
    " sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER)",
    "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,"
    " content_byte_offset INTEGER, content_byte_size INTEGER)",
)
INDEXES = (
    "CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index)",
    "CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset)",
    "CREATE INDEX idx_sample_parts_full ON"
    " sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size)",
)


def index_webdataset(
    wds_dir: Path,
    parts_dir: Path,
    raw_files: Iterable[str] = (),
    max_reject_fraction: float = 0.0,
    train_shards: int | None = None,
    heldout_shards: int | None = None,
) -> dict[str, Any]:
    """Check the parts, write `wds_dir/.nv-meta`, return what the dataset file holds.

    `train_shards` and `heldout_shards` are the numbers of shards in the plan (None: all that are there).
    `max_reject_fraction` is the share of records, 0 to 1, that may be rejected. `raw_files` tell where raw files lie
    now, when not where the conversion read them.
    Errors: DataError for missing or foreign parts, a changed raw file, too many rejects, no samples.
    """
    splits = {
        "train": _read_parts(wds_dir, parts_dir, TRAIN_PREFIX, train_shards),
        "heldout": _read_parts(wds_dir, parts_dir, HELDOUT_PREFIX, heldout_shards),
    }
    everything = splits["train"] + splits["heldout"]
    if not splits["train"]:
        raise DataError(f"{parts_dir} knows of no {TRAIN_PREFIX} shard", "run stage2_sftdata2webdataset.py first")
    for parts in splits.values():
        _check_raw(parts, {Path(path).name: path for path in raw_files})
    _check_rejects(everything, parts_dir, max_reject_fraction)
    for split, parts in splits.items():
        if parts and not any(stats["written"] for stats in parts):
            raise DataError(
                f"not one sample was written for {split}: {parts[0]['raw']['path']} has no usable record",
                f"look into {parts_dir} for the reasons (*.rejects.jsonl)",
            )
    filled = {split: [stats for stats in parts if stats["written"]] for split, parts in splits.items()}
    content = fingerprint({split: [[p["shard"], p["tar"]["hash"]] for p in parts] for split, parts in filled.items()})
    _write_meta(wds_dir, parts_dir, filled, content)
    return {
        "fingerprint": content,
        **{split: {"samples": _total(parts, "written"), "shards": len(parts)} for split, parts in filled.items()},
        **{key: _total(everything, key) for key in ("images", "read", "rejected")},
        **{key: dict(sum((Counter(stats[key]) for stats in everything), Counter())) for key in ("reasons", "kinds")},
    }


def read_finished(wds_dir: Path) -> dict[str, Any]:
    """What the dataset file holds for a folder that is indexed already: counts from its `.nv-meta`, nothing is written.

    Errors: DataError when `.nv-meta` is not whole, a shard it names is missing, or nothing is there to train on.
    """
    meta = wds_dir / ".nv-meta"
    for name in (".info.json", "split.yaml", "dataset.yaml"):
        if not (meta / name).is_file():
            raise DataError(
                f"{meta / name} is missing", "index the folder again, or convert your raw data with raw_data"
            )
    counts = read_json(meta / ".info.json")["shard_counts"]
    split_parts = yaml.safe_load((meta / "split.yaml").read_text())["split_parts"]
    splits = {"train": split_parts.get("train") or [], "heldout": split_parts.get("val") or []}
    content = []
    for name in splits["train"] + splits["heldout"]:
        tar, idx = wds_dir / name, wds_dir / f"{name}.idx"
        if not (tar.is_file() and idx.is_file() and name in counts):
            raise DataError(
                f"{tar}: named in split.yaml, but the tar, its .idx or its count is missing", "copy the folder again"
            )
        content.append([name, tar.stat().st_size, xxhash.xxh3_128_hexdigest(idx.read_bytes())])
    if not any(counts[name] for name in splits["train"]):
        raise DataError(f"{wds_dir}: the training split holds no samples", "name another folder")
    return {
        "fingerprint": fingerprint(content),
        **{
            split: {"samples": sum(counts[name] for name in names), "shards": len(names)}
            for split, names in splits.items()
        },
        "reasons": {},
        "kinds": {},
        **dict.fromkeys(("images", "read", "rejected")),
    }


def read_rejects(parts_dir: Path, parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rejects of shards in order, each with its `line` in the raw file (1-based)."""
    lines_before: Counter[str] = Counter()
    for stats in parts:
        if stats["rejected"]:
            for row in (parts_dir / f"{stats['shard']}.rejects.jsonl").read_bytes().splitlines():
                reject = orjson.loads(row)
                yield reject | {"line": lines_before[reject["file"]] + reject["line_in_range"]}
        lines_before[stats["raw"]["path"]] += stats["lines"]


def _total(parts: Iterable[dict[str, Any]], key: str) -> int:
    return sum(stats[key] for stats in parts)


def _read_parts(wds_dir: Path, parts_dir: Path, prefix: str, planned: int | None) -> list[dict[str, Any]]:
    """The statistics of a split's shards in order, each checked against its files."""
    if planned is None:
        found = (re.fullmatch(rf"{prefix}-(\d+)\.stats\.json", path.name) for path in parts_dir.glob(f"{prefix}-*"))
        numbers = sorted(int(match[1]) for match in found if match)
    else:
        numbers = list(range(planned))
    names = [shard_name(prefix, number) for number in numbers]
    missing = [name for name in names if not (parts_dir / f"{name}.stats.json").exists()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} {prefix} shards are not converted: {_some(missing)}",
            "run stage2_sftdata2webdataset.py for them",
        )
    parts = [read_json(parts_dir / f"{name}.stats.json") for name in names]
    bad = [name for name, stats in zip(names, parts, strict=True) if not _is_whole(wds_dir, stats)]
    if bad:
        raise DataError(
            f"shards do not match their statistics (tar or .tar.idx missing or changed, or of an older format): {_some(bad)}",
            f"delete {parts_dir}/{bad[0]}.stats.json (and the same for each) and convert them again",
        )
    return parts


def _is_whole(wds_dir: Path, stats: dict[str, Any]) -> bool:
    tar = wds_dir / f"{stats['shard']}.tar"
    try:
        sizes = tar.stat().st_size, tar.with_suffix(".tar.idx").stat().st_size
    except FileNotFoundError:
        return False
    return (
        stats["format_version"] == FORMAT_VERSION
        and sizes == (stats["tar"]["bytes"], 8 * (stats["written"] + 1))
        and stats["read"] == stats["written"] + stats["rejected"]
    )


def _check_raw(parts: list[dict[str, Any]], moved: dict[str, str]) -> None:
    """The parts must be made from all of the raw file, once, as it is now."""
    for before, stats in zip([None, *parts], parts, strict=False):
        due = before["raw"]["end"] if before else 0
        if stats["raw"]["start"] != due:
            raise DataError(
                f"{stats['shard']} begins at byte {stats['raw']['start']} of {stats['raw']['path']}, byte {due} was due:"
                " shards of several plans lie in one folder",
                "delete the shards and their statistics, and convert again",
            )
    changed = []
    for stats in parts:
        raw = stats["raw"]
        path = moved.get(Path(raw["path"]).name, raw["path"])
        if not os.path.exists(path):
            if path != raw["path"]:
                raise DataError(f"raw file {path} does not exist", "correct the path")
            continue  # the raw data may be gone once it is converted
        status = os.stat(path)
        if stats is parts[-1] and status.st_size != raw["end"]:
            raise DataError(
                f"{path} has {status.st_size} bytes now, the shards were made from its first {raw['end']}",
                "convert the last range and the new ones again; where the file has shrunk, delete the shards beyond its end",
            )
        if status.st_mtime_ns != raw["mtime_ns"]:
            digest = xxhash.xxh3_128()
            with open(path, "rb", buffering=1 << 20) as file:
                for _ in read_lines(file, raw["start"], raw["end"], digest.update):
                    pass
            if digest.hexdigest() != raw["hash"]:
                changed.append(stats["shard"])
    if changed:
        raise DataError(
            f"{parts[0]['raw']['path']} has changed within the ranges of {len(changed)} shards: {_some(changed)}",
            f"delete these shards' .tar (first: {changed[0]}.tar) and convert them again",
        )


def _check_rejects(parts: list[dict[str, Any]], parts_dir: Path, allowed: float) -> None:
    rejected, read = _total(parts, "rejected"), _total(parts, "read")
    if rejected <= allowed * read:
        return
    first = []
    for reject in read_rejects(parts_dir, parts):
        name = f", id {reject['id']}" if reject["id"] is not None else ""
        detail = f" ({reject['detail']})" if reject["detail"] else ""
        first.append(f"  {reject['file']}, line {reject['line']}{name}: {reject['reason']}{detail}")
        if len(first) == FIRST_REASONS:
            break
    enough = next(share for digits in range(1, 18) if (share := round(rejected / read, digits)) * read >= rejected)
    raise DataError(
        f"{rejected:,} of {read:,} records were rejected; max_reject_fraction {allowed:g} allows"
        f" {int(allowed * read):,}. The first:\n" + "\n".join(first),
        f"mend these records (all: {parts_dir}/*.rejects.jsonl), or accept that they are left out with"
        f" max_reject_fraction: {enough:g} (by hand: --max-reject-fraction {enough:g})",
    )


def _write_meta(wds_dir: Path, parts_dir: Path, splits: dict[str, list[dict[str, Any]]], content: str) -> None:
    shards = {split: [f"{stats['shard']}.tar" for stats in parts] for split, parts in splits.items()}
    # tar_file_id is the place in .info.json; energon numbers tars in the order of their names.
    parts = sorted(splits["train"] + splits["heldout"], key=lambda stats: stats["shard"])
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    info = {
        "energon_version": version("megatron-energon"),
        "shard_counts": {f"{stats['shard']}.tar": stats["written"] for stats in parts},
    }
    with atomic_dir(wds_dir / ".nv-meta") as meta:
        split_parts = {"train": shards["train"], "val": shards["heldout"], "test": []}
        write_text(meta / "split.yaml", yaml.safe_dump({"split_parts": split_parts, "exclude": []}, sort_keys=False))
        write_text(meta / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False))
        write_text(meta / ".info.json", orjson.dumps(info, option=orjson.OPT_INDENT_2).decode())
        write_text(meta / "index.uuid", str(uuid.uuid5(uuid.NAMESPACE_OID, content)))
        _write_sqlite(meta / "index.sqlite", parts_dir, parts)


def _write_sqlite(path: Path, parts_dir: Path, parts: list[dict[str, Any]]) -> None:
    database = sqlite3.connect(path)
    # The file is thrown away with its folder when this fails, so it needs no journal.
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    for statement in TABLES:
        database.execute(statement)
    for tar_id, stats in enumerate(parts):
        samples: list[tuple] = []
        members: list[tuple] = []
        with open(parts_dir / f"{stats['shard']}.samples.jsonl", "rb") as file:
            for row, line in enumerate(file):
                sample = orjson.loads(line)
                samples.append((tar_id, sample["key"], row, sample["offset"], sample["size"]))
                members += ((tar_id, row, *part) for part in sample["parts"])
        if len(samples) != stats["written"]:
            raise DataError(
                f"{file.name} has {len(samples)} rows, {stats['written']} samples were written",
                f"delete {stats['shard']}.stats.json and convert that shard again",
            )
        database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", samples)
        database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", members)
    for statement in INDEXES:
        database.execute(statement)
    database.commit()
    database.close()


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
