"""What a person watches: records in the run directory, and the lines that the terminal shows for them.

The trainer writes records, the launcher prints lines, the report draws curves: all from the same files.
- metrics.jsonl: one record per log interval; validation.jsonl: one per validation;
- events.jsonl: messages that are said once; bad_steps.jsonl: steps whose loss is NaN or far above those before, with
  the ids of their samples; samples/rank000.jsonl: the ids of every step (`log_samples`).
"""

import json
import math
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from llava_sft.data.packing import PACKED_IDS
from llava_sft.files import write_text
from llava_sft.training.remedies import exploded, slow_loading

METRICS, VALIDATION, EVENTS, BAD_STEPS = "metrics.jsonl", "validation.jsonl", "events.jsonl", "bad_steps.jsonl"
DAMAGED_SAMPLES = "damaged_samples.jsonl"  # those that the training left out
FAILURE = "failure.json"  # written by the training when it knows the cause
SLOW_LOADING = 0.2  # share of the time that steps wait for data
# Dense bf16 peak of a GPU, FLOP/s, as its maker publishes it; MFU is counted against it.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


class Watch:
    """Collects what Megatron does not count and writes a record at each log interval.

    Args:
        values: the resolved settings. data_rank: this rank's number among the data-parallel ones, of `replicas`.
        first: the step that the run goes on from.
        writes: whether this rank writes the records that are the same on all ranks.
        peak: FLOP/s of the devices of one replica, None if unknown.
        tensorboard: Megatron's writer, or None.
    """

    def __init__(
        self, run_dir: Path, values: dict, data_rank: int, replicas: int, first: int, writes: bool,
        peak: float | None, tensorboard: Any,
    ):  # fmt: skip
        self.run_dir, self.values, self.replicas, self.writes = run_dir, values, replicas, writes
        self.peak, self.tensorboard = peak, tensorboard
        self.said_slow, self.warm = False, False  # the first interval has the start of the loader in it
        self.good: deque[float] = deque(maxlen=50)
        self.bad: list[dict] = []
        self.trouble, self.last_bad = 0, -math.inf  # first step of the present bad time, and its last so far
        self.ids: list[str] = []
        self.samples_path, self.first, self.samples = run_dir / "samples" / f"rank{data_rank:03d}.jsonl", first, None
        self.reset()

    def reset(self) -> None:
        self.started, self.losses = time.perf_counter(), []
        self.waited, self.tokens, self.padded, self.flops = 0.0, 0, 0, 0.0

    def batch(self, waited: float, tokens: int, padded: int, flops: float, ids: list[str]) -> None:
        """Note one micro-batch: seconds waited for it, its tokens, and with padding, its FLOPs, its samples' ids."""
        self.waited += waited
        self.tokens += tokens
        self.padded += padded
        self.flops += flops
        self.ids += [one for packed in ids for one in packed.split(PACKED_IDS)]

    def pause(self, seconds: float) -> None:
        """Time that is no part of the steps (a validation)."""
        self.started += seconds

    def step(
        self, iteration: int, loss: float, rates: dict[str, float], grad_norm: float | None, memory_gib: float
    ) -> None:
        """Note one step; at a log interval write the record of the steps since the last.

        Raises RunError, with the remedies, after max_bad_steps bad steps in a row.
        """
        ids, self.ids = self.ids, []
        if self.values["log_samples"]:
            self._note_samples(iteration, ids)
        self._judge(iteration, loss, grad_norm, ids)
        self.losses.append(loss)
        if iteration % self.values["log_interval"] and iteration != self.values["train_iters"]:
            return
        seconds, steps = time.perf_counter() - self.started, len(self.losses)
        record = {
            "iteration": iteration,
            "train_iters": self.values["train_iters"],
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
            if self.tensorboard:  # what Megatron itself does not write
                for key in record.keys() - {"iteration", "train_iters", "lm loss", "learning-rate", "grad-norm"}:
                    self.tensorboard.add_scalar(key, record[key], iteration)
            if self.warm and not self.said_slow and record["data_wait_share"] > SLOW_LOADING:
                self.said_slow = True
                self.say(iteration, slow_loading(self.values, record["tokens_per_s"], record["data_wait_share"]))
        self.warm = True
        self.reset()

    def _note_samples(self, iteration: int, ids: list[str]) -> None:
        if self.samples is None:  # not before: of the ranks that share these samples only one gets here
            self.samples_path.parent.mkdir(exist_ok=True)
            forget_after_in(self.samples_path, self.first)
            self.samples = open(self.samples_path, "a", buffering=1)  # noqa: SIM115 (open as long as the training)
        self.samples.write(json.dumps({"iteration": iteration, "samples": ids}) + "\n")

    def _judge(self, iteration: int, loss: float, grad_norm: float | None, ids: list[str]) -> None:
        usual = median(self.good) if len(self.good) > 1 else None
        finite = math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))
        if finite and (usual is None or loss <= 2 * usual + 0.5):
            self.good.append(loss)
            self.bad.clear()
            return
        step = {"iteration": iteration, "loss": loss, "grad_norm": grad_norm, "samples": ids}
        append(self.run_dir / BAD_STEPS, step)  # every data-parallel rank has samples of its own
        self.bad.append(step)
        if iteration > self.last_bad + 50:
            self.trouble = iteration
        self.last_bad = iteration
        if len(self.bad) == 1 and self.writes:
            fault = "the loss jumped" if finite else "loss or gradient is not a number, no update"
            before = f", the steps before had {usual:.3g}" if usual is not None else ""
            self.say(iteration, f"{fault}: loss {loss:.3g}{before}; samples in {BAD_STEPS}")
        if len(self.bad) >= self.values["max_bad_steps"]:
            raise exploded(self.values, self.run_dir, self.bad, usual, self.trouble)

    def say(self, iteration: int, message: str) -> None:
        append(self.run_dir / EVENTS, {"iteration": iteration, "message": message})


