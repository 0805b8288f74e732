"""Raw files in rows and columns: tables as CSV or TSV, and Arrow as `datasets` saves it.

Notable: the first row of a table names its columns, for each of its ranges; a range begins between two rows, which only
reading them tells, since a cell may hold line ends. Arrow's stream cannot be read from the middle: it is one range.
"""

import csv
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from llava_sft.data.records import BOM, MAX_LINE_BYTES, Line
from llava_sft.data.rejects import Rejected
from llava_sft.errors import DataError, shown

BLOCK = 1 << 20
SEPARATORS = (b"\t", b",", b";", b"|")  # of the first line's columns; in this order where several are as frequent


def separator_of(head: bytes) -> bytes | None:
    """What parts the columns of a table, by its first line; None for a line that neither says so nor has any of SEPARATORS."""
    line = head.removeprefix(BOM).lstrip(b"\r\n").partition(b"\n")[0]
    if declared := DECLARATION.fullmatch(line):
        return declared[1]
    best = max(SEPARATORS, key=line.count)
    return best if best in line else None


DECLARATION = re.compile(rb'"?sep=([^\w\s"\x80-\xff]|\t)"?,*\s*', re.IGNORECASE)  # Excel's first line: sep=;


def _spelling(file: BinaryIO) -> dict[str, Any]:
    """How a table is written, by the first of its lines that says something, and by the one above that declares it."""
    file.seek(0)
    declared = DECLARATION.fullmatch(file.readline(BLOCK).removeprefix(BOM))
    if not declared:
        file.seek(0)
    lines = iter(lambda: file.readline(BLOCK), b"")
    head = next((line for line in lines if line.strip(BOM + b"\r\n\t ,;|")), b"")
    separator = declared[1] if declared else separator_of(head) or b","
    spaced = [cell.startswith(b" ") for cell in head.split(separator)[1:] if cell.strip()]  # `a, b, "c, d"`
    return {"delimiter": separator.decode(), "skipinitialspace": bool(spaced) and all(spaced), "strict": True}


def _rows(file: BinaryIO, start: int) -> Iterator[tuple[int, list[str] | Rejected, bytes]]:
    """Yield offset, cells and bytes of each row from `start`, where one begins; one that says nothing is without cells.

    A malformed row is its first line: what csv took for the rest of it is read again. What its quotes may have torn apart is
    malformed, too.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    spelling, offset, doubt = _spelling(file), start, False
    separator = spelling["delimiter"]
    before_quote = re.compile(re.escape(separator.encode()) + b' +"')
    taken: list[bytes] = []
    again: list[bytes] = []
    file.seek(start)

    def lines() -> Iterator[str]:
        while line := again.pop() if again else file.readline():
            first = offset == 0 and not taken
            taken.append(line)
            yield (line.removeprefix(BOM) if first else line).decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), **spelling)
    while True:
        problem, cells = "", []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(
                    f"{_name(file)}: the quote that opens in the row at byte {offset:,} is never closed",
                    'close it; a quote within a cell in quotes is written twice: "a ""word"" in it"',
                ) from None
            problem, doubt = f'{error}: a quote within a cell in quotes is written twice: ""', True
            again += reversed(taken[1:])
            del taken[1:]
        data = b"".join(taken)
        if doubt and not problem and (doubt := any('"' in cell for cell in cells)):
            problem = "a quote left open in the row before may end in this one"
        if before_quote.search(data) and not problem:
            spaced = [cell for cell in cells if cell[:1] == " " and cell.lstrip(" ")[:1] == '"']
            if spaced and f"{separator}{spaced[0]}".encode("utf-8", "surrogateescape") in data:
                problem = (
                    f"a space before the quote: remove it, or write one behind each {separator} of the first row, too"
                )
        declares = offset == 0 and DECLARATION.fullmatch(data.removeprefix(BOM))
        said = cells if any(cells) and not declares else []
        yield offset, Rejected("malformed row", problem) if problem else said, data
        offset += len(data)
        taken.clear()


def _name(file: BinaryIO) -> str:
    return str(getattr(file, "name", "the table"))


def table_starts(file: BinaryIO, size: int, range_bytes: int) -> list[int]:
    """The first row in each stretch of `range_bytes`: appending rows moves none of them."""
    starts, doubt = [0], False  # none behind a malformed row
    for offset, cells, _ in _rows(file, 0) if size > range_bytes else ():
        if offset // range_bytes > starts[-1] // range_bytes and not doubt:
            starts.append(offset)
        doubt = isinstance(cells, Rejected)
    return starts


def read_table(file: BinaryIO, start: int, end: int, update: Callable[[bytes], Any]) -> Iterator[Line]:
    """Rows as records whose keys are the names in the first row, which counts as a line without a record."""
    first, cells = next(((offset, cells) for offset, cells, _ in _rows(file, 0) if cells), (0, []))
    if isinstance(cells, Rejected):
        raise DataError(
            f"{_name(file)}: its first row is malformed: {cells.detail}", "name the columns in the first row"
        )
    names = [name.strip() for name in cells]
    while names and not names[-1]:
        names.pop()  # empty columns of a spreadsheet
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
        record = cells if isinstance(cells, Rejected) else _record(names, cells) if cells and offset > first else b""
        yield Line(number, offset, record, "row")


def _record(names: list[str], cells: list[str]) -> dict[str, Any] | Rejected:
    if len(cells) != len(names) and (len(cells) < len(names) or any(cells[len(names) :])):
        fix = "a text that holds the separator goes into double quotes"
        return Rejected("cells differ from the first row", f"cells: {len(cells)}, columns: {len(names)}: {fix}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return Rejected("invalid UTF-8", "save the table as UTF-8")
    return dict(zip(names, cells, strict=False))


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
