"""Look at a WebDataset from end to end: is it whole, does its index fit its tars, what is in it.

Notable: nothing that the conversion noted is taken on trust. Every tar is walked, every JSON parsed and put to the same
rules as raw records, every image's header and end checked, and a seeded part of the images decoded. One pass, one tar
in memory at a time (its offsets, not its bytes).
"""

import base64
import heapq
import os
import sqlite3
import struct
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash
import yaml
from braceexpand import braceexpand

from llava_sft.data.image_checks import check_image, decode_image
from llava_sft.data.index import read_rejects
from llava_sft.data.records import Rejected, Sample, check_sample
from llava_sft.errors import DataError
from llava_sft.files import read_json

NO_PIXEL_LIMIT = 1 << 40  # the limit is the conversion's; what is in a shard counts, whatever its size
DECODED_IMAGES = 500  # about so many are decoded in full
PROBLEMS_KEPT, REJECTS_KEPT, GALLERY_SAMPLES = 50, 20, 12
MOST_BARS = 12
THUMBNAIL = 320  # pixels, longer side
INLINE_BYTES = 32 << 10  # a larger picture is shown as a thumbnail
MIME = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif"}

META, SHARDS, INDEX, SAMPLES, IMAGES = ".nv-meta", "shards", "index against tars", "samples", "images"
VALUES = ("turns", "images per sample", "image width", "image height", "question length", "answer length")


class TarSample(NamedTuple):
    """Consecutive members of a tar that share a key: what energon takes for one sample."""

    key: str
    offset: int  # bytes, of its first header
    parts: list[tuple[str, int, int]]  # member name without the key; offset and size of the content in bytes


class Findings:
    """What has been found so far. `looked_at` counts what each check has seen, `problems` what it found wrong."""

    def __init__(self, seed: int):
        self.seed, self.decode_every = seed, 1
        self.looked_at: Counter[str] = Counter(dict.fromkeys((META, SHARDS, INDEX, SAMPLES, IMAGES), 0))
        self.problem_counts: Counter[str] = Counter()
        self.problems: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.splits: dict[str, Counter[str]] = {}  # split: samples, shards, bytes
        self.kinds: dict[str, Counter[str]] = {}  # kind: samples of each split
        self.values: dict[str, Counter[int]] = {name: Counter() for name in VALUES}
        self.formats: Counter[str] = Counter()
        self.gallery: dict[str, list[tuple[int, dict[str, Any]]]] = {}  # kind: heap, the luckiest samples

    def problem(self, check: str, where: str, what: str) -> None:
        self.problem_counts[check] += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append({"check": check, "where": where, "what": what})

    def draw(self, name: str) -> int:
        """A number that looks random and is the same for the same seed and name, in whatever order one looks."""
        return xxhash.xxh3_64_intdigest(name.encode(), self.seed)


