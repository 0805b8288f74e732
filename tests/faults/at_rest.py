"""Damage at rest: one damaged file after the other, the steps that use it, and what became of it.

    python -m faults.at_rest --cases 1000 [--root CHECKOUT] [--kinds resolved …] [--seed 1] [--out cases.jsonl]

A case is (kind of file, use, form of damage, date kept or not, seed). It runs in a sandbox, a copy of a state of the
project at a fixed path; afterwards what changed is written back in place, so that inodes stay as memos know them.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from faults.artefacts import artefacts, differences
from faults.damage import FORMS, UNREADABLE, damage
from faults.kinds import KINDS, USES, Kind
from faults.limits import LIMITS
from faults.project import NAME, ROOT, commands, environment, make_project, make_states
from faults.sandbox import Sandbox
from faults.server import Asked, Servers

OUTCOMES = ("reported", "mended", "harmless", "documented", "unnamed", "silent", "traceback", "lost", "stuck")
BAD = ("silent", "traceback", "lost", "stuck")
TRACEBACK = re.compile(r"^\s*(Traceback \(most recent call last\)|File \"[^\"]+\", line \d+)", re.MULTILINE)
LIMIT_S = 120  # of a step: what takes longer hangs
NUMBER = re.compile(r"\d+(\.\d+)?")


class Case(NamedTuple):
    kind: str
    use: str
    file: str
    form: str
    keeps_mtime: bool
    seed: int

    def __str__(self) -> str:
        date = "date kept" if self.keeps_mtime else "date changed"
        return f"{self.kind} | {self.file} | {self.form} {self.seed}, {date} | {self.use}"


class Bench:
    """The prepared project, its states, the two servers, and a sandbox for each state."""

    def __init__(self, folder: Path, root: Path = ROOT):
        self.folder, self.project, self.states = folder, folder / "project", folder / "states"
        ready = folder / "commands.json"
        if not ready.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make_project(self.project, root)
        self.work = Path(tempfile.mkdtemp(prefix="bench-", dir=folder))
        self.servers = Servers(self.project, self.work, environment())
        self.servers.wait()
        if not ready.is_file():
            self.prepare()
            ready.write_text(json.dumps(self.commands))
        self.commands = json.loads(ready.read_text())
        self.sabotage = ""  # Python that a step runs first: the harness's own tests break checks with it
        self.sandboxes: dict[str, Sandbox] = {}
        self.baselines: dict[str, tuple[dict[str, str], str]] = {}

    def prepare(self) -> None:
        """Run the chain once, by the rules' own commands, and keep its states."""

        said = open(self.work / "prepared.txt", "wb")  # noqa: SIM115 (of all steps)

        def start(argv: list[str]) -> Asked:
            return self.servers.ask(argv, self.project, said.fileno())

        def step(rule: str) -> None:
            for argv in self.commands[rule]:
                if code := start(argv).wait():
                    raise RuntimeError(f"{rule} ended with {code}:\n{Path(said.name).read_text()[-3000:]}")

        def begin(rule: str) -> Callable[[], None]:
            begun = start(self.commands[rule][0])

            def kill() -> None:
                begun.kill()
                self.servers.kill_steps()
                begun.wait()

            return kill

        self.commands = {
            "start": [["small/make_start.py"]],
            "plan": [["small/plan.py", "--dry-run", f"data_{NAME}"]],
            "runs": [["workflow_scripts/list_runs.py", "output"]],
        }
        step("start")
        self.commands |= commands(self.project)
        make_states(self.project, self.states, step, begin)

    def close(self) -> None:
        self.servers.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # --- one use

    def sandbox(self, use: str) -> Sandbox:
        state = USES[use].state
        if state not in self.sandboxes:
            self.sandboxes[state] = Sandbox(self.states / state, self.work / state)
            for other, spec in USES.items():  # memos of checks are filled by undisturbed runs, as a user's are
                if spec.state == state and other not in ("train", "resume", "export"):
                    self.run(self.sandboxes[state], other)
            self.sandboxes[state].settle()
        return self.sandboxes[state]

    def run(self, sandbox: Sandbox, use: str) -> tuple[int, str]:
        """Exit code of the first step that fails, else 0, and all that the steps printed; 124: one hung."""
        said = sandbox.root / "said.txt"
        with open(said, "wb") as output:
            code = 0
            for rule in USES[use].rules:
                for argv in self.commands[rule]:
                    asked = self.servers.ask(argv, sandbox.root, output.fileno(), self.sabotage)
                    try:
                        code = asked.wait(LIMIT_S)
                    except subprocess.TimeoutExpired:
                        os.killpg(asked.pid, signal.SIGKILL)
                        code = 124
                    if code:
                        break
        return code, said.read_text(errors="replace")

    def baseline(self, use: str) -> tuple[dict[str, str], str]:
        """Artefacts and output of the undisturbed use."""
        sandbox = self.sandbox(use)
        if use not in self.baselines:
            sandbox.remove(USES[use].without)
            code, said = self.run(sandbox, use)
            if code:
                raise RuntimeError(f"{use}: the undisturbed step ended with {code}:\n{said[-3000:]}")
            self.baselines[use] = artefacts(sandbox.root, sandbox.digests), said
            sandbox.restore()
        return self.baselines[use]

    def unsteady(self, use: str) -> list[str]:
        """Artefacts that differ from one undisturbed run to the next: none, or the comparison is worth nothing."""
        wanted, _ = self.baseline(use)
        sandbox = self.sandbox(use)
        sandbox.remove(USES[use].without)
        code, said = self.run(sandbox, use)
        found = differences(wanted, artefacts(sandbox.root, sandbox.digests))
        sandbox.restore()
        return [said] if code else found

    # --- one case

    def try_case(self, case: Case, kind: Kind) -> dict | None:
        """The outcome of a case, with what was said; None where the damage changes nothing."""
        use, sandbox = USES[case.use], self.sandbox(case.use)
        wanted, usual = self.baseline(case.use)
        try:
            sandbox.remove(use.without)
            path = sandbox.root / case.file
            siblings = [p for pattern in kind.files if path.match(pattern) for p in sorted(sandbox.root.glob(pattern))]
            if not damage(path, case.form, case.seed, case.keeps_mtime, [p for p in siblings if p != path]):
                return None
            damaged = path.read_bytes() if path.is_file() else None
            code, said = self.run(sandbox, case.use)
            named = is_named(case, fresh(said, usual))
            touched = (path.read_bytes() if path.is_file() else None) != damaged
            found = artefacts(sandbox.root, sandbox.digests)
            differ = [
                name
                for name in differences(wanted, found)
                if (touched or name != case.file) and not sandbox.untouched(name)
            ]
            outcome = judge(code, said, named, differ, touched)
            if lost := sandbox.lost(case.file, use.without):
                outcome = "lost"
            has_to_go_on = use.goes_on and kind.state_file and case.form != "folder"
            if code and has_to_go_on and outcome in ("reported", "unnamed"):
                outcome = "stuck" if self.run(sandbox, case.use)[0] else outcome
            if outcome == "silent" and any(limit.covers(*case[:2], case.form, case.keeps_mtime) for limit in LIMITS):
                outcome = "documented"
            told = {"outcome": outcome, "code": code, "message": message(said)[:300], "differ": (lost or differ)[:6]}
            return case._asdict() | told
        finally:
            sandbox.restore()


