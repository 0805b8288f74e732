"""What a chain makes, free of dates and timings, so that two runs can be compared: `{file: digest}`."""

import contextlib
import hashlib
import json
import re
import sqlite3
from pathlib import Path

from faults.project import RESULTS, RUN

# Measured anew by every run, or made of the dates of files.
VOLATILE = {
    "step_s", "tokens_per_s", "data_wait_share", "memory_gib", "seconds", "prepared_tokens_per_s", "depends", "free_gib",
    "prediction", "date", "began", "ended", "host", "pid", "mfu", "forecast",
}  # fmt: skip
# Pickles whose order is free, messages about speed, lists of the checksums of both; they are compared by their effect.
LEFT_OUT = (".log", ".lock", ".tsv", ".tmp", ".uuid", ".kept", ".metadata", "checksums.json", "events.jsonl")
FOLDERS = ("tensorboard", "logs", "benchmarks", "start")


def artefacts(project: Path, known: dict[str, tuple] | None = None) -> dict[str, str]:
    """Digest of every artefact below output/. `known` keeps digests by path from call to call, for files untouched since."""
    known, found = {} if known is None else known, {}
    for path in sorted((project / "output").rglob("*")):
        name = str(path.relative_to(project))
        if path.suffix in LEFT_OUT or path.name.endswith(LEFT_OUT) or set(FOLDERS) & set(path.parts) or not path.is_file():
            continue
        status = path.stat()
        state = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if known.get(name, (None,))[0] != state:
            known[name] = (state, digest(path, name))
        if known[name][1]:
            found[name] = known[name][1]
    return found


def digest(path: Path, name: str) -> str:
    data = path.read_bytes()
    with contextlib.suppress(ValueError, sqlite3.Error, KeyError):
        if path.suffix == ".json":
            data = json.dumps(steady(json.loads(data)), sort_keys=True).encode()
        elif path.suffix == ".jsonl":
            data = json.dumps([steady(json.loads(line)) for line in data.decode().splitlines()]).encode()
        elif path.suffix == ".sqlite":
            data = dump(path)
        elif path.suffix == ".html":
            data = words(data.decode()).encode()
        elif name.startswith(f"{RUN}/dataloader/"):
            return ""  # compared by what the training makes of it
    return hashlib.sha256(data).hexdigest()[:16]


def steady(value):
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if key not in VOLATILE}
    return [steady(each) for each in value] if isinstance(value, list) else value


def dump(path: Path) -> bytes:
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as base:
        return "\n".join(sorted(base.iterdump())).encode()


def words(page: str) -> str:
    """A page without what the clock decides: dates, durations, speeds, memory and the names of logs."""
    page = re.sub(r"run_\d{4}-\d\d-\d\d_[\w.-]+\.log", "LOG", page)
    page = re.sub(r"\d{4}-\d\d-\d\d[T ]?(\d\d:\d\d(:\d\d)?(\.\d+)?)?", "DATE", page)
    return re.sub(r"[\d.,]+( ?(s|ms|min|minutes|seconds|GiB|MB|tokens/s|tokens per second|%))\b", r"N\1", page)


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def run_files(names: dict[str, str]) -> dict[str, str]:
    """Those of the run and its results: what an interruption could change."""
    return {name: value for name, value in names.items() if name.startswith((f"{RUN}/", f"{RESULTS}/"))}
