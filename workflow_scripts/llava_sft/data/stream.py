"""The training samples as an endless stream of micro-batches, in the global order (order.py).

Notable:
- the main process walks the order and hands out numbers; a worker reads the samples' bytes at their places in the tars and
  prepares the batch. What comes depends on neither the number of workers nor their speed;
- the position is that of the batches handed to the training, not of those that are being prepared;
- a sample that cannot be read ends the run with its tar, key and id, or is left out and counted (`max_damaged_samples`).
"""

import atexit
import contextlib
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.energon import SkipSample

from llava_sft.data.loader import EncodedSample, VlmBatch, VlmTaskEncoder
from llava_sft.data.notes import without_images_like_it
from llava_sft.data.nv_meta import folder_of
from llava_sft.data.order import GlobalOrder
from llava_sft.data.packing import fair_shares
from llava_sft.data.records import Sample
from llava_sft.data.sizes import Limits, SampleSizes, global_order, sample_sizes
from llava_sft.data.stored import DamagedSample, StoredShard, forget_open_files, open_shard, stored_shards
from llava_sft.errors import SHOWN, DataError, RunError, many, shown
from llava_sft.machine import end_with_parent


class Ranks(NamedTuple):
    """This data-parallel rank, how many there are, and how many loader processes prepare its batches (0: itself)."""

    rank: int = 0
    replicas: int = 1
    num_workers: int = 0


class Prepared(NamedTuple):
    """What a worker hands over: a micro-batch, or the problem and fix that end the run; and what was left out."""

    outcome: VlmBatch | tuple[str, str]
    damaged: list[tuple[str, str]]  # id, and what is wrong


