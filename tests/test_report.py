"""The report is one file that needs nothing else, shows data as text only, and says what it does not know."""

import argparse
import json
import re
import sys

import pytest

import report as script
from helpers.reports import EVERYTHING, EVIL, ReportOfARun, answer, score, text_of
from helpers.webdatasets import picture
from llava_sft.data.records import Sample
from llava_sft.errors import SftError
from llava_sft.files import read_json, write_json
from llava_sft.report import answers
from llava_sft.report.figures import LOSS, best_validation, measured
from report import OPTIONAL, main


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "vega", lambda: "")  # a second; test_pages.py has the real one
    monkeypatch.setenv("LC_ALL", "C")
    return ReportOfARun(tmp_path)


def test_page_needs_nothing_else_and_shows_data_as_text(run):
    page = run(*EVERYTHING)
    assert "script>alert" not in page and json_of(page, "answers")["rows"][0]["turns"][0][0] == EVIL
    assert "&lt;script&gt;alert(1)" in page  # the name of a group
    shown = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL).replace("src=http://evil.example/x&gt;", "")
    assert not re.search(r"https?://", shown)
    targets = re.findall(r'\s(?:src|href)\s*=\s*"?([^"\s>]*)', shown)
    assert targets and all(target.startswith(("data:image/", "predictions.jsonl")) for target in targets)
    assert "default-src 'none'; img-src data:;" in page and "@import" not in page


def json_of(page: str, name: str):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)[1])


def test_page_tells_what_a_reader_came_for(run):
    page = run(*EVERYTHING)
    text = text_of(page)
    for expected in (
        "75.0 %", "3 of 4", "missing image", "0.125", "1,234,567", "started from untrained (random) weights",
        "1 epoch × 160 samples / 4", "step 0.5 s 0.25 s", "4,321", "never 3",
    ):  # fmt: skip
        assert expected in text, expected
    curves = json_of(page, "curves")
    assert [curve["title"] for curve in curves] == [
        "loss", "learning rate", "tokens/s", "waiting for data, % of the time", "memory of a process, GiB",
    ]  # fmt: skip  # a run without gradient norms has no curve of them
    assert curves[0]["series"][0]["points"][0] == [10, 0.5] and curves[0]["facts"].endswith("last 0.125")


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


def test_no_held_out_data_is_a_sentence_and_no_number(run):
    nothing = {"samples": 0, "correct": 0, "accuracy": None, "groups": {}}
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
    found = {"scores": [score("exact", 0.75, **better), score("anls:0.5", 0.8, **worse)], "groups": groups}
    found |= {"base": {"name": "start checkpoint (a/folder)", "cut": 5}, "answers": 9, "max_new_tokens": 32, "cut": 0}
    text = text_of(run(*EVERYTHING, evaluation=found | {"engine": "vLLM"}))
    for expected in (
        "25.0 % before the training", "one 75.0 % 3 of 4 25.0 % +50.0 +12.5 to +75.0", "25.0 % → 75.0 %: +50.0 points",
        "95 % confidence interval +12.5 to +75.0, exact McNemar test p = 0.03), more than chance explains",
        "answered better now: 2, worse: 1.", "anls:0.5 80.0 % 70.0 % – 90.0 % 90.0 % -10.0 -30.0 to +5.0",
        "5 of 9 answers before the training were cut", "answered with vLLM",
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


def test_all_answers_stand_in_a_table_wrong_ones_first_beside_those_of_the_start(run):
    rows = [answer(n > 30, base="3" if n % 2 else "7", id=str(n)) for n in range(40)]
    table = json_of(run(*EVERYTHING, answers=rows), "answers")
    assert table["models"] == ["after", "before"] and len(table["rows"]) == 40
    counts = (([False, True], 15), ([False, False], 16), ([True, False], 4), ([True, True], 5))
    assert [row["right"] for row in table["rows"]] == [right for right, count in counts for _ in range(count)]
    assert table["rows"][0]["turns"] == [["Which?", "3", "4", "3"]]
    (run.folder / "predictions.jsonl").write_text("")
    args = argparse.Namespace(predictions="other")
    assert script.answers_of(vars(args), run.folder / "predictions.jsonl", None, lambda text: text) is None


def test_pictures_of_the_answers_come_from_the_data_set_once_each_and_stay_within_bounds(monkeypatch):
    image, other = picture(size=(56, 56)), picture("JPEG", (900, 700), quality=95)
    samples = [Sample(str(n), [], [image, other] if n % 2 else [image], {}) for n in range(6)]
    rows = [answer(n == 1, id=str(n)) for n in range(6)]
    table = answers.table([rows], ["after"], samples)
    assert len(table["pictures"]) == 2 and table["rows"][-1]["pictures"] == [0, 1]
    assert all(len(each) < 12_000 for each in table["pictures"])
    others = answers.table([rows], ["after"], samples[1:])
    assert (others["pictures"], others["pictured"]) == ([], 0)
    monkeypatch.setattr(answers, "PICTURE_BYTES", len(table["pictures"][0]) + 10)
    assert answers.table([rows], ["after"], samples)["pictured"] == 2
    monkeypatch.setattr(answers, "TEXT_BYTES", 400)
    assert (len(answers.table([rows], ["after"], samples)["rows"]), table["all"]) == (3, 6)


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


def test_a_model_card_that_is_made_with_the_page_is_linked_on_it(run, tmp_path, monkeypatch):
    run()
    export = tmp_path / "huggingface"
    export.mkdir()
    monkeypatch.setattr(script, "is_export", lambda folder: folder == export)
    monkeypatch.setattr(script, "write_card", lambda folder: (folder / "README.md").write_text("card"))
    given = {
        "resolved": tmp_path / "resolved.json",
        "run-dir": run.run_dir,
        "export": export,
        "output": tmp_path / "a.html",
    }
    monkeypatch.setattr(sys, "argv", ["report.py", *(f"--{name}={path}" for name, path in given.items())])
    main()
    assert '<a href="huggingface/README.md">' in (tmp_path / "a.html").read_text()
