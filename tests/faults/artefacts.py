"""What a chain makes, free of dates and timings, so that two runs can be compared: `{file: digest}`."""

import contextlib
import hashlib
import io
import json
import pickle
import re
import sqlite3
from pathlib import Path

# Measured anew by every run, or made of the dates of files.
VOLATILE = {
    "step_s", "tokens_per_s", "data_wait_share", "memory_gib", "seconds", "prepared_tokens_per_s", "depends", "free_gib",
    "prediction", "command", "date", "began", "ended", "host", "pid", "mfu", "forecast",
    "seal",
    "crc",
    "ctime_ns",
    "mtime_ns",
    "files",
}  # fmt: skip
# Pickles whose order is free, messages about speed, lists of the checksums of both; they are compared by their effect.
LEFT_OUT = (
    ".log",
    ".lock",
    ".tsv",
    ".tmp",
    ".uuid",
    ".kept",
    ".metadata",
    "checksums.json",
    "events.jsonl",
    "sessions.jsonl",
)
TIMES = re.compile(
    r"class=.facts.|tokens/s|MFU|[GM]iB|\b(seconds?|minutes?|hours?|speed|memory|wait|waited|step time)\b|\d m?s\b",
    re.IGNORECASE,
)
MEMO = re.compile(r"\..*\.json|.*\.files\.json")  # what was found whole, with its dates
FOLDERS = ("tensorboard", "logs", "benchmarks", "start", "dataloader")


def artefacts(project: Path, known: dict[str, tuple] | None = None, timed: bool = False) -> dict[str, str]:
    """Digest of every artefact below output/.

    `known` keeps digests by path from call to call, for files untouched since. `timed`: the chains ran at different times,
    so that what a page says of speed and memory differs.
    """
    known, found = {} if known is None else known, {}
    for path in sorted((project / "output").rglob("*")):
        name = str(path.relative_to(project))
        if (
            path.suffix in LEFT_OUT
            or path.name.endswith(LEFT_OUT)
            or (MEMO.fullmatch(path.name) and path.name != ".info.json")
            or set(FOLDERS) & set(path.parts)
            or any(part.startswith("damaged_") for part in path.parts)
            or not path.is_file()
        ):
            continue
        status = path.stat()
        state = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if path.suffix == ".distcp" and (index := path.with_name(".metadata")).is_file():
            state += (index.stat().st_ctime_ns,)
        if known.get(name, (None,))[0] != state:
            known[name] = (state, digest(path, name, timed))
        if known[name][1]:
            found[name] = known[name][1]
    return found


def digest(path: Path, name: str, timed: bool) -> str:
    data = path.read_bytes()
    with contextlib.suppress(ValueError, sqlite3.Error, KeyError):
        if path.suffix in (".json", ".answers"):
            data = json.dumps(steady(json.loads(data)), sort_keys=True).encode()
        elif path.suffix == ".jsonl":
            data = json.dumps([steady(json.loads(line)) for line in data.decode().splitlines()]).encode()
        elif path.suffix == ".sqlite":
            data = dump(path)
        elif path.suffix == ".html":
            data = words(data.decode(), timed).encode()
        elif path.suffix == ".distcp":
            data = tensors(path)
    return hashlib.sha256(data).hexdigest()[:16]


def tensors(shard: Path) -> bytes:
    """Digests of the tensors in a shard of a torch_dist checkpoint; the arguments of the command beside them say which steps
    a run was started at."""
    import torch

    with contextlib.suppress(Exception):  # damaged: then its bytes are compared
        places, lines = pickle.loads((shard.parent / ".metadata").read_bytes()).storage_data, []
        data = memoryview(shard.read_bytes())
        for index, info in places.items():
            if info.relative_path == shard.name and index.offset is not None:
                tensor = torch.load(io.BytesIO(data[info.offset : info.offset + info.length]), weights_only=True)
                value = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                lines.append(f"{index.fqn} {tuple(index.offset)} {value}")
        return "\n".join(sorted(lines)).encode()
    return shard.read_bytes()


def steady(value):
    if isinstance(value, dict):
        # A model is named by the fingerprint of its export, which is made of dates.
        return {
            key: steady(each)
            for key, each in value.items()
            if key not in VOLATILE and not (key == "model" and isinstance(each, str))
        }
    return [steady(each) for each in value] if isinstance(value, list) else value


def dump(path: Path) -> bytes:
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as base:
        return "\n".join(sorted(base.iterdump())).encode()


def words(page: str, timed: bool) -> str:
    """A page without dates and names of logs; `timed`: without its charts and the lines on speed, duration and memory too."""
    page = re.sub(r"run_\d{4}-\d\d-\d\d_[\w.-]+\.log", "LOG", page)
    page = re.sub(r"(?m)^.*/LOG</code>.*\n", "", page)  # one of each start of the training
    page = re.sub(r"\d{4}-\d\d-\d\d[T ]?(\d\d:\d\d(:\d\d)?(\.\d+)?)?", "DATE", page)
    if timed:
        page = "\n".join(line for line in page.splitlines() if not TIMES.search(line))
    return page


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
