"""The files and folders of a run directory and its results, each name spelled once. No imports of this package: everyone may import it.

Megatron's layout: the tracker, and a folder for each checkpoint. A converted checkpoint has the tracker, `release/` and
`huggingface/` too.
"""

import re
from pathlib import Path

RUN_FILE = "run.json"  # the resolved settings: which run this is
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's: the step of the newest checkpoint
SIDECARS = "huggingface"  # tokenizer and config, which the export takes along
CHECKSUMS = "checksums.json"  # seals a checkpoint once it is complete
PAIRS = "pairs"  # in a converted checkpoint: those of a PEFT folder, beside release/
LORA = "lora.json"  # in a checkpoint that holds what is trained alone: what stands beside which base
VERIFIED = ".verified.json"  # files that were found whole: not read again before they change
BEST = "best.json"
FAILURE = "failure.json"  # written by the training when it knows the cause
LOST_RANKS = "lost_ranks.json"  # by a rank that ends because another has
SAMPLE_COUNTS = "sample_counts.json"
METRICS, VALIDATION, EVENTS, BAD_STEPS = "metrics.jsonl", "validation.jsonl", "events.jsonl", "bad_steps.jsonl"
LOGS = (METRICS, VALIDATION, EVENTS, BAD_STEPS)
DAMAGED_SAMPLES = "damaged_samples.jsonl"  # those that the training skipped
SAMPLES = "samples"  # a folder: the sample ids of every step, one file per data-parallel rank
SESSIONS = "sessions.jsonl"  # when and where the run was trained
TENSORBOARD = "tensorboard"
RESULTS = "_results"  # what follows the name of a run directory in that of its results, which hold:
RESOLVED, PREDICTION = "resolved.json", "preflight.json"
EVALUATION, PREDICTIONS = "evaluation.json", "predictions.jsonl"
PARITY = "parity.json"  # in an export

ITERATION = re.compile(r"iter_(\d+)")


def iteration_name(iteration: int) -> str:
    """Megatron's name of a checkpoint folder."""
    return f"iter_{iteration:07d}"


def checkpoint_dir(run_dir: Path, iteration: int) -> Path:
    return run_dir / iteration_name(iteration)


def results_of(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}{RESULTS}")


def run_of(place: Path) -> Path | None:
    """The run directory that a place is, lies in, or holds the results of; None where there is none."""
    for folder in (place, *place.parents)[:3]:
        of_results = [folder.with_name(folder.name.removesuffix(RESULTS))] if folder.name.removesuffix(RESULTS) else []
        for run in (folder, *of_results):
            if (run / RUN_FILE).is_file():
                return run
    return None


def data_dir(run_dir: Path, iteration: int) -> Path:
    """Beside the weights: the position in the data of every rank, and what the watch keeps."""
    return run_dir / "dataloader" / iteration_name(iteration)


def samples_file(run_dir: Path, data_rank: int) -> Path:
    return run_dir / SAMPLES / f"rank{data_rank:03d}.jsonl"


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of all checkpoint folders, whole or not, oldest first."""
    found = ((ITERATION.fullmatch(path.name), path) for path in run_dir.glob("iter_*"))
    return sorted(int(name[1]) for name, path in found if name and path.is_dir())