class StoredSamples:
    """The samples of the training split by number, in the order of `sizes`.

    Errors: DataError when `sizes` is of other data.
    """

    def __init__(self, folder: Path, sizes: SampleSizes):
        shards = {shard.source + shard.name: shard for shard in stored_shards(folder, "train")}
        missing = [name for name, count in sizes.shards if count and name not in shards]
        if missing or len(sizes.rows) != sum(count for _, count in sizes.shards):
            raise DataError(
                f"{folder}: its token counts are of other data ({shown(missing[:1] or 'numbers do not add up')})",
                "delete sizes.json in the results folder and run the same command: it is made again",
            )
        self.shards = [shards[name] for name, count in sizes.shards if count]
        self.ends = np.cumsum([count for _, count in sizes.shards if count])
        self.rows = np.asarray(sizes.rows, dtype=np.int32)
        self.lengths = np.asarray(sizes.tokens, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> tuple[StoredShard, str, Sample[bytes]]:
        """A sample, the shard it lies in, and its key there. Errors: DamagedSample."""
        shard, row = self.shards[int(np.searchsorted(self.ends, number, side="right"))], int(self.rows[number])
        opened = open_shard(shard)
        data, stored = opened.find(row)
        return shard, stored.key, opened.content(row, data, stored)


class MicroBatches(torch.utils.data.Dataset):
    """Packs of samples' numbers → a micro-batch."""

    def __init__(self, samples: StoredSamples, encoder: VlmTaskEncoder, leave_out: bool):
        self.samples, self.encoder, self.leave_out = samples, encoder, leave_out

    def __getitem__(self, packs: list[list[int]]) -> Prepared:
        damaged: list[tuple[str, str]] = []
        try:
            rows = [self._row(pack, damaged) for pack in packs]
            return Prepared(self.encoder.batch(rows), damaged)
        except DataError as error:  # an exception of a worker would arrive as the text of a traceback
            return Prepared((error.problem, error.fix), damaged)

    def _row(self, pack: list[int], damaged: list[tuple[str, str]]) -> EncodedSample:
        """The samples of a pack in one sequence. Where none of them can be read, the next that can is in their place."""
        encoded = [sample for number in pack if (sample := self._encoded(number, damaged))]
        for number in range(pack[-1] + 1, pack[-1] + len(self.samples)):
            if encoded:
                break
            encoded += filter(None, [self._encoded(number % len(self.samples), damaged)])
        if not encoded:
            raise DataError("not one training sample can be read", "look at the messages above")
        return self.encoder.pack_selected_samples(encoded) if self.encoder.packing else encoded[0]

    def _encoded(self, number: int, damaged: list[tuple[str, str]]) -> EncodedSample | None:
        try:
            return self.encode(number)
        except DamagedSample as error:
            if not self.leave_out:
                or_not = "or leave such samples out of the training with max_damaged_samples: 10"
                raise DataError(error.problem, f"{error.fix}; {or_not}") from None
            damaged.append((str(number), error.problem))
            return None

    def encode(self, number: int) -> EncodedSample:
        """Errors: DamagedSample; DataError when the sample has another length than was counted."""
        shard, key, sample = self.samples.read(number)
        label = key if sample.id in (None, key) else f"{key} (id {shown(sample.id, 80)})"
        try:
            encoded = self.encoder.encode(shard.source + key, sample)
        except SkipSample as error:
            raise self._of_other_settings(shard, label, str(error.__cause__ or error)) from None
        except Exception as error:  # Pillow raises errors of many kinds
            what = f"an image cannot be read: {type(error).__name__}: {error}"
            raise shard.damage(label, what, without_images_like_it) from None
        if len(encoded.input_ids) != self.samples.lengths[number]:
            counted = f"{len(encoded.input_ids)} tokens, {self.samples.lengths[number]} were counted"
            raise self._of_other_settings(shard, label, counted)
        return encoded

    def _of_other_settings(self, shard: StoredShard, label: str, what: str) -> DataError:
        return DataError(
            f"{shard.folder / shard.name}: {label}: {what}",
            "delete sizes.json in the results folder and run the same command: the tokens are counted again",
        )


class TrainingLoader:
    """Endless micro-batches of this data-parallel rank; `save_state` and `restore` keep the position.

    `found_damaged` is called with number and fault of each sample that is left out. `cost`: of a pack; the packs of
    `micro_batches`, those of a step, are then shared out so that all ranks have about the same to do.
    """

    def __init__(
        self, batches: MicroBatches, order: GlobalOrder, ranks: Ranks, micro_batch_size: int, max_damaged: int = 0,
        pin_memory: bool = False, found_damaged: Callable[[str, str], Any] = lambda number, fault: None,
        micro_batches: int = 1, cost: Callable[[list[int]], float] | None = None,
    ):  # fmt: skip
        self.micro_batches, self.cost = micro_batches, cost
        self.order, self.ranks, self.micro_batch_size = order, ranks, micro_batch_size
        self.max_damaged, self.found_damaged = max_damaged, found_damaged
        self.damaged: set[str] = set()
        self.ahead: deque[dict[str, Any]] = deque()  # positions behind the batches that are being prepared
        self.position = order.position
        self.loader = torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=self.packs(), num_workers=ranks.num_workers, pin_memory=pin_memory,
            collate_fn=_as_it_is, worker_init_fn=_start_worker, persistent_workers=False,
        )  # fmt: skip
        self.iterator: Iterator[Prepared] | None = None

    def __iter__(self) -> Iterator[VlmBatch]:
        return self

    def packs(self) -> Iterator[list[list[int]]]:
        """The packs of this rank's micro-batches, as torch's loader asks for them."""
        size, (rank, replicas, _) = self.micro_batch_size, self.ranks
        while True:
            if self.cost is None or replicas == 1:
                packs = [next(self.order) for _ in range(replicas * size)][rank * size : (rank + 1) * size]
            else:
                step = [next(self.order) for _ in range(replicas * size * self.micro_batches)]
                mine = fair_shares(list(map(self.cost, step)), replicas)[rank]
                packs = [step[place] for place in mine]
            for first in range(0, len(packs), size):  # a checkpoint stands at the end of a step
                self.ahead.append(self.order.position)
                yield packs[first : first + size]

    def __next__(self) -> VlmBatch:
        if self.iterator is None:
            self.iterator = iter(self.loader)
            atexit.register(self.close)
        try:
            prepared = next(self.iterator)
        except (RuntimeError, EOFError, OSError) as error:
            if ended := worker_ended(error):
                raise ended from None
            workers = getattr(self.iterator, "_workers", ())
            for worker in workers:
                worker.join(0.5)  # the connection breaks a moment before the process is gone
            if dead := [worker.pid for worker in workers if not worker.is_alive()]:
                raise killed_worker(f"DataLoader worker (pid {dead[0]}) is gone") from None
            raise
        if isinstance(prepared.outcome, tuple):
            raise DataError(*prepared.outcome)
        for number, fault in prepared.damaged:
            self._leave_out(number, fault)
        self.position = self.ahead.popleft()
        return prepared.outcome

    def _leave_out(self, number: str, fault: str) -> None:
        if number in self.damaged:
            return
        self.damaged.add(number)
        self.found_damaged(number, fault)
        if len(self.damaged) > self.max_damaged:
            raise DataError(
                f"{many(len(self.damaged), 'sample')} cannot be read, max_damaged_samples allows {self.max_damaged}; the last: {fault}",
                f"mend the data (the run's log names them all), or max_damaged_samples: {10 * self.max_damaged}",
            )

    def save_state(self) -> dict[str, Any]:
        """Where the training is in the data: the same on all ranks."""
        return {"order": self.position}

    def restore(self, state: Any) -> None:
        """Go on from what `save_state` gave. Errors: ValueError when it did not."""
        try:
            self.order.restore(state["order"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None
        self.position = self.order.position

    def close(self) -> None:
        """End the workers, which ignore signals."""
        iterator, self.iterator = self.iterator, None
        with contextlib.suppress(Exception):
            if self.ranks.num_workers and iterator is not None:
                iterator._shutdown_workers()  # type: ignore[attr-defined]


def worker_ended(error: BaseException) -> RunError | None:
    """The message of torch's error that a loader process was killed, which it raises wherever the training is just then."""
    ended = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    return killed_worker(str(error).splitlines()[0][:SHOWN]) if ended else None


def killed_worker(what: str) -> RunError:
    return RunError(
        f"a loader process ended: {what}",
        "was it killed for want of memory (dmesg | tail)? Fewer num_workers or a smaller max_pixels need less; the same "
        "command goes on from the last checkpoint",
    )


def _as_it_is(prepared: Prepared) -> Prepared:
    return prepared


def _start_worker(number: int) -> None:
    """Signals are for the trainer: asked to end, it saves first. A worker ends with it, however it ends."""
    forget_open_files()
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    end_with_parent()


def train_loader(
    path: Path | str, encoder: VlmTaskEncoder, ranks: Ranks, micro_batch_size: int, packing_buffer_size: int = 2000,
    sizes: SampleSizes | None = None, cost: Callable[[int, list[int]], float] | None = None, **options: Any,
) -> TrainingLoader:  # fmt: skip
    """Micro-batches of the training split of `path`, a WebDataset folder or the blend of several.

    `sizes`: what measure_webdataset.py counted; without, it is counted here. `packing_buffer_size` samples are packed at a
    time. `cost`: of a sample, by its tokens and its images' patches. `options`: of TrainingLoader.
    """
    folder = folder_of(Path(path))
    if sizes is None:
        limits = Limits(encoder.seq_length, encoder.min_pixels, encoder.max_pixels)
        sizes = sample_sizes(folder, encoder.template.folder, limits)
    samples = StoredSamples(folder, sizes)
    if cost:
        counted = sizes
        options["cost"] = lambda pack: sum(cost(counted.tokens[number], counted.patches[number]) for number in pack)
    order = global_order(
        folder, sizes, encoder.seq_length if encoder.packing else None, packing_buffer_size, encoder.seed
    )
    return TrainingLoader(
        MicroBatches(samples, encoder, options.get("max_damaged", 0) > 0), order, ranks, micro_batch_size, **options
    )
