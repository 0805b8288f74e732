"""A finished WebDataset of another make → a data set for this workflow, without touching it.

Notable: the tars are read once (their JSON and images put to the same checks as raw records) and linked into a folder of
ours with an index of our own, digests of the samples included; samples that training could not use are excluded and
counted like rejects of a conversion. A tar below several `.nv-meta` (the original's parts and their parent) is one file,
and counted once. Packed tars have no places to read a sample at; beside plain ones they are named as left out.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sft.data.formats import other_kind
from llava_sft.data.image_checks import check_image
from llava_sft.data.index import FIRST_REASONS, Tar, read_finished, too_many_rejects, write_meta
from llava_sft.data.layouts import LAYOUTS
from llava_sft.data.plan import HELDOUT_PREFIX
from llava_sft.data.records import Rejected
from llava_sft.data.shards import write_idx
from llava_sft.data.tars import TarSample, find_layout, is_finished, no_tar, packed_tars, read_at, read_meta, walk_tar
from llava_sft.errors import DataError
from llava_sft.files import atomic_file, fingerprint


def adopt_webdataset(source: Path, wds_dir: Path, max_reject_fraction: float = 0.0) -> dict[str, Any]:
    """Link the tars of `source` into `wds_dir` and index them there; return what the dataset file holds.

    With `source` as `wds_dir` the folder itself gets an index, and no tar is touched. Tars named `heldout-…` are the
    validation split; splits and exclusions of indexed folders below `source` hold on.
    Errors: DataError for damaged tars, an unknown or mixed layout, too many samples left out.
    """
    names = {path.resolve(): path.relative_to(source).as_posix() for path in sorted(source.rglob("*.tar"))}
    if not names:
        raise no_tar("", source)
    indexed = (path.parent.parent for path in source.rglob(".nv-meta/.info.json"))
    known = {folder: read_meta(folder) for folder in indexed if is_finished(folder)}
    tars: list[Tar] = []
    splits: dict[str, list[str]] = {"train": [], "heldout": []}
    exclude: list[str] = []
    first: list[str] = []
    earlier = images = 0  # earlier: samples that a folder of ours excludes already
    reasons: Counter[str] = Counter()
    layouts: dict[str, str] = {}
    for real, name in names.items():
        samples = _samples_of(real)
        layout = find_layout(real, samples)
        if layout:
            layouts.setdefault(layout, name)
        elif samples:
            raise DataError(
                f"{real}: none of its samples has JSON of a known layout ({', '.join(LAYOUTS)})",
                "convert the raw data with raw_data instead",
            )
        own = next((folder for folder in (source / name).parents if folder in known), None)
        inner = (source / name).relative_to(own).as_posix() if own else ""
        meta = known[own] if own else None
        heldout = inner in meta.splits.get("val", []) if meta else Path(name).name.startswith(HELDOUT_PREFIX)
        with open(real, "rb") as file:
            for sample in samples:
                if meta and f"{inner}/{sample.key}" in meta.exclude:
                    exclude.append(f"{name}/{sample.key}")
                    earlier += 1
                    continue
                try:
                    found, members = sample.read(file.fileno(), layout or "own")
                    for image in found.images:
                        check_image(read_at(file.fileno(), members[image]))
                    images += len(found.images)
                except Rejected as rejected:
                    exclude.append(f"{name}/{sample.key}")
                    reasons[rejected.reason] += 1
                    if len(first) < FIRST_REASONS:
                        first.append(f"  {name}, {sample.key}: {rejected}")
        link = wds_dir / name
        if wds_dir.resolve() != source.resolve():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(real)
        with atomic_file(f"{link}.idx", durable=False) as idx:
            end = samples[-1].offset + samples[-1].size if samples else 0
            write_idx(idx, [sample.offset for sample in samples], end)
        if samples:
            tars.append(Tar(name.removesuffix(".tar"), len(samples), _rows(real)))
            splits["heldout" if heldout else "train"].append(name)
    if len(layouts) > 1:
        raise DataError(f"{source} mixes layouts: {layouts}", "name a folder of one layout")
    read, rejected = sum(tar.count for tar in tars) - earlier, len(exclude) - earlier
    if rejected > max_reject_fraction * read:
        counts = ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())
        raise too_many_rejects(rejected, read, max_reject_fraction, first, counts)
    content = fingerprint([[tar.name, tar.count] for tar in tars])
    with write_meta(wds_dir, tars, *splits.values(), exclude, content, next(iter(layouts), "own")):
        pass
    counts = {"images": images, "read": read, "rejected": rejected, "reasons": dict(reasons)}
    left_out = [str(path.relative_to(source)) for path in packed_tars(source)]
    return read_finished(wds_dir) | counts | ({"packed_tars": left_out} if left_out else {})


def _samples_of(tar: Path) -> list[TarSample]:
    try:
        return walk_tar(tar)
    except OSError as error:
        raise DataError(f"{tar} can not be read: {error}", "copy or make that tar again") from None
    except tarfile.TarError as error:
        if other := other_kind(tar):
            raise DataError(f"{tar} is {other[0]}, not a plain tar", other[1]) from None
        raise DataError(f"{tar} can not be read: {error}", "copy or make that tar again") from None


def _rows(tar: Path) -> Iterator[dict[str, Any]]:
    """Walked again when the index is written: all rows of all tars would not fit into memory."""
    with open(tar, "rb") as file:
        for sample in walk_tar(tar):
            yield sample._asdict() | {"digest": sample.digest(file.fileno()).hex()}
