"""What a person watches: one record per log interval in `metrics.jsonl`, and the line the terminal shows for it.

The trainer writes records, the launcher prints lines, the report draws curves: all from the same file.
"""

import json
import time
from pathlib import Path

METRICS = "metrics.jsonl"


class Watch:
    """Collects what Megatron does not count (tokens, waiting for data) and writes a record at each log interval."""

    def __init__(self, run_dir: Path, train_iters: int, log_interval: int, replicas: int):
        self.path = run_dir / METRICS
        self.train_iters, self.log_interval, self.replicas = train_iters, log_interval, replicas
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.tokens, self.padded, self.losses = time.perf_counter(), 0.0, 0, 0, []

    def batch(self, waited: float, tokens: int, padded: int) -> None:
        """Note one micro-batch: seconds waited for it, its tokens, and its tokens with padding."""
        self.waited += waited
        self.tokens += tokens
        self.padded += padded

    def step(
        self, iteration: int, loss: float, learning_rate: float, grad_norm: float | None, memory_gib: float
    ) -> None:
        """Note one step; at a log interval write the record of the steps since the last."""
        self.losses.append(loss)
        if iteration % self.log_interval and iteration != self.train_iters:
            return
        seconds, steps = time.perf_counter() - self.started, len(self.losses)
        record = {
            "iteration": iteration,
            "train_iters": self.train_iters,
            "lm loss": sum(self.losses) / steps,
            "learning-rate": learning_rate,
            "grad-norm": grad_norm,
            "step_s": seconds / steps,
            "tokens_per_s": self.tokens * self.replicas / seconds,
            "padding_share": 1 - self.tokens / max(1, self.padded),
            "data_wait_share": self.waited / seconds,
            "memory_gib": memory_gib,
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.reset()


def read_metrics(run_dir: Path) -> list[dict]:
    path = run_dir / METRICS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def forget_after(run_dir: Path, iteration: int) -> None:
    """Drop the records of steps that a resume from `iteration` takes again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(run_dir) if record["iteration"] <= iteration]
    if (run_dir / METRICS).is_file():
        (run_dir / METRICS).write_text("".join(kept))


def progress_line(record: dict) -> str:
    """`step 200/3200  loss 1.234  lr 1.0e-05  5,120 tokens/s  data wait 1 %  2.1 GiB  4:32 left`"""
    left = int((record["train_iters"] - record["iteration"]) * record["step_s"])
    hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
    remaining = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    digits = len(str(record["train_iters"]))
    return "  ".join(
        [
            f"step {record['iteration']:>{digits}}/{record['train_iters']}",
            f"loss {record['lm loss']:.4f}",
            f"lr {record['learning-rate']:.2e}",
            f"{record['tokens_per_s']:,.0f} tokens/s",
            f"data wait {record['data_wait_share']:.0%}",
            f"{record['memory_gib']:.1f} GiB",
            f"{remaining} left",
        ]
    )
