"""What every benchmark shares: commands that are timed, a result file with where it comes from, and the table of all of them (`make figures`).

A result is benchmarks/results/<name>.json: name, date, commit, command, hardware, versions, rows; a row is
{metric, value, unit, goal, better: "higher" | "lower", settings, note}. Rows of metrics that were not measured again stay.
"""

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

COMMAND = tuple(sys.argv)  # as typed: a training in the same process changes it
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = (
    "torch",
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


def timed(*command: Any, cwd: Path = ROOT) -> tuple[float, float]:
    """Wall seconds and peak memory (resident, MB; not less than ours, which the kernel counts in) of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {command}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e6


def said(*command: Any, cwd: Path = ROOT) -> tuple[float, str]:
    """Wall seconds of a command, and what it printed; ends with that when it fails."""
    began = time.perf_counter()
    run = subprocess.run(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise SystemExit(run.stdout[-3000:])
    return time.perf_counter() - began, run.stdout


def machine() -> dict[str, Any]:
    """Where a figure comes from: hardware and versions."""
    versions = {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))}
    return {"hardware": hardware(), "versions": versions}


def write_results(name: str, rows: list[dict[str, Any]], command: str = "", **elsewhere: Any) -> Path:
    """Write the rows, each beside its goal on the terminal too; returns the file.

    `command`: if not a script here. `elsewhere`: `machine()` of another machine that the rows were measured on.
    """
    path = RESULTS / f"{name}.json"
    measured = {(row["metric"], json.dumps(row["settings"], sort_keys=True)) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    kept = [r for r in before if (r["metric"], json.dumps(r["settings"], sort_keys=True)) not in measured]
    result = {
        "name": name,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD")
        + ("+" if _output("git", "status", "--porcelain", "-uno") else ""),
        "command": command or " ".join(["python", f"benchmarks/{Path(COMMAND[0]).name}", *COMMAND[1:]]),
        **(elsewhere or machine()),
        "rows": kept + rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for each in rows:
        print(line(each, name), flush=True)
    return path


def hardware() -> dict[str, Any]:
    models = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
        "load_before": round(os.getloadavg()[0], 1),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def reached(row: dict) -> bool:
    return row["goal"] is None or (
        row["value"] >= row["goal"] if row["better"] == "higher" else row["value"] <= row["goal"]
    )


def line(row: dict, name: str) -> str:
    sign = "≥" if row["better"] == "higher" else "≤"
    goal = "" if row["goal"] is None else f"{sign} {row['goal']:g}"
    verdict = "short" if not reached(row) else "ok" if goal else ""
    shown = {"run": row["settings"]["run"]} if "run" in row["settings"] else row["settings"]  # a name for many settings
    settings = ", ".join(f"{key} {value}" for key, value in shown.items())
    measured = f"{row['value']:g} {row['unit']}".strip()
    return f"{verdict:5} {row['metric']:28} {measured:>16}  {goal:9} {name}: {settings}{'; ' if row['note'] else ''}{row['note']}"


def main() -> None:
    rows = [(row, path.stem) for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())["rows"]]
    for each, name in sorted(rows, key=lambda pair: (reached(pair[0]), pair[0]["goal"] is None)):
        print(line(each, name), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # | head
        main()
