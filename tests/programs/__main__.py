"""Programs from the package index that load an export: does each answer as this project does? (`make test-consumers`)

    PYTHONPATH=tests:benchmarks python -m programs [--only vLLM] [--environments FOLDER]

Writes benchmarks/results/consumers.json if all were asked. Needs the embedded experiment, trained: `make export_vqa`.
Two exports, and for the programs that take LoRA a PEFT folder beside one of them.
A program passes in float32 if it loads them, gives this project's answers to all questions that it has a form for,
and nothing else that its script looks at is wrong. In bfloat16 the share of equal answers is a figure, not a test.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from helpers.adapters import write_adapter
from llava_sft.settings.layers import load_model
from programs import environments, questions
from programs.environments import HERE, NOT_TRIED, PROGRAMS, TRANSFORMERS, InstallError, Program
from results import RESULTS, ROOT, row, write_results

RUN = ROOT / "output/stage2_sft_vqa"
WEBDATASETS = ROOT / "output/data/vqa/webdatasets"
START = ROOT / "output/checkpoints/LLaVA-OneVision-1.5-tiny_mcore_tp1_pp1"
MAX_NEW_TOKENS = 8
TIME_LIMIT = 1200  # s a program and export
CONVERT = str(ROOT / "workflow_scripts/convert_checkpoint.py")
ALL_CALLS = [f"transformers {version}" for version in TRANSFORMERS[-3:]]  # every call of consumers/calls.py has to work


class Exam(NamedTuple):
    """An export, what is asked about it, this project's answers and, where there are any, the true ones."""

    name: str
    export: Path
    questions: list[questions.Question]
    own: list[str]
    truths: list[str]
    adapter: Path | None = None  # a PEFT folder, whose answers beside the export are asked for: those of `merged`
    merged: Path | None = None


class Outcome(NamedTuple):
    exam: str
    dtype: str
    equal: int  # answers
    asked: int
    score: float | None  # exact matches, less this project's
    called: str
    problems: list[str]
    notes: list[str]


