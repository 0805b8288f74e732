"""The chain as a user starts it, disturbed while it runs: what every fault here shares.

Notable: one undisturbed chain is made once and kept; a fault begins from a copy of it in which the outputs of a rule and of
the rules after it are missing, and must end, by the same command, with the same artefacts.
"""

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from faults.artefacts import artefacts, differences
from faults.at_rest import TRACEBACK
from faults.project import NAME, RESULTS, ROOT, RUN, environment, make_project, run, snakemake

DATA = f"output/data/{NAME}"
CONFIG = ["--config", "train_iters=20", "lr_decay_iters=20"]
# Rule → (words of its script's command line, what is asked for, what it writes), in the order of the chain.
RULES = {
    "convert_checkpoint_hf2mcore": (("convert_checkpoint.py", "hf2mcore"), "output/checkpoints/start_mcore_tp1_pp1.done.json",
                                    ("output/checkpoints",)),
    "stage2_sftdata2webdataset": (("stage2_sftdata2webdataset.py",), f"{DATA}/dataset.json",
                                  (f"{DATA}/webdatasets", f"{DATA}/webdatasets.parts")),
    "index_webdataset": (("index_webdataset.py",), f"{DATA}/dataset.json", (f"{DATA}/webdatasets/.nv-meta", f"{DATA}/dataset.json")),
    "inspect_webdataset": (("inspect_webdataset.py",), f"{DATA}/inspect.json", (f"{DATA}/inspect.*",)),
    "measure_webdataset": (("measure_webdataset.py",), f"{RESULTS}/sizes.json", (f"{RESULTS}/sizes.json", f"{DATA}/sizes")),
    "preflight": (("preflight.py",), f"{RESULTS}/resolved.json", (f"{RESULTS}/resolved.json", f"{RESULTS}/preflight.json")),
    "train": (("train.py",), f"{RESULTS}/train.done.json", (RUN, f"{RESULTS}/train.done.json")),
    "convert_checkpoint_mcore2hf": (("convert_checkpoint.py", "mcore2hf"), f"{RESULTS}/export.done.json",
                                    (f"{RESULTS}/huggingface", f"{RESULTS}/export.done.json")),
    "evaluate": (("evaluate.py",), f"{RESULTS}/evaluation.json", (f"{RESULTS}/evaluation.json", f"{RESULTS}/.evaluation.json*")),
    # The model card too: made with the export, and again once the scores are known.
    "report": (("report.py",), f"{RESULTS}/report.html", (f"{RESULTS}/report.html", f"{RESULTS}/huggingface/README.md")),
}  # fmt: skip


class Reference:
    """The undisturbed chain, made once in `folder` and kept: its artefacts, and how long each rule took."""

    def __init__(self, folder: Path, root: Path = ROOT):
        self.folder, self.project = folder, folder / "reference"
        if not (folder / "ready").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make_project(self.project, root)
            run([sys.executable, "small/make_start.py"], self.project)
            run(snakemake(f"report_{NAME}", *CONFIG), self.project)
            (folder / "ready").touch()
        self.artefacts = artefacts(self.project, timed=True)
        self.seconds = {}
        for path in (self.project / "output/benchmarks").rglob("*.tsv"):
            rule = path.relative_to(self.project / "output/benchmarks").parts[0].removesuffix(".tsv")
            with open(path) as file:
                self.seconds[rule] = float(next(csv.DictReader(file, delimiter="\t"))["s"])

    def copy(self, folder: Path, before: str | None = None) -> Path:
        """A copy of the project in which `before` and the rules after it have not run; None: nothing has."""
        shutil.rmtree(folder, ignore_errors=True)
        left_out = None if before else lambda _, names: {"output", ".snakemake"} & set(names)
        shutil.copytree(self.project, folder, symlinks=True, ignore=left_out)
        for pattern in (p for rule in (self.rules_from(before) if before else ()) for p in RULES[rule][2]):
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return folder

    def rules_from(self, rule: str) -> list[str]:
        return list(RULES)[list(RULES).index(rule) :]

    def unlike(self, project: Path, until: str = "report", wanted: dict[str, str] | None = None) -> list[str]:
        """Artefacts that differ from the undisturbed chain's (or `wanted`), of the rules up to `until`."""
        later = [pattern for rule in self.rules_from(until)[1:] for pattern in RULES[rule][2]]
        skipped = {str(p.relative_to(root)) for root in (self.project, project) for q in later for p in root.glob(q)}

        wanted = wanted or self.artefacts

        def counts(name: str) -> bool:
            more = name.startswith(f"{RUN}/iter_") and name not in wanted  # saved at an interruption
            return not more and not any(name == skip or name.startswith(f"{skip}/") for skip in skipped)

        found = differences(wanted, artefacts(project, timed=True))
        return [name for name in found if counts(name)]


class Chain:
    """A started snakemake, with all that it starts."""

    def __init__(
        self, project: Path, *words: str, before: tuple[str, ...] = (), log: str = "said.txt", cwd: Path | None = None
    ):
        self.project, self.log = project, project / log
        self.log.unlink(missing_ok=True)
        with open(self.log, "wb") as said:
            self.process = subprocess.Popen(
                [*before, *snakemake(*words)], cwd=cwd or project, env=environment(), stdout=said, stderr=said,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def processes(self, words: tuple[str, ...] = ()) -> list[psutil.Process]:
        """Those it started whose command line holds all the words, parents first."""
        found = []
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                line = " ".join(process.cmdline())
                if all(word in line for word in words) and process.name() not in ("sh", "bash", "tee"):
                    found.append(process)
        except psutil.NoSuchProcess:
            pass
        return found

    def await_rule(self, rule: str, seconds: float = 120) -> bool:
        """Wait until a job of the rule runs; False when the chain ended before."""
        ends = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < ends:
            if self.processes(RULES[rule][0]):
                return True
            time.sleep(0.05)
        return False

    def kill(self) -> None:
        """kill -9 of every process, those that left the group too."""
        everyone = self.processes()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in everyone:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def wait(self, seconds: float = 300) -> int:
        """The exit code; 124 when it does not end by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return 124

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def finish(
    reference: Reference,
    project: Path,
    rule: str = "report",
    config: list[str] = CONFIG,
    wanted: dict | None = None,
    **options,
) -> dict:
    """Run the command to its end and compare; the outcome of the fault before it. `options`: of Chain."""
    chain = Chain(project, RULES[rule][1], *config, **options)
    code = chain.wait()
    said = chain.said()
    if code:
        outcome = "traceback" if TRACEBACK.search(said) else "stuck"
        return {"outcome": outcome, "code": code, "message": last_words(said), "differ": []}
    differ = reference.unlike(project, rule, wanted)
    return {"outcome": "silent" if differ else "mended", "code": 0, "message": "", "differ": differ[:8]}


def last_words(said: str) -> str:
    told = [line for line in said.splitlines() if re.match(r"\s*(error|\w*(Error|Exception)\b)", line)]
    return " / ".join(told[-2:])[:300] or said[-300:]


def lost(before: set[int], project: Path) -> list[int]:
    """Whole checkpoints of `before` (see `whole`) that are gone."""
    return sorted(before - whole(project))


def whole(project: Path) -> set[int]:
    """Steps of the sealed checkpoints of the run."""
    return {int(p.parent.name[5:]) for p in (project / RUN).glob("iter_*/checksums.json") if p.stat().st_size}
