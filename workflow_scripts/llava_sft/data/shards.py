"""One conversion job: a range of a raw file → one WebDataset shard, its index, and what is known about its samples.

Notable: everything in one pass. Tar headers are formatted here (Python's tarfile takes longer for a header than the
disk for an image), and the offsets noted on the way are the `.tar.idx` and the rows of `index.sqlite`. The same input
gives the same bytes: no dates, no owners. The statistics file is written last; a shard without it is not made.
"""

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import xxhash

from llava_sft.checksums import note
from llava_sft.data.formats import FORMATS, format_of
from llava_sft.data.forms import AS_GIVEN, Reading
from llava_sft.data.image_checks import MAX_IMAGE_PIXELS, ImageInfo, ImageRoot, check_image, decode_image
from llava_sft.data.other_forms import Unread
from llava_sft.data.plan import TRAIN_PREFIX, Range, raw_size, shard_name
from llava_sft.data.records import Line, Sample, parse_json, parse_record
from llava_sft.data.rejects import Rejected, reject_row
from llava_sft.errors import DataError
from llava_sft.files import atomic_file, write_json

FORMAT_VERSION = 1  # raise it when the same input gives other shards: all of them are then converted again

TAR_BLOCK = 512
TAR_RECORD = 20 * TAR_BLOCK  # tar files are padded to whole records
WRITE_BYTES = 16 << 10  # joined and written at once: with far larger ones Linux took up to three times as long
PROGRESS_RECORDS = 256
ONE_RANGE = ("arrow", "gzip")  # formats that no shard_bytes cuts
MOST_UNREAD = 50  # keys that are named, of those that are not read


