"""The raw formats: where a file may be cut into ranges, and how the records that start in a range are read.

Notable:
- ranges of every format are bytes [start, end) of the file, and a range owns the records that *start* in it;
- the elements of a JSON array are found by their brackets, vectorised and never parsed whole: a bad element is one
  reject, where a streaming parser (ijson) would end at it;
- plans are made while Snakemake builds its DAG: numpy and pyarrow are imported only for files that need them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava_sft.data.records import BOM, MAX_LINE_BYTES, Line, Rejected, read_lines
from llava_sft.errors import DataError

BLOCK = 1 << 20
ROWS_AT_ONCE = 32  # of a Parquet file: rows may hold images
EXTENSIONS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def format_of(path: Path | str) -> str:
    """A key of FORMATS: by the extension where that says it, else by how the file begins."""
    if known := EXTENSIONS.get(Path(path).suffix.lower()):
        return known
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    return "json" if head.removeprefix(BOM).lstrip().startswith(b"[") else "jsonl"


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
    ended, whole_file = False, end == file.seek(0, 2)
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
            for row in range(len(batch)):
                number += 1
                try:
                    record: Any = batch.slice(row, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    record = Rejected("invalid UTF-8", f"byte {error.start} of a text")
                yield Line(number, offset, record, "row")
    file.seek(start)
    while start < end and (block := file.read(min(BLOCK, end - start))):
        update(block)
        start += len(block)


# --------------------------------------------------------------------------------------------------- table


class Format(NamedTuple):
    starts: Callable[[BinaryIO, int, int], list[int]]  # (file, size, range_bytes) → where ranges begin
    read: Callable[..., Iterator[Line]]  # (file, start, end, update) → records; `update` sees the range's bytes
    range_bytes: int  # of one range, where the settings say `auto`


FORMATS = {
    "jsonl": Format(lambda file, size, step: list(range(0, size, step)), read_lines, 8 << 20),
    "json": Format(_array_starts, _read_array, 8 << 20),
    "parquet": Format(_parquet_starts, _read_parquet, 256 << 20),  # holds its images
}
