"""Combine shards into one energon data set: check the conversion's notes, write `.nv-meta`.

Notable: no tar is read; what `energon prepare` would collect from them was noted while they were written. Only shards
of the present plan enter. Several sources are a folder each, and a blend of them.
"""

import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import xxhash

from llava_sft.data.hold_out import bound_by, choose_heldout, merge_heldout
from llava_sft.data.notes import ConvertedSource, check_raw, counted, total
from llava_sft.data.nv_meta import METADATASET, NV_META, Dataset, Tar, read_meta, split_counts, write_blend, write_meta
from llava_sft.data.plan import TRAIN_PREFIX
from llava_sft.data.rejects import ALL_REJECTS, read_rejects, too_many_rejects, write_all_rejects
from llava_sft.data.shards import MOST_UNREAD
from llava_sft.errors import DataError
from llava_sft.files import atomic_dir, fingerprint, read_json, write_json

MOST_SAID = 5  # keys that are not read, in a warning
HELDOUT_RECORD = "heldout.json"  # in .nv-meta: how val_fraction was carried out

Chosen = dict[str, list[tuple[str, bytes]]]  # by source: (shard, row) of the samples that val_fraction holds out


def index_webdataset(
    wds_dir: Path, notes_dir: Path, max_reject_fraction: float = 0.0, plan: list[dict[str, Any]] | None = None,
    val_fraction: float = 0.0, split_seed: int = 0,
) -> Dataset:  # fmt: skip
    """Check the shards, write `.nv-meta` (of each source, and their blend), return what the dataset file holds.

    `plan` names the sources with their weights and numbers of shards (None: all that are there). `max_reject_fraction`
    is the share of records, 0 to 1, that may be rejected. `val_fraction` holds out a share of the training
    records when there are no others.
    Errors: DataError for missing or foreign shards, a changed raw file, too many rejects, no samples.
    """
    sources = [ConvertedSource(wds_dir, notes_dir, entry) for entry in plan or _plan_of(notes_dir)]
    shards = [stats for source in sources for stats in source.shards]
    for source in sources:
        if not source.train:
            raise DataError(
                f"{source.notes_dir} knows of no {TRAIN_PREFIX} shard", "run stage2_sftdata2webdataset.py first"
            )
        for _, of_one_file in itertools.groupby(source.shards, lambda stats: stats["raw"]["path"]):
            check_raw(list(of_one_file))
    rejected, read = (total(shards, key) for key in ("rejected", "read"))
    rejects = (row for source in sources for row in read_rejects(source.notes_dir, source.shards))
    first = write_all_rejects(notes_dir / ALL_REJECTS, rejects)
    if rejected > max_reject_fraction * read:
        reasons = counted(shards, "reasons")
        raise too_many_rejects(rejected, read, max_reject_fraction, first, notes_dir / ALL_REJECTS, reasons)
    _check_filled(sources)
    chosen: Chosen = {}
    record = None
    if val_fraction and not any(source.heldout for source in sources):
        chosen, record = _hold_out(sources, val_fraction, split_seed)
    contents = {source.name: _write_source(source, chosen.get(source.name, []), record) for source in sources}
    metas = {source.name: read_meta(source.wds_dir) for source in sources}
    weights = {source.name: source.weight for source in sources}
    if len(sources) > 1:
        write_blend(wds_dir, weights, metas)
    else:
        (wds_dir / METADATASET).unlink(missing_ok=True)  # of an earlier plan: readers would follow it
    counts = split_counts(metas.values())
    dataset: Dataset = {
        "fingerprint": contents[""] if len(sources) == 1 else fingerprint([contents, weights]),
        "train": counts["train"],
        "heldout": counts["heldout"],
        "images": total(shards, "images"),
        "read": read,
        "rejected": rejected,
        "reasons": dict(counted(shards, "reasons")),
        "kinds": dict(counted(shards, "kinds")),
        "unread": dict(counted(shards, "unread").most_common(MOST_UNREAD)),
    }
    if record:
        dataset["split"] = record
    if leak := _leak(sources):
        dataset["heldout_trained_on"] = leak
    if len(sources) > 1:
        epoch = sum(weight * metas[name].samples("train") for name, weight in weights.items())
        dataset |= {"weights": weights, "epoch_samples": round(epoch)}
    return dataset


def _plan_of(notes_dir: Path) -> list[dict[str, Any]]:
    """Of shards that were made by hand: one source, or one in each sub-folder."""
    names = sorted(path.name for path in notes_dir.glob("*/") if next(path.glob("*.stats.json"), None))
    return [{"name": name, "weight": 1.0} for name in names or [""]]


def _check_filled(sources: list[ConvertedSource]) -> None:
    for source in sources:
        for split in ("train", "heldout"):
            shards = getattr(source, split)
            if shards and not source.filled(split):
                raise DataError(
                    f"not one sample was written for {split}: {shards[0]['raw']['path']} has no usable record",
                    f"look into {source.notes_dir} for the reasons (*.rejects.jsonl)",
                )


