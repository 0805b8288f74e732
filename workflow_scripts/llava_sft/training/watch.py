"""What a person watches: records in the run directory, and the lines that the terminal shows for them.

The trainer writes records, the launcher prints lines, the report draws curves: all from the same files.
- metrics.jsonl: one record per log interval; validation.jsonl: one per validation;
- events.jsonl: messages that are said once; bad_steps.jsonl: steps whose loss is NaN or far above those before, with
  the ids of their samples; samples/rank000.jsonl: the ids of every step (`log_samples`).
A line begins with its checksum. A checkpoint keeps what the next lines depend on, and a copy of those so far: the lines
after an interruption are those of an undisturbed run, and one that was damaged since is taken from the copy.
"""

import contextlib
import json
import math
import re
import shutil
import time
import zlib
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from llava_sft.checkpoint.start import RUN_FILE
from llava_sft.data.packing import PACKED_IDS
from llava_sft.files import read_json, write_json, write_text
from llava_sft.training.checkpoints import data_dir, iterations_done
from llava_sft.training.remedies import exploded, slow_loading

METRICS, VALIDATION, EVENTS, BAD_STEPS = "metrics.jsonl", "validation.jsonl", "events.jsonl", "bad_steps.jsonl"
LOGS = (METRICS, VALIDATION, EVENTS, BAD_STEPS)
CHECKED = re.compile(r'\{"crc": "([0-9a-f]{8})", ')
DAMAGED_SAMPLES = "damaged_samples.jsonl"  # those that the training left out
FAILURE = "failure.json"  # written by the training when it knows the cause
SLOW_LOADING = 0.2  # share of the time that steps wait for data
# Dense bf16 peak of a GPU, FLOP/s, as its maker publishes it; MFU is counted against it.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


SUMS = ("losses", "waited", "tokens", "padded", "flops")  # since the last record


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
        self.state_file, self.steps = f"watch_dprank{data_rank:03d}.json", 0
        self.reset()
        if first:
            self._restore(read_json(data_dir(run_dir, first) / self.state_file, None))
        if tensorboard:
            purge(tensorboard, first)

    def reset(self) -> None:
        self.started, self.losses = time.perf_counter(), []
        self.waited, self.tokens, self.padded, self.flops = 0.0, 0, 0, 0.0

    def save(self, iteration: int) -> None:
        """Keep with the checkpoint of a step what the next records depend on, and the records so far.

        Errors: OSError.
        """
        if not self.steps:  # of ranks that share their samples only one gets the losses
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
        if state is None:  # of a version that kept none
            return
        self.good.extend(state.pop("good"))
        self.started -= state.pop("elapsed")
        vars(self).update(state)

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
        self.steps += 1
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
            self.samples = self.samples_path
        append(self.samples, {"iteration": iteration, "samples": ids})

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


_waiting: dict[Path, str] = {}  # lines that the disk did not take
_said: set[str] = set()


def append(path: Path, record: dict) -> None:
    """Add a record, with a checksum of its line. A line that a full disk does not take waits for the next one: a log
    does not cost the run."""
    text = json.dumps(record)[1:]
    lines = _waiting.pop(path, "") + f'{{"crc": "{zlib.crc32(text.encode()):08x}", {text}\n'
    try:
        with open(path, "ab") as file:
            file.write(lines.encode())
    except OSError as error:
        _say_once(f"warning: {path} cannot be written: {error.strerror}; the training goes on")
        _waiting[path] = "\n" + lines.lstrip()  # a part of it may stand there


def parse(line: str | bytes, checked: bool = False) -> dict:
    """The record of a line. Errors: ValueError where it is damaged. `checked`: it must have a checksum."""
    line = line.decode() if isinstance(line, bytes) else line
    sum_ = CHECKED.match(line)
    if (sum_ and f"{zlib.crc32(line[sum_.end() :].encode()):08x}" != sum_[1]) or (checked and not sum_):
        raise ValueError("not what was written")
    record = json.loads(line)
    if not isinstance(record, dict) or ("crc" in record) != bool(sum_):
        raise ValueError("not a record")
    if not sum_ and not isinstance(record.get("iteration"), int):  # of an earlier version
        raise ValueError("no step of a training")
    record.pop("crc", None)
    return record


def _read(path: Path) -> tuple[dict[bytes, dict], int]:
    """Whole lines with their records, and the number of damaged ones; what follows the last line end is being written."""
    found: dict[bytes, dict] = {}
    damaged, checked = 0, False
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            if line:
                found[line] = parse(line, checked)
                checked = checked or line.startswith(b'{"crc"')  # lines of earlier versions may stand before it
        except (ValueError, RecursionError):
            damaged += 1
    return found, damaged


def _lines(path: Path) -> dict[bytes, dict]:
    """The lines of a log and their records. Damaged ones are left out, or taken from the newest checkpoint's copy."""
    found, damaged = _read(path)
    done = iterations_done(path.parent)
    copy = data_dir(path.parent, done) / path.name
    kept, _ = _read(copy) if done else ({}, 0)
    if kept.keys() - found.keys():
        _say_once(f"warning: {path}: records are damaged or missing: taken from {copy}")
        return kept | {line: record for line, record in found.items() if record["iteration"] > done}
    if damaged:
        _say_once(f"warning: {path}: {damaged} damaged lines are left out")
    return found


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        print(message, flush=True)


def read_jsonl(path: Path) -> list[dict]:
    return list(_lines(path).values())


def read_metrics(run_dir: Path) -> list[dict]:
    return read_jsonl(run_dir / METRICS)


def forget_after_in(path: Path, iteration: int) -> None:
    """Drop the records of steps that a resume from `iteration` takes again."""
    lines = _lines(path)
    if lines or path.is_file():
        kept = [line.decode() + "\n" for line, record in lines.items() if record["iteration"] <= iteration]
        write_text(path, "".join(kept))


def forget_after(run_dir: Path, iteration: int) -> None:
    for name in LOGS:
        forget_after_in(run_dir / name, iteration)


def purge(tensorboard: Any, first: int) -> None:
    """Have TensorBoard forget the steps that are taken again; and a disk that takes no more events not end the training."""
    writer = tensorboard._get_file_writer()
    add, flush = writer.add_event, writer.flush

    def going_on(function, *args, **named) -> None:
        try:
            function(*args, **named)
        except (OSError, ValueError) as error:
            _say_once(f"warning: TensorBoard's file cannot be written: {error}; the training goes on")

    writer.add_event = lambda *args, **named: going_on(add, *args, **named)
    writer.flush = lambda: going_on(flush)
    if first:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # a tenth of a second, in the training alone

        writer.add_event(Event(step=first + 1, session_log=SessionLog(status=SessionLog.START)))


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
                for record in filter(None, text.split(b"\n")):
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        said.append(line(parse(record)))
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
