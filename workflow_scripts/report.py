"""Write the report of a run, one self-contained HTML page, from what the steps before it left behind."""

import argparse
from pathlib import Path

from llava_sft.errors import RunError, exits_cleanly
from llava_sft.files import read_json, write_text
from llava_sft.report.page import render_report

OPTIONAL = {  # the page says what is missing
    "prediction": ("prediction", "what preflight predicted"),
    "dataset": ("dataset", "dataset file (index_webdataset)"),
    "inspect": ("inspection", "what inspect_webdataset found"),
    "train-done": ("done", "marker of the finished training"),
    "evaluation": ("evaluation", "answers on held-out data (evaluate)"),
}


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--resolved", type=json_file, required=True, metavar="JSON", help="resolved settings (preflight)")
    add("--run-dir", type=Path, required=True, metavar="DIR", help="run directory, with metrics.jsonl")
    for name, (dest, meaning) in OPTIONAL.items():
        add(f"--{name}", dest=dest, type=json_file, metavar="JSON", help=meaning)
    add("--export", type=Path, metavar="DIR", help="Hugging Face folder, to be named on the page")
    add("--output", type=Path, required=True, metavar="HTML")
    args = parser.parse_args()
    if not args.run_dir.is_dir():
        raise RunError(f"run directory {args.run_dir} does not exist", "train first, or name another --run-dir")

    known = {dest: getattr(args, dest) for dest, _ in OPTIONAL.values()}
    write_text(args.output, render_report(args.resolved, args.run_dir, args.export, **known))
    print(f"report: {args.output}")


def json_file(path: str) -> dict:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file", "make it first, or leave its option out") from None
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON: {error}", "delete it and make it again") from None


if __name__ == "__main__":
    main()
