"""A split by image, a blend of sources, and WebDatasets of another make, as stock energon reads them."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from helpers import SCRIPTS
from helpers.webdatasets import Raw, contents, mix, picture, read_with_energon, record, tar_of, turns
from llava_sft.data.adopt import adopt_webdataset
from llava_sft.data.hold_out import choose_heldout
from llava_sft.data.index import index_webdataset
from llava_sft.data.inspect import inspect_webdataset
from llava_sft.data.nv_meta import is_finished, read_meta
from llava_sft.data.stored import read_split
from llava_sft.errors import DataError

# ------------------------------------------------------------------------------------------------------ split


@given(
    st.lists(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=3), min_size=1, max_size=30),
    st.floats(0.01, 0.9),
    st.integers(0, 9),
)
def test_nothing_that_shares_a_name_is_parted_and_no_side_is_empty(samples, fraction, seed):
    try:
        sides, groups = choose_heldout(samples, fraction, seed)
    except DataError:
        names = set(samples[0])
        for _ in samples:
            names |= {n for sample in samples if names & set(sample) for n in sample}
        assert all(names & set(sample) for sample in samples)  # it was one group indeed
        return
    assert groups > 1 and any(sides) and not all(sides)
    train, heldout = ({n for s, side in zip(samples, sides, strict=True) if side is held for n in s} for held in (0, 1))
    assert not train & heldout
    assert choose_heldout(samples, fraction, seed)[0] == sides


def test_the_share_is_about_right_and_most_samples_keep_their_side_when_data_is_added():
    samples = [[f"image {i // 2}"] for i in range(4000)]
    sides, _ = choose_heldout(samples, 0.1, 0)
    assert 300 < sum(sides) < 500
    assert choose_heldout([*samples, *([f"new {i}"] for i in range(4000))], 0.1, 0)[0][:4000] == sides
    assert choose_heldout(samples, 0.1, 1)[0] != sides


def test_the_side_of_a_group_hangs_on_its_smallest_hash():
    names = [xxhash.xxh3_128_hexdigest(b"%d" % i) for i in range(3000)]
    samples = [names[i : i + 1 + i % 3] for i in range(0, 3000, 3)] + [
        [names[3 * i], names[3 * i + 3]] for i in range(0, 900, 2)
    ]
    of: dict[str, set[str]] = {}
    for sample in samples:
        group = set(sample).union(*(of.get(name, ()) for name in sample))
        of |= dict.fromkeys(group, group)
    sides, groups = choose_heldout(samples, 0.2, 7)
    assert groups == len({min(group) for group in of.values()})
    drawn = [xxhash.xxh3_64_intdigest(min(of[sample[0]]).encode(), 7) / 2**64 for sample in samples]
    assert sides == [draw < 0.2 for draw in drawn]


def distinct(folder: Path, number: int, **options: Any) -> Raw:
    """Records that share pictures in a chain: 2k and 2k + 1 show the same one; every fifth has no picture."""
    raw = Raw(folder, [record(i, None if i % 5 == 4 else f"{i // 2}.png", **options) for i in range(number)])
    for i in range(number):
        (raw.images / f"{i // 2}.png").write_bytes(picture(size=(30 + i // 2, 28)))
    raw.convert()
    return raw


def sources(folder: Path, **numbers: int) -> tuple[Path, Path]:
    """The shards and the parts of several sources, each with so many records of a kind of its own name."""
    for name, number in numbers.items():
        raw = distinct(folder / name, number, kind=name)
        for part in ("wds", "wds.parts"):
            (folder / part).mkdir(exist_ok=True)
            (raw.folder / part).rename(folder / part / name)
    return folder / "wds", folder / "wds.parts"


def test_energon_sees_each_sample_on_one_side_only_and_all_of_them(tmp_path):
    raw = distinct(tmp_path, 60)
    dataset = index_webdataset(raw.wds, raw.parts, val_fraction=0.2)
    assert dataset["train"]["samples"] + dataset["heldout"]["samples"] == 60
    assert dataset["heldout"]["shards"] == 1
    assert dataset["split"]["samples"] == dataset["heldout"]["samples"] > 3
    (read,) = read_with_energon(raw.wds, full=True)
    train, val = ({sample[1][0] for sample in read[side]} for side in ("train", "val"))
    assert not train & val and len(train | val) == 60
    assert len(val) == len(read["val"]) == dataset["heldout"]["samples"]
    assert {sample.messages[0]["content"] for sample in read_split(raw.wds, "val")} == val
    assert {sample.messages[0]["content"] for sample in read_split(raw.wds, "train")} == train
    report, _ = inspect_webdataset(raw.wds, raw.parts, dataset)
    assert report["ok"], report["problems"]

    # A new index by --fix keeps the split, which stands in the dataset file.
    shutil.rmtree(raw.wds / ".nv-meta")
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    fix = [sys.executable, SCRIPTS / "inspect_webdataset.py", raw.wds, "--fix"]
    assert subprocess.run(fix, capture_output=True).returncode == 0
    assert {sample.messages[0]["content"] for sample in read_split(raw.wds, "val")} == val

    # The same again is the same; without the fraction, the merged tars are gone.
    before = contents(raw.wds)
    assert index_webdataset(raw.wds, raw.parts, val_fraction=0.2) == dataset
    assert contents(raw.wds) == before
    assert index_webdataset(raw.wds, raw.parts)["train"]["samples"] == 60
    assert not list(raw.wds.glob("heldout-*"))


def test_a_heldout_file_is_preferred_and_one_group_is_an_error(tmp_path):
    raw = distinct(tmp_path, 10)
    heldout = Raw(tmp_path, [record(100)], "heldout.jsonl")
    heldout.convert("heldout")
    assert index_webdataset(raw.wds, raw.parts, val_fraction=0.5)["heldout"]["samples"] == 1
    same = Raw(tmp_path / "same", [record(i) for i in range(5)])
    same.convert()
    with pytest.raises(DataError, match="share images"):
        index_webdataset(same.wds, same.parts, val_fraction=0.5)


# ---------------------------------------------------------------------------------------------------- sources


def test_several_sources_are_blended_by_weight_and_split_together(tmp_path):
    wds, parts = sources(tmp_path, small=20, large=60)
    plan = [{"name": "small", "weight": 6.0}, {"name": "large", "weight": 1.0}]
    dataset = index_webdataset(wds, parts, plan=plan, val_fraction=0.2)
    assert dataset["train"]["samples"] + dataset["heldout"]["samples"] == 80
    (read,) = read_with_energon(wds / "metadataset.yaml", full=True)
    train = {sample[1][0] for sample in read["train"]}
    val = {sample.messages[0]["content"] for sample in read_split(wds, "val")}
    assert not train & val
    # The samples 0 … 19 of both sources: 20 × 6 + 20 of 20 × 6 + 60 draws.
    low = sum(int(sample[1][0].rstrip("?").split()[-1]) < 20 for sample in read["train"])
    assert 60 < low < 95
    # The blend's own file is what training reads, its validation too.
    assert {sample.messages[0]["content"] for sample in read_split(wds / "metadataset.yaml", "val")} == val
    report, _ = inspect_webdataset(wds, parts, dataset)
    assert report["ok"], report["problems"]
    adopted = adopt_webdataset(wds, tmp_path / "adopted")  # a blend of ours under another experiment: no leak
    assert (adopted["train"]["samples"], adopted["rejected"]) == (dataset["train"]["samples"], 0)
    assert {sample.messages[0]["content"] for sample in read_split(tmp_path / "adopted", "val")} == val
    other = index_webdataset(wds, parts, plan=[plan[0] | {"weight": 1.0}, plan[1]], val_fraction=0.2)
    assert other["fingerprint"] != dataset["fingerprint"]


def test_several_sources_made_one_again_leave_no_blend_to_be_read(tmp_path):
    raw = distinct(tmp_path, 20)
    for folder in ("wds", "wds.parts"):
        for name in ("one", "two"):
            shutil.copytree(raw.folder / folder, tmp_path / "copy" / folder / name)
        shutil.copytree(raw.folder / folder, tmp_path / "copy" / folder, dirs_exist_ok=True)
    wds, parts = tmp_path / "copy/wds", tmp_path / "copy/wds.parts"
    index_webdataset(wds, parts, plan=[{"name": name, "weight": 1.0} for name in ("one", "two")])
    assert len(list(read_split(wds, "train"))) == 40
    index_webdataset(wds, parts, plan=[{"name": "", "weight": 1.0}])
    assert len(list(read_split(wds, "train"))) == 20


def test_a_source_that_is_held_out_whole_is_evaluated_and_inspected(tmp_path):
    wds, parts = sources(tmp_path, one=1, many=40)
    plan = [{"name": "one", "weight": 1.0}, {"name": "many", "weight": 1.0}]
    datasets = (index_webdataset(wds, parts, plan=plan, val_fraction=0.5, split_seed=seed) for seed in range(100))
    dataset = next(each for each in datasets if read_meta(wds / "one").samples("val"))
    assert {sample.meta["kind"] for sample in read_split(wds, "val")} == {"one", "many"}
    assert len(list(read_split(wds, "val"))) == dataset["heldout"]["samples"]
    report, _ = inspect_webdataset(wds, parts, dataset)
    assert report["ok"], report["problems"]


# --------------------------------------------------------------------------------------------------- adoption


def original_meta(folder: Path, shards: list[str]) -> None:
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    (meta / ".info.yaml").write_text("shard_counts: {}\n")
    (meta / "split.yaml").write_text(f"split_parts: {{train: {shards}, val: [], test: []}}\nexclude: []\n")
    (meta / "dataset.yaml").write_text(
        "sample_type:\n  __module__: aiak_training_llm.data.multimodal\n  __class__: MultiMixQASample\n"
    )


def test_the_originals_mix_layout_is_adopted_untouched_and_videos_are_counted(tmp_path):
    source, ours = tmp_path / "theirs", tmp_path / "data/ours"
    mix(source / "pretrain-0.tar", range(9))
    mix(source / "pretrain-1.tar", range(9, 15), videos=3)
    original_meta(source, ["pretrain-1.tar", "pretrain-0.tar"])
    before = contents(source)
    assert not is_finished(source)
    with pytest.raises(DataError, match="3 × video is not supported"):
        adopt_webdataset(source, ours)
    dataset = adopt_webdataset(source, ours, max_reject_fraction=0.2)
    assert (dataset["train"]["samples"], dataset["rejected"], dataset["images"]) == (15, 3, 15)
    assert contents(source) == before
    assert is_finished(ours)
    (read,) = read_with_energon(ours, full=True)
    assert {sample[1][1] for sample in read["train"]} == {f"Answer {n}." for n in range(15)}
    assert all(sample[2] == sample[1][0].count("<image>") for sample in read["train"])
    report, _ = inspect_webdataset(ours, dataset=dataset)
    assert report["ok"], report["problems"]
    assert report["splits"]["train"]["samples"] == 15


def test_the_single_image_layout_without_any_index_is_adopted(tmp_path):
    members: dict[str, Any] = {}
    for n in range(6):
        members |= {f"folder/a_{n}.jpg": picture("WEBP"), f"folder/a_{n}.json": turns(n)}
    tar_of(tmp_path / "theirs/subtaskdata-00000.tar", members)
    dataset = adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")
    assert dataset["train"]["samples"] == 6
    (read,) = read_with_energon(tmp_path / "ours", full=True)
    assert {sample[0] for sample in read["train"]} == {f"folder/a_{n}" for n in range(6)}
    assert [sample.images for sample in read_split(tmp_path / "ours", "train")] == [[picture("WEBP")]] * 6


def test_packs_of_several_hosts_are_adopted_once_and_their_parent_index_adds_nothing(tmp_path):
    source, ours = tmp_path / "theirs", tmp_path / "ours"
    for part in range(2):
        members: dict[str, Any] = {}
        for n in range(5):
            key = f"ps_{n:08d}"
            members |= {f"{key}.img{i}.jpg": picture("JPEG", (28 + i, 28)) for i in range(11)}
            members[f"{key}.json"] = {
                "prompts": [f"<image>Question {i}?" for i in range(11)],
                "captions": [f"Caption {part} {n} {i}" for i in range(11)],
                "images": ["/somewhere/else.jpg"],
            }
        tar_of(source / f"part_0{part}_wds/pretrain-000000.tar", members)
        original_meta(source / f"part_0{part}_wds", ["pretrain-000000.tar"])
    original_meta(source, ["part_00_wds/pretrain-000000.tar", "part_01_wds/pretrain-000000.tar"])
    dataset = adopt_webdataset(source, ours)
    assert dataset["train"] == {"samples": 10, "shards": 2}
    (read,) = read_with_energon(ours, full=True)
    assert Counter(len(sample[1]) for sample in read["train"]) == {22: 100}
    assert len({sample[1][1] for sample in read["train"]}) == 10
    first = next(read_split(ours, "train"))
    assert [m["content"] for m in first.messages[1::2]] == [f"Caption 0 0 {i}" for i in range(11)]
    assert first.images[10] == picture("JPEG", (38, 28))
    report, _ = inspect_webdataset(ours, dataset=dataset)  # both parts have the same keys
    assert report["ok"], report["problems"]


def test_a_folder_of_ours_without_its_index_is_indexed_in_place_and_by_fix(tmp_path):
    raw = distinct(tmp_path, 20)
    before = index_webdataset(raw.wds, raw.parts)
    tables = contents(raw.wds)
    for path in [*raw.wds.glob("*.idx"), *(raw.wds / ".nv-meta").iterdir()]:
        path.unlink()
    (raw.wds / ".nv-meta").rmdir()
    for path in raw.parts.iterdir():
        path.unlink()
    raw.parts.rmdir()
    command = [sys.executable, SCRIPTS / "inspect_webdataset.py", raw.wds]
    assert subprocess.run(command, capture_output=True).returncode == 1
    fixed = subprocess.run([*command, "--fix"], capture_output=True, text=True)
    assert fixed.returncode == 0, fixed.stderr
    after = contents(raw.wds)
    same = [name for name in tables if not name.endswith((".uuid", ".sqlite"))]
    assert {name: after[name] for name in same} == {name: tables[name] for name in same}
    done = subprocess.run([sys.executable, SCRIPTS / "index_webdataset.py", raw.wds], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "wds.json").read_bytes())["train"] == before["train"]


def test_what_can_not_be_adopted_is_one_message(tmp_path):
    tar_of(tmp_path / "odd/a.tar", {"k.json": {"title": "?"}, "k.jpg": picture("JPEG")})
    mix(tmp_path / "two/a.tar", range(3))
    tar_of(tmp_path / "two/b.tar", {"k.json": turns(1), "k.jpg": picture("JPEG")})
    tar_of(tmp_path / "cut/a.tar", {"k.json": turns(1), "k.jpg": picture("JPEG")})
    (tmp_path / "cut/a.tar").write_bytes((tmp_path / "cut/a.tar").read_bytes()[:700])
    (tmp_path / "none").mkdir()
    for name, message in (
        ("odd", "known layout"),
        ("two", "mixes layouts"),
        ("cut", "cannot be read"),
        ("none", "no .tar"),
    ):
        with pytest.raises(DataError, match=message):
            adopt_webdataset(tmp_path / name, tmp_path / "ours")


def test_a_folder_that_is_no_webdataset_has_no_index_to_delete(tmp_path):
    (tmp_path / "images").mkdir()
    for folder in (tmp_path / "images", tmp_path / "gone"):
        with pytest.raises(DataError, match=f"{folder}: no WebDataset in it") as error:
            read_meta(folder)
        assert "delete" not in error.value.fix
