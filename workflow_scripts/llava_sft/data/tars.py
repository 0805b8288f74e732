"""The tars of a WebDataset, read without energon: the samples in them, their digests, and their layout."""

import contextlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash

from llava_sft.data.formats import other_kind
from llava_sft.data.layouts import CAPTIONS, layout_of, stored_sample
from llava_sft.data.records import Sample, check_sample
from llava_sft.data.rejects import Rejected
from llava_sft.errors import DataError, many

MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # energon's: the key ends at the first dot of the file's name
PACKED = re.compile(r".*\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)")
FIRST_MEMBERS = 1000  # of a tar, among which its first JSON stands

Extent = tuple[int, int]  # offset and size in bytes


class TarSample(NamedTuple):
    """Consecutive members of a tar that share a key: what energon takes for one sample."""

    key: str
    offset: int  # bytes, of its first header
    size: int  # bytes, to the next sample
    members: list[tuple[str, int, int]]  # name without the key; offset and size of the content in bytes

    @property
    def extent(self) -> Extent:
        return self.offset, self.size

    def digest(self, data: bytes) -> bytes:
        """The digest of its bytes, `data`, as the table sample_digests of our index has it."""
        return sample_digest(data, [(offset - self.offset, size) for _, offset, size in self.members])

    def read(self, data: bytes, layout: str, rules: bool = True) -> tuple[Sample[str], dict[str, bytes]]:
        """Its content, under the `rules` of raw records, and that of its members by their names; `data`: its bytes.

        Errors: `Rejected`.
        """
        contents = {name: data[at - self.offset : at - self.offset + size] for name, at, size in self.members}
        names = [name for name, _, _ in self.members]
        if len(contents) != len(names):
            raise Rejected("a member stands twice", ", ".join(names))
        try:
            sample = stored_sample(layout, self.key, contents)
            if rules:
                check_sample(sample)
            missing = set(sample.images) - set(names)
            others = layout in ("record", "caption")  # may lie beside the pictures
            if missing or (rules and not others and sorted([*sample.images, "json"]) != sorted(names)):
                raise Rejected("members differ from the images that the JSON names", f"{sample.images}, {names}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Rejected("not the expected JSON", f"{type(error).__name__}: {error}") from None
        return sample, contents


def sample_digest(data: bytes, extents: Iterable[tuple[int, int]]) -> bytes:
    """The xxh3_64 of a sample's bytes in a tar, in which the xxh3_128 of each member's content stands for the content.

    A conversion knows these already, as the images' hashes, so that noting a sample's digest costs next to nothing.
    `extents`: offset and size in `data` of each content, in order.
    """
    view, known, at = memoryview(data), bytearray(), 0
    for offset, size in extents:
        known += view[at:offset]
        known += xxhash.xxh3_128_digest(view[offset : offset + size])
        at = offset + size
    known += view[at:]
    return xxhash.xxh3_64_digest(known)


def read_at(file: int, extent: Extent) -> bytes:
    return os.pread(file, extent[1], extent[0])


def walk_tar(path: Path, odd: Callable[[str], Any] = lambda name: None) -> list[TarSample]:
    """The samples of a tar, in order. `odd` gets the members that energon leaves out.

    Errors: `tarfile.TarError`, OSError for a tar that is damaged or cut off.
    """
    with tarfile.open(path, "r:") as tar:
        samples, end = _grouped(tar, odd), tar.offset
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(1024) != bytes(1024):
            raise tarfile.ReadError("the end of the archive is missing: it was cut off, or a header is damaged")
    ends = [sample.offset for sample in samples[1:]] + [end]
    # An empty tar has an end and no sample.
    return [sample._replace(size=stop - sample.offset) for sample, stop in zip(samples, ends, strict=False)]


def sample_in(data: bytes) -> TarSample:
    """The sample whose bytes these are; its offsets count from their beginning. Errors: `tarfile.TarError`."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        samples = _grouped(tar)
    if len(samples) != 1:
        raise tarfile.ReadError(f"holds {many(len(samples), 'sample')} where one is due")
    return samples[0]._replace(size=len(data))


def _grouped(tar: tarfile.TarFile, odd: Callable[[str], Any] = lambda name: None) -> list[TarSample]:
    """The samples of an open tar, without their sizes."""
    samples: list[TarSample] = []
    for member in _members(tar):
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if not member.isreg():
            continue
        match = MEMBER.fullmatch(member.name)
        if not match:
            odd(member.name)
            continue
        key, name = match.groups()
        if not samples or samples[-1].key != key:
            samples.append(TarSample(key, member.offset, 0, []))
        samples[-1].members.append((name, member.offset_data, member.size))
    return samples


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    try:
        yield from tar
    except (ValueError, ArithmeticError, LookupError, MemoryError, RecursionError) as error:  # a damaged header
        raise tarfile.ReadError(f"a header is damaged: {type(error).__name__}: {error}") from None


def find_layout(tar: Path, samples: list[TarSample]) -> str | None:
    """The layout of a tar, by the first sample whose JSON can be read; captions are read where none can."""
    with open(tar, "rb") as file:
        for sample in samples:
            extent = next(((offset, size) for name, offset, size in sample.members if name == "json"), None)
            with contextlib.suppress(ValueError):
                if extent and (layout := layout_of(orjson.loads(read_at(file.fileno(), extent)))):
                    return layout
    return "caption" if any(name in CAPTIONS for sample in samples for name, _, _ in sample.members) else None


def first_layout(tar: Path) -> str | None:
    """The layout of a tar by its first JSON, or captions, read from its beginning alone; None for an unknown one, or a damaged
    tar."""
    of_json: list[str | None] = []
    captions = None
    with contextlib.suppress(OSError, tarfile.TarError, ValueError), tarfile.open(tar, "r:") as members:
        for member in itertools.islice(members, FIRST_MEMBERS):
            match = MEMBER.fullmatch(member.name)
            if not member.isreg() or not match:
                continue
            if match[2] == "json" and not of_json and (content := members.extractfile(member)):
                of_json.append(layout_of(orjson.loads(content.read())))
            elif match[2] in CAPTIONS:
                captions = "caption"
            if of_json and (of_json[0] or captions):
                break
        return (of_json and of_json[0]) or captions
    return None


def packed_tars(folder: Path) -> list[Path]:
    """The compressed tars in a folder, by their names."""
    return [path for path in sorted(folder.rglob("*.t*")) if PACKED.fullmatch(path.name) and path.is_file()]


def no_tar(setting: str, folder: Path) -> DataError:
    """What is wrong with a folder without any .tar; `setting` names what the folder was given as."""
    packed = next(iter(packed_tars(folder)), None)
    if other := packed and other_kind(packed):
        where = f"{setting}{folder} holds no .tar file, and {packed.name} is {other[0]}"
        return DataError(f"{where}: samples are read at their places, which only a plain tar has", other[1])
    return DataError(
        f"{setting}{folder}: no such folder, or no .tar file (and .nv-meta) in it",
        "name the folder that holds the tars, or set raw_data to convert your own records",
    )