def inspect_webdataset(
    wds_dir: Path, parts_dir: Path | None = None, dataset: dict[str, Any] | None = None, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the report (plain JSON; lengths in characters, image sizes in pixels) and a gallery of samples.

    `parts_dir` adds the rejects and the check of the tars' hashes; `dataset`, the dataset file's content, the check of
    its counts. The gallery's pictures are data URIs. Errors: DataError if there is no tar to look at.
    """
    if not wds_dir.is_dir():
        raise DataError(f"{wds_dir} is not a folder", "give the folder that holds the .tar files and .nv-meta")
    tars = sorted(path.relative_to(wds_dir).as_posix() for path in wds_dir.rglob("*.tar"))
    if not tars:
        raise DataError(f"{wds_dir} holds no .tar file", "give a WebDataset folder, or convert the raw data first")
    stats_files = sorted(parts_dir.glob("*.stats.json")) if parts_dir else []
    parts = [stats for path in stats_files if f"{(stats := read_json(path))['shard']}.tar" in tars]
    hashes = {f"{stats['shard']}.tar": stats["tar"]["hash"] for stats in parts}
    found = Findings(seed)
    split_of, counted = _read_meta(wds_dir, tars, found)
    images = sum(stats["images"] for stats in parts) or sum(samples for _, samples in counted.values())
    found.decode_every = max(1, images // DECODED_IMAGES)
    database = _open_index(wds_dir, found)
    for name in tars:
        split = split_of.get(name)
        if split is None and split_of:
            if _idx_samples(wds_dir / name) != 0:  # an empty shard is rightly in no split
                found.notes.append(f"{name} is in no split: training does not see it")
            continue
        try:
            samples = _walk_tar(wds_dir / name, name, found)
            _check_index(wds_dir / name, name, samples, counted.get(name), database, found)
            with open(wds_dir / name, "rb") as file:
                for sample in samples:
                    _check_sample(file.fileno(), name, split or "all", sample, found)
                if name in hashes:
                    file.seek(0)
                    if _hash(file) != hashes[name]:
                        found.problem(SHARDS, name, "its bytes are not those that the conversion wrote")
        except (OSError, tarfile.TarError) as error:
            found.problem(SHARDS, name, f"can not be read: {error}")
            continue
        found.looked_at[SHARDS] += 1
        size = (wds_dir / name).stat().st_size
        found.splits.setdefault(split or "all", Counter()).update(samples=len(samples), shards=1, bytes=size)
    if database:
        database.close()
    if dataset:
        for split, energon_split in (("train", "train"), ("heldout", "val")):
            there = found.splits.get(energon_split, Counter())["samples"]
            if there != dataset[split]["samples"]:
                found.problem(META, split, f"holds {there} samples, the dataset file says {dataset[split]['samples']}")
    return _report(wds_dir, parts_dir, parts, found), _pick_gallery(found)


def _read_meta(wds_dir: Path, tars: list[str], found: Findings) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Return the split of each shard, and the number that energon gives each shard with its count of samples."""
    meta = wds_dir / ".nv-meta"
    split_of: dict[str, str] = {}
    counted: dict[str, tuple[int, int]] = {}
    for name in (".info.json", "split.yaml", "dataset.yaml", "index.sqlite", "index.uuid"):
        found.looked_at[META] += 1
        if not (meta / name).is_file():
            found.problem(META, f".nv-meta/{name}", "is missing: run index_webdataset.py")
    try:
        if (meta / ".info.json").is_file():
            counts = orjson.loads((meta / ".info.json").read_bytes())["shard_counts"]
            counted = {name: (number, int(count)) for number, (name, count) in enumerate(counts.items())}
        if (meta / "split.yaml").is_file():
            split_parts = yaml.safe_load((meta / "split.yaml").read_bytes())["split_parts"]
            for split, patterns in split_parts.items():
                for name in (name for pattern in patterns for name in braceexpand(pattern)):
                    if name in split_of:
                        found.problem(META, name, f"is in the splits {split_of[name]} and {split}")
                    split_of[name] = split
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        found.problem(META, ".nv-meta", f"can not be understood: {type(error).__name__}: {error}")
    if counted:
        for name in sorted(split_of.keys() - counted.keys()):
            found.problem(META, name, "is in split.yaml and not in .info.json")
    for name in sorted((split_of.keys() | counted.keys()) - set(tars)):
        found.problem(META, name, "is named in .nv-meta and not in the folder")
    if split_of and "train" not in split_of.values():
        found.problem(META, "split.yaml", "the training split is empty")
    if split_of and "val" not in split_of.values():
        found.notes.append("there is no held-out split (val)")
    return split_of, counted


def _open_index(wds_dir: Path, found: Findings) -> sqlite3.Connection | None:
    path = wds_dir / ".nv-meta" / "index.sqlite"
    if not path.is_file():
        return None
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        database.execute("SELECT 1 FROM samples, sample_parts LIMIT 1")
    except sqlite3.Error as error:
        found.problem(INDEX, "index.sqlite", f"can not be read: {error}")
        return None
    return database


def _idx_samples(tar: Path) -> int | None:
    idx = tar.with_suffix(".tar.idx")
    return idx.stat().st_size // 8 - 1 if idx.is_file() else None


def _walk_tar(path: Path, name: str, found: Findings) -> list[TarSample]:
    """The samples of a tar, in order; the last has no parts and the offset of the archive's end."""
    samples: list[TarSample] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # tarfile would keep them all
            if not member.isreg():
                continue
            folder, _, file_name = member.name.rpartition("/")
            stem, dot, part = file_name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not dot or not stem:
                found.problem(SAMPLES, f"{name}: {member.name}", "has no key and extension: energon leaves it out")
                continue
            if not samples or samples[-1].key != key:
                samples.append(TarSample(key, member.offset, []))
            samples[-1].parts.append((part, member.offset_data, member.size))
        end = tar.offset
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(1024) != bytes(1024):
            raise tarfile.ReadError("the end of the archive is missing: it was cut off")
    return [*samples, TarSample("", end, [])]


def _check_index(
    tar: Path, name: str, samples: list[TarSample], counted: tuple[int, int] | None, database: Any, found: Findings
) -> None:
    end = samples.pop()
    found.looked_at[INDEX] += 1
    offsets = [sample.offset for sample in (*samples, end)]
    idx = tar.with_suffix(".tar.idx")
    if not idx.is_file():
        found.problem(INDEX, f"{name}.idx", "is missing")
    elif idx.read_bytes() != struct.pack(f"<{len(offsets)}Q", *offsets):
        found.problem(INDEX, f"{name}.idx", "does not hold the offsets of the tar's samples")
    if counted and counted[1] != len(samples):
        found.problem(INDEX, name, f".info.json says {counted[1]} samples, the tar has {len(samples)}")
    if database and counted:
        rows = [(s.key, n, s.offset, offsets[n + 1] - s.offset) for n, s in enumerate(samples)]
        members = [(n, *part) for n, sample in enumerate(samples) for part in sample.parts]
        for table, columns, order, expected in (
            ("samples", "sample_key, sample_index, byte_offset, byte_size", "sample_index", rows),
            (
                "sample_parts",
                "sample_index, part_name, content_byte_offset, content_byte_size",
                "sample_index, content_byte_offset",
                members,
            ),
        ):
            query = f"SELECT {columns} FROM {table} WHERE tar_file_id = ? ORDER BY {order}"
            if database.execute(query, counted[:1]).fetchall() != expected:
                found.problem(INDEX, name, f"the table {table} of index.sqlite differs from the tar")


def _check_sample(file: int, name: str, split: str, sample: TarSample, found: Findings) -> None:
    where = f"{name}: {sample.key}"
    found.looked_at[SAMPLES] += 1
    members = {part: (offset, size) for part, offset, size in sample.parts}
    try:
        if len(members) != len(sample.parts):
            raise Rejected("a member stands twice", ", ".join(part for part, _, _ in sample.parts))
        if "json" not in members:
            raise Rejected("no json member", f"has {', '.join(members)}")
        record = orjson.loads(os.pread(file, members["json"][1], members["json"][0]))
        images, messages, meta = record["images"], record["messages"], record.get("meta", {})
        check_sample(Sample(record["id"], messages, images, meta))
        if sorted([*images, "json"]) != sorted(members):
            raise Rejected("members differ from the images that the JSON names", f"{images}, {list(members)}")
        kind = str(meta.get("kind", "all"))
    except Rejected as rejected:
        return found.problem(SAMPLES, where, str(rejected))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return found.problem(SAMPLES, where, f"not the expected JSON: {type(error).__name__}: {error}")
    for image in images:
        found.looked_at[IMAGES] += 1
        data = os.pread(file, members[image][1], members[image][0])
        chosen = found.draw(f"{sample.key}.{image}") % found.decode_every == 0
        try:
            info = (decode_image if chosen else check_image)(data, NO_PIXEL_LIMIT)
        except Rejected as rejected:
            found.problem(IMAGES, f"{where}.{image}", str(rejected))
            continue
        found.formats[info.extension] += 1
        found.values["image width"][info.width] += 1
        found.values["image height"][info.height] += 1
    found.kinds.setdefault(kind, Counter())[split] += 1
    found.values["images per sample"][len(images)] += 1
    found.values["turns"][sum(message["role"] == "user" for message in messages)] += 1
    for message in messages:
        if message["role"] != "system":
            which = "question length" if message["role"] == "user" else "answer length"
            found.values[which][len(message["content"])] += 1
    _offer_to_gallery(file, split, kind, sample.key, record["id"], messages, [members[i] for i in images], found)
    return None


def _hash(file: Any) -> str:
    digest = xxhash.xxh3_128()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _offer_to_gallery(
    file: int, split: str, kind: str, key: str, name: str, messages: list[Any], places: list[Any], found: Findings
) -> None:
    heap = found.gallery.setdefault(kind, [])
    luck = found.draw(key)
    if len(heap) == GALLERY_SAMPLES and luck <= heap[0][0]:
        return
    images = [os.pread(file, size, offset) for offset, size in places]
    entry = (luck, {"key": key, "id": name, "split": split, "kind": kind, "messages": messages, "images": images})
    (heapq.heappush if len(heap) < GALLERY_SAMPLES else heapq.heappushpop)(heap, entry)


def _pick_gallery(found: Findings) -> list[dict[str, Any]]:
    """Some samples of every kind, in turn; their images become data URIs."""
    heaps = [sorted(heap, key=lambda entry: -entry[0]) for _, heap in sorted(found.gallery.items())]
    picked = [heap[turn][1] for turn in range(GALLERY_SAMPLES) for heap in heaps if turn < len(heap)]
    return [sample | {"images": [_data_uri(i) for i in sample["images"]]} for sample in picked[:GALLERY_SAMPLES]]


def _data_uri(data: bytes) -> str:
    try:
        extension = check_image(data, NO_PIXEL_LIMIT).extension
    except Rejected:
        return ""
    mime = MIME.get(extension)
    if mime is None or len(data) > INLINE_BYTES:
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=80)
        data, mime = buffer.getvalue(), "image/jpeg"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _report(wds_dir: Path, parts_dir: Path | None, parts: list[dict[str, Any]], found: Findings) -> dict[str, Any]:
    rejects = None
    if parts and parts_dir:
        reasons = sum((Counter(stats["reasons"]) for stats in parts), Counter())
        first = [row for row, _ in zip(read_rejects(parts_dir, parts), range(REJECTS_KEPT), strict=False)]
        read, rejected = (sum(stats[key] for stats in parts) for key in ("read", "rejected"))
        rejects = {"read": read, "rejected": rejected, "reasons": dict(reasons.most_common()), "first": first}
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
        "rejects": rejects,
    }


