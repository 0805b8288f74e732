"""Look at a WebDataset from end to end: is it whole, does its index fit its tars, what is in it.

Notable: nothing that the conversion noted is taken on trust. Every tar is walked, every JSON parsed and put to the same
rules as raw records, every image's header and end checked, and a seeded part of the images decoded. One pass, one tar
in memory at a time (its offsets, not its bytes). Folders of another make are read by their layout (layouts.py).
"""

import heapq
import itertools
import sqlite3
import struct
import tarfile
import unicodedata
from bisect import bisect_left
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import xxhash

from llava_sft.data.heldout import data_uri
from llava_sft.data.image_checks import check_image, decode_image
from llava_sft.data.images import decode_rgb
from llava_sft.data.index import read_rejects, told_leak
from llava_sft.data.records import Rejected, Sample
from llava_sft.data.tars import (
    ENERGON_SPLITS,
    Meta,
    TarSample,
    find_layout,
    noted_digests,
    read_at,
    read_meta,
    source_folders,
    walk_tar,
)
from llava_sft.data.verify import read_stats
from llava_sft.errors import SHOWN, DataError, shown
from llava_sft.files import file_hash
from llava_sft.model.processing import image_tokens, patch_grid
from llava_sft.model.template import ChatTemplate, UnusableSample
from llava_sft.report.html import render

CHANGED = "its bytes are not those that were written"
NO_PIXEL_LIMIT = 1 << 40  # the limit is the conversion's; what is in a shard counts, whatever its size
DECODED_IMAGES = 500  # about so many are decoded in full
PROBLEMS_KEPT, REJECTS_KEPT, GALLERY_SAMPLES = 50, 20, 12
MOST_BARS = 12
THUMBNAIL = 320  # pixels, longer side
INLINE_BYTES = 32 << 10  # a larger picture is shown as a thumbnail
SHOWN_BY_BROWSERS = {"jpg", "png", "webp", "gif"}

META, SHARDS, INDEX, SAMPLES, IMAGES = ".nv-meta", "shards", "index against tars", "samples", "images"
VALUES = ("tokens", "turns", "images per sample", "image width", "image height", "question length", "answer length")
SCRIPT_LETTERS = 500  # of a conversation, that its script is known by
EAST_ASIAN = {"Cjk": "Chinese", "Hiragana": "Japanese", "Katakana": "Japanese", "Hangul": "Korean"}


class Findings:
    """What has been found so far. `looked_at` counts what each check has seen, `problems` what it found wrong."""

    def __init__(self, seed: int, tokens: "TokenCounter | None"):
        self.seed, self.decode_every, self.tokens = seed, 1, tokens
        self.seen: dict[str, set[int]] = {"sample": set(), "image": set()}  # 8-byte hashes
        self.duplicates: Counter[str] = Counter(dict.fromkeys(self.seen, 0))
        self.scripts: Counter[str] = Counter()
        self.excluded = 0
        self.looked_at: Counter[str] = Counter(dict.fromkeys((META, SHARDS, INDEX, SAMPLES, IMAGES), 0))
        self.problem_counts: Counter[str] = Counter()
        self.problems: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.splits: dict[str, Counter[str]] = {}  # split: samples, shards, bytes
        self.kinds: dict[str, Counter[str]] = {}  # kind: samples of each split
        self.values: dict[str, Counter[int]] = {name: Counter() for name in VALUES}
        self.formats: Counter[str] = Counter()
        self.gallery: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}  # kind: heap, the luckiest samples

    def problem(self, check: str, where: str, what: str) -> None:
        self.problem_counts[check] += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append({"check": check, "where": where, "what": what})

    def note_duplicate(self, what: str, *parts: bytes) -> int:
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        number = digest.intdigest()
        self.duplicates[what] += number in self.seen[what]
        self.seen[what].add(number)
        return number

    def draw(self, name: str) -> int:
        """A number that looks random and is the same for the same seed and name, in whatever order one looks."""
        return xxhash.xxh3_64_intdigest(name.encode(), self.seed)


