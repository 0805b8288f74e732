"""The raw formats: where a file may be cut into ranges, and how the records that start in a range are read.

Notable:
- ranges of every format are bytes [start, end) of the file, and a range owns the records that *start* in it;
- the elements of a JSON array are found by their brackets, vectorised and never parsed whole: a bad element is one
  reject, where a streaming parser (ijson) would end at it;
- what gzip has packed cannot be read from the middle: it is one range;
- plans are made while Snakemake builds its DAG: numpy and pyarrow are imported only for files that need them.
"""

import contextlib
import gzip
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from llava_sft.data.forms import has_known_form
from llava_sft.data.records import BOM, MAX_LINE_BYTES, Line, read_lines
from llava_sft.data.rejects import Rejected
from llava_sft.data.tables import batch_rows, read_arrow, read_blocks, read_table, separator_of, table_starts
from llava_sft.errors import SHOWN, DataError

BLOCK = 1 << 20
ROWS_AT_ONCE = 32  # of a Parquet file: rows may hold images
EXTENSIONS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".csv": "table", ".tsv": "table"
}  # fmt: skip
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # how a file and a stream begin
GZIP = b"\x1f\x8b"
BEHIND_ANY = 1 << 62  # bytes


# Whole files of another kind, by how they begin: one message in place of a reject for each line.
OTHER_FILES = {
    b"\x1f\x8b": ("gzip", "gunzip -c"), b"PK\3\4": ("a zip archive or an Excel file", "unpack it, or save the sheet as CSV, UTF-8"),
    b"BZh": ("bzip2", "bunzip2 -c"), b"\xfd7zXZ": ("xz", "xz -dc"), b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"), b"\xd0\xcf\x11\xe0": ("an old Excel file", "save the sheet as CSV, UTF-8"),
    b"SQLite format": ("an SQLite database", "export it as JSONL"),
    b"version https://git-lfs": ("a Git LFS pointer", "git lfs pull"), b"<!DO": ("a web page", "download the file itself"),
    b"<htm": ("a web page", "download the file itself"),
    **dict.fromkeys(
        (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*"),
        ("a picture", "name the file of the records; image_root is the folder of their pictures"),
    ),
    b"%PDF": ("a PDF", "name the file of the records"),
}  # fmt: skip
PACKED_AS = dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), "") | dict.fromkeys((".tgz", ".tbz2", ".txz"), ".tar")
UTF_16_32 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
# Strings, and what the value of one that is a key begins with; brackets.
JSON_PARTS = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")(?:\s*:\s*(?=(\[\s*\{|[\[{]|)))?|[\]\[{}]', re.DOTALL)
# COCO's two tables to one, an annotation a record.
JOIN_TABLES = "(.images | map({key: (.id | tostring), value: .file_name}) | from_entries) as $name | [.annotations[] | . + {image: $name[.image_id | tostring]}]"
ENCODINGS = ("gb18030", "big5", "shift_jis", "cp1252")  # that a text which is no UTF-8 is tried as


def other_kind(path: Path | str) -> tuple[str, str] | None:
    """What a file of another kind is, and how to get at what it holds; None for a kind that is not known."""
    with open(path, "rb") as file:
        head = file.read(32)
    kind, fix = next((known for start, known in OTHER_FILES.items() if head.startswith(start)), (None, ""))
    if kind and fix.endswith((" -c", " -dc")):  # writes to its standard output, whatever the file is named
        fix = _unpacking(fix, Path(path))
    return (kind, fix) if kind else None


def _unpacking(command: str, path: Path) -> str:
    here = shlex.quote(str(path))
    if path.suffix.lower() in PACKED_AS:
        plain = shlex.quote(str(path.with_suffix(PACKED_AS[path.suffix.lower()])))
        return f"unpack it, and use {plain}: {command} {here} > {plain}"
    new = shlex.quote(f"{path}.new")
    return f"unpack it: {command} {here} > {new} && mv {new} {here}"