def message(said: str) -> str:
    """The first error or warning, else the last line."""
    lines = [line for line in said.splitlines() if line.strip()]
    return next((line for line in lines if re.match(r"error|warning", line, re.I)), (lines or [""])[-1])


def fresh(said: str, usual: str) -> list[str]:
    """Lines that the undisturbed step did not print; numbers aside."""
    expected = {NUMBER.sub("N", line) for line in usual.splitlines()}
    return [line for line in said.splitlines() if NUMBER.sub("N", line) not in expected]


def is_named(case: Case, lines: list[str]) -> bool:
    """Whether what was said names the damaged file, its folder where that is a checkpoint, or its shard."""
    path = Path(case.file)
    names = {path.name, path.name.split(".")[0] if ".tar" in case.file or "webdatasets" in case.file else path.name}
    names |= {part for part in path.parts if part.startswith("iter_")}
    names |= {word for word in ("release", "huggingface") if word in path.parts}
    if ".nv-meta" in path.parts:
        names |= {".nv-meta", "index"}
    return any(name and name in line for line in lines for name in names)


def judge(code: int, said: str, named: bool, differ: list[str], touched: bool) -> str:
    if TRACEBACK.search(said):
        return "traceback"
    if code == 124:
        return "stuck"
    if code:
        return "reported" if named else "unnamed"
    if differ:
        return "reported" if named else "silent"
    return "mended" if touched or named else "harmless"


