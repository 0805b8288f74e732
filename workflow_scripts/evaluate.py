"""Answer the held-out split with the exported model, as a user of it would, and count exact matches.

All answers are written to predictions.jsonl beside the result.
"""

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from llava_sft.checkpoint.verify import MARKER
from llava_sft.checkpoint.verify import require_whole as require_whole_export
from llava_sft.data.index import leak_note
from llava_sft.data.stored import read_split
from llava_sft.data.verify import require_whole as require_whole_data
from llava_sft.errors import DamagedFileError, RunError, SettingsError, exits_cleanly
from llava_sft.evaluation.answers import generate
from llava_sft.evaluation.judge import group_counts, judge
from llava_sft.files import file_fingerprint, fingerprint, read_json, write_json, write_text

PREDICTIONS = "predictions.jsonl"
RULES = 2  # version of how answers are generated and judged: another number evaluates anew


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path, help="exported Hugging Face folder")
    parser.add_argument("webdatasets", type=Path, help="WebDataset folder with .nv-meta")
    parser.add_argument("--dataset", type=Path, required=True, help="dataset.json of that folder")
    parser.add_argument("--output", type=Path, required=True, help="evaluation.json")
    parser.add_argument("--by", default="kind", help="the record's key that accuracy is reported by")
    parser.add_argument("--samples", default="all", help="all, or the number of samples")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    for path in (args.model_dir / MARKER, args.dataset):
        if not path.is_file():
            raise RunError(
                f"{path}: no such file", "an export of convert_checkpoint.py, and the file of index_webdataset.py"
            )
    if args.samples != "all" and not (args.samples.isdecimal() and int(args.samples)):
        raise SettingsError(f"--samples {args.samples}: neither `all` nor a number of samples", "evaluate_samples: all")
    require_whole_export(args.model_dir)
    require_whole_data(args.webdatasets, args.dataset)
    model, data = required_value(args.model_dir / MARKER, "depends"), required_value(args.dataset, "fingerprint")
    options = [args.by, args.samples, args.batch_size, args.max_new_tokens]
    depends = fingerprint([model, data, options, RULES])
    cache = args.output.with_name(f".{args.output.name}.kept")  # Snakemake deletes the output itself before a rerun
    if earlier := cached_result(cache, depends):
        write_json(args.output, earlier, sealed=True)
        print(f"{args.output}: the same model and data, nothing to evaluate")
        return

    result, rows = evaluate(args)
    predictions = args.output.with_name(PREDICTIONS)
    write_text(predictions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    result |= {"depends": depends, "predictions": file_fingerprint(predictions)}
    write_json(cache, result, sealed=True)
    write_json(args.output, result, sealed=True)
    print_summary(args, result)


def required_value(path: Path, key: str) -> str:
    """A string that one of our files must have."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        raise DamagedFileError(f"{path}: has no {key}", "delete it and run the same command: it is made again")
    return content[key]


def cached_result(cache: Path, depends: str) -> dict[str, Any] | None:
    """The result of the last evaluation, if it was of the same model, data and options and its files are whole."""
    try:
        earlier = read_json(cache, None)
    except DamagedFileError as error:
        print(f"{error.problem}: evaluating again", file=sys.stderr)
        return None
    predictions = cache.with_name(PREDICTIONS)
    if not isinstance(earlier, dict) or earlier.get("depends") != depends:
        return None
    if not predictions.is_file() or file_fingerprint(predictions) != earlier.get("predictions"):
        print(f"{predictions}: missing, or not what was written: evaluating again", file=sys.stderr)
        return None
    return earlier


def print_summary(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if not result["samples"]:
        print(f"{args.webdatasets} has no held-out split: there is no accuracy", file=sys.stderr)
        return
    print(f"{args.output}: {result['correct']} of {result['samples']} right = {result['accuracy']:.1%}")
    for name, group in result["groups"].items():
        print(f"  {name:20} {group['correct']:5} of {group['samples']:5} = {group['correct'] / group['samples']:.1%}")
    if result["cut"]:
        print(
            f"  {result['cut']:,} of {result['answers']:,} answers were cut after {args.max_new_tokens} tokens "
            "(max_new_tokens), which makes most of them wrong"
        )
    if leak := leak_note(read_json(args.dataset)):
        print(f"  {leak}")


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of evaluation.json, and the rows of predictions.jsonl."""
    limit = None if args.samples == "all" else int(args.samples)
    samples = list(islice(read_split(args.webdatasets, "val"), limit))
    began = time.monotonic()
    questions = [sample.before(turn) for sample in samples for turn in sample.answers()]
    answers = generate(args.model_dir, questions, args.batch_size, args.max_new_tokens) if questions else []
    rows, examples = judge(samples, answers, args.by)
    correct = sum(row["correct"] for row in rows)
    result = {
        "split": "val",
        "by": args.by,
        "samples": len(rows),
        "correct": correct,
        "accuracy": correct / len(rows) if rows else None,
        "groups": group_counts(rows),
        "answers": len(answers),
        "cut": sum(answer.cut for answer in answers),
        "max_new_tokens": args.max_new_tokens,
        "seconds": round(time.monotonic() - began, 1),
        "examples": examples,
    }
    return result, rows


if __name__ == "__main__":
    main()