def render_html(report: dict[str, Any], gallery: list[dict[str, Any]]) -> str:
    """The report as one HTML page without external resources."""
    import jinja2

    folder = Path(__file__).parent.parent / "report"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("inspect.html.j2").render(report=report, gallery=gallery)


def distribution(values: Counter[int]) -> dict[str, Any]:
    """Smallest, median, 95th percentile, largest and mean of counted values ≥ 0, and a histogram of at most 12 bars.

    Bars are {from, to (inclusive), count}: one a value while there are few values, else of equal width, or, when the
    largest value is over twenty times the median, growing geometrically.
    """
    total, ordered = values.total(), sorted(values)

    def quantile(share: float) -> int:
        seen = 0
        for value in ordered:
            seen += values[value]
            if seen >= share * total:
                return value
        return ordered[-1]

    low, high, median = ordered[0], ordered[-1], quantile(0.5)
    if len(ordered) <= MOST_BARS:
        starts = ordered
    elif high > 20 * max(median, 1):
        base = max(low, 1)
        starts = sorted({low, *(int(base * (high / base) ** (bar / MOST_BARS)) for bar in range(MOST_BARS))})
    else:
        starts = sorted({low + (high + 1 - low) * bar // MOST_BARS for bar in range(MOST_BARS)})
    ends = [following - 1 for following in starts[1:]] + [high]
    if len(ordered) <= MOST_BARS:
        ends = starts
    return {
        "count": total,
        "min": low,
        "median": median,
        "p95": quantile(0.95),
        "max": high,
        "mean": round(sum(value * count for value, count in values.items()) / total, 2),
        "histogram": [
            {"from": a, "to": b, "count": sum(count for value, count in values.items() if a <= value <= b)}
            for a, b in zip(starts, ends, strict=True)
        ],
    }
