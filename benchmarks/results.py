"""What the benchmarks share: timed commands, result files with their provenance, and the table of all figures
(`make figures`).

A result is benchmarks/results/<name>.json: name, date, commit, command, hardware, versions, rows; a row is
{metric, value, unit, goal, better: "higher" | "lower", settings, note}. Rows that were not measured again stay.

Speeds are compared with benchmarks/baseline.json, the best accepted so far on the same kind of GPU at the same settings: more
than 3 % below is said. `python benchmarks/results.py --accept` takes what is recorded now for the baseline.
"""

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

COMMAND = tuple(sys.argv)  # as typed: a training in the same process changes it
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
BASELINE = ROOT / "benchmarks/baseline.json"
SPEEDS = ("mfu_", "useful_tokens_per_s")  # how metrics begin that are compared with it
TOLERATED = 0.03  # of a speed: what two machines of one kind differ by
DEMO_RUN = ROOT / "output/stage2_sft_vqa_results/resolved.json"  # written by `snakemake preflight_vqa`
DEADLINE = "BENCHMARK_UNTIL"  # seconds since 1970 (on_gpus.py)
PACKAGES = (
    "torch",
    "flash-attn-4",
    "megatron-core",
    "megatron-energon",
    "transformers",
    "transformer-engine",
    "snakemake",
    "webdataset",
)


def row(
    metric: str, value: float, unit: str, goal: float | None, better: str, note: str = "", **settings: Any
) -> dict[str, Any]:
    """One figure. `better`: "higher" or "lower"; `settings`: what it was measured at."""
    value = float(f"{value:.4g}")
    return dict(metric=metric, value=value, unit=unit, goal=goal, better=better, settings=settings, note=note)


class Timed(NamedTuple):
    seconds: float  # of the wall clock
    peak_mb: float  # resident memory; this process's own peak counts in, the kernel has it so
    output: str


def timed(*command: Any, cwd: Path = ROOT) -> Timed:
    """Run a command; ends with the last of its output when it fails."""
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(f"failed: {command}\n{text[-3000:]}")
    return Timed(seconds, usage.ru_maxrss * 1024 / 1e6, text)


def single_process() -> dict[str, str]:
    """The variables with which torchrun would start a training of one process."""
    port = str(29000 + os.getpid() % 9000)
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}


def seconds_left() -> float:
    """Until no other case is to be begun."""
    return float(os.environ.get(DEADLINE, "inf")) - time.time()


def machine() -> dict[str, Any]:
    """Where a figure comes from: hardware and versions."""
    models = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    hardware = {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
        "load_before": round(os.getloadavg()[0], 1),
    }
    installed = {each.name: each.version for each in distributions() if each.name in PACKAGES}
    return {"hardware": hardware, "versions": {"python": platform.python_version(), **installed}}


def write_results(name: str, rows: list[dict[str, Any]], command: str = "", **elsewhere: Any) -> Path:
    """Write the rows and print each beside its goal; returns the file.

    `command`: if it is not a script here. `elsewhere`: `machine()` of another machine on which the rows were measured.
    """
    path = RESULTS / f"{name}.json"
    measured = {_identity(row) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    changed = "+" if _output("git", "status", "--porcelain", "-uno") else ""
    result = {
        "name": name,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD") + changed,
        "command": command or " ".join(["python", f"benchmarks/{Path(COMMAND[0]).name}", *COMMAND[1:]]),
        **(elsewhere or machine()),
        "rows": [row for row in before if _identity(row) not in measured] + rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for each in rows:
        print(line(each, name), flush=True)
    print("".join(f"regression: {each}\n" for each in regressions(rows)), end="", flush=True)
    return path


def speeds(rows: list[dict]) -> list[dict]:
    """Those that are compared: of a GPU, higher is better."""
    return [each for each in rows if each["metric"].startswith(SPEEDS) and "gpu" in each["settings"]]


def regressions(rows: list[dict]) -> list[str]:
    """What is slower than the baseline, in words."""
    accepted = {_identity(each): each["value"] for each in json.loads(BASELINE.read_text())}
    found = []
    for each in speeds(rows):
        before = accepted.get(_identity(each))
        if before and each["value"] < (1 - TOLERATED) * before:
            change = f"{each['value']:g} after {before:g}, {each['value'] / before - 1:+.1%}"
            found.append(f"{each['metric']} {change}: {json.dumps(each['settings'])}")
    return found


def accept() -> None:
    """Take the recorded speeds for the baseline."""
    recorded = [row for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())["rows"]]
    rows = [{key: each[key] for key in ("metric", "value", "settings")} for each in speeds(recorded)]
    BASELINE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _identity(row: dict) -> tuple[str, str]:
    return row["metric"], json.dumps(row["settings"], sort_keys=True)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def reached(row: dict) -> bool:
    if row["goal"] is None:
        return True
    return row["value"] >= row["goal"] if row["better"] == "higher" else row["value"] <= row["goal"]


def line(row: dict, name: str) -> str:
    sign = "≥" if row["better"] == "higher" else "≤"
    goal = "" if row["goal"] is None else f"{sign} {row['goal']:g}"
    verdict = "short" if not reached(row) else "ok" if goal else ""
    shown = {"run": row["settings"]["run"]} if "run" in row["settings"] else row["settings"]  # a name for many settings
    settings = ", ".join(f"{key} {value}" for key, value in shown.items())
    measured = f"{row['value']:g} {row['unit']}".strip()
    note = f"; {row['note']}" if row["note"] else ""
    return f"{verdict:5} {row['metric']:28} {measured:>16}  {goal:9} {name}: {settings}{note}"


def main() -> None:
    rows = [(row, path.stem) for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())["rows"]]
    for each, name in sorted(rows, key=lambda pair: (reached(pair[0]), pair[0]["goal"] is None)):
        print(line(each, name), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # | head
        accept() if "--accept" in sys.argv else main()
