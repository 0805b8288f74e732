"""Raw files in rows and columns: tables as CSV or TSV, and Arrow as `datasets` saves it.

Notable: the first row of a table names its columns, for each of its ranges; a range begins between two rows, which only
reading them tells, since a cell may hold line ends. Arrow's stream cannot be read from the middle: it is one range.
"""

import csv
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from llava_sft.data.records import BOM, MAX_LINE_BYTES, Line
from llava_sft.data.rejects import Rejected
from llava_sft.errors import DataError, shown

BLOCK = 1 << 20
SEPARATORS = (b"\t", b",", b";")  # of the first line's columns; in this order where several are as frequent


def separator_of(head: bytes) -> bytes | None:
    """What parts the columns of a table, by its first line; None for a line without any of SEPARATORS."""
    line = head.removeprefix(BOM).lstrip(b"\r\n").partition(b"\n")[0]
    best = max(SEPARATORS, key=line.count)
    return best if best in line else None


def _rows(file: BinaryIO, start: int) -> Iterator[tuple[int, list[str] | Rejected, bytes]]:
    """Yield offset, cells and bytes of each row from `start`, where one begins; a blank line is a row without cells."""
    csv.field_size_limit(MAX_LINE_BYTES)
    file.seek(0)
    separator = separator_of(file.readline(BLOCK)) or b","
    file.seek(start)
    offset, taken = start, b""

    def lines() -> Iterator[str]:
        nonlocal taken
        while line := file.readline():
            first, taken = offset == 0 and not taken, taken + line
            yield (line.removeprefix(BOM) if first else line).decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), delimiter=separator.decode(), strict=True)
    while True:
        try:
            cells: list[str] | Rejected = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(
                    f"{_name(file)}: the quote that opens in the row at byte {offset:,} is never closed",
                    'close it; a quote within a cell in quotes is written twice: "a ""word"" in it"',
                ) from None
            cells = Rejected("malformed row", f'{error}: a quote within a cell in quotes is written twice: ""')
        yield offset, cells, taken
        offset, taken = offset + len(taken), b""


def _name(file: BinaryIO) -> str:
    return str(getattr(file, "name", "the table"))


def table_starts(file: BinaryIO, size: int, range_bytes: int) -> list[int]:
    """The first row in each stretch of `range_bytes`: appending rows moves none of them."""
    starts = [0]
    for offset, _, _ in _rows(file, 0) if size > range_bytes else ():
        if offset // range_bytes > starts[-1] // range_bytes:
            starts.append(offset)
    return starts


def read_table(file: BinaryIO, start: int, end: int, update: Callable[[bytes], Any]) -> Iterator[Line]:
    """Rows as records whose keys are the names in the first row, which counts as a line without a record."""
    names = next((cells for _, cells, _ in _rows(file, 0)), [])
    names = [] if isinstance(names, Rejected) else [name.strip() for name in names]
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        raise DataError(f"{_name(file)}: its first row is not UTF-8", "save the table as UTF-8") from None
    if twice := [name for name in names if names.count(name) > 1]:
        fix = "give each column a name of its own in the first row"
        raise DataError(f"{_name(file)}: two columns are named {shown(twice[0])}", fix)
    for number, (offset, cells, taken) in enumerate(_rows(file, start), 1):
        if offset >= end:
            break
        update(taken)
        if isinstance(cells, Rejected):
            yield Line(number, offset, cells, "row")
        else:
            yield Line(number, offset, _record(names, cells) if offset and cells else b"", "row")


def _record(names: list[str], cells: list[str]) -> dict[str, Any] | Rejected:
    if len(cells) != len(names):
        fix = "a text that holds the separator goes into double quotes"
        return Rejected("cells differ from the first row", f"{len(cells)} cells, {len(names)} columns: {fix}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return Rejected("invalid UTF-8", "save the table as UTF-8")
    return dict(zip(names, cells, strict=True))


def read_arrow(file: BinaryIO, start: int, end: int, update: Callable[[bytes], Any]) -> Iterator[Line]:
    """The rows of Arrow's stream format, which `datasets` saves, or of its file format."""
    import pyarrow

    source, number = pyarrow.memory_map(file.name), 0
    try:
        if source.read(6) == b"ARROW1":
            arrow = pyarrow.ipc.open_file(source)
            batches: Iterator[Any] = map(arrow.get_batch, range(arrow.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            for record in batch_rows(batch):
                number += 1
                yield Line(number, min(source.tell(), end - 1), record, "row")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name} is not a whole Arrow file: {error}", "download or save it again") from None
    read_blocks(file, start, end, update)


def batch_rows(batch: Any) -> Iterator[Any]:
    """The rows of a pyarrow batch as dicts, one after the other: they may hold images."""
    for row in range(len(batch)):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield Rejected("invalid UTF-8", f"byte {error.start} of a text")


def read_blocks(file: BinaryIO, start: int, end: int, update: Callable[[bytes], Any]) -> None:
    """Give the bytes [start, end) to `update`."""
    file.seek(start)
    while start < end and (block := file.read(min(BLOCK, end - start))):
        update(block)
        start += len(block)
