"""List every run in the output folder: state, loss, accuracy, what it was trained with, and the command that resumes it."""

import contextlib
import json
import shlex
from pathlib import Path

import llava_sft  # noqa: F401 (first: it says what an unfit Python lacks)

# isort: split
import yaml
from pydantic import ValidationError

from llava_sft.command_line import Parser
from llava_sft.errors import DamagedFileError, exits_cleanly, require_folder
from llava_sft.files import read_json
from llava_sft.report.html import percent
from llava_sft.report.runs import evaluation_of
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.layout import FAILURE, LOST_RANKS, PREDICTION, RUN_FILE, results_of
from llava_sft.run.lock import is_running
from llava_sft.run.records import read_metrics
from llava_sft.settings.resolve import ResolvedSettings


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("exp_dir", type=Path, nargs="?", help="EXP_DIR (default: output)")
    exp_dir = parser.parse_args().exp_dir
    if exp_dir is not None:  # before the first run there is no output/
        require_folder(exp_dir)
    exp_dir = exp_dir or Path("output")
    rows = [describe(path.parent) for path in sorted(exp_dir.glob(f"stage*/{RUN_FILE}"))]
    if not rows:
        print(f"no runs in {exp_dir}/")
        return
    rows.insert(0, ("name", "state", "step", "loss", "accuracy", "lr", "batch", "LoRA", "size", "to resume"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())


def describe(run_dir: Path) -> tuple[str, ...]:
    done, metrics = iterations_done(run_dir), read_metrics(run_dir)
    try:
        settings = ResolvedSettings.model_validate(read_json(run_dir / RUN_FILE)["settings"])
    except (DamagedFileError, OSError, KeyError, TypeError, ValidationError):
        return run_dir.name, f"{RUN_FILE} is damaged", str(done), *[""] * 7
    size = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
    if is_running(run_dir):
        state, done = "running", metrics[-1]["iteration"] if metrics else done
    elif done == settings.train_iters:
        state = "done"
    else:
        failed = any((run_dir / name).is_file() for name in (FAILURE, LOST_RANKS))
        state = "failed" if failed else "stopped"
    return (
        run_dir.name,
        state,
        f"{done}/{settings.train_iters}",
        f"{metrics[-1]['lm loss']:.4f}" if metrics else "",
        percent(evaluation["scores"][0]["mean"]) if (evaluation := evaluation_of(run_dir)) else "",
        f"{settings.lr:g}",
        str(settings.global_batch_size),
        f"rank {settings.lora_rank}" if settings.lora_rank else "",
        f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB",
        command(run_dir, settings) if state in ("stopped", "failed") else "",
    )


def command(run_dir: Path, settings: ResolvedSettings) -> str:
    """The command that resumes a run, with the same --config as before, which preflight noted beside it."""
    note = {}
    with contextlib.suppress(DamagedFileError):
        note = read_json(results_of(run_dir) / PREDICTION, {})
    pairs = [(key, yaml.safe_load(value)) for key, _, value in (o.partition("=") for o in note.get("overrides", []))]
    typed = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in pairs]
    given = " --config " + " ".join(map(shlex.quote, typed)) if typed else ""
    profile = " --profile slurm" if note.get("cluster") else ""
    return f"snakemake{profile} train_{settings.experiment}{given}"


if __name__ == "__main__":
    main()
