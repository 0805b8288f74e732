"""What is measured while training: throughput, MFU, memory and bad steps, as records in the run directory.

- metrics.jsonl: a record per log interval; validation.jsonl: one per validation;
- events.jsonl: messages that are given once; bad_steps.jsonl: steps whose loss is NaN or far above those before, with the
  ids of their samples; samples/rank000.jsonl: the sample ids of every step (`log_samples`).
A checkpoint keeps what the next records depend on, so that those after an interruption are those of an undisturbed run.
"""

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llava_sft.data.packing import PACKED_IDS
from llava_sft.files import read_json, write_json
from llava_sft.run.layout import BAD_STEPS, EVENTS, LOGS, METRICS, RUN_FILE, data_dir, samples_file
from llava_sft.run.records import append, forget_after_in, warn_once
from llava_sft.run.remedies import exploded, of_ranks, slow_loading
from llava_sft.settings.resolve import ResolvedSettings

SLOW_LOADING = 0.2  # share of the time that steps wait for data

SUMS = ("losses", "waited", "tokens", "padded", "flops")  # since the last record


EVERY_STEP = ("lm loss", "learning-rate", "grad-norm")  # in TensorBoard; what else a record holds, at each log interval


class Watch:
    """Collects what Megatron does not count, and writes a record at each log interval.

    Args:
        data_rank: this rank's number among `replicas` data-parallel ones.
        first: the step that the run resumes from.
        writes: whether this rank writes the records that are the same on all ranks.
        peak: FLOP/s of all devices of one replica, None if unknown.
        tensorboard: a SummaryWriter, or None on the ranks that write none.
    """

    def __init__(
        self, run_dir: Path, values: ResolvedSettings, data_rank: int, replicas: int, first: int, writes: bool,
        peak: float | None, tensorboard: Any,
    ):  # fmt: skip
        self.run_dir, self.values, self.replicas, self.writes = run_dir, values, replicas, writes
        self.peak, self.tensorboard = peak, tensorboard
        self.said_slow, self.warm = False, False  # not warm: the first interval includes the start of the loader
        self.good: deque[float] = deque(maxlen=50)
        self.bad: list[dict] = []
        self.trouble, self.last_bad = 0, -math.inf  # first and last step of the latest bad stretch
        self.ids: list[str] = []
        self.samples, self.samples_cut, self.first = samples_file(run_dir, data_rank), False, first
        self.state_file, self.steps = f"watch_dprank{data_rank:03d}.json", 0
        self.reset()
        if first:
            self._restore(saved_state(data_dir(run_dir, first), self.state_file))
        if tensorboard:
            purge(tensorboard, first)

    def reset(self) -> None:
        self.started = time.perf_counter()
        self.losses: list[float] = []
        self.waited, self.tokens, self.padded, self.flops = 0.0, 0, 0, 0.0

    def save(self, iteration: int) -> None:
        """Keep with the checkpoint of a step what the next records depend on, and a copy of the logs. Errors: OSError."""
        if not self.steps:  # of the ranks that share their samples only one gets the losses
            return
        state = {name: getattr(self, name) for name in (*SUMS, "bad", "trouble", "last_bad", "said_slow")}
        state |= {"good": list(self.good), "elapsed": time.perf_counter() - self.started}
        folder = data_dir(self.run_dir, iteration)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / self.state_file, state, sealed=True)
        if self.writes:
            for name in (*LOGS, RUN_FILE):
                if (self.run_dir / name).is_file():
                    shutil.copyfile(self.run_dir / name, folder / name)

    def _restore(self, state: dict | None) -> None:
        if state is None:  # a checkpoint of a version that kept none
            return
        self.good.extend(state.pop("good"))
        self.started -= state.pop("elapsed")
        vars(self).update(state)

    def batch(self, waited: float, tokens: int, padded: int, flops: float, ids: list[str]) -> None:
        """Count a micro-batch: seconds waited for it, its tokens without and with padding, its FLOPs, its samples' ids."""
        self.waited += waited
        self.tokens += tokens
        self.padded += padded
        self.flops += flops
        self.ids += [one for packed in ids for one in packed.split(PACKED_IDS)]

    def pause(self, seconds: float) -> None:
        """Leave out time that is not spent on steps (a validation)."""
        self.started += seconds

    def step(
        self, iteration: int, loss: float, rates: dict[str, float], grad_norm: float | None, memory_gib: float,
        whose: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Count a step; at a log interval write the record of the steps since the last.

        `whose`: the data-parallel ranks whose loss is not a number.
        Raises RunError, with remedies, after max_bad_steps bad steps in a row.
        """
        self.steps += 1
        ids, self.ids = self.ids, []
        if self.values.log_samples:
            self._note_samples(iteration, ids)
        self._judge(iteration, loss, grad_norm, ids, whose)
        self.losses.append(loss)
        self._draw(iteration, dict(zip(EVERY_STEP, (loss, rates["learning-rate"], grad_norm), strict=True)))
        if iteration % self.values.log_interval and iteration != self.values.train_iters:
            return
        seconds, steps = time.perf_counter() - self.started, len(self.losses)
        record: dict[str, Any] = {
            "iteration": iteration,
            "train_iters": self.values.train_iters,
            "lm loss": sum(self.losses) / steps,
            **rates,
            "grad-norm": grad_norm,
            "step_s": seconds / steps,
            "tokens_per_s": self.tokens * self.replicas / seconds,
            "padding_share": 1 - self.tokens / max(1, self.padded),
            "data_wait_share": self.waited / seconds,
            "memory_gib": memory_gib,
        }
        if self.peak:
            record["mfu"] = self.flops / seconds / self.peak
        if self.writes:
            append(self.run_dir / METRICS, record)
            self._draw(
                iteration, {key: record[key] for key in record.keys() - {"iteration", "train_iters", *EVERY_STEP}}
            )
            if self.warm and not self.said_slow and record["data_wait_share"] > SLOW_LOADING:
                self.said_slow = True
                self.say(iteration, slow_loading(self.values, record["tokens_per_s"], record["data_wait_share"]))
        self.warm = True
        self.reset()

    def _draw(self, iteration: int, values: dict[str, float | None]) -> None:
        for name, value in values.items() if self.tensorboard else ():
            if value is not None:
                self.tensorboard.add_scalar(name, value, iteration)

    def _note_samples(self, iteration: int, ids: list[str]) -> None:
        if not self.samples_cut:  # not before: of the ranks that share these samples only one gets here
            self.samples.parent.mkdir(exist_ok=True)
            forget_after_in(self.samples, self.first)
            self.samples_cut = True
        append(self.samples, {"iteration": iteration, "samples": ids})

    def _judge(
        self, iteration: int, loss: float, grad_norm: float | None, ids: list[str], whose: Sequence[int]
    ) -> None:
        usual = median(self.good) if len(self.good) > 1 else None
        finite = math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))
        if finite and (usual is None or loss <= 2 * usual + 0.5):
            self.good.append(loss)
            self.bad.clear()
            return
        step: dict[str, Any] = {"iteration": iteration, "loss": loss, "grad_norm": grad_norm, "samples": ids}
        if 0 < len(whose) < self.replicas:
            step["ranks"] = list(whose)
        append(self.run_dir / BAD_STEPS, step)  # every data-parallel rank has samples of its own
        self.bad.append(step)
        if iteration > self.last_bad + 50:
            self.trouble = iteration
        self.last_bad = iteration
        if len(self.bad) == 1 and self.writes:
            fault = "the loss jumped" if finite else "loss or gradient is not a number, no update"
            before = f", the steps before had {usual:.3g}" if usual is not None else ""
            self.say(iteration, f"{fault}: loss {loss:.3g}{of_ranks(step)}{before}; samples in {BAD_STEPS}")
        if len(self.bad) >= self.values.max_bad_steps:
            raise exploded(self.values, self.run_dir, self.bad, usual, self.trouble)

    def say(self, iteration: int, message: str) -> None:
        append(self.run_dir / EVENTS, {"iteration": iteration, "message": message})


def saved_state(folder: Path, name: str) -> dict | None:
    """What this rank kept with a checkpoint; one that the run did not have then goes by the first one's."""
    names = (name, "watch_dprank000.json")
    return next(filter(None, (read_json(folder / each, None) for each in names)), None)


def purge(tensorboard: Any, first: int) -> None:
    """Have TensorBoard forget the steps that are taken again, and keep a full disk from ending the training."""
    writer = tensorboard._get_file_writer()

    def tolerant(function: Callable) -> Callable:
        def call(*args, **named) -> None:
            try:
                function(*args, **named)
            except (OSError, ValueError) as error:
                warn_once(f"warning: TensorBoard's file cannot be written: {error}; the training continues")

        return call

    writer.add_event, writer.flush = tolerant(writer.add_event), tolerant(writer.flush)
    if first:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # a tenth of a second, in the training alone

        writer.add_event(Event(step=first + 1, session_log=SessionLog(status=SessionLog.START)))