def _hold_out(sources: list[ConvertedSource], fraction: float, seed: int) -> tuple[Chosen, dict[str, Any]]:
    """Choose the held-out samples of all sources together; the second is what is recorded of it."""
    shards = [(source, stats) for source in sources for stats in source.filled("train")]
    names = (bound_by(row) for source, stats in shards for row in source.parsed(stats))
    sides, groups = choose_heldout(names, fraction, seed)
    side = iter(sides)
    chosen: Chosen = {source.name: [] for source in sources}
    for source, stats in shards:
        chosen[source.name] += ((stats["shard"], row) for row in source.rows(stats) if next(side))
    return chosen, {
        "val_fraction": fraction,
        "split_seed": seed,
        "groups": groups,
        "samples": sum(sides),
        "of": len(sides),
    }


def _write_source(source: ConvertedSource, chosen: list[tuple[str, bytes]], record: dict[str, Any] | None) -> str:
    """Write a source's `.nv-meta` and its merged held-out tars; return the fingerprint."""
    filled = {split: source.filled(split) for split in ("train", "heldout")}
    with atomic_dir(source.wds_dir / ".heldout.new") as staged:
        merged = merge_heldout(source.wds_dir, staged, chosen)
    staged = source.wds_dir / ".heldout.new"
    exclude = [f"{shard}.tar/{orjson.loads(row)['key']}" for shard, row in chosen]
    content = {split: [[stats["shard"], stats["tar"]["hash"]] for stats in shards] for split, shards in filled.items()}
    content["heldout"] += [[name, tar_hash] for name, _, tar_hash in merged]
    tars = [
        Tar(stats["shard"], stats["written"], source.parsed(stats)) for shards in filled.values() for stats in shards
    ]
    tars += [Tar(name, len(rows), rows) for name, rows, _ in merged]
    splits = {split: [f"{name}.tar" for name, _ in named] for split, named in content.items()}
    own = fingerprint([content, exclude] if exclude else content)
    before = read_json(source.wds_dir / NV_META / HELDOUT_RECORD, {"tars": []})
    stale = set(before["tars"]) - set(splits["heldout"])
    with write_meta(source.wds_dir, tars, splits, exclude, own) as meta:
        if merged and record:
            tar_names = [f"{name}.tar" for name, _, _ in merged]
            write_json(meta / HELDOUT_RECORD, record | {"tars": tar_names}, sealed=True)
            shutil.rmtree(source.wds_dir / NV_META, ignore_errors=True)  # the old index ends with the old tars
            for path in staged.iterdir():
                os.replace(path, source.wds_dir / path.name)
    shutil.rmtree(staged)
    for name in stale:
        for path in (source.wds_dir / name, source.wds_dir / f"{name}.idx"):
            path.unlink(missing_ok=True)
    return own


def _leak(sources: list[ConvertedSource]) -> dict[str, int]:
    """How many of the held-out records that the user brought are trained on as well; empty when none is.

    `records` share images and question with a training record, `images` at least one image.
    """
    held = [row for source in sources for stats in source.filled("heldout") for row in source.parsed(stats)]
    if not held:
        return {}
    # Of the training records only what the held-out ones have as well is kept: there may be 10^8.
    images = dict.fromkeys((image["hash"] for row in held for image in row["images"]), False)
    records = dict.fromkeys((_asked(row) for row in held if "asked" in row), False)
    for source in sources:
        for stats in source.filled("train"):
            for row in source.parsed(stats):
                images |= {image["hash"]: True for image in row["images"] if image["hash"] in images}
                if (asked := _asked(row)) in records:
                    records[asked] = True
    counts = {
        "records": sum(records[_asked(row)] for row in held if "asked" in row),
        "images": sum(any(images[image["hash"]] for image in row["images"]) for row in held),
    }
    return counts | {"of": len(held)} if any(counts.values()) else {}


def _asked(row: dict[str, Any]) -> int:
    return hash((row.get("asked"), *(image["hash"] for image in row["images"])))


def leak_note(dataset: Mapping[str, Any]) -> str | None:
    """What dataset.json says of held-out samples that are trained on, in words."""
    leak = dataset.get("heldout_trained_on") or {"records": 0, "images": 0, "of": 0}
    if not leak["records"] + leak["images"]:
        return None
    return (
        f"{leak['records']:,} of {leak['of']:,} held-out samples are trained on ({leak['records'] / leak['of']:.1%}: same"
        f" images, same question), {leak['images']:,} share an image with the training data: the held-out accuracy says less"
        " than it seems"
    )


def unread_note(dataset: Mapping[str, Any]) -> str | None:
    """What dataset.json says of keys that were not read, in words."""
    if not (unread := dataset.get("unread")):
        return None
    named = [f"{key} ({count:,})" for key, count in list(unread.items())[:MOST_SAID]] + ["…"] * (
        len(unread) > MOST_SAID
    )
    return f"keys that are not read, with their records: {', '.join(named)}; inspect.html has an example of each"


def read_finished(wds_dir: Path) -> Dataset:
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
    counts = split_counts([meta])
    return {
        "fingerprint": fingerprint(content),
        "train": counts["train"],
        "heldout": counts["heldout"],
        "images": None,
        "read": None,
        "rejected": None,
        "reasons": {},
        "kinds": {},
    }