def format_of(path: Path | str) -> str:
    """A key of FORMATS: by how the file begins, and by its extension. Errors: DataError for a file of another kind."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(ARROW):
        return "arrow"
    if head.startswith(GZIP):
        _kind_of_packed(path)
        return "gzip"
    if other := other_kind(path):
        raise DataError(f"{path} is {other[0]}, not JSONL, JSON, CSV or Parquet", other[1])
    if head.startswith(UTF_16_32):
        code = "UTF-32" if b"\0\0" in head[:4] else "UTF-16"
        raise DataError(f"{path} is {code}, not UTF-8", f"iconv -f {code} -t UTF-8 {path} > NEW.jsonl")
    if b"\0" in head[:512]:
        raise DataError(f"{path} is a binary file, not JSONL, JSON, CSV or Parquet", "name the file of the records")
    extension = EXTENSIONS.get(Path(path).suffix.lower())
    if extension in ("parquet", "arrow"):
        return extension  # its reader says what is wrong
    return _kind_of_text(Path(path), head, extension)


def _kind_of_text(path: Path, head: bytes, extension: str | None) -> str:
    """The format of a text that begins with `head`, 64 KiB or all of it."""
    text = head.removeprefix(BOM).lstrip()
    if _is_table(path, text, len(head) < 1 << 16, extension):
        return "table"
    if text.startswith(b"[") and (extension is None or text[1:].lstrip().startswith(b"{")):
        return "json"  # whatever its name: an array of objects is no record a line
    return "jsonl"


def _is_table(path: Path, head: bytes, whole: bool, extension: str | None) -> bool:
    """Raise DataError when the first lines show that a file as a whole holds no records in UTF-8."""
    complete = head.splitlines() if whole else head.splitlines()[:-1]
    lines = [line.strip() for line in complete[:20] if line.strip()]
    if not lines:
        if head.startswith(b"{") and not _goes_on(path):
            _refuse_wrapped(path, head, cut=True)
        return extension == "table"
    if sum(not _decodes(line, "utf-8") for line in lines) > len(lines) / 2:
        code = next((name for name in ENCODINGS if _decodes(b"".join(lines), name)), "latin-1")
        raise DataError(f"{path} is not UTF-8, it may be {code}", f"iconv -f {code} -t UTF-8 {path} > NEW{path.suffix}")
    if lines[0].startswith(b"{"):
        one = _json(head) if whole else None
        spread = (isinstance(one, dict) and len(lines) > 1) or (lines[0] == b"{" and not any(map(_json, lines)))
        if b"\n}\n{" in head.replace(b"\r", b""):
            raise DataError(
                f"{path}: its records go over several lines", f"a record a line: jq -c . {path} > NEW.jsonl"
            )
        if spread or len(lines) == 1:
            _refuse_wrapped(path, head, spread, not whole)
    elif extension == "table":
        return not lines[0].startswith(b"[{")
    elif not any(line.startswith((b"{", b"[")) for line in lines):
        return separator_of(lines[0]) is not None
    return False


def _goes_on(path: Path) -> bool:
    """Whether a file has a second line."""
    with open(path, "rb") as file:
        return file.readline(MAX_LINE_BYTES).endswith(b"\n") and bool(file.read(1))


def _refuse_wrapped(path: Path, head: bytes, alone: bool = False, cut: bool = False) -> None:
    """Raise DataError for an object, which begins with `head`, that holds records; `alone`: for any. `cut`: it goes on."""
    begins: dict[str, bytes] = {}  # by key: of its value
    depth = 0
    for part in JSON_PARTS.finditer(head):
        if part[1] is None:
            depth += 1 if part[0] in b"[{" else -1
        elif depth == 1 and part[2] is not None:
            begins[part[1][1:-1].decode("utf-8", "replace")] = part[2]
    lists = [key for key, begin in begins.items() if len(begin) > 1]
    keyed = len(begins) > 1 and set(begins.values()) == {b"{"}
    if not alone and (has_known_form(begins) or not (lists or keyed)):
        return
    pick = f".[{orjson.dumps(lists[0]).decode()}]" if len(lists) == 1 else ""
    pick = "to_entries | map({id: .key} + .value)" if keyed else pick
    pick = JOIN_TABLES if "images" in lists and ("annotations" in lists or cut) else pick
    command = f"; for instance: jq {shlex.quote(pick)} {shlex.quote(str(path))} > NEW.json" if pick else ""
    keys = f" with the keys {', '.join(begins)}"[:SHOWN] if begins else ""
    raise DataError(
        f"{path} holds one JSON object{keys}, not records",
        f"store the list of records alone, as a JSON array: [ {{…}}, {{…}} ]{command}",
    )


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


# ---------------------------------------------------------------------------------------------- JSON array


def _array_cuts(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes, list[int], bool]]:
    """Yield blocks as (offset, bytes, places in it behind the `[` `,` `]` around elements, whether the array ends in it)."""
    import numpy as np

    kind = np.zeros(256, np.int8)  # by byte: what it does to the depth; 2 for a comma, 3 for a quote
    kind[list(b"[{")], kind[list(b"]}")], kind[list(b",")], kind[list(b'"')] = 1, -1, 2, 3
    depth, in_string, offset = int(start > 0), 0, start
    file.seek(start)
    while offset < end and (block := file.read(min(BLOCK, end - offset))):
        while block.endswith(b"\\") and offset + len(block) < end and (more := file.read(1)):
            block += more  # an escape is not torn apart
        codes = np.frombuffer(block.replace(b"\\\\", b"__").replace(b'\\"', b"__"), np.uint8)
        places = np.flatnonzero(kind[codes])
        kinds = kind[codes[places]]
        quotes = kinds == 3
        inside = (np.cumsum(quotes) + in_string) & 1
        outside = (inside == 0) & ~quotes
        in_string = int(inside[-1]) if len(inside) else in_string
        places, kinds = places[outside], kinds[outside]
        depths = np.cumsum(np.where(kinds == 2, 0, kinds), dtype=np.int64) + depth
        depth = int(depths[-1]) if len(depths) else depth
        opened, closed = (kinds == 1) & (depths == 1), (kinds == -1) & (depths == 0)
        cuts = ((kinds == 2) & (depths == 1)) | opened | closed
        yield offset, block, (places[cuts] + 1).tolist(), bool(closed.any())
        offset += len(block)


def _array_starts(file: BinaryIO, size: int, range_bytes: int) -> list[int]:
    """The first place between two elements in each stretch of `range_bytes`: appending elements moves none of them."""
    starts = [0]
    for offset, _, cuts, _ in _array_cuts(file, 0, size):
        for cut in cuts:
            if (offset + cut) // range_bytes > starts[-1] // range_bytes and offset + cut < size:
                starts.append(offset + cut)
    return starts


def _read_array(file: BinaryIO, start: int, end: int, update: Callable[[bytes], Any]) -> Iterator[Line]:
    number, element, begin, too_long = 0, b"", start, False
    ended, whole_file = False, end == BEHIND_ANY or end == file.seek(0, 2)
    for offset, block, cuts, closed in _array_cuts(file, start, end):
        update(block)
        previous = 0
        for cut in cuts:
            element += block[previous : cut - 1]
            if begin == 0 and element.removeprefix(BOM).strip() == b"" and block[cut - 1 : cut] == b"[":
                element = b""  # what stands before the first element
            if element.strip() or too_long:
                number += 1
                yield Line(number, begin, None if too_long else element, "record")
            element, begin, too_long, previous = b"", offset + cut, False, cut
        element += block[previous:]
        if len(element) > MAX_LINE_BYTES:
            element, too_long = b"", True
        ended = ended or closed
    if element.strip() or too_long or (whole_file and not ended):
        yield Line(number + 1, begin, None if too_long else element + b" [", "record")  # cut off, or more than an array


# ------------------------------------------------------------------------------------------------- Parquet


def _parquet(file: BinaryIO) -> tuple[Any, list[tuple[int, int]]]:
    """The open file, and of each row group the offset and compressed size in bytes."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name} is not a whole Parquet file: {error}", "download or write it again") from None
    groups = []
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        columns = [group.column(c) for c in range(group.num_columns)]
        begin = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        groups.append((begin, sum(c.total_compressed_size for c in columns)))
    return parquet, groups


