"""What the conversion notes of its shards, beside the WebDataset: statistics, rows of samples, hashes; read and checked.

Notable: no tar is read. Sizes, checksums of the small files and the hash of each range of a raw file tell whether shards
still are what was converted.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
import xxhash

from llava_sft.checksums import find_damage
from llava_sft.data.formats import read_blocks
from llava_sft.data.plan import FILE_STEP, HELDOUT_PREFIX, TRAIN_PREFIX, default_notes_dir, shard_name
from llava_sft.data.records import read_lines
from llava_sft.data.shards import FORMAT_VERSION
from llava_sft.errors import DamagedFileError, DataError, many, shown, verb_of
from llava_sft.files import read_json

Stats = dict[str, Any]  # what shards.py writes into `.stats.json`


class ConvertedSource:
    """The planned shards of one source: their statistics by split, each checked against its files.

    Errors: DataError for shards that are missing, damaged, or not converted yet.
    """

    def __init__(self, wds_dir: Path, notes_dir: Path, plan: dict[str, Any]):
        self.name, self.weight = plan["name"], plan["weight"]
        self.wds_dir, self.notes_dir = wds_dir / self.name, notes_dir / self.name
        self.train = self._read(TRAIN_PREFIX, plan.get(TRAIN_PREFIX))
        self.heldout = self._read(HELDOUT_PREFIX, plan.get(HELDOUT_PREFIX, [] if TRAIN_PREFIX in plan else None))
        self.shards = self.train + self.heldout

    def _read(self, prefix: str, planned: list[int] | None) -> list[Stats]:
        """The statistics of a split's shards in order; `planned`: shards of each raw file, None: all that are there."""
        if planned is None:
            paths = self.notes_dir.glob(f"{prefix}-*")
            matches = (re.fullmatch(rf"{prefix}-(\d+)\.stats\.json", path.name) for path in paths)
            numbers = sorted(int(match[1]) for match in matches if match)
        else:
            numbers = [file * FILE_STEP + n for file, count in enumerate(planned) for n in range(count)]
        names = [shard_name(prefix, number) for number in numbers]
        missing = [name for name in names if not (self.notes_dir / f"{name}.stats.json").exists()]
        if missing:
            raise DataError(
                f"{len(missing)} of {many(len(names), f'{prefix} shard')} {verb_of(len(missing), 'are')} not converted: {_first_few(missing)}",
                "run stage2_sftdata2webdataset.py for them",
            )
        shards = [read_stats(self.notes_dir / f"{name}.stats.json") for name in names]
        bad = [n for n, stats in zip(names, shards, strict=True) if not is_whole(self.wds_dir, self.notes_dir, stats)]
        if bad:
            raise self._damaged(
                "shards do not match their statistics (tar, .tar.idx or .samples.jsonl missing or changed, or of an older"
                " format)",
                bad,
            )
        if odd := [stats["shard"] for stats in shards if find_damage(self.notes_dir, stats.get("samples", {}))]:
            raise self._rows_damaged(odd)
        return shards

    def filled(self, split: str) -> list[Stats]:
        """The shards of "train" or "heldout" that hold samples."""
        return [stats for stats in getattr(self, split) if stats["written"]]

    def rows(self, stats: Stats) -> Iterator[bytes]:
        """The lines of a shard's `.samples.jsonl`."""
        with open(self.notes_dir / f"{stats['shard']}.samples.jsonl", "rb") as file:
            yield from file

    def parsed(self, stats: Stats) -> Iterator[dict[str, Any]]:
        try:
            for row in self.rows(stats):
                yield orjson.loads(row)
        except ValueError:
            raise self._rows_damaged([stats["shard"]]) from None

    def _rows_damaged(self, names: list[str]) -> DataError:
        what = f"{self.notes_dir}: the lines of .samples.jsonl are not those that the conversion wrote"
        return self._damaged(what, names)

    def _damaged(self, what: str, names: list[str]) -> DataError:
        fix = f"delete {self.wds_dir}/{names[0]}.tar (and the same for each) and run the same command, which converts them again"
        return DataError(f"{what}: {_first_few(names)}", fix)