def exams(folder: Path) -> list[Exam]:
    """Exports by the code as it stands, and their questions."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    convert = [sys.executable, CONVERT, "mcore2hf", "--model", "tiny"]
    for source, name in ((RUN, "embedded"), (START, "tiny")):
        subprocess.run([*convert, str(source), str(folder / name)], check=True, cwd=ROOT)
    asked, truths = zip(*questions.embedded_samples(WEBDATASETS), strict=True)
    made = []
    for name, samples, true in (
        ("embedded", list(asked), list(truths)),
        ("tiny", list(questions.tiny_samples(folder / "pictures")), []),
    ):
        own = [plain(text) for text in questions.own_answers(folder / name, samples, MAX_NEW_TOKENS)]
        made.append(Exam(name, folder / name, questions.written(samples, folder / "pictures"), own, true))
    made.append(with_adapter(made[0], list(asked), folder / "lora"))
    return made


def with_adapter(exam: Exam, samples: list[Any], folder: Path) -> Exam:
    """The exam with a PEFT folder that this project wrote: pairs of random values beside the export, which went through a
    checkpoint of LoRA. Its own answers are those of the merged export."""
    random = write_adapter(folder / "random", exam.export, load_model("tiny"), seed=1, rank=8, size=0.25)
    made, adapter, merged = (folder / name for name in ("mcore", "adapter", "merged"))
    for words in (
        ("hf2mcore", random, made),
        ("mcore2peft", made / "pairs", adapter),
        ("merge", exam.export, adapter, merged),
    ):
        subprocess.run([sys.executable, CONVERT, *map(str, words)], check=True, cwd=ROOT)
    own = [plain(text) for text in questions.own_answers(merged, samples, MAX_NEW_TOKENS)]
    if not any(answer != other for answer, other in zip(own, exam.own, strict=True)):
        raise SystemExit("error: the adapter changes no answer: nothing would be shown")
    return exam._replace(name="adapter", own=own, truths=[], adapter=adapter, merged=merged)


def files_of(exam: Exam) -> list[Path]:
    return [path for folder in (exam.export, exam.adapter, exam.merged) if folder for path in folder.iterdir()]


def plain(text: str) -> str:
    """Programs differ in whether an answer shows its end token, and half a character."""
    return re.sub(r"<\|[a-z_]+\|>|\ufffd", "", text).strip()


def ask(program: Program, python: Path, exam: Exam, dtype: str, folder: Path) -> Outcome:
    given = {"export": str(exam.export), "dtype": dtype, "max_new_tokens": MAX_NEW_TOKENS, "questions": exam.questions}
    given |= {"adapter": str(exam.adapter or ""), "merged": str(exam.merged or "")}
    # The calls hang on no weight: asked of one export.
    calls = program.name in ALL_CALLS and exam.name == "tiny" and dtype == "float32"
    text = json.dumps(given | {"calls": calls})
    # What was answered before is not asked again: an interrupted run goes on.
    asked = [text.encode(), *(path.read_bytes() for path in sorted([HERE / program.script, *files_of(exam)]))]
    key = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in asked)).hexdigest()[:12]
    job, output, log = (folder / f"{exam.name}-{dtype}-{key}.{kind}" for kind in ("job.json", "output.json", "log"))
    if output.is_file():
        return judge(exam, dtype, json.loads(output.read_text()))
    job.write_text(text)
    with log.open("w") as file:
        command = [str(python), str(HERE / program.script), str(job), str(output)]
        try:
            subprocess.run(
                command, stdout=file, stderr=file, cwd=folder, env=environments.clean_variables(), timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired:
            return Outcome(exam.name, dtype, 0, 0, None, "", [f"no answer after {TIME_LIMIT} s"], [])
    if not output.is_file():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = (
            [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
            or lines
            or ["ended without a word"]
        )
        return Outcome(exam.name, dtype, 0, 0, None, "", [errors[-1][:300]], [])
    return judge(exam, dtype, json.loads(output.read_text()))


def judge(exam: Exam, dtype: str, found: dict[str, Any]) -> Outcome:
    pairs = [(plain(a), own) for a, own in zip(found["answers"], exam.own, strict=True) if a is not None]
    equal = sum(answer == own for answer, own in pairs)
    score = None
    if exam.truths:
        kept = [
            (plain(a), own, true)
            for a, own, true in zip(found["answers"], exam.own, exam.truths, strict=True)
            if a is not None
        ]
        score = (sum(a == true for a, _, true in kept) - sum(own == true for _, own, true in kept)) / len(kept)
    wrong = [f"{name}: {problem}" for name, problem in found["checks"].items() if problem]
    notes = [f"{name} {version}" for name, version in found["versions"].items()]
    if found["checks"]:
        notes.append(f"{len(found['checks']) - len(wrong)} of {len(found['checks'])} other calls right")
    problems = [f"{answer!r} for {own!r}" for answer, own in pairs if answer != own][:3] if dtype == "float32" else []
    return Outcome(exam.name, dtype, equal, len(pairs), score, found["called"], problems + wrong, notes)


def run(program: Program, python: Path, made: list[Exam]) -> list[Outcome]:
    here = python.parents[1] / "asked"
    here.mkdir(exist_ok=True)
    outcomes = []
    for dtype in program.dtypes:
        for exam in (each for each in made if program.adapters or not each.adapter):
            began = time.monotonic()
            outcome = ask(program, python, exam, dtype, here)
            outcomes.append(outcome)
            said = "; ".join(outcome.problems) or f"{outcome.equal} of {outcome.asked} answers equal"
            print(f"{program.name}, {exam.name}, {dtype}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return outcomes


def rows_of(tried: dict[str, list[Outcome]], missing: dict[str, str]) -> list[dict[str, Any]]:
    failed = [name for name, outcomes in tried.items() if any(each.problems for each in outcomes)]
    passed = 1 - len(failed) / len(tried)
    rows = [
        row(
            "consumers_passed",
            passed,
            "",
            1,
            "higher",
            f"of {len(tried)} programs and versions; not: {', '.join(failed) or 'none'}",
        ),
        row("consumers_not_tried", len(missing), "", None, "lower", "; ".join(f"{k}: {v}" for k, v in missing.items())),
    ]
    for name, outcomes in tried.items():
        for dtype in dict.fromkeys(each.dtype for each in outcomes):
            mine = [each for each in outcomes if each.dtype == dtype]
            equal, asked = sum(each.equal for each in mine), sum(each.asked for each in mine)
            said = [
                f"{equal} of {asked} answers",
                *dict.fromkeys(each.called for each in mine),
                *dict.fromkeys(note for each in mine for note in each.notes),
            ]
            said += [f"{each.exam}: {problem}" for each in mine for problem in each.problems]
            said += [f"score {each.score:+.3f} of {each.exam}" for each in mine if each.score is not None]
            goal = 1 if dtype == "float32" else None
            share = equal / asked if asked else float(not any(each.problems for each in mine))
            rows.append(
                row("consumers_equal_answers", share, "", goal, "higher", "; ".join(said), program=name, dtype=dtype)
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--environments", type=Path, default=ROOT / "output/programs", help="folder, kept and used again"
    )
    parser.add_argument("--only", default="", metavar="NAME", help="programs whose name begins so; writes no result")
    parser.add_argument("--jobs", type=int, default=1, help="programs at a time")
    args = parser.parse_args()
    for needed in (RUN, WEBDATASETS, START):
        if not needed.exists():
            raise SystemExit(f"error: {needed}: no such file\n  fix: make export_vqa")
    folder = args.environments.resolve()
    made = exams(folder / "exams")
    missing, pythons = dict(NOT_TRIED), {}
    for program in PROGRAMS:
        if program.name.startswith(args.only):
            try:
                pythons[program] = environments.python_of(program, folder)
            except InstallError as error:
                missing[program.name] = str(error)
                print(f"{program.name}: not installed: {error}", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = pool.map(lambda program: run(program, pythons[program], made), pythons)
        tried = {program.name: outcome for program, outcome in zip(pythons, outcomes, strict=True)}
    rows = rows_of(tried, missing)
    if not args.only:
        (RESULTS / "consumers.json").unlink(missing_ok=True)  # no row of a version that is pinned no more
        write_results("consumers", rows, "make test-consumers")
    return rows[0]["value"] < 1


if __name__ == "__main__":
    sys.exit(main())