# ------------------------------------------------------------------------------------------------- many


def cases(bench: Bench, seed: int, kinds: list[Kind], uses: set[str] | None = None) -> Iterator[tuple[Case, Kind]]:
    """Cases without end: every pair of kind and use in turn, files, forms and dates by chance."""
    chance, number = random.Random(seed), 0
    pairs = [(kind, use) for kind in kinds for use in kind.uses if not uses or use in uses]
    while True:
        for kind, use in sorted(pairs, key=lambda pair: USES[pair[1]].state):
            sandbox = bench.sandbox(use)
            skipped = USES[use].without
            there = {p for pattern in kind.files for p in sandbox.root.glob(pattern)}
            there -= {p for pattern in skipped for p in sandbox.root.glob(pattern)}
            files = sorted(p for p in there if p.is_file() and not any(q in there for q in p.parents))
            if not files:
                continue
            number += 1
            # The newest of several checkpoints is what a step reads, unless that is damaged.
            file = str((files[-1] if chance.random() < 0.5 else chance.choice(files)).relative_to(sandbox.root))
            yield (
                Case(
                    kind.name,
                    use,
                    file,
                    chance.choice(FORMS * 3 + UNREADABLE),
                    chance.random() < 0.5,
                    seed * 100000 + number,
                ),
                kind,
            )


def run_cases(bench: Bench, count: int, seed: int, kinds: list[Kind], out: Path | None = None, uses: set[str] | None = None,
              until: float = float("inf")) -> list[dict]:  # fmt: skip
    """`count` cases, or as many as there is time for; each on a line of `out` as soon as it is known."""
    done = []
    for tried, (case, kind) in enumerate(cases(bench, seed, kinds, uses)):
        if len(done) >= count or tried > 4 * count + 50 or time.time() > until:
            break
        began = time.monotonic()
        found = bench.try_case(case, kind)
        if found:
            found["seconds"] = round(time.monotonic() - began, 2)
            done.append(found)
            if out:
                with open(out, "a") as file:
                    file.write(json.dumps(found, ensure_ascii=False) + "\n")
    return done


def table(found: list[dict]) -> str:
    lines = [f"{'':42}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES)]
    for kind in dict.fromkeys(each["kind"] for each in found):
        counts = Counter(each["outcome"] for each in found if each["kind"] == kind)
        lines.append(f"{kind:42}" + "".join(f"{counts[outcome] or '·':>11}" for outcome in OUTCOMES))
    total = Counter(each["outcome"] for each in found)
    return "\n".join([*lines, f"{len(found):<42}" + "".join(f"{total[outcome]:>11}" for outcome in OUTCOMES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, default=Path(tempfile.gettempdir()) / "llava_sft_faults", help="kept from run to run")
    add("--root", type=Path, default=ROOT, help="the checkout that is tested")
    add("--cases", type=int, default=100)
    add("--seed", type=int, default=1)
    add("--kinds", nargs="*", help="parts of their names")
    add("--uses", nargs="*")
    add("--out", type=Path)
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if not args.kinds or any(word in kind.name for word in args.kinds)]
    with Bench(args.folder, args.root) as bench:
        found = run_cases(bench, args.cases, args.seed, kinds, args.out, set(args.uses or ()))
    print(table(found))
    for each in found:
        if each["outcome"] in (*BAD, "unnamed"):
            case = Case(*(each[name] for name in Case._fields))
            print(f"{each['outcome']}: {case}: {each['message'][:160]} {each['differ']}")


if __name__ == "__main__":
    main()