def read_stats(path: Path) -> Stats:
    """What the conversion noted of a shard. Raises DamagedFileError where it is of another one."""
    stats = read_json(path)
    if stats.get("shard") != path.name.removesuffix(".stats.json"):
        raise DamagedFileError(
            f"{path}: damaged: it is of {shown(stats.get('shard'))}",
            "delete that shard's .tar and run the same command",
        )
    return stats


def is_whole(wds_dir: Path, notes_dir: Path, stats: Stats) -> bool:
    """Whether a shard's files are there, in the sizes that its conversion noted."""
    try:
        tar, rows = wds_dir / f"{stats['shard']}.tar", notes_dir / f"{stats['shard']}.samples.jsonl"
        sizes = tar.stat().st_size, tar.with_suffix(".tar.idx").stat().st_size
        noted = [size for size, _ in stats.get("samples", {}).values()] or [rows.stat().st_size]
        return (
            stats["format_version"] == FORMAT_VERSION
            and sizes == (stats["tar"]["bytes"], 8 * (stats["written"] + 1))
            and noted == [rows.stat().st_size]
            and (not stats["rejected"] or (notes_dir / f"{stats['shard']}.rejects.jsonl").is_file())
            and stats["read"] == stats["written"] + stats["rejected"]
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return False


def check_raw(shards: list[Stats]) -> None:
    """Errors: DataError unless the shards are made from all of one raw file, once, as it is now."""
    path, due = shards[0]["raw"]["path"], 0
    for stats in shards:
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
    touched = [stats for stats in shards if stats["raw"]["mtime_ns"] != status.st_mtime_ns]
    if changed := [stats["shard"] for stats in touched if hash_range(path, stats["raw"]) != stats["raw"]["hash"]]:
        raise DataError(
            f"{path} has changed within the ranges of {many(len(changed), 'shard')}: {_first_few(changed)}",
            "run the same command (make data_EXPERIMENT), which converts these again; by hand: convert these ranges",
        )


def hash_range(path: Path | str, raw: dict[str, Any]) -> str:
    """The hash of a range's bytes, as its conversion took it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=1 << 20) as file:
        if raw["format"] == "jsonl":  # from line to line
            for _ in read_lines(file, raw["start"], raw["end"], digest.update):
                pass
        else:
            read_blocks(file, raw["start"], raw["end"], digest.update)
    return digest.hexdigest()


def total(shards: Iterable[Stats], key: str) -> int:
    return sum(stats[key] for stats in shards)


def counted(shards: Iterable[Stats], key: str) -> Counter[str]:
    """The counts under a key of all shards, which earlier versions may not have noted."""
    return sum((Counter(stats.get(key, {})) for stats in shards), Counter())


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def way_out(folder: Path, name: str) -> str:
    """How a damaged tar of `folder` is made whole: who made it can make it again."""
    notes_dirs = (default_notes_dir(folder), default_notes_dir(folder.parent) / folder.name)
    shard, tar = name.removesuffix(".tar"), folder / name
    if any((path / f"{shard}.stats.json").exists() for path in notes_dirs):
        return f"delete {tar} and run the same command (make data_EXPERIMENT), which converts it again"
    if any(path.is_dir() for path in notes_dirs):  # merged by val_fraction
        return f"delete {folder}/.nv-meta and run the same command (make data_EXPERIMENT), which makes it again"
    return f"copy or make {tar.resolve()} again, and run the same command"


def without_images_like_it(folder: Path, name: str) -> str:
    """The way out where a tar holds what was written, and an image in it was damaged before."""
    again = way_out(folder, name)
    if again.startswith("delete"):
        return f"mend that image, or set decode_images: true and a max_reject_fraction, which reject it; then {again}"
    return "run the data step again with a max_reject_fraction, which leaves such samples out; by hand: index_webdataset.py"