def _parquet_starts(file: BinaryIO, size: int, range_bytes: int) -> list[int]:
    starts, filled = [0], 0
    for offset, group_bytes in _parquet(file)[1]:
        if filled and filled + group_bytes > range_bytes:
            starts.append(offset)
            filled = 0
        filled += group_bytes
    return starts


def _read_parquet(file: BinaryIO, start: int, end: int, update: Callable[[bytes], Any]) -> Iterator[Line]:
    parquet, groups = _parquet(file)
    number = 0
    for group, (offset, _) in enumerate(groups):
        if not start <= offset < end:
            continue
        batches = parquet.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group])
        left = parquet.metadata.row_group(group).num_rows
        while left:
            try:
                batch = next(batches)
            except OSError as error:  # pyarrow's errors of damaged pages are among them
                damage = Rejected("damaged row group", f"group {group}: {error}")
                yield from (Line(number + n + 1, offset, damage, "row") for n in range(left))
                number += left
                break
            left -= len(batch)
            for record in batch_rows(batch):
                number += 1
                yield Line(number, offset, record, "row")
    read_blocks(file, start, end, update)


# ---------------------------------------------------------------------------------------------------- gzip


def _kind_of_packed(path: Path | str) -> str:
    """The format of what gzip has packed. Errors: DataError where it is damaged, or none that is read in one go."""
    with gzip.open(path) as file, _no_damage(path):
        head = file.read(1 << 16)
    inner = Path(path).with_suffix("") if Path(path).suffix.lower() == ".gz" else Path(path)
    if head[257:262] == b"ustar" or head.startswith((b"PAR1", *ARROW, *OTHER_FILES, *UTF_16_32)):
        raise DataError(f"{path} is gzip, and holds no text", _unpacking("gunzip -c", Path(path)))
    return _kind_of_text(Path(path), head, EXTENSIONS.get(inner.suffix.lower()))


