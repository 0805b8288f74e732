"""The report is one file that needs nothing else, shows data as text only, and says what it does not know."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "workflow_scripts" / "report.py"
EVIL = "</div><script>alert(1)</script><img src=http://evil.example/x>"


def embedded(size: tuple[int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def example(correct: bool, **changes) -> dict:
    known = {"id": "a", "group": "which_digit", "question": "Which?", "answer": "3", "prediction": "3", "images": []}
    return {**known, "correct": correct, **changes}


@pytest.fixture
def run(tmp_path):
    """Write what the chain would have left; return a function that makes the report of some of it."""
    records = [
        {"iteration": i, "train_iters": 40, "lm loss": 5 / i, "learning-rate": 1e-5, "grad-norm": None,
         "step_s": 0.25, "tokens_per_s": 9000.0 + i, "data_wait_share": 0.01, "memory_gib": 1.5}
        for i in (10, 20, 30, 40)
    ]  # fmt: skip
    run_dir = tmp_path / "stage2_sft_vqa"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = {"epochs": 1.25, "seen": {"0": 3, "1": 5}, "left_out": []}
    (run_dir / "sample_counts.json").write_text(json.dumps(counts))
    inputs = {
        "resolved": {
            "settings": {"experiment": "vqa", "train_iters": 40, "lr": 1e-5, "gpus_per_node": 0},
            "why": {"train_iters": "1 epochs × 160 samples / 4"},
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
            "examples": [
                example(True, images=[embedded((56, 56)), embedded((640, 480))]),
                example(False, question=EVIL, prediction=EVIL, images=["http://evil.example/x.png", EVIL]),
            ],
        },
    }  # fmt: skip

    def report(*names: str) -> str:
        options = []
        for name in ("resolved", *names):
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(inputs[name]))
            options += [f"--{name}", path]
        output = tmp_path / "report.html"
        subprocess.run([sys.executable, SCRIPT, *options, "--run-dir", run_dir, "--output", output], check=True)
        return output.read_text()

    return report


EVERYTHING = ("prediction", "dataset", "train-done", "evaluation")


def test_page_needs_nothing_else_and_shows_data_as_text(run):
    page = run(*EVERYTHING)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    as_shown = page.replace("src=http://evil.example/x&gt;", "")  # the question, as text
    assert not re.search(r"https?://", as_shown)
    targets = re.findall(r'\s(?:src|href|xlink:href)\s*=\s*"?([^"\s>]*)', as_shown)
    assert targets and all(target.startswith(("data:image/png;base64,", "#")) for target in targets)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))
    assert "@import" not in page


def test_page_tells_what_a_reader_came_for(run):
    page = run(*EVERYTHING)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for expected in (
        "75.0 %", "3 of 4", "✗ wrong", "✓ right", "missing image", "0.125", "1,234,567",
        "started from untrained (random) weights", "1 epochs × 160 samples / 4", "tokens/s", "learning rate",
        "step 0.5 s 0.25 s", "4,321", "never 3",
    ):  # fmt: skip
        assert expected in text, expected
    assert page.count('<svg role="img"') == 5  # a run without gradient norms has no curve of them
    assert len(re.findall(r'<img class="tiny" width="112"', page)) == 1, "only the small picture is enlarged"


def test_missing_inputs_are_said(run):
    page = run()
    assert "There is no evaluation" in page
    assert "Whether training finished is not known" in page
    assert "no dataset file was given" in page
    assert "There is no prediction" in page


def test_same_input_gives_same_bytes(run):
    assert run(*EVERYTHING) == run(*EVERYTHING)


def test_an_evaluation_of_what_is_no_export_is_one_message(tmp_path):
    script = SCRIPT.with_name("evaluate.py")
    run = subprocess.run(
        [sys.executable, script, tmp_path, tmp_path, "--dataset", tmp_path / "d.json", "--output", tmp_path / "e.json"],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, "Traceback" in run.stderr) == (1, False)
    assert f"error: {tmp_path}/converted.json: no such file" in run.stderr
