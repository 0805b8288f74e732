"""When a training saves: is there room, is the one before whole, what is noted, and which may go."""

import threading
from pathlib import Path

import torch

from llava_sft.checkpoint.adapters import note_base
from llava_sft.checkpoint.start import Start
from llava_sft.data.stream import TrainingLoader
from llava_sft.files import write_text
from llava_sft.megatron.checkpoint import Checkpoints
from llava_sft.run.checkpoints import check_disk, checkpoint_bytes, prune, seal
from llava_sft.run.layout import TRACKER, checkpoint_dir, checkpoints
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.training.position import save_position
from llava_sft.training.watch import Watch


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
        self.start = start
        self.states, self.loader, self.watch = states, loader, watch
        self.first_rank = torch.distributed.get_rank() == 0
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

    def finish(self, wait: bool = False) -> None:
        """Let a checkpoint count that is written; `wait` until it is, and until its checksums are noted."""
        self.states.finish(wait)
        if wait and self.sealing:
            self.sealing.join()

    def _written(self, iteration: int) -> None:
        """Have the tracker name it; note checksums and delete old checkpoints, beside the training."""
        if self.first_rank:
            if lora := self.values.trained.lora:
                note_base(checkpoint_dir(self.run_dir, iteration), lora, self.start)
            write_text(self.run_dir / TRACKER, str(iteration))
            self.sealing = threading.Thread(target=self._seal, args=(iteration,))
            self.sealing.start()

    def _seal(self, iteration: int) -> None:
        seal(self.run_dir, iteration)
        prune(self.run_dir, self.values.keep_last, self.values.keep_every)