class TarWriter:
    """Writes plain ustar members (mode 644, no owner, time 0) and hashes the file's bytes on the way."""

    # name, mode, uid, gid, size, mtime, checksum, type, link name, magic, version: IEEE 1003.1 ustar, octal text fields
    _TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    _IDS = b"0000644\0" + b"0000000\0" * 2
    _TIME = b"00000000000\0"
    _FIXED_SUM = sum(_IDS) + sum(_TIME) + sum(_TAIL) + 8 * ord(" ")

    def __init__(self, file: BinaryIO):
        self.offset = 0  # bytes: where the next member's header goes
        self._file = file
        self._pending: list[bytes] = []
        self._pending_end = WRITE_BYTES
        self._hash = xxhash.xxh3_128()
        self._sample: list[bytes] = []  # what its digest is made of, as `tars.sample_digest` has it

    def add(self, name: str, data: bytes, digest: bytes | None = None) -> int:
        """Append a member; return the offset of its content in bytes. `name` has at most 100 bytes."""
        name_bytes, size = name.encode(), len(data)
        size_bytes = b"%011o\0" % size
        checksum = self._FIXED_SUM + sum(name_bytes) + sum(size_bytes)
        header = b"%s%s%s%s%06o\0 %s" % (
            name_bytes.ljust(100, b"\0"), self._IDS, size_bytes, self._TIME, checksum, self._TAIL
        )  # fmt: skip
        padding = bytes(-size % TAR_BLOCK)
        self._sample += (header, digest or xxhash.xxh3_128_digest(data), padding)
        self._pending += (header, data, padding)
        content = self.offset + TAR_BLOCK
        self.offset = content + size + -size % TAR_BLOCK
        if self.offset >= self._pending_end:
            self._flush()
        return content

    def add_sample(self, key: str, contents: Iterable[tuple[str, bytes, bytes | None]]) -> dict[str, Any]:
        """Append a sample's members: name without the key, data, and the xxh3_128 of the data where it is known already.

        Returns what the index says of it: key, offset and size in bytes, digest in hexadecimal (`tars.sample_digest`), and
        as "parts" the name, offset and size of each member's content.
        """
        start = self.offset
        members = [(name, self.add(f"{key}.{name}", data, digest), len(data)) for name, data, digest in contents]
        digest = xxhash.xxh3_64_hexdigest(b"".join(self._sample))
        self._sample.clear()
        return {"key": key, "offset": start, "size": self.offset - start, "digest": digest, "parts": members}

    def finish(self) -> str:
        """Write the end of the archive; return the xxh3_128 of the whole file, in hexadecimal."""
        padded = -(-(self.offset + 2 * TAR_BLOCK) // TAR_RECORD) * TAR_RECORD
        self._pending.append(bytes(padded - self.offset))
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        block = b"".join(self._pending)
        self._hash.update(block)
        self._file.write(block)
        self._pending.clear()
        self._pending_end = self.offset + WRITE_BYTES


def idx_bytes(starts: list[int], end: int) -> bytes:
    """Energon's `.tar.idx`: where each sample begins, and where the last one ends."""
    return struct.pack(f"<{len(starts) + 1}Q", *starts, end)


class ShardWriter:
    """A shard as it is made: its files, which take their places when `files` closes without an error, and its counts.

    `raw`: the file that its records come from. `key_prefix`: of its samples' keys.
    """

    def __init__(
        self, files: ExitStack, raw: Path | str, wds_dir: Path, notes_dir: Path, name: str, key_prefix: str,
        reading: Reading = AS_GIVEN,
    ):  # fmt: skip
        def new(path: Path) -> BinaryIO:
            return files.enter_context(atomic_file(path, durable=False))

        self.raw, self.key_prefix, self.reading = str(raw), key_prefix, reading
        self._rows, self._rejects = new(notes_dir / f"{name}.samples.jsonl"), new(notes_dir / f"{name}.rejects.jsonl")
        self._idx, self.tar = new(wds_dir / f"{name}.tar.idx"), TarWriter(new(wds_dir / f"{name}.tar"))
        self.starts: list[int] = []  # byte offset of each sample in the tar
        self.lines = self.read = self.images = 0
        self.reasons: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.unread = Unread()  # keys of records that nothing here reads

    def take(self, line: Line, load: Callable[[list[str | bytes]], tuple[list[bytes], list[ImageInfo]]]) -> None:
        """Make a sample, or a reject, of a record; `load` reads and checks its images."""
        self.lines += 1
        record = None
        try:
            record = parse_json(line)
            if record is None:
                return
            sample = parse_record(record, self.unread, self.reading)
            self._add(sample, *load(sample.images))
        except Rejected as rejected:
            self.reasons[rejected.reason] += 1
            origin = {"file": self.raw, "word": line.word, "line_in_range": line.number, "byte": line.offset}
            self._rejects.write(reject_row(origin, record, rejected))
        self.read += 1

    def _add(self, sample: Sample, images: list[bytes], infos: list[ImageInfo]) -> None:
        """Write a sample's members and its line of `.samples.jsonl`."""
        key = f"{self.key_prefix}_{len(self.starts):06d}"
        names = [f"{number:03d}.{info.extension}" for number, info in enumerate(infos)]
        hashes = [xxhash.xxh3_128_digest(image) for image in images]
        name = sample.id or key
        content = orjson.dumps({"id": name, "messages": sample.messages, "images": names, "meta": sample.meta})
        row = self.tar.add_sample(key, [*zip(names, images, hashes, strict=True), ("json", content, None)])
        self.starts.append(row["offset"])
        row |= {
            "id": name,
            "asked": xxhash.xxh3_64_hexdigest(sample.questions.encode("utf-8", "surrogatepass")),
            "images": [
                {"hash": digest.hex(), "width": info.width, "height": info.height}
                for digest, info in zip(hashes, infos, strict=True)
            ],
            "meta": sample.meta,
        }
        self._rows.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        self.images += len(images)
        if "kind" in sample.meta:
            self.kinds[str(sample.meta["kind"])] += 1

    def finish(self) -> str:
        """Write the end of the archive, and its index; return the tar's hash."""
        self._idx.write(idx_bytes(self.starts, self.tar.offset))
        return self.tar.finish()

    def counts(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "read": self.read,
            "written": len(self.starts),
            "rejected": self.reasons.total(),
            "reasons": dict(self.reasons),
            "images": self.images,
            "kinds": dict(self.kinds),
            "unread": dict(self.unread.most_common(MOST_UNREAD)),
            "unread_examples": {key: self.unread.examples[key] for key, _ in self.unread.most_common(MOST_UNREAD)},
        }


def convert_range(
    raw: Path | str, image_root: Path | str, wds_dir: Path, notes_dir: Path, prefix: str, cut: Range,
    max_image_pixels: int = MAX_IMAGE_PIXELS, max_shard_bytes: int | None = None, decode_images: bool = False,
    progress: Callable[[int, int], Any] = lambda raw_bytes, records: None, reading: Reading = AS_GIVEN,
) -> dict[str, Any]:  # fmt: skip
    """Convert one range of a raw file (any of FORMATS); return its statistics.

    Writes `PREFIX-NNNNN.tar` and `.tar.idx` in `wds_dir`; `.samples.jsonl`, `.rejects.jsonl` and `.stats.json` in
    `notes_dir`. A bad record goes to the rejects and its neighbours are kept. `decode_images` decodes every image in
    full, not only those whose header or end marker is odd. `progress` gets what has been done so far in this range:
    bytes read, records read.
    Errors: DataError when the raw file or the image root is missing, the range lies beyond the file's end, the file
    changes meanwhile, or the tar grows beyond `max_shard_bytes`.
    """
    image_files, check = ImageRoot(image_root), decode_image if decode_images else check_image

    def load(images: list[str | bytes]) -> tuple[list[bytes], list[ImageInfo]]:
        encoded = [image if isinstance(image, bytes) else image_files.read(image) for image in images]
        return encoded, [check(image, max_image_pixels) for image in encoded]

    size, raw_format, name = raw_size(raw), format_of(raw), shard_name(prefix, cut.number)
    if not 0 <= cut.start < cut.end <= size:
        raise DataError(
            f"range {cut.start}-{cut.end} does not lie in {raw}, which has {size} bytes",
            "plan again (the file has changed since), or give 0 <= start < end <= size",
        )
    _make_room(wds_dir, notes_dir, name)
    # No other shard of either split has it.
    key_prefix = f"{'' if prefix == TRAIN_PREFIX else prefix[0]}{cut.number:05d}"
    raw_hash = xxhash.xxh3_128()
    with ExitStack() as files:
        file = files.enter_context(open(raw, "rb", buffering=1 << 20))
        shard = ShardWriter(files, raw, wds_dir, notes_dir, name, key_prefix, reading)
        before = os.fstat(file.fileno())
        for line in FORMATS[raw_format].read(file, cut.start, cut.end, raw_hash.update):
            shard.take(line, load)
            done = line.offset - cut.start
            if max_shard_bytes and shard.tar.offset > max_shard_bytes:
                fits = 0 if raw_format in ONE_RANGE else done
                raise _too_large(name, fits, cut.end - cut.start, shard.tar.offset, max_shard_bytes)
            if not shard.lines % PROGRESS_RECORDS:
                progress(done, shard.read)
        tar_hash = shard.finish()
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{raw} changed while it was read", "convert again when nothing writes to it any more")
    origin = {"path": str(raw), "format": raw_format, "start": cut.start, "end": cut.end, "hash": raw_hash.hexdigest()}
    state = {"size": after.st_size, "mtime_ns": after.st_mtime_ns, "ctime_ns": after.st_ctime_ns}
    stats = shard.counts() | {
        "format_version": FORMAT_VERSION,
        "shard": name,
        "raw": origin | state,
        "tar": {"hash": tar_hash, "bytes": os.path.getsize(wds_dir / f"{name}.tar")},
        "samples": note(notes_dir, [notes_dir / f"{name}.samples.jsonl"]),
    }
    if stats["read"] != stats["written"] + stats["rejected"]:
        raise AssertionError(f"records were lost: {stats}")
    write_json(notes_dir / f"{name}.stats.json", stats, sealed=True)
    progress(cut.end - cut.start, shard.read)
    return stats


def _make_room(wds_dir: Path, notes_dir: Path, name: str) -> None:
    """Make the folders of a shard, and remove its statistics and what a killed job left. Raises DataError where it cannot."""
    for folder in (wds_dir, notes_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("no write permission")
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error}", "choose a folder that you may write to") from None
        for leftover in folder.glob(f".{name}.*.tmp"):  # nobody else works on this shard
            leftover.unlink(missing_ok=True)
    (notes_dir / f"{name}.stats.json").unlink(missing_ok=True)


def _too_large(name: str, done: int, planned: int, tar_bytes: int, allowed: int) -> DataError:
    fits = 1 << max(10, int(done * allowed / tar_bytes * 0.8).bit_length() - 1)  # a power of two
    return DataError(
        f"{name}.tar grows beyond max_shard_bytes {allowed:,}: its images are large for the {planned:,} bytes of raw data"
        " that it is made from",
        f"raise max_shard_bytes{f', or cut finer with shard_bytes: {fits}' if done else ', or split the raw file'}",
    )
