"""The chain with random faults for an hour, in one project: `python -m faults.soak --minutes 60`.

A round: the outputs from a random rule on are removed, the chain is started, something happens to it (a kill, a signal, a
damaged or missing file, a second copy), and the same command has to end with the artefacts of the undisturbed chain. Where a
step refuses a damaged file by name, the file is deleted, as its message says, and the command given again. The row is
written after every round: the soak may be stopped at any time.
"""

import argparse
import contextlib
import difflib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults.artefacts import words
from faults.at_rest import TRACEBACK
from faults.damage import FORMS, damage
from faults.kinds import KINDS, USES
from faults.live import CONFIG, RULES, Chain, Reference, finish, last_words
from faults.project import ROOT, RUN
from faults.results import write
from results import row

FAULTS = ("kill", "kill", "terminate", "damage", "damage", "remove", "twice")
# What a damaged file is tried on, where its kind is used by it; the run directory stays for the training.
RULE_OF_USE = {use: spec.rules[0] for use, spec in USES.items() if spec.rules[0] in RULES and not use.endswith("again")}


def soak(reference: Reference, folder: Path, minutes: float, seed: int) -> None:
    project, chance = reference.copy(folder / "soak", "report"), random.Random(seed)
    began, counts, bad = time.monotonic(), Counter(), []
    finish(reference, project)
    while (time.monotonic() - began) / 60 < minutes:
        fault = chance.choice(FAULTS)
        what, file = (
            damage_one(project, fault, chance)
            if fault in ("damage", "remove")
            else disturb(reference, project, fault, chance)
        )
        damaged = content(project / file)
        found = finish(reference, project)
        if found["outcome"] == "stuck" and file and is_named(file, found["message"]):
            found = mend(reference, project, file)
        if file and found["differ"] == [file] and content(project / file) == damaged:
            found |= {"outcome": "mended", "differ": []}  # it was not used
        counts[found["outcome"]] += 1
        spent = (time.monotonic() - began) / 60
        print(f"{spent:5.1f} min  {what}: {found['outcome']} {found['message'][-200:]} {found['differ']}", flush=True)
        if found["outcome"] != "mended":
            bad.append(f"{what}: {found['outcome']}")
            for name in (name for name in found["differ"] if name.endswith(".html")):
                pages = [words((root / name).read_text(), True).splitlines() for root in (reference.project, project)]
                print("\n".join(line[:300] for line in difflib.unified_diff(*pages, lineterm="", n=0)), flush=True)
        if file or found["outcome"] != "mended":
            shutil.rmtree(project)
            project = reference.copy(folder / "soak", "report")
            finish(reference, project)
        note = f"{counts.total()} faults, {counts['mended']} ended as undisturbed" + "".join(
            f"; {each}" for each in bad[:20]
        )
        write([row("soak_minutes", spent, "min", 60, "higher", note, faults="soak")], "make soak")


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def disturb(reference: Reference, project: Path, fault: str, chance: random.Random) -> tuple[str, str]:
    """Remove the outputs from a random rule on, start the chain, and do something to it while that rule runs."""
    rule = chance.choice(list(RULES))
    forget(project, [pattern for each in reference.rules_from(rule) for pattern in RULES[each][2]])
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
    return f"{fault} at {rule}", ""


def damage_one(project: Path, fault: str, chance: random.Random) -> tuple[str, str]:
    """Damage or remove a file, and remove the outputs of a rule that uses it and of those after it, the run itself excepted."""
    while True:
        kind = chance.choice(KINDS)
        files = sorted(
            p for pattern in kind.files for p in project.glob(pattern) if p.is_file() and "small" not in p.parts
        )
        rules = [RULE_OF_USE[use] for use in kind.uses if use in RULE_OF_USE]
        if not files or not rules:
            continue
        rule, path = chance.choice(rules), chance.choice(files)
        later = [p for each in list(RULES)[list(RULES).index(rule) :] for p in RULES[each][2] if p != RUN]
        if any(path == gone or gone in path.parents for pattern in later for gone in project.glob(pattern)):
            continue
        forget(project, later)
        form = "gone" if fault == "remove" else chance.choice(FORMS)
        damage(path, form, chance.randrange(10**6), chance.random() < 0.5, files)
        name = str(path.relative_to(project))
        return f"{name} {form} before {rule}", name


def is_named(file: str, message: str) -> bool:
    return any(part in message for part in Path(file).parts[-2:])


def mend(reference: Reference, project: Path, file: str) -> dict:
    """As messages say: the file is removed, then what the step that made it wrote; the same command each time."""
    forget(project, [file])
    found = finish(reference, project)
    if found["outcome"] == "stuck":
        made = [rule for rule in RULES if any(Path(file).match(p) or file.startswith(f"{p}/") for p in RULES[rule][2])]
        forget(project, [pattern for rule in made[:1] for pattern in RULES[rule][2] if pattern != RUN])
        found = finish(reference, project)
    return found


def forget(project: Path, patterns: list[str]) -> None:
    for path in (p for pattern in patterns for p in project.glob(pattern)):
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
