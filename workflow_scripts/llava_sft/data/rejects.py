"""Records that are left out: why, where all of them are written, and what is said when there are too many."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from llava_sft.errors import SHOWN, DataError, many, verb_of
from llava_sft.files import atomic_file

ALL_REJECTS = "rejects.jsonl"  # beside the shards' own: all of them, with their lines in the raw files
FIRST_REASONS, FIRST_ALIKE = 10, 3  # that a message quotes; of one reason
FORMS = (
    "LLaVA (conversations of from and value, image), OpenAI (messages of role and content, images), question and answer"
)
# The way out where most rejects have one reason, and mending the records is not the first that comes to mind.
WAYS_OUT = {
    "invalid JSON": "write each record with json.dumps, one a line and without a comma behind it, or all of them as one JSON array",
    "missing image": "set image_root to the folder that the records' image paths start from",
    "missing key": "say which keys they are: columns: {question: KEY, answer: KEY, image: KEY}, or caption: KEY; the first row of a table names them",
    "image is an address": "download the pictures, and name the files",
    "malformed row": "a text with the separator, a quote or a line end goes into double quotes, without a space before them",
    "columns of several forms": "correct `columns`: question and answer, or caption, or conversations",
    "preference data is not supported": "keep the answers to learn alone, without the keys that compare them",
    "caption without a picture": "name the picture's file under the key image, or say which key has it: columns: {image: KEY}",
    "missing column": "correct `columns`: to the left what it is, to the right the key or column of your file",
    "number of <image> differs from images": "where no text has <image>: image_first: true",
    "image outside the image root": "set image_root to a folder that all pictures lie below",
}

WAYS_OUT |= dict.fromkeys(
    ("options are not read", "context is not read", "conversation in a text", "content is not a string", "picture is not named", "several answers", "keys of several forms", "several keys for the question", "several keys for the answer",
     "several keys for the caption", "several keys for the conversations", "image under several keys"),
    "mend the records, or say which keys are meant: `columns`, as the first of the rejects has it",
)  # fmt: skip


class Rejected(Exception):
    """A record is left out. `reason` is one of a fixed set (it is counted), `detail` holds this record's values, cut."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail if len(detail) <= SHOWN else f"{detail[:SHOWN]}…"
        super().__init__(f"{reason}: {self.detail}" if detail else reason)


def reject_row(origin: dict[str, Any], record: dict[str, Any] | None, rejected: Rejected) -> bytes:
    """A line of a shard's `.rejects.jsonl`. `origin`: {file, word, line_in_range, byte}; `record`: what was read of it, None
    where it is no JSON object."""
    name = record.get("id") if record else None
    row = origin | {
        "id": None if name is None else str(name)[:SHOWN],
        "reason": rejected.reason,
        "detail": rejected.detail,
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def read_rejects(notes_dir: Path, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rejects of shards (their statistics, in order), each with its `line` in the raw file (1-based)."""
    lines_before: Counter[str] = Counter()
    for stats in shards:
        if stats["rejected"]:
            path = notes_dir / f"{stats['shard']}.rejects.jsonl"
            try:
                rejects = [orjson.loads(row) | {} for row in path.read_bytes().splitlines()]
            except (OSError, ValueError, TypeError):
                raise DataError(
                    f"{path}: missing or damaged",
                    f"delete {stats['shard']}.tar and run the same command, which converts it again",
                ) from None
            for reject in rejects:
                yield reject | {"line": lines_before[reject["file"]] + reject["line_in_range"]}
        lines_before[stats["raw"]["path"]] += stats["lines"]


def write_all_rejects(path: Path, rejects: Iterable[dict[str, Any]]) -> list[str]:
    """Write the rejects of all shards into one file; return the first of them in words."""
    first: list[str] = []
    alike: Counter[tuple[str, str]] = Counter()  # by file and reason
    last: dict[tuple[str, str], int] = {}  # of each of these, the place in `first`
    with atomic_file(path) as file:
        for reject in rejects:
            file.write(orjson.dumps(reject, option=orjson.OPT_APPEND_NEWLINE))
            kind = reject["file"], reject["reason"]
            if len(first) < FIRST_REASONS and alike[kind] < FIRST_ALIKE:
                name = f", id {reject['id']}" if reject["id"] is not None else ""
                detail = f" ({reject['detail']})" if reject["detail"] else ""
                last[kind] = len(first)
                first.append(f"  {reject['file']}, {reject['word']} {reject['line']}{name}: {reject['reason']}{detail}")
            if kind in last:
                alike[kind] += 1
    for kind, place in last.items():
        if alike[kind] > FIRST_ALIKE:
            first[place] += f", and {alike[kind] - FIRST_ALIKE:,} more for the same reason"
    return first


def too_many_rejects(
    rejected: int, read: int, allowed: float, first: list[str], where: Path | str, reasons: Counter[str] | None = None
) -> DataError:
    """What is said when more than `allowed`, 0 to 1, of the records are rejected; `first`: some of them in words, `where` all
    of them stand, `reasons`: how many for each. That nothing is left is never advised."""
    most = next((reason for reason, count in (reasons or {}).items() if count > rejected / 2), "")
    problem = (
        f"{rejected:,} of {many(read, 'record')} {verb_of(rejected, 'were')} rejected; max_reject_fraction {allowed:g} allows"
        f" {int(allowed * read):,}. The first:\n" + "\n".join(first)
    )
    if rejected == read:
        way_out = WAYS_OUT.get(most, f"not one record can be used: it is their form. Read are {FORMS}")
        return DataError(problem, f"{way_out}; all rejects: {where}")
    shares = (math.ceil(rejected / read * 10**digits) / 10**digits for digits in range(1, 18))
    enough = next((share for share in shares if 1 > share >= rejected / read), rejected / read)
    return DataError(
        problem,
        f"mend these records (all: {where}), or accept that they are left out with"
        f" max_reject_fraction: {enough!r} (by hand: --max-reject-fraction {enough!r})",
    )
