"""Answer questions with an exported model, as a user of it would, and score the answers.

    evaluate.py output/stage2_sft_vqa_results/huggingface other/test.jsonl --scores normalised --scores anls

DATA is a webdatasets folder, whose held-out split is asked, or a raw file of any format that is converted. With --start-of or
--base another model answers the same questions, and the difference is shown with its interval. All answers are written to
predictions.jsonl beside the result.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from llava_sft.checkpoint.start import read_hf_config
from llava_sft.checkpoint.verify import require_export
from llava_sft.command_line import Parser
from llava_sft.data.forms import add_reading, reading_of
from llava_sft.errors import (
    INTERRUPTED,
    CheckpointError,
    DamagedFileError,
    RunError,
    SettingsError,
    SftError,
    exits_cleanly,
    many,
    verb_of,
)
from llava_sft.evaluation.answers import Model, Options, answers_of
from llava_sft.evaluation.base import exported, start_of
from llava_sft.evaluation.judge import Answer, group_summaries, judge, summary
from llava_sft.evaluation.questions import Questions, read_questions, require_positions
from llava_sft.evaluation.scores import SPELLINGS, Score, function_file, load_score
from llava_sft.files import file_fingerprint, fingerprint, read_json, refuse_others_file, write_json, write_text
from llava_sft.machine import vllm_interpreter
from llava_sft.model.hf_config import model_of_config
from llava_sft.run.layout import EVALUATION, PREDICTIONS

DEFAULT_BY = "kind"
RULES = 6  # version of what evaluation.json holds: another number evaluates anew


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def path(text: str) -> Path | None:
        return Path(text) if text else None

    add("model_dir", type=Path, metavar="EXPORT", help="exported Hugging Face folder, or a run's results")
    add("data", type=Path, metavar="DATA", help="webdatasets folder, or a JSONL, JSON or Parquet file")
    add("--image-root", type=Path, help="of a raw file: the folder that image paths start from (beside the file)")
    add_reading(add)
    add("--split", choices=["val", "train"], default="val", help="of a folder: what is asked (%(default)s)")
    add("--dataset", type=Path, help="dataset.json of the folder (that beside it)")
    add("--output", type=Path, help="evaluation.json (EXPORT/../evaluations/NAME OF DATA/evaluation.json)")
    add(
        "--scores",
        action="append",
        metavar="SCORE",
        help=f"the first decides what is right; several: repeat. {SPELLINGS}",
    )
    add("--by", default=DEFAULT_BY, metavar="KEY", help="the record's key that scores are reported by (%(default)s)")
    add("--samples", default="all", help="all, or the number of samples")
    add("--base", type=Path, metavar="EXPORT", help="another export, to compare with")
    add("--start-of", type=path, metavar="RUN_DIR", help="compare with what this run started from")
    add("--skip-missing-start", action="store_true", help="no error where what that run started from is gone")
    add("--base-answers", type=Path, metavar="DIR", help="keeps answers of what is compared with (beside the output)")
    add("--batch-size", type=int, default=Options().batch_size, help="questions at once, of transformers (%(default)s)")
    add("--max-new-tokens", type=int, default=Options().max_new_tokens, help="longest answer (%(default)s)")
    add("--with", dest="engine", choices=["transformers", "vllm"],
        help="who generates (vLLM where there are it and a GPU)")  # fmt: skip
    add("--vllm-python", type=path, help="interpreter of an environment with vLLM (this one)")
    args = parser.parse_args()
    if args.samples != "all" and not (args.samples.isdecimal() and int(args.samples)):
        raise SettingsError(f"--samples {args.samples}: neither `all` nor a number of samples", "--samples all")
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise SettingsError(
            "--batch-size and --max-new-tokens must be at least 1",
            f"the defaults: {Options().batch_size} and {Options().max_new_tokens}",
        )
    if args.base and args.start_of:
        raise SettingsError("--base and --start-of: there is one model to compare with", "leave one of them out")
    if args.output and args.output.is_dir():
        raise SettingsError(f"--output {args.output}: a folder", f"--output {args.output / EVALUATION}")
    args.model_dir = require_export(args.model_dir)
    if args.output is None:
        data = Path(os.path.abspath(args.data))  # `.` has no name
        name = data.parent.name if data.name == "webdatasets" else data.stem
        args.output = args.model_dir.resolve().parent / "evaluations" / name / EVALUATION
    refuse_lost_files(args)
    args.scores = list(dict.fromkeys(args.scores or ["exact"]))
    args.base_answers = args.base_answers or args.output.parent / "base_answers"
    return args


def refuse_lost_files(args: argparse.Namespace) -> None:
    """Raise SettingsError where the result, or the answers beside it, would take the place of what no evaluation wrote."""
    predictions = args.output.with_name(PREDICTIONS)
    for path in (args.output, predictions):
        if path.exists() and args.data.exists() and path.samefile(args.data):
            raise SettingsError(
                f"--output {args.output}: {path} is what is asked, and would be lost", "a file in another folder"
            )
    refuse_others_file(args.output, "accuracy", f"--output {args.output}")
    if not (args.output.exists() or kept_result(args.output).exists()):
        refuse_others_file(
            predictions,
            "turns",
            f"--output {args.output}: its answers go to {predictions}, which",
            f"--output {args.output.parent / 'evaluation' / args.output.name}",
        )


def kept_result(output: Path) -> Path:
    """The result once more: Snakemake deletes the output itself before a rerun."""
    return output.with_name(f".{output.name}.kept")


@exits_cleanly
def main() -> None:
    try:
        evaluate(parse_arguments())
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the answers that are there", file=sys.stderr)
        sys.exit(INTERRUPTED)


def evaluate(args: argparse.Namespace) -> None:
    scores = read_scores(args.scores)
    options = Options(args.batch_size, args.max_new_tokens, vllm_interpreter(args.engine, args.vllm_python))
    model, (base, missing) = exported(args.model_dir), find_base(args)
    require_positions(args.max_new_tokens, model_of_config(read_hf_config(args.model_dir)))
    limit = None if args.samples == "all" else int(args.samples)
    asked = read_questions(args.data, args.dataset, args.split, limit, args.image_root, reading_of(args))
    files = [file_fingerprint(path) for score in args.scores if (path := function_file(score))]
    judged = [args.scores, files, args.by, base.fingerprint if base else missing]
    depends = fingerprint([model.fingerprint, asked.fingerprint, options.depends(), judged, RULES])
    cache = kept_result(args.output)
    if earlier := cached_result(cache, depends):
        write_json(args.output, earlier, sealed=True)
        print(f"{args.output}: the same model and data, nothing to evaluate")
        return

    began = time.monotonic()
    questions = [sample.before(turn) for sample in asked.samples for turn in sample.answers()]
    kept = args.output.with_name(f".{args.output.name}.answers")
    answers = answers_of(model, questions, asked.fingerprint, options, kept)
    before = None
    if base and questions:
        kept = args.base_answers / f"{fingerprint([base.fingerprint, asked.fingerprint, options.depends()])}.json"
        try:
            before = answers_of(base, questions, asked.fingerprint, options, kept)
        except CheckpointError as error:
            missing = missing_start(args, error)
    rows = judge(asked.samples, answers, scores, args.by, before)
    result = described(rows, [score.name for score in scores], answers)
    result["base"] = {"name": base.name, "cut": sum(a.cut for a in before)} if base and before else {"missing": missing}
    result |= {"split": asked.split, "by": args.by}
    result |= {"max_new_tokens": args.max_new_tokens, "engine": "vLLM" if options.vllm else "transformers"}
    predictions = args.output.with_name(PREDICTIONS)
    write_text(predictions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    result |= {"depends": depends, "model": model.fingerprint, "predictions": file_fingerprint(predictions)}
    result["seconds"] = round(time.monotonic() - began, 1)
    write_json(cache, result, sealed=True)
    write_json(args.output, result, sealed=True)
    print_summary(args, result, asked)
    if missing:  # last, where it is seen
        sys.stdout.flush()
        print(f"not compared: {missing}", file=sys.stderr)


def read_scores(names: list[str]) -> list[Score]:
    try:
        return [load_score(name) for name in names]
    except ValueError as error:
        raise SettingsError(f"--scores: {error}", "--help explains them") from None


def find_base(args: argparse.Namespace) -> tuple[Model | None, str]:
    """The model to compare with; or why a run has none, where that is no error."""
    if args.base:
        return exported(args.base), ""
    if not args.start_of:
        return None, ""
    try:
        return start_of(args.start_of, args.base_answers), ""
    except (CheckpointError, RunError, DamagedFileError) as error:
        return None, missing_start(args, error)


def missing_start(args: argparse.Namespace, error: SftError) -> str:
    """Why there is no comparison. Errors: RunError, unless --skip-missing-start says that it is none."""
    if not args.skip_missing_start:
        raise RunError(
            f"--start-of {args.start_of}: {error.problem}",
            f"{error.fix or 'another run directory'}, or --skip-missing-start",
        ) from error
    return error.problem


def described(rows: list[dict[str, Any]], names: list[str], answers: list[Answer]) -> dict[str, Any]:
    """Counts and scores, of all samples and of each group."""
    result = summary(rows, names)
    result |= {"accuracy": result["scores"][0]["mean"] if rows else None, "groups": group_summaries(rows, names)}
    return result | {"answers": len(answers), "cut": sum(answer.cut for answer in answers)}


def cached_result(cache: Path, depends: str) -> dict[str, Any] | None:
    """The result of the last evaluation, if it was of the same model, data and options and its files are whole."""
    try:
        earlier = read_json(cache, None)
    except DamagedFileError as error:
        print(f"{error.problem}: evaluating again", file=sys.stderr)
        return None
    predictions = cache.with_name(PREDICTIONS)
    if not isinstance(earlier, dict) or earlier.get("depends") != depends:
        if earlier:
            print(f"{cache}: of another model, data or settings, or of an earlier version: evaluating again")
        return None
    if not predictions.is_file() or file_fingerprint(predictions) != earlier.get("predictions"):
        print(f"{predictions}: missing, or not what was written: evaluating again", file=sys.stderr)
        return None
    return earlier


def print_summary(args: argparse.Namespace, result: dict[str, Any], asked: Questions) -> None:
    if not result["samples"]:
        what = "no record" if asked.split == "all" else "no held-out split"
        print(f"{args.data} has {what}: there is no accuracy", file=sys.stderr)
        return
    print(f"{args.output}: {result['correct']:,} of {result['samples']:,} right")
    for score in result["scores"]:
        print(f"  {score_line(score)}")
    for name, group in result["groups"].items() if len(result["groups"]) > 1 else ():
        print(f"  {name:20} {group['correct']:5} of {group['samples']:5}  {score_line(group['scores'][0])}")
    for whose, cut in (("", result["cut"]), (" of the base", result["base"].get("cut", 0))):
        if cut:
            print(
                f"  {cut:,} of {many(result['answers'], 'answer')}{whose} {verb_of(cut, 'were')} cut after "
                f"{many(args.max_new_tokens, 'token')} "
                "(max_new_tokens, --max-new-tokens), which makes most of them wrong"
            )
    if asked.leak:
        print(f"  {asked.leak}")
    if args.by not in (DEFAULT_BY, "id") and set(result["groups"]) == {"all"}:
        print(f"  no record has the key {args.by!r}: all are one group")


def score_line(score: dict[str, Any]) -> str:
    """`exact 97.5 % (87.1 to 99.6), base 10.0 %: +87.5 (71.6 to 94.1)`"""
    low, high = (100 * end for end in score["interval"])
    line = f"{score['name']} {100 * score['mean']:.1f} % ({low:.1f} to {high:.1f})"
    if "base" in score:
        low, high = (100 * end for end in score["interval_of_difference"])
        line += f", base {100 * score['base']:.1f} %: {100 * score['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
    return line


if __name__ == "__main__":
    main()