@contextlib.contextmanager
def _no_damage(path: Path | str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}", "download or pack it again") from None


def _read_packed(file: BinaryIO, start: int, end: int, update: Callable[[bytes], Any]) -> Iterator[Line]:
    """Offsets are those in the packed file."""
    inner = FORMATS[_kind_of_packed(file.name)]
    with gzip.GzipFile(fileobj=file) as unpacked, _no_damage(file.name):
        for line in inner.read(unpacked, 0, BEHIND_ANY, lambda _: None):
            data = line.data.removeprefix(BOM) if isinstance(line.data, bytes) and line.number == 1 else line.data
            yield line._replace(offset=min(file.tell(), end - 1), data=data)
    read_blocks(file, start, end, update)


# --------------------------------------------------------------------------------------------------- table


class Format(NamedTuple):
    starts: Callable[[BinaryIO, int, int], list[int]]  # (file, size, range_bytes) → where ranges begin
    read: Callable[..., Iterator[Line]]  # (file, start, end, update) → records; `update` sees the range's bytes
    range_bytes: int  # of one range, where the settings say `auto`


FORMATS = {
    "jsonl": Format(lambda file, size, step: list(range(0, size, step)), read_lines, 8 << 20),
    "json": Format(_array_starts, _read_array, 8 << 20),
    "parquet": Format(_parquet_starts, _read_parquet, 256 << 20),  # holds its images
    "table": Format(table_starts, read_table, 8 << 20),
    "arrow": Format(lambda file, size, step: [0], read_arrow, 256 << 20),
    "gzip": Format(lambda file, size, step: [0], _read_packed, 256 << 20),
}
