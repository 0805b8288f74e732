"""Look at a WebDataset from end to end: is it complete, does the index match the tars, what does it contain.

Notable: nothing that the conversion noted is taken on trust. Every tar is walked, every JSON parsed and put to the same
rules as raw records, every image's header and end checked, and a seeded part of the images decoded. One pass, one tar
in memory at a time (its offsets, not its bytes). Folders of another make are read by their layout (layouts.py).
"""

import tarfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llava_sft.data.findings import DECODED_IMAGES, IMAGES, INDEX, META, SAMPLES, SHARDS, Findings, TokenCounter
from llava_sft.data.image_checks import NO_PIXEL_LIMIT, check_image, decode_image
from llava_sft.data.index import leak_note
from llava_sft.data.notes import Stats, read_stats
from llava_sft.data.nv_meta import (
    ENERGON_SPLITS,
    META_FILES,
    NV_META,
    Dataset,
    Meta,
    SampleIndex,
    read_meta,
    source_folders,
)
from llava_sft.data.rejects import Rejected
from llava_sft.data.shards import idx_bytes
from llava_sft.data.tars import TarSample, find_layout, read_at, walk_tar
from llava_sft.errors import SHOWN, DataError, shown
from llava_sft.files import file_hash
from llava_sft.progress import Progress

CHANGED = "its bytes are not those that were written"


