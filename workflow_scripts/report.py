"""Write the report of a run, one self-contained HTML page, from what the steps before it left behind.

Every input but the resolved settings may be missing, and so may their keys: the page says so.
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

from llava_sft.checkpoint.verify import is_export
from llava_sft.command_line import Parser
from llava_sft.data.index import leak_note
from llava_sft.data.stored import read_split
from llava_sft.errors import DamagedFileError, RunError, exits_cleanly
from llava_sft.evaluation.scores import explained
from llava_sft.files import file_fingerprint, read_json, read_rows, write_text
from llava_sft.publish.card import CARD, write_card
from llava_sft.report.answers import table
from llava_sft.report.charts import Records, charts, vega
from llava_sft.report.figures import best_validation, is_scored, measured, with_scores
from llava_sft.report.html import refuse_others_page, render
from llava_sft.report.language import Say, sayer, spoken
from llava_sft.report.places import chat_command, links, newest_log, paths, provenance
from llava_sft.report.verdict import Verdict, verdict
from llava_sft.run.coverage import count_samples
from llava_sft.run.layout import BAD_STEPS, EVALUATION, PARITY, PREDICTIONS, RUN_FILE, SAMPLE_COUNTS, VALIDATION, run_of
from llava_sft.run.records import read_jsonl, read_metrics
from llava_sft.settings.resolved import ResolvedData

OPTIONAL = {
    "prediction": "what preflight predicted",
    "dataset": "dataset file (index_webdataset)",
    "inspect": "what inspect_webdataset found",
    "train-done": "marker of the finished training",
    "evaluation": "answers on held-out data (evaluate)",
}
# By option, keys that its file has had in every version, and the type of each: without them it is another file.
KEYS: dict[str, dict[str, Any]] = {
    "resolved": {"settings": dict, "why": dict, "run_name": str},
    "prediction": {"parameters": int, "warnings": list},
    "dataset": {"train": dict, "heldout": dict},
    "inspect": {"checks": list, "distributions": dict},
    "train_done": {"iteration": int},
    "evaluation": {"split": str, "samples": int, "correct": int, "groups": dict},
    "counts": {"epochs": (int, float), "seen": dict},
    "parity": {"passed": (bool, type(None))},
}
DISTRIBUTIONS = ("images per sample", "question length", "answer length", "image width", "image height")


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--resolved", type=Path, required=True, metavar="JSON", help="resolved settings (preflight)")
    add("--run-dir", type=Path, required=True, metavar="DIR", help="run directory, with metrics.jsonl")
    for name, meaning in OPTIONAL.items():
        add(f"--{name}", type=Path, metavar="JSON", help=meaning)
    add("--export", type=Path, metavar="DIR", help="Hugging Face folder, to be named on the page")
    add("--output", type=Path, required=True, metavar="HTML")
    args = parser.parse_args()
    if not args.run_dir.is_dir():
        raise RunError(f"run directory {args.run_dir} does not exist", "train first, or name another --run-dir")
    if (meant := run_of(args.run_dir)) and not (args.run_dir / RUN_FILE).is_file():
        raise RunError(f"--run-dir {args.run_dir}: no run directory", f"--run-dir {meant}")
    refuse_others_page(args.output)
    exported = args.export and is_export(args.export)
    if exported:
        write_card(args.export)  # again: the scores are known now; before the page, which links to it
    html, found, say = page(args)
    write_text(args.output, html)
    print(found.headline)
    print(say("report: %(path)s", path=args.output))
    if exported:
        print(say("talk to it: %(command)s", command=chat_command(args.run_dir)))


def read_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """The content of each option's file, None where it is not given, by its name in the template.

    Errors: DamagedFileError for a damaged file, RunError for one of another run.
    """
    files: dict[str, Path | None] = {name: getattr(args, name, None) for name in KEYS}
    files["counts"] = args.run_dir / SAMPLE_COUNTS
    files["parity"] = args.export and args.export / PARITY
    found: dict[str, Any] = {}
    for name, path in files.items():
        needed = name not in ("counts", "parity")  # the others are looked for, and given only where they exist
        found[name] = None
        if not path:
            continue
        if name == "counts" and found["train_done"] and "data" in found["resolved"] and not path.is_file():
            of_run = found["resolved"]  # the file was damaged, and deleted
            count_samples(args.run_dir, ResolvedData.model_validate(of_run["data"]), of_run["settings"]["train_iters"])
        found[name] = read_json(path, *(() if needed else (None,)))
        if found[name] is None:
            print(f"note: {path}: no such file; the page says so")
        else:
            check_keys(path, found[name], KEYS[name])
            if name == "evaluation" and not all(map(is_scored, [found[name], *found[name]["groups"].values()])):
                raise damaged(path, "scores")
    data, fingerprint = found["resolved"].get("data", {}), (found["dataset"] or {}).get("fingerprint")
    if fingerprint and data.get("fingerprint", fingerprint) != fingerprint:
        raise not_this_run(args.dataset, f"its data is {fingerprint}, that of the run {data['fingerprint']}")
    run_name = found["resolved"]["run_name"]
    if (of := (found["prediction"] or {}).get("run_name", run_name)) != run_name:
        raise not_this_run(args.prediction, f"it is of {of}")
    if (of := Path((found["train_done"] or {}).get("run_dir", args.run_dir))) != args.run_dir:
        raise not_this_run(args.train_done, f"it is of {of}")
    return found


def check_keys(path: Path, content: Any, keys: dict[str, Any]) -> None:
    for key, kind in keys.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise damaged(path, key)


def damaged(path: Path, key: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path}: damaged, or another file than its name says: it has no {key} as it should",
        "delete it and run the same command: it is made again",
    )


def not_this_run(path: Path, why: str) -> RunError:
    return RunError(f"{path}: not of this run: {why}", "delete it and run the same command: it is made again")


def page(args: argparse.Namespace) -> tuple[str, Verdict, Say]:
    """The page, its verdict, and its language. In the template JSON files go by the names of their options, None where one is missing."""
    run_dir, found = args.run_dir, read_inputs(args)
    metrics, validations = read_metrics(run_dir), read_jsonl(run_dir / VALIDATION)
    settings, why = found["resolved"]["settings"], found["resolved"]["why"]
    language = spoken(settings.get("report_language", "auto"))
    say = sayer(language)
    evaluation = found["evaluation"] = with_scores(found["evaluation"]) if found["evaluation"] else {}
    groups = {name: with_scores(group) for name, group in evaluation.get("groups", {}).items()}
    records = {"metrics": metrics, "validations": validations, "bad": read_jsonl(run_dir / BAD_STEPS)}
    judged = verdict(found, records, say, run_dir)
    inspection = args.inspect and args.inspect.with_suffix(".html")
    predictions = args.evaluation.with_name(PREDICTIONS) if evaluation else None
    html = render(
        "report.html.j2",
        language,
        **found,
        **measured(metrics),
        verdict=judged,
        provenance=provenance(run_dir, found, metrics),
        links=links(
            args.output, inspection_of_the_data=inspection, exported_model=args.export,
            model_card=args.export and args.export / CARD, all_answers=predictions, log_of_the_training=newest_log(run_dir),
        ),
        derived={name: settings.get(name) for name in why},
        given={name: value for name, value in settings.items() if name not in why},
        distributions=DISTRIBUTIONS,
        last={**(metrics[-1] if metrics else {}), **(found["train_done"] or {})},
        curves=charts([Records(metrics, validations)], say),
        vega=vega,
        validations=validations,
        best=best_validation(validations),
        meaning=explained(evaluation["scores"][0]["name"]) if evaluation.get("scores") else "",
        measure=measure_of(evaluation, say),
        measure_is_accuracy=is_accuracy(evaluation),
        others=other_sets(args.evaluation, evaluation.get("model")) if args.evaluation else {},
        leak=found["dataset"] and leak_note(found["dataset"]),
        groups=sorted(groups.items(), key=lambda item: item[1]["scores"][0]["mean"] if item[1]["samples"] else 0),
        answers=answers_of(evaluation, predictions, found["resolved"].get("data", {}).get("path"), say),
        paths=paths(run_dir, args.export, found["resolved"]),
    )  # fmt: skip
    return html, judged, say


def answers_of(
    evaluation: dict[str, Any], predictions: Path | None, data: str | None, say: Say
) -> dict[str, Any] | None:
    """The table of all answers; None where there are none, or they are not those that were evaluated. Of a data set that is
    no longer there, without pictures."""
    if not predictions or not predictions.is_file():
        return None
    if evaluation.get("predictions") != file_fingerprint(predictions):
        return None
    rows = read_rows(predictions)
    models = [say("after"), say("before")] if rows and "base_correct" in rows[0] else [say("answer")]
    return table([rows], models, islice(read_split(data, evaluation["split"]), len(rows)) if data else [])


def is_accuracy(evaluation: dict[str, Any]) -> bool:
    """Whether the first score's mean is the share of right answers."""
    scores = evaluation.get("scores")
    return not scores or abs(scores[0]["mean"] * evaluation["samples"] - evaluation["correct"]) < 1e-6


def measure_of(evaluation: dict[str, Any], say: Say) -> str:
    """What the first score's mean is called."""
    if is_accuracy(evaluation):
        return say("held-out accuracy")
    return say("held-out score (%(name)s)", name=evaluation["scores"][0]["name"])


def other_sets(evaluation: Path, model: str | None) -> dict[str, dict[str, Any]]:
    """What evaluate.py found by hand on other data with the same export, by the name of the data."""
    files = sorted(evaluation.parent.glob(f"evaluations/*/{EVALUATION}"))
    found = {path.parent.name: read_json(path) for path in files}
    return {
        name: with_scores(each)
        for name, each in found.items()
        if is_scored(each) and each["samples"] and each.get("model") == model
    }


if __name__ == "__main__":
    main()
