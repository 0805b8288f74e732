"""The training's position in the data: kept with a checkpoint, restored with it, and what was left out on the way."""

import pickle
from pathlib import Path

import torch
from megatron.core import parallel_state

from llava_sft.data.stream import TrainingLoader
from llava_sft.errors import RunError
from llava_sft.run.layout import DAMAGED_SAMPLES, checkpoint_dir, data_dir
from llava_sft.run.records import append

KEY = "dataloader_state_dict"  # Megatron's


def position_file(run_dir: Path, iteration: int) -> Path:
    """Where this data-parallel rank's position lies, in a folder that Megatron would name so."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    folder = "mp_rank_00_000" if stages > 1 else "mp_rank_00"
    rank = parallel_state.get_data_parallel_rank()
    return data_dir(run_dir, iteration) / folder / f"train_dataloader_dprank{rank:03d}.pt"


def save_position(loader: TrainingLoader, run_dir: Path, iteration: int) -> None:
    """Of the ranks that share their samples the first writes."""
    if parallel_state.is_pipeline_first_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        path = position_file(run_dir, iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({KEY: loader.save_state()}, path)


def restore_position(loader: TrainingLoader, run_dir: Path, iteration: int) -> None:
    """Errors: RunError when the file is damaged, or of an earlier version, which drew the samples in another order."""
    path = position_file(run_dir, iteration)
    try:
        loader.restore(torch.load(path, weights_only=True)[KEY])
    except (pickle.UnpicklingError, ValueError, KeyError, EOFError, RuntimeError) as error:
        raise RunError(
            f"{path}: no position in the data that this version can go on from ({type(error).__name__}): the file is "
            "damaged, or of a run that an earlier version began, which drew the samples in another order",
            f"start another run from its weights: --config run_tag=next load={checkpoint_dir(run_dir, iteration)}",
        ) from None
    print(f"data position restored from {path}")


def note_damaged(run_dir: Path, number: str, fault: str) -> None:
    print(f"left out: {fault}", flush=True)
    append(run_dir / DAMAGED_SAMPLES, {"number": int(number), "fault": fault})