def inspect_webdataset(
    wds_dir: Path, notes_dir: Path | None = None, dataset: Dataset | None = None, seed: int = 0,
    tokens: TokenCounter | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Return the report (plain JSON; lengths in characters, image sizes in pixels) and a gallery of samples.

    `notes_dir` adds the rejects and the check of the tars' hashes; `dataset`, the dataset file's content, the check of
    its counts; `tokens`, the tokens of each sample and what the sequence length would cut.
    Errors: DataError if there is no tar to look at.
    """
    if not wds_dir.is_dir():
        raise DataError(f"{wds_dir} is not a folder", "give the folder that holds the .tar files and .nv-meta")
    findings = Findings(seed, tokens)
    converted: list[tuple[Path, list[Stats]]] = []
    for folder in source_folders(wds_dir):
        tars = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar"))
        if not tars:
            raise DataError(f"{folder} holds no .tar file", "give a WebDataset folder, or convert the raw data first")
        notes = notes_dir / folder.relative_to(wds_dir) if notes_dir else None
        paths = sorted(notes.glob("*.stats.json")) if notes else []
        shards = [read_stats(path) for path in paths if f"{path.name.removesuffix('.stats.json')}.tar" in tars]
        uncounted = set(tars) - {f"{stats['shard']}.tar" for stats in shards}
        for listed in sorted(notes.glob("*.samples.jsonl")) if notes else []:
            shard = listed.name.removesuffix(".samples.jsonl")
            if f"{shard}.tar" in uncounted:
                lost = listed.with_name(f"{shard}.stats.json")
                findings.problem(SHARDS, f"{shard}.tar", f"{lost} is missing: delete the tar and convert again")
        _Inspection(folder, tars, shards, findings).run()
        if shards and notes:
            converted.append((notes, shards))
    if dataset:
        for split, noted in (("train", dataset["train"]), ("heldout", dataset["heldout"])):
            held = findings.splits.get(ENERGON_SPLITS[split], Counter())["samples"]
            if held != noted["samples"]:
                findings.problem(META, split, f"samples: {held}, the dataset file says {noted['samples']}")
    if leak := leak_note({"heldout_trained_on": findings.digests.trained_on()}):
        findings.notes.append(leak)
    if findings.excluded:
        why = "held out by val_fraction" if converted else "left out by the folder's own index or as unusable"
        findings.notes.append(
            f"1 sample is {why}: training skips it"
            if findings.excluded == 1
            else f"{findings.excluded:,} samples are {why}: training skips them"
        )
    return findings.report(wds_dir, converted), findings.picked_gallery()


class _Inspection:
    """One folder of tars. `shards`: what the conversion noted of them, where there is such."""

    def __init__(self, folder: Path, tars: list[str], shards: list[Stats], findings: Findings):
        self.folder, self.tars, self.findings = folder, tars, findings
        self.hashes = {f"{stats['shard']}.tar": stats["tar"]["hash"] for stats in shards}
        self.meta = self._read_meta()
        self.numbers = self.meta.numbers()
        self.split_of = {name: split for split, names in self.meta.splits.items() for name in names}
        self.index: SampleIndex | None = None
        images = sum(stats["images"] for stats in shards) or sum(self.meta.counts.values())
        findings.decode_every = max(1, images // DECODED_IMAGES)
        self.progress = Progress(sum(folder.joinpath(name).stat().st_size for name in tars) / 1e6, "MB")

    def run(self) -> None:
        with ExitStack() as stack:
            if (self.folder / NV_META / "index.sqlite").is_file():
                try:
                    self.index = stack.enter_context(SampleIndex(self.folder))
                    list(self.index.rows("SELECT 1 FROM sample_parts LIMIT 1"))
                except DataError as error:
                    self.index = None
                    self._index_unreadable(error)
            for name in self.tars:
                if not self._is_inspected(name):
                    continue
                try:
                    self._check_tar(name)
                except (OSError, tarfile.TarError) as error:
                    self.findings.problem(SHARDS, name, f"cannot be read: {error}")
                except DataError as error:
                    self._index_unreadable(error)
                    break

    def _index_unreadable(self, error: DataError) -> None:
        self.findings.problem(INDEX, "index.sqlite", error.problem.split("/index.sqlite: ")[-1][:SHOWN])

    def _is_inspected(self, name: str) -> bool:
        """Whether a tar is in a split, or no tar is."""
        if name in self.split_of or not self.split_of:
            return True
        idx = self.folder / f"{name}.idx"
        if not idx.is_file() or idx.stat().st_size != 8:  # an empty shard is rightly in no split
            self.findings.notes.append(f"{name} is in no split: training does not see it")
        return False

    def _check_tar(self, name: str) -> None:
        findings, tar = self.findings, self.folder / name
        odd: list[str] = []
        samples = walk_tar(tar, odd.append)
        if odd:
            findings.notes.append(
                f"{name}: passed over, without key and extension: {shown(odd[0])}, {len(odd):,} in all"
            )
        self._check_index(name, samples)
        included = [sample for sample in samples if f"{name}/{sample.key}" not in self.meta.exclude]
        findings.excluded += len(samples) - len(included)
        layout = self.meta.layout if self.split_of else find_layout(tar, samples) or "own"
        split = self.split_of.get(name, "all")
        digests = self.index.digests(self.numbers[name]) if self.index and name in self.numbers else {}
        written = {sample.key: digests[row] for row, sample in enumerate(samples) if row in digests}
        with open(tar, "rb") as file:
            for sample in included:
                data = read_at(file.fileno(), sample.extent)
                self.progress.add(len(data) / 1e6)
                if sample.key in written and sample.digest(data) != written[sample.key]:
                    findings.problem(SAMPLES, f"{name}: {sample.key}", CHANGED)
                self._check_sample(data, name, split, sample, layout)
        if name in self.hashes and file_hash(tar) != self.hashes[name]:
            findings.problem(SHARDS, name, "its bytes are not those that the conversion wrote")
        findings.looked_at[SHARDS] += 1
        counts = findings.splits.setdefault(split, Counter())
        counts.update(samples=len(included), shards=1, bytes=tar.stat().st_size)

    def _check_sample(self, data: bytes, name: str, split: str, stored: TarSample, layout: str) -> None:
        findings, where = self.findings, f"{name}: {stored.key}"
        findings.looked_at[SAMPLES] += 1
        try:
            sample, contents = stored.read(data, layout)
        except Rejected as rejected:
            findings.problem(SAMPLES, where, str(rejected))
            return
        infos, hashes = [], []
        for image in sample.images:
            findings.looked_at[IMAGES] += 1
            hashes.append(findings.digests.note("image", split, contents[image]))
            drawn = findings.draw(f"{stored.key}.{image}") % findings.decode_every == 0
            try:
                infos.append((decode_image if drawn else check_image)(contents[image], NO_PIXEL_LIMIT))
            except Rejected as rejected:
                findings.problem(IMAGES, f"{where}.{image} (id {shown(sample.id)})", str(rejected))
        kind = str(sample.meta.get("kind", "all"))
        findings.note_sample(split, kind, sample, infos, hashes)
        findings.offer_to_gallery(kind, split, stored.key, sample, contents, infos)

    def _check_index(self, name: str, samples: list[TarSample]) -> None:
        """Compare `.tar.idx`, `.info.json` and index.sqlite with the samples of a tar."""
        findings, idx = self.findings, self.folder / f"{name}.idx"
        findings.looked_at[INDEX] += 1
        end = samples[-1].offset + samples[-1].size if samples else 0
        if not idx.is_file():
            findings.problem(INDEX, f"{name}.idx", "is missing")
        elif idx.read_bytes() != idx_bytes([sample.offset for sample in samples], end):
            findings.problem(INDEX, f"{name}.idx", "does not hold the offsets of the tar's samples")
        if name not in self.numbers:
            return
        number, counted = self.numbers[name], self.meta.counts[name]
        if counted != len(samples):
            findings.problem(INDEX, name, f"samples: .info.json says {counted}, the tar has {len(samples)}")
        if not self.index:
            return
        columns = "sample_key, sample_index, byte_offset, byte_size"
        query = f"SELECT {columns} FROM samples WHERE tar_file_id = ? ORDER BY sample_index"
        indexed = list(self.index.rows(query, number))
        rows = [(sample.key, row, sample.offset, sample.size) for row, sample in enumerate(samples)]
        if len(indexed) < len(rows):  # packs of several hosts bear the same keys: the table has the first of each
            earlier = "SELECT 1 FROM samples WHERE sample_key = ? AND tar_file_id < ?"
            rows = [row for row in rows if not any(self.index.rows(earlier, row[0], number))]
        if indexed != rows:
            findings.problem(INDEX, name, "the table samples of index.sqlite differs from the tar")
        if list(self.index.members(number)) != [
            (row, *m) for row, sample in enumerate(samples) for m in sample.members
        ]:
            findings.problem(INDEX, name, "the table sample_parts of index.sqlite differs from the tar")

    def _read_meta(self) -> Meta:
        findings = self.findings
        for name in META_FILES:
            findings.looked_at[META] += 1
            if not (self.folder / NV_META / name).is_file():
                findings.problem(META, f".nv-meta/{name}", "is missing: run index_webdataset.py, or this with --fix")
        try:
            meta = read_meta(self.folder)
        except DataError as error:
            if "understood" in error.problem:
                findings.problem(META, ".nv-meta", error.problem)
            return Meta({}, {}, set(), "own")
        named = Counter(name for names in meta.splits.values() for name in names)
        for name in sorted(named.keys() - meta.counts.keys()):
            findings.problem(META, name, "is in split.yaml and not in .info.json")
        for name in sorted(name for name, count in named.items() if count > 1):
            findings.problem(META, name, f"stands {named[name]} times in split.yaml")
        for name in sorted((named.keys() | meta.counts.keys()) - set(self.tars)):
            findings.problem(META, name, "is named in .nv-meta and not in the folder")
        if not meta.splits.get("train"):
            findings.problem(META, "split.yaml", "the training split is empty")
        if not meta.splits.get("val"):
            findings.notes.append("there is no held-out split (val)")
        return meta
