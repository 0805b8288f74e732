"""The report is one file that needs nothing else, shows data as text only, and says what it does not know."""

import argparse
import base64
import io
import json
import re
import sys

import pytest
from PIL import Image

from llava_sft.errors import SftError
from llava_sft.files import read_json, write_json
from llava_sft.report.figures import LOSS, best_validation, measured
from report import OPTIONAL, main, page

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

    def report(*names: str, **changes) -> str:
        files = {"run_dir": run_dir, "export": None}
        for name in ("resolved", *names):
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(inputs[name] | changes.get(name.replace("-", "_"), {})))
            files[name.replace("-", "_")] = path
        return page(argparse.Namespace(**dict.fromkeys(NAMES) | files))

    report.folder = tmp_path
    return report


EVERYTHING = ("prediction", "dataset", "train-done", "evaluation")
NAMES = [name.replace("-", "_") for name in OPTIONAL]


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


def test_a_run_with_lora_says_what_was_trained_and_what_its_checkpoints_need(run):
    checkpoint = run.folder / "stage2_sft_vqa/iter_0000040"
    checkpoint.mkdir()
    (checkpoint / "checksums.json").write_text("{}")
    parts = {"trainable_modules": ["language_model"], "lora_modules": ["language_model"], "lora_rank": 8}
    changes = {
        "resolved": {"settings": parts, "start": {"load": "a/folder", "folder": "converted/folder"}},
        "prediction": {"trained_parameters": 26112},
    }
    text = text_of(run(*EVERYTHING, **changes))
    assert "1,234,567 parameters, 26,112 trained by LoRA of rank 8" in text
    assert "base, which checkpoints need converted/folder" in text and "[language_model]" in text
    assert "convert_checkpoint.py mcore2peft" in text and "iter_0000040 adapter" in text
    parts["trainable_modules"] += ["adapter"]  # whole: no PEFT folder holds it
    assert "mcore2peft" not in run(*EVERYTHING, **changes)
    assert "trained by" not in run(*EVERYTHING) and "which checkpoints need" not in run(*EVERYTHING)


def test_missing_inputs_are_said(run):
    page = run()
    assert "There is no evaluation" in page
    assert "Whether training finished is not known" in page
    assert "no dataset file was given" in page
    assert "There is no prediction" in page


def test_same_input_gives_same_bytes(run):
    assert run(*EVERYTHING) == run(*EVERYTHING)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_no_held_out_data_is_a_sentence_and_no_number(run):
    nothing = {"samples": 0, "correct": 0, "accuracy": None, "groups": {}, "examples": []}
    text = text_of(run(*EVERYTHING, evaluation=nothing))
    assert "There is no held-out data: nothing here says" in text
    assert "0 of 0" not in text and "confidence" not in text and "held-out accuracy" not in text


def test_accuracy_on_held_out_samples_that_are_trained_on_is_marked(run):
    assert "Not all of it is held out" not in run(*EVERYTHING)
    leak = {"heldout_trained_on": {"records": 20, "images": 21, "of": 24}}
    assert "20 of 24 held-out samples are trained on" in text_of(run(*EVERYTHING, dataset=leak))


def test_cut_answers_and_the_rule_of_a_right_one_are_said(run):
    assert "were cut" not in run(*EVERYTHING)
    text = text_of(run(*EVERYTHING, evaluation={"cut": 3, "answers": 9, "max_new_tokens": 32}))
    assert "3 of 9 answers were cut after 32 tokens" in text
    assert "the expected text exactly, white space at both ends aside" in text


def score(name: str, mean: float, **compared) -> dict:
    return {"name": name, "mean": mean, "interval": [mean - 0.1, mean + 0.1], **compared}


def test_base_and_trained_stand_beside_each_other_with_difference_and_interval(run):
    better = {
        "base": 0.25,
        "difference": 0.5,
        "interval_of_difference": [0.125, 0.75],
        "p": 0.03,
        "gained": 2,
        "lost": 1,
    }
    worse = {"base": 0.9, "difference": -0.1, "interval_of_difference": [-0.3, 0.05], "p": None}
    groups = {"one": {"samples": 4, "correct": 3, "scores": [score("exact", 0.75, **better)]}}
    shown = [example(False, base="7", base_cut=True, prediction="8"), example(True, base="the base said this")]
    found = {"scores": [score("exact", 0.75, **better), score("anls:0.5", 0.8, **worse)], "groups": groups}
    found |= {"base": {"name": "start checkpoint (a/folder)", "cut": 5}, "answers": 9, "max_new_tokens": 32, "cut": 0}
    text = text_of(run(*EVERYTHING, evaluation=found | {"examples": shown, "engine": "vLLM"}))
    for expected in (
        "3 of 4 · 25.0 % before", "one 75.0 % 3 of 4 25.0 % +50.0 +12.5 to +75.0", "25.0 % → 75.0 %: +50.0 points",
        "95 % confidence interval +12.5 to +75.0, exact McNemar test p = 0.03), more than chance explains",
        "2 are answered better now, 1 worse", "anls:0.5 80.0 % 70.0 % – 90.0 % 90.0 % -10.0 -30.0 to +5.0",
        "5 of 9 answers before the training were cut", "before 7 (cut) after 8", "before the base said this after 3", "answered with vLLM",
    ):  # fmt: skip
        assert expected in text, expected
    chance = better | {"interval_of_difference": [-0.1, 0.75]}
    found["scores"] = [score("anls", 0.75, **chance)]
    text = text_of(run(*EVERYTHING, evaluation=found | {"correct": 2}))
    assert "which chance alone may explain" in text and "held-out score (anls) · 2 of 4" in text
    gone = {"missing": "the start checkpoint is no longer there: /gone"}
    text = text_of(run(*EVERYTHING, evaluation={"scores": [score("exact", 0.75)], "base": gone}))
    assert "Not compared with the start checkpoint: the start checkpoint is no longer there: /gone." in text


