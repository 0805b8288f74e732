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
from llava_sft.data.index import read_finished
from llava_sft.data.layouts import LAYOUTS
from llava_sft.data.nv_meta import Dataset, Meta, Tar, is_finished, read_meta, write_meta
from llava_sft.data.plan import HELDOUT_PREFIX
from llava_sft.data.rejects import FIRST_REASONS, Rejected, too_many_rejects
from llava_sft.data.shards import idx_bytes
from llava_sft.data.tars import TarSample, find_layout, no_tar, packed_tars, read_at, walk_tar
from llava_sft.errors import DataError
from llava_sft.files import atomic_file, fingerprint
from llava_sft.progress import tracked


def adopt_webdataset(source: Path, wds_dir: Path, max_reject_fraction: float = 0.0) -> Dataset:
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
    adopted = _Adopted()
    for tar, name in tracked(names.items(), len(names), "tars"):
        own = next((folder for folder in (source / name).parents if folder in known), None)
        samples = _samples_of(tar)
        adopted.take(
            tar, name, samples, known[own] if own else None, (source / name).relative_to(own or source).as_posix()
        )
        link = wds_dir / name
        if wds_dir.resolve() != source.resolve():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(tar)
        with atomic_file(f"{link}.idx", durable=False) as idx:
            end = samples[-1].offset + samples[-1].size if samples else 0
            idx.write(idx_bytes([sample.offset for sample in samples], end))
    if len(adopted.layouts) > 1:
        raise DataError(f"{source} mixes layouts: {adopted.layouts}", "name a folder of one layout")
    read, reasons = sum(tar.samples for tar in adopted.tars) - adopted.excluded_before, adopted.reasons
    if reasons.total() > max_reject_fraction * read:
        counts = ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())
        raise too_many_rejects(reasons.total(), read, max_reject_fraction, adopted.first, counts)
    content = fingerprint([[tar.name, tar.samples] for tar in adopted.tars])
    layout = next(iter(adopted.layouts), "own")
    with write_meta(wds_dir, adopted.tars, adopted.splits, adopted.exclude, content, layout):
        pass
    dataset = read_finished(wds_dir)
    dataset |= {"images": adopted.images, "read": read, "rejected": reasons.total(), "reasons": dict(reasons)}
    if left_out := [str(path.relative_to(source)) for path in packed_tars(source)]:
        dataset["packed_tars"] = left_out
    return dataset


class _Adopted:
    """What the tars so far hold: those with samples, by split, and the samples that are excluded."""

    def __init__(self) -> None:
        self.tars: list[Tar] = []
        self.splits: dict[str, list[str]] = {"train": [], "heldout": []}
        self.exclude: list[str] = []
        self.excluded_before = 0  # by the folder's own index
        self.images = 0
        self.reasons: Counter[str] = Counter()
        self.first: list[str] = []  # rejects in words
        self.layouts: dict[str, str] = {}  # and a tar of each

    def take(self, tar: Path, name: str, samples: list[TarSample], meta: Meta | None, inner: str) -> None:
        """Check the samples of a tar. `meta`: the index that the tar has already, in which it is named `inner`."""
        layout = find_layout(tar, samples)
        if layout:
            self.layouts.setdefault(layout, name)
        elif samples:
            raise DataError(
                f"{tar}: none of its samples has JSON of a known layout ({', '.join(LAYOUTS)}); the first has"
                f" {', '.join(name for name, _, _ in samples[0].members)}",
                "beside KEY.jpg put KEY.json, a record as raw data has them, or KEY.txt, a caption; or convert with raw_data",
            )
        with open(tar, "rb") as file:
            for sample in samples:
                if meta and f"{inner}/{sample.key}" in meta.exclude:
                    self.exclude.append(f"{name}/{sample.key}")
                    self.excluded_before += 1
                    continue
                try:
                    stored, contents = sample.read(read_at(file.fileno(), sample.extent), layout or "own")
                    for image in stored.images:
                        check_image(contents[image])
                    self.images += len(stored.images)
                except Rejected as rejected:
                    self.exclude.append(f"{name}/{sample.key}")
                    self.reasons[rejected.reason] += 1
                    if len(self.first) < FIRST_REASONS:
                        self.first.append(f"  {name}, {sample.key}: {rejected}")
        if samples:
            heldout = inner in meta.splits.get("val", []) if meta else Path(name).name.startswith(HELDOUT_PREFIX)
            self.tars.append(Tar(name.removesuffix(".tar"), len(samples), _rows(tar)))
            self.splits["heldout" if heldout else "train"].append(name)


def _samples_of(tar: Path) -> list[TarSample]:
    try:
        return walk_tar(tar)
    except (OSError, tarfile.TarError) as error:
        if isinstance(error, tarfile.TarError) and (other := other_kind(tar)):
            raise DataError(f"{tar} is {other[0]}, not a plain tar", other[1]) from None
        raise DataError(f"{tar} cannot be read: {error}", "copy or make that tar again") from None


def _rows(tar: Path) -> Iterator[dict[str, Any]]:
    """Walked again when the index is written: all rows of all tars would not fit into memory."""
    with open(tar, "rb") as file:
        for sample in walk_tar(tar):
            row = {"key": sample.key, "offset": sample.offset, "size": sample.size, "parts": sample.members}
            yield row | {"digest": sample.digest(read_at(file.fileno(), sample.extent)).hex()}
