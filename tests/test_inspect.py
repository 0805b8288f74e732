"""A whole WebDataset is called whole, and no kind of damage goes unseen."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import SCRIPTS
from helpers.webdatasets import Raw, picture, record
from llava_sft.data import findings as of_findings
from llava_sft.data.findings import Findings, TokenCounter, distribution
from llava_sft.data.images import decode_rgb
from llava_sft.data.index import index_webdataset
from llava_sft.data.inspect import inspect_webdataset
from llava_sft.data.records import Sample
from llava_sft.data.stored import read_split
from llava_sft.errors import DataError
from llava_sft.model.processing import image_tokens, to_patches
from llava_sft.model.template import ChatTemplate
from llava_sft.report.inspection import inspection_page
from llava_sft.report.pictures import thumbnail


@pytest.fixture
def raw(tmp_path) -> Raw:
    records = [record(i, [None, "a.png", ["a.png", "b.jpg"]][i % 3], kind="ab"[i % 2]) for i in range(30)]
    raw = Raw(tmp_path, [*records, record(99, "nowhere.png")])
    (raw.images / "b.jpg").write_bytes(picture("JPEG", (900, 700), quality=100))
    raw.convert()
    index_webdataset(raw.wds, raw.parts, max_reject_fraction=1)
    return raw


def test_statistics_of_a_shard_that_are_gone_are_missed(raw):
    statistics, *_ = raw.parts.glob("*.stats.json")
    statistics.unlink()
    report, _ = inspect_webdataset(raw.wds, raw.parts)
    (problem,) = report["problems"]
    assert problem["check"] == "shards" and f"{statistics} is missing" in problem["what"]


def test_a_whole_set_is_whole_and_counted(raw):
    dataset = index_webdataset(raw.wds, raw.parts, max_reject_fraction=1)
    report, gallery = inspect_webdataset(raw.wds, raw.parts, dataset)
    assert report["ok"], report["problems"]
    assert report["splits"]["train"]["samples"] == 30
    assert report["kinds"] == {"a": {"train": 15}, "b": {"train": 15}}
    assert report["distributions"]["images per sample"]["histogram"] == [
        {"from": n, "to": n, "count": 10} for n in range(3)
    ]
    assert report["distributions"]["image width"]["max"] == 900
    assert report["rejects"]["reasons"] == {"missing image": 1}
    assert report["rejects"]["first"][0]["line"] == 31
    assert report["notes"] == ["there is no held-out split (val)"]
    assert {sample["kind"] for sample in gallery} == {"a", "b"}
    assert inspect_webdataset(raw.wds, raw.parts, dataset) == (report, gallery)


def test_page_is_self_contained_and_escapes_what_the_data_holds(raw):
    raw.path.write_bytes(json.dumps(record(0, "b.jpg", kind="<script>alert(1)</script>")).encode() + b"\n")
    shutil.rmtree(raw.parts)
    shutil.rmtree(raw.wds)
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    page = inspection_page(*inspect_webdataset(raw.wds, raw.parts))
    assert "<script" not in page
    assert "Question 0?" in page
    assert all(target.startswith("data:image/") for target in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "url(" not in page
    assert len(page) < 60_000  # large pictures are shown as thumbnails


def overwrite(path: Path, find: bytes, replacement: bytes) -> None:
    data = path.read_bytes()
    assert find in data
    path.write_bytes(data.replace(find, replacement, 1))


def change_index(raw: Raw, statement: str) -> None:
    with sqlite3.connect(raw.wds / ".nv-meta/index.sqlite") as database:
        database.execute(statement)


DAMAGE = {
    "an index row is gone": (lambda raw: change_index(raw, "DELETE FROM samples WHERE rowid = 2"), "index.sqlite"),
    "an index offset is wrong": (
        lambda raw: change_index(raw, "UPDATE sample_parts SET content_byte_offset = 7 WHERE rowid = 5"),
        "index.sqlite",
    ),
    "the index is no database": (
        lambda raw: (raw.wds / ".nv-meta/index.sqlite").write_bytes(b"x" * 5000),
        "cannot be read",
    ),
    "the index is missing": (lambda raw: (raw.wds / ".nv-meta/index.sqlite").unlink(), "is missing"),
    "no .nv-meta at all": (lambda raw: shutil.rmtree(raw.wds / ".nv-meta"), "is missing"),
    "split.yaml is no YAML": (
        lambda raw: (raw.wds / ".nv-meta/split.yaml").write_text("a: ["),
        "cannot be understood",
    ),
    "a shard is gone": (lambda raw: (raw.wds / "subtaskdata-00001.tar").unlink(), "not in the folder"),
    "an .idx is gone": (lambda raw: (raw.wds / "subtaskdata-00001.tar.idx").unlink(), "is missing"),
    "an .idx is of another tar": (
        lambda raw: shutil.copy(raw.wds / "subtaskdata-00000.tar.idx", raw.wds / "subtaskdata-00001.tar.idx"),
        "offsets",
    ),
    "a tar is cut off": (
        lambda raw: os.truncate(raw.wds / "subtaskdata-00001.tar", 3000),
        "cannot be read",
    ),
    "a JSON is damaged": (
        lambda raw: overwrite(raw.wds / "subtaskdata-00000.tar", b'"role"', b'"rule"'),
        "not the expected JSON",
    ),
    "an answer is empty": (
        lambda raw: overwrite(raw.wds / "subtaskdata-00000.tar", b"Answer 0.", b"         "),
        "empty answer",
    ),
    "an image is damaged": (
        lambda raw: overwrite(raw.wds / "subtaskdata-00000.tar", b"IHDR", b"JHDR"),
        "not an image",
    ),
    "a byte of a picture has flipped": (
        lambda raw: overwrite(raw.wds / "subtaskdata-00000.tar", b"Question 1?", b"Question 9?"),
        "not those that the conversion wrote",
    ),
    "a key stands twice": (
        lambda raw: overwrite(raw.wds / "subtaskdata-00000.tar", b"00000_000001.json", b"00000_000000.json"),
        "subtaskdata-00000.tar",
    ),
}


def test_a_picture_damaged_within_is_told_and_not_shown(tmp_path):
    raw = Raw(tmp_path, [record(0, "noise.png")])
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(pixels).save(raw.images / "noise.png")
    data = bytearray((raw.images / "noise.png").read_bytes())
    data[len(data) // 2] ^= 255
    (raw.images / "noise.png").write_bytes(data)
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    report, gallery = inspect_webdataset(raw.wds, raw.parts)
    assert [problem["check"] for problem in report["problems"]] == ["images"]
    assert [thumbnail(image) for image in gallery[0]["images"]] == [""]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen(raw, damage):
    harm, told = DAMAGE[damage]
    harm(raw)
    report, _ = inspect_webdataset(raw.wds, raw.parts)
    assert not report["ok"]
    assert any(told in f"{problem['where']}: {problem['what']}" for problem in report["problems"]), report["problems"]


def test_counts_that_differ_from_the_dataset_file_are_seen(raw):
    dataset = {"train": {"samples": 31}, "heldout": {"samples": 0}}
    report, _ = inspect_webdataset(raw.wds, raw.parts, dataset)
    assert "the dataset file says 31" in report["problems"][0]["what"]


def test_a_folder_without_shards_is_a_clear_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"\.tar|not a folder"):
            inspect_webdataset(folder)


def test_by_hand_exit_code_and_files(raw):
    script = [sys.executable, SCRIPTS / "inspect_webdataset.py", raw.wds, "--json", raw.folder / "i.json"]
    done = subprocess.run([*script, "--html", raw.folder / "i.html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stdout
    assert json.loads((raw.folder / "i.json").read_bytes())["ok"]
    (raw.wds / "subtaskdata-00001.tar.idx").unlink()
    broken = subprocess.run([*script, "--html", raw.folder / "i.html"], capture_output=True, text=True)
    assert broken.returncode == 1
    assert "subtaskdata-00001.tar.idx: is missing" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert not json.loads((raw.folder / "i.json").read_bytes())["ok"]
    kept = raw.folder / "i.broken.html"  # Snakemake deletes i.json and i.html, which are the failed rule's outputs
    assert f"all: {kept}" in broken.stderr
    assert "subtaskdata-00001.tar.idx" in kept.read_text()
    assert json.loads(kept.with_suffix(".json").read_bytes()) == json.loads((raw.folder / "i.json").read_bytes())
    assert not (raw.folder / "i.html").exists()


@pytest.mark.parametrize(
    "values", [[0], [3, 3], range(12), range(1000), [0, *range(5), 100_000], [5, 7, 10**6] * 9 + [*range(30)]]
)
def test_histogram_holds_every_value_once(values):
    told = distribution(Counter(values))
    bars = told["histogram"]
    assert sum(bar["count"] for bar in bars) == told["count"] == len(values)
    assert len(bars) <= 13
    assert all(before["to"] < after["from"] for before, after in pairwise(bars))
    assert (told["min"], told["max"]) == (min(values), max(values))


def test_what_an_inspection_keeps_does_not_grow_with_the_data(monkeypatch):
    shown = []
    monkeypatch.setattr(of_findings, "MOST_KEPT", 20)
    monkeypatch.setattr(of_findings, "example", lambda value: shown.append(value) or "one")
    findings = Findings(0, None)
    for n in range(200):
        sample = Sample(
            f"s{n}",
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            [],
            {"all": n, f"k{n}": n},
        )
        findings.note_sample("train", f"kind {n % 50:02}", sample, [], [n % 3])
        findings.offer_to_gallery(f"kind {n % 50:02}", "train", str(n), sample, {}, [])
    assert len(findings.kinds) == len(findings.kept_keys) == 21 and len(shown) == 21
    assert (
        findings.kept_keys["all"] == 200 and findings.kept_keys.total() == 400 and findings.kinds["…"]["train"] == 120
    )
    assert (
        sorted(findings.gallery) == [f"kind {n:02}" for n in range(12)] and len(findings.picked_gallery()) == 13
    )  # and the longest
    assert findings.digests.repeated("sample") == {"repeated": 197, "different": 3}


def test_tokens_duplicates_and_scripts_are_counted(tmp_path, small_checkpoint):
    texts = ["What is it?", "这是什么？", "これは何ですか", "Что это?", "123"]
    records = [record(i, "a.png") for i in range(5)] + [record(0, "a.png"), record(9, ["a.png", "b.jpg"])]
    for turn, text in zip(records, texts, strict=False):
        turn["conversations"] = [{"from": "human", "value": f"<image>{text}"}, {"from": "gpt", "value": text}]
    records[5]["conversations"] = records[0]["conversations"]
    long = record(10, None)
    long["conversations"] += [{"from": "human", "value": "x " * 500}, {"from": "gpt", "value": "y"}]
    raw = Raw(tmp_path, [*records, long])
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    tokens = TokenCounter(small_checkpoint, 200, 3136, 1_000_000)
    report, gallery = inspect_webdataset(raw.wds, raw.parts, tokens=tokens)
    assert report["ok"], report["problems"]
    assert report["duplicates"] == {
        "sample": {"repeated": 1, "different": 7},
        "image": {"repeated": 6, "different": 2},
    }
    assert report["scripts"] == {"Latin": 4, "Chinese": 1, "Japanese": 1, "Cyrillic": 1, "other": 1}
    assert report["distributions"]["tokens"]["count"] == 8
    assert report["distributions"]["tokens"]["max"] > 500
    assert report["sequence_length"] == {"seq_length": 200, "cut": 1, "left_out": 0}
    # As training counts them.
    template = ChatTemplate(small_checkpoint)
    sample = next(read_split(raw.wds, "train"))
    _, grid = to_patches(decode_rgb(sample.images[0]), 3136, 1_000_000)
    assert tokens.count(sample.messages, [(32, 28)]) == len(
        template.encode(sample.messages, [image_tokens(grid)], 10_000).input_ids
    )
    assert "seq_length 200" in inspection_page(report, gallery)
