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
    """The table of jobs that Snakemake prints."""
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE) if name != "total"}


def losses(project: Path, run: str) -> list[tuple[int, float]]:
    lines = (project / run / "metrics.jsonl").read_text().splitlines()
    return [(record["iteration"], record["lm loss"]) for record in map(json.loads, lines)]