class TokenCounter:
    """Tokens of a sample as training would make them, before anything is cut."""

    def __init__(self, tokenizer: Path, seq_length: int, min_pixels: int, max_pixels: int):
        self.template, self.seq_length, self.limits = ChatTemplate(tokenizer), seq_length, (min_pixels, max_pixels)
        self.cut = self.left_out = 0

    def count(self, messages: list[dict[str, str]], sizes: list[tuple[int, int]]) -> int:
        images = [image_tokens(patch_grid(height, width, *self.limits)) for width, height in sizes]
        length = len(self.template.encode(messages, images, 1 << 40).input_ids)
        if length > self.seq_length:
            try:
                self.template.encode(messages, images, self.seq_length)
                self.cut += 1
            except UnusableSample:
                self.left_out += 1
        return length


def inspect_webdataset(
    wds_dir: Path, parts_dir: Path | None = None, dataset: dict[str, Any] | None = None, seed: int = 0,
    tokens: TokenCounter | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Return the report (plain JSON; lengths in characters, image sizes in pixels) and a gallery of samples.

    `parts_dir` adds the rejects and the check of the tars' hashes; `dataset`, the dataset file's content, the check of
    its counts; `tokens`, the tokens of each sample and what the sequence length would cut. The gallery's pictures are
    data URIs. Errors: DataError if there is no tar to look at.
    """
    if not wds_dir.is_dir():
        raise DataError(f"{wds_dir} is not a folder", "give the folder that holds the .tar files and .nv-meta")
    found = Findings(seed, tokens)
    rejects: list[tuple[Path, list[dict[str, Any]]]] = []
    for folder in source_folders(wds_dir):
        tars = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar"))
        if not tars:
            raise DataError(f"{folder} holds no .tar file", "give a WebDataset folder, or convert the raw data first")
        notes = parts_dir / folder.relative_to(wds_dir) if parts_dir else None
        stats_files = sorted(notes.glob("*.stats.json")) if notes else []
        parts = [read_stats(path) for path in stats_files if f"{path.name.removesuffix('.stats.json')}.tar" in tars]
        _inspect_folder(folder, tars, parts, found)
        if parts and notes:
            rejects.append((notes, parts))
    if dataset:
        for split, energon_split in ENERGON_SPLITS.items():
            there = found.splits.get(energon_split, Counter())["samples"]
            if there != dataset[split]["samples"]:
                found.problem(META, split, f"holds {there} samples, the dataset file says {dataset[split]['samples']}")
        if told := told_leak(dataset):
            found.notes.append(told)
    if found.excluded:
        found.notes.append(f"{found.excluded:,} samples are excluded: training does not see them where they lie")
    return _report(wds_dir, rejects, found), _pick_gallery(found)


def _inspect_folder(folder: Path, tars: list[str], parts: list[dict[str, Any]], found: Findings) -> None:
    hashes = {f"{stats['shard']}.tar": stats["tar"]["hash"] for stats in parts}
    meta = _check_meta(folder, tars, found)
    split_of = {name: split for split, names in meta.splits.items() for name in names}
    numbers = {name: number for number, name in enumerate(meta.counts)}
    images = sum(stats["images"] for stats in parts) or sum(meta.counts.values())
    found.decode_every = max(1, images // DECODED_IMAGES)
    database = _open_index(folder, found)
    for name in tars:
        split = split_of.get(name)
        if split is None and split_of:
            idx = folder / f"{name}.idx"
            if not idx.is_file() or idx.stat().st_size != 8:  # an empty shard is rightly in no split
                found.notes.append(f"{name} is in no split: training does not see it")
            continue
        try:
            odd: list[str] = []
            samples = walk_tar(folder / name, odd.append)
            if odd:
                found.notes.append(
                    f"{name}: {len(odd):,} members without key and extension are passed over: {shown(odd[0])} …"
                )
            _check_index(folder / name, name, samples, meta.counts.get(name), numbers.get(name), database, found)
            kept = [sample for sample in samples if f"{name}/{sample.key}" not in meta.exclude]
            found.excluded += len(samples) - len(kept)
            layout = meta.layout if split_of else find_layout(folder / name, samples) or "own"
            noted = noted_digests(folder, numbers[name]) if database and name in numbers else {}
            written = {sample.key: noted[row] for row, sample in enumerate(samples) if row in noted}
            with open(folder / name, "rb") as file:
                for sample in kept:
                    if sample.key in written and sample.digest(file.fileno()) != written[sample.key]:
                        found.problem(SAMPLES, f"{name}: {sample.key}", CHANGED)
                    _check_sample(file.fileno(), name, split or "all", sample, layout, found)
            if name in hashes and file_hash(folder / name) != hashes[name]:
                found.problem(SHARDS, name, "its bytes are not those that the conversion wrote")
        except (OSError, tarfile.TarError) as error:
            found.problem(SHARDS, name, f"can not be read: {error}")
            continue
        except (sqlite3.Error, UnicodeDecodeError, DataError) as error:
            found.problem(INDEX, "index.sqlite", f"can not be read: {str(error).splitlines()[0][:SHOWN]}")
            break
        found.looked_at[SHARDS] += 1
        size = (folder / name).stat().st_size
        found.splits.setdefault(split or "all", Counter()).update(samples=len(kept), shards=1, bytes=size)
    if database:
        database.close()


def _check_meta(folder: Path, tars: list[str], found: Findings) -> Meta:
    for name in (".info.json", "split.yaml", "dataset.yaml", "index.sqlite", "index.uuid"):
        found.looked_at[META] += 1
        if not (folder / ".nv-meta" / name).is_file():
            found.problem(META, f".nv-meta/{name}", "is missing: run index_webdataset.py, or this with --fix")
    try:
        meta = read_meta(folder)
    except DataError as error:
        if "understood" in error.problem:
            found.problem(META, ".nv-meta", error.problem)
        return Meta({}, {}, set(), "own")
    named = Counter(name for names in meta.splits.values() for name in names)
    for name in sorted(named.keys() - meta.counts.keys()):
        found.problem(META, name, "is in split.yaml and not in .info.json")
    for name in sorted(name for name, count in named.items() if count > 1):
        found.problem(META, name, f"stands {named[name]} times in split.yaml")
    for name in sorted((named.keys() | meta.counts.keys()) - set(tars)):
        found.problem(META, name, "is named in .nv-meta and not in the folder")
    if not meta.splits.get("train"):
        found.problem(META, "split.yaml", "the training split is empty")
    if not meta.splits.get("val"):
        found.notes.append("there is no held-out split (val)")
    return meta


def _open_index(wds_dir: Path, found: Findings) -> sqlite3.Connection | None:
    path = wds_dir / ".nv-meta" / "index.sqlite"
    if not path.is_file():
        return None
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        database.execute("SELECT 1 FROM samples, sample_parts LIMIT 1")
    except (sqlite3.Error, ValueError) as error:  # SQLite's message may quote damaged bytes
        found.problem(INDEX, "index.sqlite", f"can not be read: {error}")
        return None
    return database


def _check_index(
    tar: Path, name: str, samples: list[TarSample], counted: int | None, number: int | None,
    database: sqlite3.Connection | None, found: Findings,
) -> None:  # fmt: skip
    found.looked_at[INDEX] += 1
    offsets = [sample.offset for sample in samples]
    offsets.append(samples[-1].offset + samples[-1].size if samples else 0)
    idx = tar.with_suffix(".tar.idx")
    if not idx.is_file():
        found.problem(INDEX, f"{name}.idx", "is missing")
    elif idx.read_bytes() != struct.pack(f"<{len(offsets)}Q", *offsets):
        found.problem(INDEX, f"{name}.idx", "does not hold the offsets of the tar's samples")
    if counted is not None and counted != len(samples):
        found.problem(INDEX, name, f".info.json says {counted} samples, the tar has {len(samples)}")
    if database and number is not None:
        columns = "sample_key, sample_index, byte_offset, byte_size"
        query = f"SELECT {columns} FROM samples WHERE tar_file_id = ? ORDER BY sample_index"
        indexed = database.execute(query, (number,)).fetchall()
        rows = [(s.key, n, s.offset, s.size) for n, s in enumerate(samples)]
        if len(indexed) < len(rows):  # packs of several hosts bear the same keys: the table has the first of each
            earlier = "SELECT 1 FROM samples WHERE sample_key = ? AND tar_file_id < ?"
            rows = [row for row in rows if not database.execute(earlier, (row[0], number)).fetchone()]
        if indexed != rows:
            found.problem(INDEX, name, "the table samples of index.sqlite differs from the tar")
        columns = "sample_index, part_name, content_byte_offset, content_byte_size"
        query = f"SELECT {columns} FROM sample_parts WHERE tar_file_id = ? ORDER BY sample_index, content_byte_offset"
        if database.execute(query, (number,)).fetchall() != [(n, *p) for n, s in enumerate(samples) for p in s.parts]:
            found.problem(INDEX, name, "the table sample_parts of index.sqlite differs from the tar")


def _check_sample(file: int, name: str, split: str, stored: TarSample, layout: str, found: Findings) -> None:
    where = f"{name}: {stored.key}"
    found.looked_at[SAMPLES] += 1
    try:
        sample, members = stored.read(file, layout)
    except Rejected as rejected:
        return found.problem(SAMPLES, where, str(rejected))
    sizes, hashes = [], []
    for image in sample.images:
        found.looked_at[IMAGES] += 1
        data = read_at(file, members[image])
        hashes.append(found.note_duplicate("image", data).to_bytes(8))
        chosen = found.draw(f"{stored.key}.{image}") % found.decode_every == 0
        try:
            info = (decode_image if chosen else check_image)(data, NO_PIXEL_LIMIT)
        except Rejected as rejected:
            found.problem(IMAGES, f"{where}.{image} (id {shown(sample.id)})", str(rejected))
            continue
        sizes.append((info.width, info.height))
        found.formats[info.extension] += 1
        found.values["image width"][info.width] += 1
        found.values["image height"][info.height] += 1
    kind = str(sample.meta.get("kind", "all"))
    found.kinds.setdefault(kind, Counter())[split] += 1
    found.values["images per sample"][len(sample.images)] += 1
    found.values["turns"][sum(message["role"] == "user" for message in sample.messages)] += 1
    for message in sample.messages:
        if message["role"] != "system":
            which = "question length" if message["role"] == "user" else "answer length"
            found.values[which][len(message["content"])] += 1
    texts = "\n".join(message["content"] for message in sample.messages)
    found.note_duplicate("sample", texts.encode("utf-8", "surrogatepass"), *hashes)
    found.scripts[script_of(texts)] += 1
    if found.tokens and len(sizes) == len(sample.images):
        found.values["tokens"][found.tokens.count(sample.messages, sizes)] += 1
    _offer_to_gallery(file, split, kind, stored.key, sample, [members[i] for i in sample.images], found)
    return None


def script_of(text: str) -> str:
    """The script that most letters are of, as Unicode names it, `other` without any: a hint at the language, no more."""
    letters = filter(str.isalpha, text.replace("<image>", "")[:SCRIPT_LETTERS])
    scripts = (unicodedata.name(letter, "other").split(" ")[0].capitalize() for letter in letters)
    counts = Counter(EAST_ASIAN.get(script, script) for script in scripts)
    if counts["Japanese"] > counts["Chinese"] / 10:  # kana tell, also where Chinese characters are more
        counts["Japanese"] += counts["Chinese"]
    return max(counts, key=counts.__getitem__) if counts.total() else "other"


def _offer_to_gallery(
    file: int, split: str, kind: str, key: str, sample: Sample, places: list[tuple[int, int]], found: Findings
) -> None:
    heap = found.gallery.setdefault(kind, [])
    luck = found.draw(key)
    if len(heap) == GALLERY_SAMPLES and luck <= heap[0][0]:
        return
    images = [read_at(file, place) for place in places]
    shown = {"key": key, "id": sample.id, "split": split, "kind": kind, "messages": sample.messages, "images": images}
    entry = (luck, found.looked_at[SAMPLES], shown)  # keys of several sources may be the same
    (heapq.heappush if len(heap) < GALLERY_SAMPLES else heapq.heappushpop)(heap, entry)


def _pick_gallery(found: Findings) -> list[dict[str, Any]]:
    """Some samples of every kind, in turn; their images become data URIs."""
    heaps = [sorted(heap, key=lambda entry: -entry[0]) for _, heap in sorted(found.gallery.items())]
    picked = [heap[turn][2] for turn in range(GALLERY_SAMPLES) for heap in heaps if turn < len(heap)]
    return [sample | {"images": [_thumbnail(i) for i in sample["images"]]} for sample in picked[:GALLERY_SAMPLES]]


def _thumbnail(data: bytes) -> str:
    """A picture as it is where it is small and browsers know its format, else a JPEG of it; "" for a damaged one."""
    try:
        extension = decode_image(data, NO_PIXEL_LIMIT).extension
    except Rejected:
        return ""
    if extension not in SHOWN_BY_BROWSERS or len(data) > INLINE_BYTES:
        image = decode_rgb(data)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=80)
        data = buffer.getvalue()
    return data_uri(data)


def _report(wds_dir: Path, noted: list[tuple[Path, list[dict[str, Any]]]], found: Findings) -> dict[str, Any]:
    rejects = None
    if everything := [stats for _, parts in noted for stats in parts]:
        reasons = sum((Counter(stats["reasons"]) for stats in everything), Counter())
        first = [row for folder, parts in noted for row in read_rejects(folder, parts)][:REJECTS_KEPT]
        read, rejected = (sum(stats[key] for stats in everything) for key in ("read", "rejected"))
        rejects = {"read": read, "rejected": rejected, "reasons": dict(reasons.most_common()), "first": first}
    length = None
    if found.tokens:
        length = {"seq_length": found.tokens.seq_length, "cut": found.tokens.cut, "left_out": found.tokens.left_out}
    return {
        "path": str(wds_dir),
        "ok": not found.problem_counts,
        "checks": [
            {"name": name, "looked_at": count, "problems": found.problem_counts[name]}
            for name, count in found.looked_at.items()
        ],
        "problems": found.problems,
        "notes": found.notes,
        "splits": {split: dict(counts) for split, counts in sorted(found.splits.items())},  # train before val
        "kinds": {kind: dict(counts) for kind, counts in sorted(found.kinds.items())},
        "image_formats": dict(found.formats.most_common()),
        "distributions": {name: distribution(values) for name, values in found.values.items() if values},
        "duplicates": {
            what: {"repeated": n, "different": len(found.seen[what])} for what, n in found.duplicates.items()
        },
        "scripts": dict(found.scripts.most_common()),
        "sequence_length": length,
        "rejects": rejects,
    }


def render_html(report: dict[str, Any], gallery: list[dict[str, Any]]) -> str:
    """The report as one HTML page without external resources."""
    return render("inspect.html.j2", report=report, gallery=gallery)


def distribution(values: Counter[int]) -> dict[str, Any]:
    """Smallest, median, 95th percentile, largest and mean of counted values ≥ 0, and a histogram of at most 12 bars.

    Bars are {from, to (inclusive), count}: one a value while there are few values, else of equal width, or, when the
    largest value is over twenty times the median, growing geometrically.
    """
    ordered = sorted(values)
    seen = list(itertools.accumulate(values[value] for value in ordered))
    total = seen[-1]
    low, median, p95, high = (ordered[bisect_left(seen, share * total)] for share in (0, 0.5, 0.95, 1))
    if len(ordered) <= MOST_BARS:
        starts = ordered
    elif high > 20 * max(median, 1):
        base = max(low, 1)
        starts = sorted({low, *(int(base * (high / base) ** (bar / MOST_BARS)) for bar in range(MOST_BARS))})
    else:
        starts = sorted({low + (high + 1 - low) * bar // MOST_BARS for bar in range(MOST_BARS)})
    ends = starts if starts is ordered else [following - 1 for following in starts[1:]] + [high]
    return {
        "count": total,
        "min": low,
        "median": median,
        "p95": p95,
        "max": high,
        "mean": round(sum(value * count for value, count in values.items()) / total, 2),
        "histogram": [
            {"from": a, "to": b, "count": sum(count for value, count in values.items() if a <= value <= b)}
            for a, b in zip(starts, ends, strict=True)
        ],
    }
