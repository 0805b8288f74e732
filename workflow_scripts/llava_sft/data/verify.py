"""Whether a data set still is what was converted and indexed, and which shards a change makes out of date.

Notable: `DATASET.files.json` beside the dataset file holds what the index step found: a checksum of each small file,
size and date of each tar. Where they agree nothing is read; a tar of another date is read, and compared with the digests
of its samples in the index. A raw file counts as changed when its size or any of its dates is another, not a later one,
and then the hash of each range decides. No torch.
"""

import itertools
import os
import struct
import tarfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava_sft.checksums import Memo, damages, note
from llava_sft.data.notes import hash_range, is_whole, read_stats, way_out
from llava_sft.data.nv_meta import META_FILES, METADATASET, NV_META, REINDEX, SampleIndex, read_meta, source_folders
from llava_sft.data.plan import Range, default_notes_dir
from llava_sft.data.tars import Extent, sample_digest, walk_tar
from llava_sft.errors import DamagedFileError, DataError, many, verb_of
from llava_sft.files import read_json, write_json


class Damage(NamedTuple):
    """A file of a data set that is not what it was; `redo` is the tar to be converted again, None: the index."""

    file: str
    what: str
    fix: str
    redo: str | None = None


def notes_of(dataset: Path) -> Path:
    """Where the state of a data set's files is noted, beside its dataset file."""
    return dataset.with_name(f"{dataset.stem}.files.json")


def note_dataset(wds_dir: Path, dataset: Path) -> None:
    """Note the files of a data set that was just indexed."""
    small, tars = [], {}
    for folder in source_folders(wds_dir):
        small += [folder / NV_META / name for name in META_FILES]
        for name in read_meta(folder).counts:
            small.append(folder / f"{name}.idx")
            status = os.stat(folder / name)
            tars[str((folder / name).relative_to(wds_dir))] = [status.st_size, status.st_mtime_ns]
    small.append(wds_dir / METADATASET)
    noted = {"files": note(wds_dir, [path for path in small if path.is_file()]), "tars": tars}
    write_json(notes_of(dataset), noted, indent=None, sealed=True)


def find_damages(wds_dir: Path, dataset: Path, full: bool = False) -> list[Damage]:
    """What is wrong with the files of a data set. `full`: every byte of every sample is read.

    A data set that was indexed by an earlier version has no notes: without `full` nothing is found there.
    """
    try:
        noted: dict[str, Any] = read_json(notes_of(dataset), {"files": {}, "tars": {}})
        files, tars = dict(noted["files"]), dict(noted["tars"])
    except (DamagedFileError, KeyError, TypeError, ValueError):
        return [Damage(str(notes_of(dataset)), "is damaged", f"delete {notes_of(dataset)} and run the same command")]
    memo = dataset.with_name(f".{dataset.stem}.whole.json")
    found = [_small_damage(wds_dir, name, what) for name, what in damages(wds_dir, files, memo, full)]
    if found:
        return found  # the digests of the samples stand in one of these
    whole = Memo(memo)
    indexed = ((f, *tar) for f in source_folders(wds_dir) for tar in enumerate(read_meta(f).counts.items()))
    for folder, number, (tar, count) in indexed:
        path = folder / tar
        name = str(path.relative_to(wds_dir))
        state: list[int] = []
        try:
            status = os.stat(path)
            state = [status.st_size, status.st_mtime_ns, status.st_ino]
            size, date = tars.get(name, state[:2])
            if not full and (state[:2] == [size, date] or whole.knows(path, state)):
                continue
            what = f"has {state[0]:,} bytes, {size:,} were written" if state[0] != size else None
            what = what or find_changed_sample(path, folder, number, count)
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        if what:
            found.append(Damage(str(path), what, way_out(folder, tar), name))
        else:
            whole.add(path, state)
    whole.save()
    return found


def _small_damage(wds_dir: Path, name: str, what: str) -> Damage:
    tar = name.removesuffix(".idx")
    if tar == name:
        return Damage(str(wds_dir / name), what, REINDEX)
    path = wds_dir / tar
    return Damage(str(wds_dir / name), what, way_out(path.parent, path.name), tar)


