"""The chain with random faults for an hour, in one project: `python -m faults.soak --minutes 60`.

A round: the outputs from a random rule on are removed, the chain is started, something happens to it (a kill, a signal, a
damaged or missing file, a second copy), and the same command has to end with the artefacts of the undisturbed chain. Where a
step refuses a damaged file by name, the file is deleted, as its message says, and the command given again. The row is
written after every round: the soak may be stopped at any time.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults.at_rest import TRACEBACK
from faults.damage import FORMS, damage
from faults.kinds import KINDS
from faults.live import CONFIG, RULES, Chain, Reference, finish, last_words
from faults.project import ROOT
from faults.results import write
from results import row

FAULTS = ("kill", "kill", "terminate", "damage", "damage", "remove", "twice")


def soak(reference: Reference, folder: Path, minutes: float, seed: int) -> None:
    project, chance = reference.copy(folder / "soak", "report"), random.Random(seed)
    began, counts, bad = time.monotonic(), Counter(), []
    while (spent := (time.monotonic() - began) / 60) < minutes:
        rule, fault = chance.choice(list(RULES)), chance.choice(FAULTS)
        what = f"{fault} at {rule}"
        said = disturb(reference, project, rule, fault, chance)
        found = finish(reference, project)
        if found["outcome"] == "stuck" and said and Path(said).name in found["message"]:
            forget(project, said)  # refused by name: the file goes, as the message says
            found = finish(reference, project)
        counts[found["outcome"]] += 1
        print(
            f"{spent:5.1f} min  {what} {said}: {found['outcome']} {found['message'][-200:]} {found['differ']}",
            flush=True,
        )
        if found["outcome"] != "mended":
            bad.append(f"{what} {said}: {found['outcome']}")
            shutil.rmtree(project)
            project = reference.copy(folder / "soak", "report")
        spent = (time.monotonic() - began) / 60
        note = f"{counts.total()} faults, {counts['mended']} ended as undisturbed" + "".join(
            f"; {each}" for each in bad
        )
        write([row("soak_minutes", spent, "min", 60, "higher", note, faults="soak")], "make soak")


def disturb(reference: Reference, project: Path, rule: str, fault: str, chance: random.Random) -> str:
    """Remove the outputs from `rule` on, start the chain, and do something to it; names the damaged file, if one is."""
    if fault in ("damage", "remove"):
        kind = chance.choice([kind for kind in KINDS if kind.owner != "start"])
        files = sorted(
            p for pattern in kind.files for p in project.glob(pattern) if p.is_file() and "small" not in p.parts
        )
        if not files:
            return ""
        path = chance.choice(files)
        damage(
            path,
            "gone" if fault == "remove" else chance.choice(FORMS),
            chance.randrange(10**6),
            chance.random() < 0.5,
            files,
        )
        return str(path.relative_to(project))
    for pattern in (p for each in reference.rules_from(rule) for p in RULES[each][2]):
        for path in project.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    chain = Chain(project, RULES["report"][1], *CONFIG)
    if chain.await_rule(rule):
        time.sleep(chance.uniform(0, reference.seconds.get(rule, 5)))
    if fault == "kill":
        chain.kill()
    elif fault == "terminate":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(chain.process.pid, chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
        chain.wait()
        chain.kill()
    else:
        second = Chain(project, RULES["report"][1], *CONFIG, log="second.txt")
        codes = second.wait(), chain.wait()
        if TRACEBACK.search(second.said()):
            print(f"two copies: {codes}: {last_words(second.said())}")
    return ""


def forget(project: Path, name: str) -> None:
    path = project / name
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "llava_sft_soak")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.nice(19)
    soak(Reference(args.folder / "reference", args.root), args.folder, args.minutes, args.seed)


if __name__ == "__main__":
    main()
