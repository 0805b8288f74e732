"""Write the report of a run, one self-contained HTML page, from what the steps before it left behind."""

import argparse
from pathlib import Path

from llava_sft.errors import RunError, exits_cleanly
from llava_sft.files import read_json, write_text
from llava_sft.report.page import render_report
from llava_sft.training.watch import read_metrics

OPTIONAL = {  # the page says what is missing
    "prediction": "what preflight predicted",
    "dataset": "dataset file (index_webdataset)",
    "inspect": "what inspect_webdataset found",
    "train-done": "marker of the finished training",
    "evaluation": "answers on held-out data (evaluate)",
}


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--resolved", type=json_file, required=True, metavar="JSON", help="resolved settings (preflight)"
    )
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="run directory, with metrics.jsonl")
    for name, meaning in OPTIONAL.items():
        parser.add_argument(f"--{name}", type=json_file, metavar="JSON", help=meaning)
    parser.add_argument("--export", type=Path, metavar="DIR", help="Hugging Face folder, to be named on the page")
    parser.add_argument("--output", type=Path, required=True, metavar="HTML")
    args = parser.parse_args()
    if not args.run_dir.is_dir():
        raise RunError(f"run directory {args.run_dir} does not exist", "train first, or name another --run-dir")

    page = render_report(
        resolved=args.resolved,
        run_dir=args.run_dir,
        metrics=read_metrics(args.run_dir),
        prediction=args.prediction,
        dataset=args.dataset,
        inspection=args.inspect,
        done=args.train_done,
        evaluation=args.evaluation,
        export=args.export,
    )
    write_text(args.output, page)
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