def find_changed_sample(tar: Path, folder: Path, number: int, count: int) -> str | None:
    """What is wrong with a tar, by the digests of its samples in the index of `folder` (all bytes are read).

    Where every sample has one, their places are those of the `.tar.idx`, which is far faster than to look for headers.
    """
    try:
        with SampleIndex(folder) as index:
            digests = index.digests(number)
            members: dict[int, list[Extent]] = defaultdict(list)
            for row, _, offset, size in index.members(number) if len(digests) == count else ():
                members[row].append((offset, size))
        if len(digests) == count:
            data = Path(f"{tar}.idx").read_bytes()
            if len(data) != 8 * (count + 1):
                return f"its .idx has {len(data):,} bytes, {8 * (count + 1):,} are due"
            starts, size = struct.unpack(f"<{count + 1}Q", data), os.path.getsize(tar)
            with open(tar, "rb") as file:
                for row, (start, stop) in enumerate(itertools.pairwise(starts)):
                    sample = os.pread(file.fileno(), max(0, stop - start), start) if stop <= size else b""
                    if sample_digest(sample, [(at - start, size) for at, size in members[row]]) != digests[row]:
                        return f"sample {row} (counted from 0) does not hold what was written"
            return None
        samples = walk_tar(tar)
        if len(samples) != count:
            return f"holds {many(len(samples), 'sample')}, {count:,} {verb_of(count, 'were')} written"
    except (OSError, OverflowError, tarfile.TarError) as error:
        return f"cannot be read: {error}"
    return None


def require_whole(wds_dir: Path, dataset: Path, full: bool = False) -> None:
    """Errors: DataError naming the first file that is not what was indexed, and how many there are."""
    if found := find_damages(wds_dir, dataset, full):
        first, more = found[0], f" ({len(found)} files in all)" if len(found) > 1 else ""
        raise DataError(f"{first.file}: {first.what}{more}", first.fix)


def out_of_date(webdatasets: Path, dataset: Path, planned: Mapping[str, tuple[Path, Range]]) -> list[Path]:
    """Of the tars and the dataset file those that exist and have to be made again.

    `planned`: raw file and range of each shard of the plan, by its name with its source. Snakemake finds what is missing or newer by
    itself; this adds what is damaged or gone beside a tar, and ranges of raw files whose content is another, whatever their
    dates say.
    """
    stale: set[str] = set()
    made: dict[Path, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for name, (raw, part) in planned.items():
        if not (webdatasets / f"{name}.tar").exists():
            continue
        notes_dir = (default_notes_dir(webdatasets) / name).parent
        try:
            stats = read_stats(notes_dir / f"{Path(name).name}.stats.json")
            if not is_whole((webdatasets / name).parent, notes_dir, stats):
                stale.add(name)
            elif raw.is_file() and (stats["raw"]["start"], stats["raw"]["end"]) == (part.start, part.end):
                made[raw].append((name, stats["raw"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            stale.add(name)
    seen = Memo(dataset.with_name(".raw_files.json"))
    for raw, ranges in made.items():
        status = os.stat(raw)
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        if seen.knows(raw, state):
            continue
        changed = {
            name
            for name, noted in ranges  # of other dates or size than a conversion noted
            if [noted["size"], noted["mtime_ns"], noted.get("ctime_ns", state[2])] != state
            and hash_range(raw, noted) != noted["hash"]
        }
        stale |= changed
        if not changed:
            seen.add(raw, state)
    seen.save()
    index = False
    if dataset.is_file():
        try:
            found = find_damages(webdatasets, dataset)
        except (DataError, OSError):
            found, index = [], True
        for damage in found:
            tar = damage.redo.removesuffix(".tar") if damage.redo else None
            if tar and tar in planned:
                stale.add(tar)
            elif tar is None or planned or damage.file.endswith(".idx"):
                index = True  # a foreign folder's own tar is not ours to make again: training refuses it
    return [*(webdatasets / f"{name}.tar" for name in sorted(stale)), *([dataset] if index else [])]
