"""Runs as `make runs` and `make compare` see them: what each was trained with, and what its evaluation found."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_sft.errors import DamagedFileError, RunError
from llava_sft.evaluation.intervals import compare
from llava_sft.files import file_fingerprint, read_json, read_rows
from llava_sft.report.charts import Records
from llava_sft.report.figures import is_scored, with_scores
from llava_sft.run.layout import EVALUATION, PREDICTIONS, RUN_FILE, VALIDATION, results_of, run_of
from llava_sft.run.records import read_jsonl, read_metrics
from llava_sft.settings.resolved import Resolved

Name = tuple[str | None, int]  # a sample's id, and how many samples before it bear the same


class Run(NamedTuple):
    """`rows`: those of predictions.jsonl as `numbered` names them, empty where there is no evaluation."""

    records: Records
    resolved: Resolved
    evaluation: dict[str, Any]
    rows: dict[Name, dict[str, Any]]


def numbered[T](items: Iterable[T], id_of: Callable[[T], str | None]) -> Iterator[tuple[Name, T]]:
    """Each with its name: records may share an id."""
    before: Counter[str | None] = Counter()
    for item in items:
        name = id_of(item)
        yield (name, before[name]), item
        before[name] += 1


def evaluation_of(run_dir: Path) -> dict[str, Any]:
    """What evaluation.json says, empty where it is missing, damaged, or of no sample."""
    with contextlib.suppress(DamagedFileError, KeyError, TypeError, AttributeError):
        found = read_json(results_of(run_dir) / EVALUATION, {})
        return with_scores(found) if found.get("samples") and is_scored(found) else {}
    return {}


def read(run_dir: Path) -> Run:
    """Errors: RunError where it is no run, DamagedFileError."""
    if not (run_dir / RUN_FILE).is_file():
        meant = run_of(run_dir)
        fix = f"name {meant}" if meant else "`make runs` lists the names of all runs"
        raise RunError(f"{run_dir}: no run here ({RUN_FILE} is missing)", fix)
    evaluation, predictions = evaluation_of(run_dir), results_of(run_dir) / PREDICTIONS
    answered = evaluation and predictions.is_file() and evaluation.get("predictions") == file_fingerprint(predictions)
    rows = dict(numbered(read_rows(predictions), lambda row: row["id"])) if answered else {}
    records = Records(read_metrics(run_dir), read_jsonl(run_dir / VALIDATION), run_dir.name)
    return Run(records, Resolved.read(run_dir / RUN_FILE), evaluation, rows)


def differing_settings(runs: list[Run]) -> dict[str, list[Any]]:
    """Setting → its value in each run, of those that are not the same in all; data and start by their fingerprints."""
    dumps = [
        {"data": run.resolved.data.fingerprint, "start": run.resolved.start.fingerprint} | run.resolved.settings.dump()
        for run in runs
    ]
    names = dict.fromkeys(name for dump in dumps for name in dump)
    values = {name: [dump.get(name) for dump in dumps] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def same_questions(runs: list[Run]) -> list[Name]:
    """Names of the samples that all runs answered, with the same questions and expected answers."""

    def asked(row: dict[str, Any]) -> list[tuple[str, str]]:
        return [(turn["question"], turn["answer"]) for turn in row["turns"]]

    first = runs[0].rows
    return [id for id in first if all(id in run.rows and asked(run.rows[id]) == asked(first[id]) for run in runs[1:])]


def against_first(runs: list[Run], ids: list[Name]) -> list[dict[str, Any]]:
    """For each run the mean of its score on these questions, and, but for the first, what `intervals.compare` says."""
    names = [next(iter(run.rows[ids[0]]["scores"])) for run in runs]
    same = names if len(set(names)) == 1 else []  # of runs with different scores: how many are right
    values = [
        [row["scores"][same[0]] if same else float(row["correct"]) for row in (run.rows[i] for i in ids)]
        for run in runs
    ]
    clusters = [runs[0].rows[i].get("cluster", place) for place, i in enumerate(ids)]
    return [
        {"mean": sum(one) / len(one)} | (compare(values[0], one, clusters) if place else {})
        for place, one in enumerate(values)
    ]
