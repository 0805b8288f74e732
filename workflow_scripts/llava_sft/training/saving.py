"""When a training saves: is there room, is the one before whole, what is noted, and which may go; and its position in the
data, kept with a checkpoint and restored with it."""

import pickle
import threading
from pathlib import Path

import torch
from megatron.core import parallel_state

from llava_sft.checkpoint.base import base_to_note, note_base
from llava_sft.checkpoint.start import Start
from llava_sft.data.stream import TrainingLoader
from llava_sft.errors import RunError
from llava_sft.files import write_text
from llava_sft.megatron.checkpoint import Checkpoints
from llava_sft.run.checkpoints import check_disk, checkpoint_bytes, prune, seal
from llava_sft.run.layout import DAMAGED_SAMPLES, TRACKER, checkpoint_dir, checkpoints, data_dir
from llava_sft.run.records import append
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.training.watch import Watch

KEY = "dataloader_state_dict"  # Megatron's, of the position in the data


class Saves:
    """The checkpoints of a run, all that belongs to one. `expected`: bytes of the first."""

    def __init__(
        self,
        run_dir: Path,
        values: ResolvedSettings,
        expected: int,
        states: Checkpoints,
        loader: TrainingLoader,
        watch: Watch,
        start: Start,
    ):
        self.run_dir, self.values, self.expected = run_dir, values, expected
        self.base = base_to_note(start) if values.trained.lora and start.folder else None
        self.states, self.loader, self.watch = states, loader, watch
        self.first_rank = torch.distributed.get_rank() == 0
        self.steps = 0  # that were begun
        self.begun = 0  # the step whose checkpoint was begun last
        self.sealing: threading.Thread | None = None

    def save(self, iteration: int) -> None:
        """Begin a checkpoint. Errors: RunError when the disk has no room for it."""
        self.finish(wait=True)
        if self.first_rank:
            earlier = checkpoints(self.run_dir)
            needed = checkpoint_bytes(self.run_dir, earlier[-1]) if earlier else self.expected
            check_disk(self.run_dir, needed, f"the checkpoint of step {iteration}")
        self.begun = iteration
        self.watch.save(iteration)
        save_position(self.loader, self.run_dir, iteration)
        self.states.save(checkpoint_dir(self.run_dir, iteration), iteration, lambda: self._written(iteration))

    def before_step(self) -> None:
        """Let a checkpoint count that is written. From the second step on, once the optimizer has its state, memory for
        copies is taken."""
        self.finish()
        self.steps += 1
        if self.steps >= 2:
            self.states.pin_ahead()

    def finish(self, wait: bool = False) -> None:
        """Let a checkpoint count that is written; `wait` until it is, and until its checksums are noted."""
        self.states.finish(wait)
        if wait and self.sealing:
            self.sealing.join()

    def _written(self, iteration: int) -> None:
        """Have the tracker name it; note checksums and delete old checkpoints, beside the training."""
        if self.first_rank:
            if (lora := self.values.trained.lora) and self.base:
                note_base(checkpoint_dir(self.run_dir, iteration), lora, self.base)
            write_text(self.run_dir / TRACKER, str(iteration))
            self.sealing = threading.Thread(target=self._seal, args=(iteration,))
            self.sealing.start()

    def _seal(self, iteration: int) -> None:
        seal(self.run_dir, iteration)
        prune(self.run_dir, self.values.keep_last, self.values.keep_every)


# ---------------------------------------------------------------------------------------- position in the data


FOLDERS = ("mp_rank_00", "mp_rank_00_000")  # as Megatron would name them: the second with pipeline parallelism


def position_file(run_dir: Path, iteration: int) -> Path:
    """Where this data-parallel rank's position lies."""
    folder = FOLDERS[parallel_state.get_pipeline_model_parallel_world_size() > 1]
    rank = parallel_state.get_data_parallel_rank()
    return data_dir(run_dir, iteration) / folder / f"train_dataloader_dprank{rank:03d}.pt"


def saved_position(run_dir: Path, iteration: int) -> Path:
    """The file that this rank goes on from: its own, or, where the run had fewer ranks or other stages, the first one's; all
    say the same."""
    own = position_file(run_dir, iteration)
    first = (data_dir(run_dir, iteration) / folder / "train_dataloader_dprank000.pt" for folder in FOLDERS)
    return next((path for path in (own, *first) if path.is_file()), own)


def save_position(loader: TrainingLoader, run_dir: Path, iteration: int) -> None:
    """Of the ranks that share their samples the first writes."""
    if parallel_state.is_pipeline_first_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        path = position_file(run_dir, iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({KEY: loader.save_state()}, path)


def restore_position(loader: TrainingLoader, run_dir: Path, iteration: int) -> None:
    """Errors: RunError when the file is damaged, or of an earlier version, which drew the samples in another order."""
    path = saved_position(run_dir, iteration)
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
