"""The verdict at the top of a report: what the interval allows and no more, and the next step that the records ask for."""

import re
from types import SimpleNamespace

import pytest

import report as script
from helpers.reports import EVERYTHING, ReportOfARun, score, step, text_of, validation, write_lines
from llava_sft.report.language import sayer
from llava_sft.report.verdict import verdict
from llava_sft.run import sessions


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "vega", lambda: "")
    monkeypatch.setenv("LC_ALL", "C")
    return ReportOfARun(tmp_path)


def verdict_of(page: str) -> str:
    return re.sub(
        r"\s+", " ", re.sub(r"<[^>]+>", "", re.search(r'<section class="verdict.*?</section>', page, re.DOTALL)[0])
    )


def compared(difference: float, low: float, high: float) -> dict:
    better = {
        "base": 0.5,
        "difference": difference,
        "interval_of_difference": [low, high],
        "p": 0.5,
        "gained": 2,
        "lost": 1,
    }
    return {"scores": [score("exact", 0.75, **better)], "base": {"name": "start", "cut": 0}}


def test_the_verdict_says_what_the_interval_allows_and_no_more(run):
    said = verdict_of(run(*EVERYTHING, evaluation=compared(0.5, 0.125, 0.75)))
    assert (
        "The model learned: +50.0 points over the start (+12.5 to +75.0)." in said and "questions are few" not in said
    )
    assert "The model became worse: -5.0 points" in verdict_of(
        run(*EVERYTHING, evaluation=compared(-0.05, -0.1, -0.01))
    )
    chance = verdict_of(run(*EVERYTHING, evaluation=compared(0.1, -0.1, 0.75)))
    assert "chance alone could not explain" in chance and "4 questions are few" in chance
    alone = compared(0.0, -0.1, 0.75) | {"samples": 1, "correct": 1}
    assert "One question is little" in verdict_of(run(*EVERYTHING, evaluation=alone))
    assert "75.0 % on held-out questions" in verdict_of(run(*EVERYTHING)) and "not compared" in verdict_of(
        run(*EVERYTHING)
    )
    assert "make evaluate_vqa" in verdict_of(run("dataset", "train-done"))
    nothing = {"samples": 0, "correct": 0, "groups": {}}
    none = verdict_of(run(*EVERYTHING, evaluation=nothing, dataset={"heldout": {"samples": 0}}))
    assert (
        "No held-out data: nothing can be said" in none and "val_fraction: 0.05 in config/experiments/vqa.yaml" in none
    )


def test_the_verdict_names_the_next_step_that_the_records_ask_for(run):
    def said(losses: list[float], **changes) -> str:
        write_lines(run.run_dir / "validation.jsonl", [validation(10 * n, loss) for n, loss in enumerate(losses, 1)])
        return verdict_of(run(*EVERYTHING, **changes))

    assert "--config epochs=2 run_tag=longer" in said([3, 2, 1, 0.9])
    assert "--config train_iters=80 run_tag=longer" in said([3, 2, 1, 0.9], resolved={"why": {}})
    million = {"why": {}, "settings": {"experiment": "vqa", "lr": 1e-5, "train_iters": 1_000_000}}
    falling = [validation(n, loss) for n, loss in ((500_000, 2), (1_000_000, 1))]
    found = {"resolved": million, "evaluation": {}, "dataset": None, "counts": None, "train_done": None}
    steps = verdict(found, {"validations": falling, "bad": [], "metrics": []}, sayer("en"), run.run_dir).next_steps
    assert any("--config train_iters=2000000 run_tag=longer" in step for step in steps)
    assert "Held-out loss" not in said([3, 2, 1, 0.995]) + said([1]) + said([])
    assert "rose again after step 20 (0.8 → 1)" in (risen := said([1, 0.8, 0.9, 1])) and "mcore2hf" not in risen
    (run.run_dir / "iter_0000020").mkdir()
    assert f"mcore2hf {run.run_dir}/iter_0000020 best" in said([1, 0.8, 0.9, 1])
    cut = said([1], evaluation={"cut": 3, "answers": 9, "max_new_tokens": 32})
    assert "3 of 9 answers were cut off" in cut and "max_new_tokens: 64" in cut
    write_lines(run.run_dir / "bad_steps.jsonl", [{"iteration": 3, "samples": []}, {"iteration": 3, "samples": []}])
    write_lines(run.run_dir / "metrics.jsonl", [step(n, 1) | {"data_wait_share": 0.4} for n in (10, 20, 30)])
    (run.run_dir / "sample_counts.json").write_text('{"epochs": 0.5, "seen": {"0": 4, "1": 4}}')
    all_at_once = said([1], train_done={"iteration": 30})
    for text in (
        "Steps whose loss jumped or was not a number: 1;", "lr: 5e-06", "waited 40.0 % of their time", "0.5 epochs; samples that were never seen: 4.",
        "ended at step 30 of 40: make train_vqa", "Rejected records: 1 of 11",
    ):  # fmt: skip
        assert text in all_at_once, text


def test_where_and_when_a_run_was_trained_is_on_the_page(run, monkeypatch):
    assert "CPU, float32" in text_of(run(*EVERYTHING))
    monkeypatch.setattr(sessions, "gpus", lambda: [SimpleNamespace(name="NVIDIA H100")] * 2)
    times = iter(
        (
            "2026-01-02T03:04:05+00:00",
            "2026-01-02T03:05:05+00:00",
            "2026-01-02T04:00:00+00:00",
            "2026-01-02T04:00:30+00:00",
        )
    )
    monkeypatch.setattr(sessions, "_now", lambda: next(times))
    for reached in (20, 40):
        sessions.note_start(run.run_dir, reached - 20, on_gpu=True, nodes=2)
        sessions.note_end(run.run_dir, reached)
    text = text_of(run(*EVERYTHING, prediction={"command": "snakemake report_vqa"}))
    for expected in (
        "started 2026-01-02 03:04:05+00:00 trained for 1 min 30 s", "2 × NVIDIA H100, float32", "2 sessions",
        f"commit {sessions.commit()}", "command: snakemake report_vqa",
    ):  # fmt: skip
        assert expected in text, expected
