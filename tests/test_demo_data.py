"""The embedded data set is the same on every machine, honest about its held-out part, and right."""

import json
import re
from collections import Counter, defaultdict

import pytest

from helpers import ROOT
from helpers.webdatasets import contents
from llava_sft.data.demo import HELDOUT_RECORDS, TRAIN_RECORDS, write_demo
from llava_sft.data.plan import plan_ranges
from llava_sft.data.shards import convert_range
from llava_sft.embedded import DEMO_BYTES


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


def records(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_bytes().splitlines()]


def shown(record) -> list[str]:
    image = record.get("image", [])
    return image if isinstance(image, list) else [image]


def source(image: str) -> str:
    """The handwritten digit that a picture was made from: `digit_0423_2.png` is a variant of `digit_0423.png`."""
    return image.removesuffix(".png")[: len("digit_0000")]


def test_same_bytes_every_time(demo, tmp_path):
    write_demo(tmp_path)
    assert contents(tmp_path) == contents(demo)


def test_no_held_out_picture_or_text_question_is_in_training(demo):
    train, heldout = records(demo, "train"), records(demo, "heldout")
    pictures = [{source(image) for record in split for image in shown(record)} for split in (train, heldout)]
    assert not pictures[0] & pictures[1]
    assert [len(split) for split in pictures] == [1437, 360]
    texts = [{r["conversations"][0]["value"] for r in split if r["kind"] == "text_only"} for split in (train, heldout)]
    assert texts[1]
    assert not texts[0] & texts[1]


def test_sizes_are_those_that_the_conversion_is_planned_with(demo):
    assert {name: (demo / name).stat().st_size for name in DEMO_BYTES} == DEMO_BYTES


def test_every_kind_is_there_in_the_stated_number(demo):
    assert Counter(record["kind"] for record in records(demo, "train")) == TRAIN_RECORDS
    assert Counter(record["kind"] for record in records(demo, "heldout")) == HELDOUT_RECORDS


def test_answers_agree_with_each_other(demo):
    """All questions about a picture must be answered for one and the same digit."""
    digits = defaultdict(set)
    asked = [*records(demo, "train"), *records(demo, "heldout")]
    for record in asked:
        if record["kind"] in ("which_digit", "two_turns"):
            digits[source(record["image"])].add(int(record["conversations"][1]["value"]))
    assert all(len(values) == 1 for values in digits.values())
    digit = {image: next(iter(values)) for image, values in digits.items()}
    for record in asked:
        answer = record["conversations"][-1]["value"]
        known = [digit[source(image)] for image in shown(record) if source(image) in digit]
        if record["kind"] == "even_or_odd" and known:
            assert answer == ("even", "odd")[known[0] % 2]
        elif record["kind"] == "two_turns":
            assert int(answer) == known[0] + 1
        elif record["kind"] == "larger_of_two" and len(known) == 2:
            assert known[0] != known[1]
            assert int(answer) == max(known)
        elif record["kind"] == "text_only":
            numbers = re.findall(r"\d+", record["conversations"][0]["value"])
            assert int(answer) == max(map(int, numbers))


def test_conversion_rejects_none_of_it(demo, tmp_path):
    for split in ("train", "heldout"):
        raw = demo / f"{split}.jsonl"
        for part in plan_ranges(raw):
            stats = convert_range(raw, demo / "images", tmp_path / "wds", tmp_path / "parts", "subtaskdata", part)
            assert (stats["rejected"], stats["written"]) == (0, stats["read"])


def test_clean_removes_what_the_embedded_experiment_made_and_nothing_else(tmp_path, monkeypatch):
    import make_demo_vqa

    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    theirs = ["demo/notes.txt", "stage2_sft_vqa_mine_results/report.html", "data/mine/x.tar", "checkpoints/x/y"]
    ours = ["demo/images/digit_0001.png", "data/vqa/dataset.json", "stage2_sft_vqa_tag_results/report.html"]
    ours += ["checkpoints/LLaVA-OneVision-1.5-tiny_mcore_tp1_pp1/converted.json", "demo.done.json"]
    for name in theirs + ours:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    for run, experiment in (("stage2_sft_vqa_tag", "vqa"), ("stage2_sft_vqa_mine", "vqa_mine")):
        settings = json.dumps({"settings": {"experiment": experiment}})
        (out / f"{run}_results/resolved.json").write_text(settings)
    monkeypatch.setattr("sys.argv", ["make_demo_vqa.py", "--clean", "--config", f"exp_dir={out}"])
    make_demo_vqa.main()
    assert [name for name in theirs + ours if (out / name).exists()] == theirs

    (out / "demo/images").mkdir()
    (out / "demo/images/PRECIOUS.txt").write_text("keep")
    (out / "data/vqa").mkdir()
    with pytest.raises(SystemExit):
        make_demo_vqa.main()
    assert (out / "demo/images/PRECIOUS.txt").exists() and (out / "data/vqa").exists()
