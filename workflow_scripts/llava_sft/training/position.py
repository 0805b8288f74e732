"""The training's position in the data: restored with a checkpoint, and what was left out on the way."""

import pickle
from pathlib import Path

import torch

from llava_sft.data.stream import TrainingLoader
from llava_sft.errors import RunError
from llava_sft.run.layout import DAMAGED_SAMPLES
from llava_sft.run.records import append


def restore_position(loader: TrainingLoader, path: Path) -> None:
    """Errors: RunError when the file is damaged, or of an earlier version, which drew the samples in another order."""
    try:
        loader.restore(torch.load(path, weights_only=True)["dataloader_state_dict"])
    except (pickle.UnpicklingError, ValueError, KeyError, EOFError, RuntimeError) as error:
        iteration = path.parent.name
        raise RunError(
            f"{path}: no position in the data that this version can go on from ({type(error).__name__}): the file is "
            "damaged, or of a run that an earlier version began, which drew the samples in another order",
            f"start another run from its weights: --config run_tag=next load={path.parents[2] / iteration}",
        ) from None
    print(f"data position restored from {path}")


def note_damaged(run_dir: Path, number: str, fault: str) -> None:
    print(f"left out: {fault}", flush=True)
    append(run_dir / DAMAGED_SAMPLES, {"number": int(number), "fault": fault})
