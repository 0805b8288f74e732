"""One conversion job: a range of a raw file → one WebDataset shard, its index, and what is known about its samples.

Notable: everything in one pass. Tar headers are formatted here (Python's tarfile takes longer for a header than the
disk for an image), and the offsets noted on the way are the `.tar.idx` and the rows of `index.sqlite`. The same input
gives the same bytes: no dates, no owners. The statistics file is written last; a shard without it is not made.
"""

import os
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import xxhash

from llava_sft.checksums import note
from llava_sft.data.formats import FORMATS, format_of
from llava_sft.data.image_checks import MAX_IMAGE_PIXELS, ImageRoot, check_image, decode_image
from llava_sft.data.plan import TRAIN_PREFIX, Range, raw_size, shard_name
from llava_sft.data.records import Line, Rejected, Sample, parse_json, parse_record
from llava_sft.errors import SHOWN, DataError
from llava_sft.files import atomic_file, write_json

FORMAT_VERSION = 1  # raise it when the same input gives other shards: all of them are then converted again

TAR_BLOCK = 512
TAR_RECORD = 20 * TAR_BLOCK  # tar files are padded to whole records
WRITE_BYTES = 16 << 10  # joined and written at once: with far larger ones Linux took up to three times as long
PROGRESS_RECORDS = 256
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
        """Append a member; return the offset of its content in bytes. `name` has at most 100 bytes, `digest` is the
        xxh3_128 of `data` where it is known already."""
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

    def end_sample(self) -> str:
        """The digest of the members since the last call, in hexadecimal (see `tars.sample_digest`)."""
        digest = xxhash.xxh3_64_hexdigest(b"".join(self._sample))
        self._sample.clear()
        return digest

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


def write_idx(file: BinaryIO, starts: list[int], end: int) -> None:
    """Energon's `.tar.idx`: where each sample begins, and where the last one ends."""
    file.write(struct.pack(f"<{len(starts) + 1}Q", *starts, end))


