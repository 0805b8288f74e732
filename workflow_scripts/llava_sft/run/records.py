"""The logs of a run, one JSON record a line, and the lines that the terminal shows for them.

The trainer appends records, the launcher prints lines, the report draws curves: all from the same files.
A line begins with its checksum. A checkpoint keeps a copy of the logs so far: a line that is damaged later is taken from it.
No torch.
"""

import contextlib
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sft.errors import many
from llava_sft.files import write_text
from llava_sft.progress import clock
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.layout import EVENTS, LOGS, METRICS, SAMPLES, VALIDATION, data_dir

CHECKED = re.compile(r'\{"crc": "([0-9a-f]{8})", ')

_waiting: dict[Path, str] = {}  # lines that the disk did not take
_warnings: set[str] = set()


def append(path: Path, record: dict) -> None:
    """Add a record, with a checksum of its line. A line that a full disk does not take waits for the next one: a log
    does not cost the run."""
    text = json.dumps(record)[1:]
    lines = _waiting.pop(path, "") + f'{{"crc": "{_checksum(text)}", {text}\n'
    try:
        with open(path, "ab") as file:
            file.write(lines.encode())
    except OSError as error:
        warn_once(f"warning: {path} cannot be written: {error.strerror}; the training continues")
        _waiting[path] = "\n" + lines.lstrip()  # a part of it may have been written


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def warn_once(message: str) -> None:
    if message not in _warnings:
        _warnings.add(message)
        print(message, flush=True)


def parse(data: bytes, checked: bool = False) -> dict:
    """The record of a line. Errors: ValueError where it is damaged. `checked`: it must have a checksum."""
    line = data.decode()
    prefix = CHECKED.match(line)
    if (prefix and _checksum(line[prefix.end() :]) != prefix[1]) or (checked and not prefix):
        raise ValueError("not what was written")
    record = json.loads(line)
    if not isinstance(record, dict) or ("crc" in record) != bool(prefix):
        raise ValueError("not a record")
    if not prefix and not isinstance(record.get("iteration"), int):  # of an earlier version
        raise ValueError("no step of a training")
    record.pop("crc", None)
    return record


def _read(path: Path) -> tuple[dict[bytes, dict], int]:
    """Records by their lines, and the number of damaged lines. What follows the last line end is still being written."""
    records: dict[bytes, dict] = {}
    damaged, checked = 0, False
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            if line:
                records[line] = parse(line, checked)
                checked = checked or line.startswith(b'{"crc"')  # only lines of earlier versions, before it, have none
        except (ValueError, RecursionError):
            damaged += 1
    return records, damaged


def _lines(path: Path) -> dict[bytes, dict]:
    """Records by their lines. Damaged ones are taken from the newest checkpoint's copy, or skipped."""
    records, damaged = _read(path)
    done = iterations_done(path.parent)
    copy = data_dir(path.parent, done) / path.name
    copied, _ = _read(copy) if done else ({}, 0)
    if copied.keys() - records.keys():
        warn_once(f"warning: {path}: records are damaged or missing: taken from {copy}")
        return copied | {line: record for line, record in records.items() if record["iteration"] > done}
    if damaged:
        warn_once(f"warning: {path}: {many(damaged, 'damaged line', 'are')} skipped")
    return records


def read_jsonl(path: Path) -> list[dict]:
    return list(_lines(path).values())


def read_metrics(run_dir: Path) -> list[dict]:
    return read_jsonl(run_dir / METRICS)


def forget_after(run_dir: Path, iteration: int) -> None:
    """Drop the records of steps that a run which resumes from `iteration` takes again."""
    for name in (*LOGS, *(f"{SAMPLES}/{path.name}" for path in run_dir.glob(f"{SAMPLES}/rank*.jsonl"))):
        forget_after_in(run_dir / name, iteration)


def forget_after_in(path: Path, iteration: int) -> None:
    lines = _lines(path)
    if lines or path.is_file():
        kept = [line.decode() + "\n" for line, record in lines.items() if record["iteration"] <= iteration]
        write_text(path, "".join(kept))


class Tail:
    """What becomes of each record that is appended to the logs of a run directory from now on, or of all (`whole`): a
    terminal line, or what `formats` (file → function of a record) makes."""

    def __init__(self, run_dir: Path, formats: dict[str, Callable[[dict], Any]] | None = None, whole: bool = False):
        formats = formats or {METRICS: progress_line, VALIDATION: validation_line, EVENTS: event_line}
        self.formats = {run_dir / name: line_of for name, line_of in formats.items()}
        self.offsets = {path: path.stat().st_size if path.is_file() and not whole else 0 for path in self.formats}

    def new(self) -> list[Any]:
        lines = []
        for path, line_of in self.formats.items():
            if path.is_file() and path.stat().st_size > self.offsets[path]:
                with open(path, "rb") as file:
                    file.seek(self.offsets[path])
                    text = file.read()
                text = text[: text.rfind(b"\n") + 1]  # a record may be half-written
                self.offsets[path] += len(text)
                for record in filter(None, text.split(b"\n")):
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        lines.append(line_of(parse(record)))
        return lines


def progress_line(record: dict) -> str:
    """`step 200/3200  loss 1.234  lr 1.0e-05  grad 0.42  5,120 tokens/s  MFU 51%  padding 3%  data wait 1%  2.1 GiB  4:32 left`"""
    left = clock((record["train_iters"] - record["iteration"]) * record["step_s"])
    digits = len(str(record["train_iters"]))
    parts = ((key.removeprefix("learning-rate-"), rate) for key, rate in record.items() if "learning-rate-" in key)
    others = ", ".join(f"{part} {rate:.2e}" for part, rate in parts if rate != record["learning-rate"])
    mfu = f"  MFU {record['mfu']:.0%}" if "mfu" in record else ""
    return (
        f"step {record['iteration']:>{digits}}/{record['train_iters']}  loss {record['lm loss']:.4f}"
        f"  lr {record['learning-rate']:.2e}{f' ({others})' if others else ''}  grad {record['grad-norm'] or 0:.2f}"
        f"  {record['tokens_per_s']:,.0f} tokens/s{mfu}  padding {record['padding_share']:.0%}"
        f"  data wait {record['data_wait_share']:.0%}  {record['memory_gib']:.1f} GiB  {left} left"
    )


def validation_line(record: dict) -> str:
    best = "the best so far" if record["best"] else "not the best"
    return f"step {record['iteration']}: held-out loss {record['lm loss validation']:.4f}, {best}"


def event_line(record: dict) -> str:
    return f"step {record['iteration']}: {record['message']}"