def test_other_test_sets_are_listed(run):
    other = run.folder / "evaluations/charts/evaluation.json"
    other.parent.mkdir(parents=True)
    write_json(other, {"samples": 8, "correct": 6, "scores": [score("number:0.05", 0.75)]}, sealed=True)
    assert "charts · number:0.05 75.0 % 6 of 8 65.0 % – 85.0 %" in text_of(run(*EVERYTHING))
    write_json(other, read_json(other) | {"model": "an earlier export"}, sealed=True)
    assert "charts · " not in text_of(run(*EVERYTHING))


def test_every_wrong_answer_that_was_kept_is_shown(run):
    wrong = [example(False, prediction=f"wrong {n}") for n in range(30)]
    shown = run(*EVERYTHING, evaluation={"samples": 40, "correct": 5, "examples": wrong})
    assert all(f"wrong {n}<" in shown for n in range(30))
    assert "(30 of 35)" in text_of(shown)


def test_numbers_without_their_records_are_missing_and_no_crash(run):
    lines = [{"iteration": 10, "train_iters": 40}, {"iteration": 40, "train_iters": 40, "lm loss": float("nan")}]
    (run.folder / "stage2_sft_vqa/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [{"iteration": 1, LOSS: None, "answers": []}, {"iteration": 2, LOSS: float("nan"), "answers": []}]
    (run.folder / "stage2_sft_vqa/validation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    text = text_of(run(*EVERYTHING, inspect={}))
    assert "trained to the end" in text and "lowest loss" not in text


@pytest.mark.parametrize("name", ["resolved", *OPTIONAL])
def test_damaged_or_exchanged_input_is_one_message_and_no_page(run, name, capsys, monkeypatch):
    run(*EVERYTHING)
    names = dict.fromkeys(["resolved", *EVERYTHING, name])
    write_json(run.folder / "inspect.json", {"ok": True, "checks": [], "distributions": {}, "notes": ["5 samples"]})
    sound = {each: json.loads((run.folder / f"{each}.json").read_text()) for each in names}
    options = [word for each in names for word in (f"--{each}", str(run.folder / f"{each}.json"))]
    output = run.folder / "page.html"
    words = ["report.py", *options, "--run-dir", str(run.folder / "stage2_sft_vqa"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    path = run.folder / f"{name}.json"
    write_json(path, sound[name], sealed=True)
    main()
    output.unlink()
    digit = re.sub(
        rb"(?<!seal\": \")(?<=: )(\d)(?=[\d,.\n])",
        lambda found: b"%d" % ((int(found[1]) + 1) % 10),
        path.read_bytes(),
        count=1,
    )
    if name == "inspect":
        digit = path.read_bytes().replace(b"5 samples", b"6 samples")
    other = json.dumps(sound["dataset" if name != "dataset" else "evaluation"]).encode()
    for damaged in (digit, path.read_bytes()[:-20], other, b"[1, 2]", b"", b"\0" * 40):
        assert damaged != path.read_bytes()
        path.write_bytes(damaged)
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code == 1 and said.startswith("error: ") and f"{name}.json" in said, said
        assert not output.exists()
        write_json(path, sound[name], sealed=True)


def test_files_of_another_run_are_not_mixed_into_the_page(run):
    for name, change in (
        ("dataset", {"fingerprint": "b"}), ("prediction", {"run_name": "stage2_sft_other"}), ("train_done", {"run_dir": "other"}),
    ):  # fmt: skip
        with pytest.raises(SftError, match="not of this run"):
            run(*EVERYTHING, resolved={"data": {"fingerprint": "a"}}, **{name: change})


def test_figures_are_medians_of_the_records_and_the_greatest_memory():
    records = [
        {"tokens_per_s": 1.0, "step_s": 9.0, "memory_gib": 3.0},
        {"tokens_per_s": 5.0, "step_s": 2.0, "memory_gib": 7.0},
    ]
    records += [{"tokens_per_s": 4.0, "step_s": None, "memory_gib": 1.0}, {"iteration": 4}]
    assert measured(records) == {"speed": 4.0, "step_s": 5.5, "peak_gib": 7.0}
    assert measured([{"iteration": 4}]) == {"speed": None, "step_s": None, "peak_gib": 0}


def test_best_validation_is_the_lowest_loss_that_is_a_number():
    records = [
        {"iteration": n, LOSS: loss} for n, loss in enumerate([0.5, None, float("nan"), 0.25, float("-inf"), 0.75])
    ]
    assert best_validation(records)["iteration"] == 3
    assert best_validation(records[1:3]) is None


def test_page_orders_groups_weakest_first_and_counts_the_shares(run):
    groups = {
        "strong": {"samples": 4, "correct": 4},
        "weak": {"samples": 8, "correct": 1},
        "fair": {"samples": 2, "correct": 1},
    }
    text = text_of(run(*EVERYTHING, evaluation={"groups": groups, "samples": 14, "correct": 6, "accuracy": 6 / 14}))
    assert "42.9 % held-out accuracy · 6 of 14" in text
    assert re.findall(r"(weak|fair|strong) (\d+\.\d %) (\d of \d)", text) == [
        ("weak", "12.5 %", "1 of 8"), ("fair", "50.0 %", "1 of 2"), ("strong", "100.0 %", "4 of 4"),
    ]  # fmt: skip
