"""Snakemake in a copy of the project, and what its output and a run's records say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def copy_project(target: Path) -> Path:
    """A copy of the project as git sees it, with nothing made in it yet."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listing.stdout.splitlines():
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def snakemake_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("snakemake")), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONDONTWRITEBYTECODE": ""}


def snakemake(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        snakemake_command(*arguments),
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def planned(output: str) -> dict[str, int]:
    """How many jobs of each rule are announced, by a run or by `-n`."""
    rows = re.findall(r"^ +(\d+)  (\w+) ", output, re.MULTILINE)
    for listed in re.findall(r"^\d\d:\d\d:\d\d  \d+ jobs?: (.*)$", output, re.MULTILINE):
        rows += [(entry.split() if " " in entry else ["1", entry]) for entry in listed.split(", ")]
    return {name: int(count) for count, name in rows}


def losses(project: Path, run: str) -> list[tuple[int, float]]:
    lines = (project / run / "metrics.jsonl").read_text().splitlines()
    return [(record["iteration"], record["lm loss"]) for record in map(json.loads, lines)]