def append(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # after a kill the last may be half-written


def read_metrics(run_dir: Path) -> list[dict]:
    return read_jsonl(run_dir / METRICS)


def forget_after_in(path: Path, iteration: int) -> None:
    """Drop the records of steps that a resume from `iteration` takes again."""
    if path.is_file():
        kept = [json.dumps(record) + "\n" for record in read_jsonl(path) if record["iteration"] <= iteration]
        write_text(path, "".join(kept))


def forget_after(run_dir: Path, iteration: int) -> None:
    for name in (METRICS, VALIDATION, EVENTS, BAD_STEPS):
        forget_after_in(run_dir / name, iteration)


class Tail:
    """The lines for people of what is appended to the records of a run directory from now on."""

    def __init__(self, run_dir: Path):
        lines = {METRICS: progress_line, VALIDATION: validation_line, EVENTS: event_line}
        self.files = {run_dir / name: line for name, line in lines.items()}
        self.read = {path: path.stat().st_size if path.is_file() else 0 for path in self.files}

    def new(self) -> list[str]:
        said = []
        for path, line in self.files.items():
            if path.is_file() and path.stat().st_size > self.read[path]:
                with open(path, "rb") as file:
                    file.seek(self.read[path])
                    text = file.read()
                text = text[: text.rfind(b"\n") + 1]  # a record may be half-written
                self.read[path] += len(text)
                said += [line(json.loads(record)) for record in text.splitlines()]
        return said


def progress_line(record: dict) -> str:
    """`step 200/3200  loss 1.234  lr 1.0e-05  grad 0.42  5,120 tokens/s  MFU 51%  padding 3%  data wait 1%  2.1 GiB  4:32 left`"""
    left = int((record["train_iters"] - record["iteration"]) * record["step_s"])
    hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
    remaining = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    digits = len(str(record["train_iters"]))
    parts = ((key.removeprefix("learning-rate-"), rate) for key, rate in record.items() if "learning-rate-" in key)
    others = ", ".join(f"{part} {rate:.2e}" for part, rate in parts if rate != record["learning-rate"])
    mfu = f"  MFU {record['mfu']:.0%}" if "mfu" in record else ""
    return (
        f"step {record['iteration']:>{digits}}/{record['train_iters']}  loss {record['lm loss']:.4f}"
        f"  lr {record['learning-rate']:.2e}{f' ({others})' if others else ''}  grad {record['grad-norm'] or 0:.2f}"
        f"  {record['tokens_per_s']:,.0f} tokens/s{mfu}  padding {record['padding_share']:.0%}"
        f"  data wait {record['data_wait_share']:.0%}  {record['memory_gib']:.1f} GiB  {remaining} left"
    )


def validation_line(record: dict) -> str:
    best = "the best so far" if record["best"] else "not the best"
    return f"step {record['iteration']}: held-out loss {record['lm loss validation']:.4f}, {best}"


def event_line(record: dict) -> str:
    return f"step {record['iteration']}: {record['message']}"
