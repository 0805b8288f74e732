"""What the chain leaves of a run, written by hand, and the report of some of it."""

import argparse
import json
import re
from pathlib import Path

from llava_sft.files import file_fingerprint
from llava_sft.report.figures import LOSS
from report import OPTIONAL, page

EVIL = "</div><script>alert(1)</script><img src=http://evil.example/x>"


def answer(correct: bool, base: str | None = None, **changes) -> dict:
    """A row of predictions.jsonl: of one turn, whose texts `changes` may name."""
    turn = {"question": "<image>\nWhich?", "answer": "3", "prediction": "3" if correct else "4", "cut": False}
    turn |= {key: changes.pop(key) for key in list(changes) if key in turn}
    row = {"id": "a", "group": "which_digit", "cluster": 0, "scores": {"exact": float(correct)}, "correct": correct}
    if base is not None:
        turn |= {"base": base, "base_cut": False}
        row |= {"base_scores": {"exact": float(base == turn["answer"])}, "base_correct": base == turn["answer"]}
    return {**row, "turns": [turn], **changes}


EVERYTHING = ("prediction", "dataset", "train-done", "evaluation")
NAMES = [name.replace("-", "_") for name in OPTIONAL]
TWO = (answer(True), answer(False, question=EVIL, prediction=EVIL))


def step(iteration: int, loss: float) -> dict:
    return {"iteration": iteration, "train_iters": 40, "lm loss": loss, "learning-rate": 1e-5, "grad-norm": None,
            "step_s": 0.25, "tokens_per_s": 9000.0 + iteration, "data_wait_share": 0.01, "memory_gib": 1.5}  # fmt: skip


def validation(iteration: int, loss: float) -> dict:
    return {"iteration": iteration, LOSS: loss, "best": True, "answers": []}


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class ReportOfARun:
    """Called with the names of the files that are there, and changes of their content, it returns the page."""

    def __init__(self, folder: Path):
        self.folder, self.run_dir = folder, folder / "stage2_sft_vqa"
        self.run_dir.mkdir()
        write_lines(self.run_dir / "metrics.jsonl", [step(i, 5 / i) for i in (10, 20, 30, 40)])
        counts = {"epochs": 1.25, "seen": {"0": 3, "1": 5}, "left_out": []}
        (self.run_dir / "sample_counts.json").write_text(json.dumps(counts))
        self.inputs = {
            "resolved": {
                "settings": {"experiment": "vqa", "train_iters": 40, "lr": 1e-5, "gpus_per_node": 0},
                "why": {"train_iters": "1 epoch × 160 samples / 4"},
                "start": {"load": "a/folder", "untrained": True},
                "run_name": "stage2_sft_vqa",
            },
            "prediction": {"parameters": 1234567, "warnings": [],
                           "prediction": {"memory_gib": {"weights": 1.0, "libraries and the rest": 0.4}, "step_s": 0.5,
                                          "tokens_per_s": 4321.0, "recorded_runs": 10}},
            "dataset": {"read": 11, "rejected": 1, "reasons": {"missing image": 1}, "images": 10, "kinds": {},
                        "train": {"samples": 8, "shards": 1}, "heldout": {"samples": 2, "shards": 1}},
            "train-done": {"iteration": 40, "train_iters": 40, "lm loss": 0.125},
            "evaluation": {
                "split": "val", "samples": 4, "correct": 3, "accuracy": 0.75, "by": "kind",
                "groups": {"which_digit": {"samples": 3, "correct": 3}, EVIL: {"samples": 1, "correct": 0}},
            },
        }  # fmt: skip

    def __call__(self, *names: str, answers: tuple | list = TWO, **changes) -> str:
        files = {"run_dir": self.run_dir, "export": None, "output": self.folder / "report.html"}
        predictions = self.folder / "predictions.jsonl"
        write_lines(predictions, answers)
        self.inputs["evaluation"]["predictions"] = file_fingerprint(predictions)
        for name in ("resolved", *names):
            path = self.folder / f"{name}.json"
            path.write_text(json.dumps(self.inputs[name] | changes.get(name.replace("-", "_"), {})))
            files[name.replace("-", "_")] = path
        return page(argparse.Namespace(**dict.fromkeys(NAMES) | files))[0]


def score(name: str, mean: float, **compared) -> dict:
    return {"name": name, "mean": mean, "interval": [mean - 0.1, mean + 0.1], **compared}


def text_of(page: str) -> str:
    shown = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", shown))