def convert_range(
    raw: Path | str, image_root: Path | str, wds_dir: Path, parts_dir: Path, prefix: str, part: Range,
    max_image_pixels: int = MAX_IMAGE_PIXELS, max_shard_bytes: int | None = None, decode_images: bool = False,
    progress: Callable[[int, int], Any] = lambda raw_bytes, records: None,
) -> dict[str, Any]:  # fmt: skip
    """Convert one range of a raw file (any of FORMATS); return its statistics.

    Writes `PREFIX-NNNNN.tar` and `.tar.idx` in `wds_dir`; `.samples.jsonl`, `.rejects.jsonl` and `.stats.json` in
    `parts_dir`. A bad record goes to the rejects and its neighbours are kept. `decode_images` decodes every image in
    full, not only those whose header or end marker is odd. `progress` gets what has been done so far in this range:
    bytes read, records read.
    Errors: DataError when the raw file or the image root is missing, the range lies beyond the file's end, the file
    changes meanwhile, or the tar grows beyond `max_shard_bytes`.
    """
    images = ImageRoot(image_root)
    check = decode_image if decode_images else check_image
    size = raw_size(raw)
    raw_format = format_of(raw)
    if not 0 <= part.start < part.end <= size:
        raise DataError(
            f"range {part.start}-{part.end} does not lie in {raw}, which has {size} bytes",
            "plan again (the file has changed since), or give 0 <= start < end <= size",
        )
    name = shard_name(prefix, part.index)
    key_prefix = "" if prefix == TRAIN_PREFIX else prefix[0]  # a key is unique in the whole data set, both splits
    stats_path = parts_dir / f"{name}.stats.json"
    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    unread: Counter[str] = Counter()  # keys of records that nothing here reads
    raw_hash = xxhash.xxh3_128()
    starts: list[int] = []  # byte offset of each sample in the tar
    read = lines = image_count = 0
    for folder in (wds_dir, parts_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("no write permission")
        except OSError as error:
            raise DataError(f"can not write to {folder}: {error}", "choose a folder that you may write to") from None
        for leftover in folder.glob(f".{name}.*.tmp"):  # of a killed job: nobody else works on this shard
            leftover.unlink(missing_ok=True)
    stats_path.unlink(missing_ok=True)
    with ExitStack() as stack:
        file = stack.enter_context(open(raw, "rb", buffering=1 << 20))
        samples_file = stack.enter_context(atomic_file(parts_dir / f"{name}.samples.jsonl", durable=False))
        rejects_file = stack.enter_context(atomic_file(parts_dir / f"{name}.rejects.jsonl", durable=False))
        idx_file = stack.enter_context(atomic_file(wds_dir / f"{name}.tar.idx", durable=False))
        tar = TarWriter(stack.enter_context(atomic_file(wds_dir / f"{name}.tar", durable=False)))
        before = os.fstat(file.fileno())
        for line in FORMATS[raw_format].read(file, part.start, part.end, raw_hash.update):
            lines += 1
            record = None
            try:
                record = parse_json(line)
                if record is None:
                    continue
                read += 1
                sample = parse_record(record, unread)
                blobs = [image if isinstance(image, bytes) else images.read(image) for image in sample.images]
                infos = [check(blob, max_image_pixels) for blob in blobs]
            except Rejected as rejected:
                read += record is None
                reasons[rejected.reason] += 1
                rejects_file.write(_reject_row(raw, line, record, rejected))
            else:
                key = f"{key_prefix}{part.index:05d}_{len(starts):06d}"
                starts.append(tar.offset)
                samples_file.write(_add_sample(tar, key, sample, blobs, infos))
                image_count += len(blobs)
                if "kind" in sample.meta:
                    kinds[str(sample.meta["kind"])] += 1
                if max_shard_bytes and tar.offset > max_shard_bytes:
                    raise _too_large(name, line.offset - part.start, part.end - part.start, tar.offset, max_shard_bytes)
            if not lines % PROGRESS_RECORDS:
                progress(line.offset - part.start, read)
        write_idx(idx_file, starts, tar.offset)
        tar_hash = tar.finish()
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{raw} changed while it was read", "convert again when nothing writes to it any more")
    stats = {
        "format_version": FORMAT_VERSION,
        "shard": name,
        "raw": {
            "path": str(raw),
            "format": raw_format,
            "size": after.st_size,
            "mtime_ns": after.st_mtime_ns,
            "ctime_ns": after.st_ctime_ns,
            "start": part.start,
            "end": part.end,
            "hash": raw_hash.hexdigest(),
        },
        "lines": lines,
        "read": read,
        "written": len(starts),
        "rejected": reasons.total(),
        "reasons": dict(reasons),
        "images": image_count,
        "kinds": dict(kinds),
        "unread": dict(unread.most_common(MOST_UNREAD)),
        "tar": {"hash": tar_hash, "bytes": os.path.getsize(wds_dir / f"{name}.tar")},
        "samples": note(parts_dir, [parts_dir / f"{name}.samples.jsonl"]),
    }
    if read != stats["written"] + stats["rejected"]:
        raise AssertionError(f"records were lost: {stats}")
    write_json(stats_path, stats, sealed=True)
    progress(part.end - part.start, read)
    return stats


def _add_sample(tar: TarWriter, key: str, sample: Sample, blobs: list[bytes], infos: list[Any]) -> bytes:
    """Write a sample's members; return its line of `.samples.jsonl`."""
    offset = tar.offset
    names = [f"{number:03d}.{info.extension}" for number, info in enumerate(infos)]
    hashes = [xxhash.xxh3_128_digest(blob) for blob in blobs]
    parts = [
        (name, tar.add(f"{key}.{name}", blob, digest), len(blob))
        for name, blob, digest in zip(names, blobs, hashes, strict=True)
    ]
    name = sample.id or key
    content = orjson.dumps({"id": name, "messages": sample.messages, "images": names, "meta": sample.meta})
    parts.append(("json", tar.add(f"{key}.json", content), len(content)))
    row = {
        "key": key,
        "id": name,
        "offset": offset,
        "size": tar.offset - offset,
        "digest": tar.end_sample(),
        "asked": xxhash.xxh3_64_hexdigest(sample.questions.encode("utf-8", "surrogatepass")),
        "parts": parts,
        "images": [
            {"hash": digest.hex(), "width": info.width, "height": info.height}
            for digest, info in zip(hashes, infos, strict=True)
        ],
        "meta": sample.meta,
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _too_large(name: str, done: int, planned: int, tar_bytes: int, allowed: int) -> DataError:
    fits = 1 << max(10, int(done * allowed / tar_bytes * 0.8).bit_length() - 1)  # a power of two
    return DataError(
        f"{name}.tar grows beyond max_shard_bytes {allowed:,}: its images are large for the {planned:,} bytes of raw data"
        " that it is made from",
        f"raise max_shard_bytes{f', or cut finer with shard_bytes: {fits}' if done else ''}",
    )


def _reject_row(raw: Path | str, line: Line, record: dict[str, Any] | None, rejected: Rejected) -> bytes:
    name = record.get("id") if record else None
    row = {
        "file": str(raw),
        "word": line.word,
        "line_in_range": line.number,
        "byte": line.offset,
        "id": None if name is None else str(name)[:SHOWN],
        "reason": rejected.reason,
        "detail": rejected.detail,
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
