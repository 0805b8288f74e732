"""What others wrote is parsed and completed, never trusted; damage at rest is named, mended or harmless."""

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
import sqlite3
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.webdatasets import Raw, picture, record, tar_of, turns
from llava_sft.data.adopt import adopt_webdataset
from llava_sft.data.index import index_webdataset, read_finished
from llava_sft.data.inspect import inspect_webdataset
from llava_sft.data.nv_meta import is_finished, read_meta
from llava_sft.data.nv_meta_yaml import expand, literal
from llava_sft.data.stored import read_split
from llava_sft.data.tars import no_tar
from llava_sft.data.verify import find_damages, note_dataset, notes_of
from llava_sft.errors import DataError, SftError
from llava_sft.files import read_json, write_json
from llava_sft.paths import Paths


@pytest.fixture
def raw(tmp_path) -> Raw:
    raw = Raw(tmp_path, [record(i, [None, "a.png", "b.jpg"][i % 3]) for i in range(12)])
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    return raw


DATASET_YAML = {
    "a call in the subflavors": "subflavors: {layout: own, x: {__module__: os, __function__: system}}",
    "a call as a value": "subflavors: {layout: {__module__: os, __function__: system}}",
    "a loader of its own": "sample_loader: sample_loader.py:sample_loader",
    "a filter of its own": "part_filter: sample_loader.py:part_filter",
    "another class, ours in a comment": "__class__: StandardWebdatasetFactory # __class__: CrudeWebdataset",
    "a tag": "subflavors: !!python/object/apply:os.system [true]",
    "an alias": "subflavors: &a {layout: own}\nmore: *a",
    "a layout unknown": "subflavors: {layout: theirs}",
}


@pytest.mark.parametrize("case", DATASET_YAML)
def test_a_folder_whose_dataset_yaml_says_more_than_is_known_is_never_used_as_it_is(raw, tmp_path, case):
    path = raw.wds / ".nv-meta/dataset.yaml"
    assert is_finished(raw.wds)
    path.write_text(path.read_text() + DATASET_YAML[case] + "\n")
    assert not is_finished(raw.wds)
    with pytest.raises(DataError, match="cannot be understood"):
        read_finished(raw.wds)
    with pytest.raises(DataError, match="cannot be understood"):
        list(read_split(raw.wds, "train"))
    assert adopt_webdataset(raw.wds, tmp_path / "ours")["train"]["samples"] == 12
    assert "system" not in (tmp_path / "ours/.nv-meta/dataset.yaml").read_text()


@pytest.mark.parametrize(
    "blend",
    [
        [{"path": "../elsewhere", "weight": 1, "subflavors": {"source": "../elsewhere"}}],
        [{"path": "a", "weight": {"__module__": "os", "__function__": "getcwd"}, "subflavors": {"source": "a"}}],
        [{"path": "a", "weight": 1, "subflavors": {"source": "a"}, "aux": {"x": "/"}}],
        [{"path": "a", "weight": 1, "subflavors": {"source": {"__module__": "os"}}}],
        "all",
    ],
)
def test_a_metadataset_that_names_other_paths_or_calls_is_refused(raw, blend):
    config = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"blend": blend}}}
    (raw.wds / "metadataset.yaml").write_text(json.dumps(config))
    assert not is_finished(raw.wds)
    with pytest.raises(DataError, match=r"metadataset\.yaml: .*cannot be understood"):
        list(read_split(raw.wds, "train"))


def test_a_finished_folder_of_another_layout_is_adopted(tmp_path, raw):
    single = {
        f"{n}.{end}": content for n in range(3) for end, content in (("jpg", picture("JPEG")), ("json", turns(n)))
    }
    tar_of(tmp_path / "theirs/a.tar", single)
    adopt_webdataset(tmp_path / "theirs", tmp_path / "theirs")
    (tmp_path / "theirs/.nv-meta/dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    assert not is_finished(tmp_path / "theirs")  # `energon prepare` writes it so
    assert adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")["train"]["samples"] == 3


@pytest.mark.parametrize(
    "patterns",
    [
        "{" * 40 + "a" + "}" * 40,
        "{a,b}" * 30,
        "{0..999999999}",
        "{00000..99999}{00000..99999}",
        "/etc/x.tar",
        "a/../../b.tar",
    ],
)
def test_patterns_beyond_the_limits_and_names_that_lead_out_are_refused(patterns):
    with pytest.raises(ValueError, match=r"expanded|stands for|leads out"):
        expand([patterns])


def test_a_split_of_aliases_or_of_nothing_is_one_message(raw):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdef", "bcdefg", strict=True)
    )
    for text in (bomb, "split_parts: {train: 3}", "split_parts: {train: [[a]]}", "[" * 5000, "", "split_parts: [a]"):
        (raw.wds / ".nv-meta/split.yaml").write_text(text)
        with pytest.raises(DataError, match=r"split\.yaml"):
            read_meta(raw.wds)


def test_names_are_never_patterns(tmp_path):
    names = ["a{1,2}.tar", "b [x].tar", "猫 'q\".tar", "sub dir/c{01..03},d.tar", "e\\{f,g}.tar"]
    for number, name in enumerate(names):
        tar_of(tmp_path / "theirs" / name, {f"k{number}.jpg": picture("JPEG"), f"k{number}.json": turns(number)})
    dataset = adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")
    assert dataset["train"] == {"samples": 5, "shards": 5}
    assert sorted(read_meta(tmp_path / "ours").splits["train"]) == sorted(names)
    assert len(list(read_split(tmp_path / "ours", "train"))) == 5
    assert inspect_webdataset(tmp_path / "ours", dataset=dataset)[0]["ok"]
    assert all(expand([literal(name)]) == [name] for name in names)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("name", ["a.tar", "it's a.tar", "a.tar.gz", "a.tgz", "b/a.tar.xz", "a.tar.bz2"])
def test_a_packed_tar_is_named_as_such_and_the_fix_unpacks_it(tmp_path, name):
    tar_of(tmp_path / "plain.tar", {"k.jpg": picture("JPEG"), "k.json": turns(0)})
    packed = tmp_path / "theirs" / name
    packed.parent.mkdir(parents=True)
    packed.write_bytes(PACKERS.get(packed.suffix[1:], gzip.compress)((tmp_path / "plain.tar").read_bytes()))
    with pytest.raises(DataError, match=r"is (gzip|xz|bzip2)\b.* plain tar") as told:
        adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")
    if not name.endswith(".tar"):
        assert str(no_tar("", tmp_path / "theirs")) == str(told.value)  # what `webdatasets` is told before any job
    command = told.value.fix.partition(": ")[2]
    if not shutil.which(command.split()[0]):
        pytest.skip(f"no {command.split()[0]} here")
    subprocess.run(command, shell=True, check=True)
    dataset = adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")
    assert dataset["train"]["samples"] == 1
    # Unpacked to another name, the packed one lies beside it.
    assert dataset.get("packed_tars", []) == ([] if name.endswith(".tar") else [name])


def test_odd_members_are_a_note_and_bad_images_are_left_out_when_adopting(tmp_path):
    members = {f"{n}.{end}": c for n in range(4) for end, c in (("jpg", picture("JPEG")), ("json", turns(n)))}
    tar_of(tmp_path / "theirs/a.tar", {"README": b"hello", "__MACOSX/x": b"x"} | members | {"2.jpg": b"no image"})
    with pytest.raises(DataError, match="1 × not an image"):
        adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")
    dataset = adopt_webdataset(tmp_path / "theirs", tmp_path / "ours", max_reject_fraction=0.25)
    assert (dataset["train"]["samples"], dataset["rejected"]) == (3, 1)
    report, _ = inspect_webdataset(tmp_path / "ours", dataset=dataset)
    assert report["ok"], report["problems"]
    assert any("README" in note for note in report["notes"])


def test_heldout_samples_that_are_trained_on_are_counted(tmp_path):
    rows = [record(i, f"{i}.png") for i in range(20)]
    for i in range(25):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{i}.png").write_bytes(picture(size=(28 + i, 30)))
    train = Raw(tmp_path, rows)
    train.convert()
    heldout = Raw(tmp_path, [*rows[:6], record(90, "7.png"), record(91, "24.png")], "heldout.jsonl")
    heldout.convert("heldout")
    dataset = index_webdataset(train.wds, train.parts)
    assert dataset["heldout_trained_on"] == {"records": 6, "images": 7, "of": 8}
    report, _ = inspect_webdataset(train.wds, train.parts, dataset)
    assert any("6 of 8 held-out samples are trained on" in note for note in report["notes"])


def test_one_file_as_training_and_heldout_data_is_told_before_any_job(tmp_path):
    (tmp_path / "raw.jsonl").write_text("{}\n")
    file = str(tmp_path / "raw.jsonl")
    paths = object.__new__(Paths)
    paths.demo, paths.settings = None, SimpleNamespace(raw_data=file, heldout_data=file, sources=[], image_root=None)
    with pytest.raises(DataError, match="training data and held-out data at once"):
        _ = paths.sources


def test_a_sample_changed_at_rest_is_named_with_tar_key_and_id(raw):
    tar = raw.wds / "subtaskdata-00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"Answer", b"Anwser", 1))
    with pytest.raises(DataError) as told:
        list(read_split(raw.wds, "train"))
    assert all(word in str(told.value) for word in ("subtaskdata-00001.tar", "00001_", "'r", f"delete {tar}"))
    with sqlite3.connect(raw.wds / ".nv-meta/index.sqlite") as database:
        database.execute("DROP TABLE sample_digests")  # an index of an earlier version
    assert len(list(read_split(raw.wds, "train"))) == 12


def damage(path: Path, draw: random.Random) -> None:
    """A bit, a byte or a stretch turned, the end cut off, or nothing left; sometimes the date is kept."""
    status, data = os.stat(path), bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    match draw.randrange(5):
        case 0:
            data[at] ^= 1 << draw.randrange(8)
        case 1:
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        case 2:
            data[at : at + 40] = draw.randbytes(len(data[at : at + 40]))
        case 3:
            del data[at:]
        case 4:
            data.clear()
    path.write_bytes(data)
    if draw.randrange(2):
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_damage_at_rest_of_every_kind_of_file_is_told_or_harmless(raw, tmp_path):
    dataset = tmp_path / "dataset.json"
    heldout = Raw(tmp_path, [record(100 + i) for i in range(4)], "heldout.jsonl")
    heldout.convert("heldout")
    write_json(dataset, index_webdataset(raw.wds, raw.parts), sealed=True)
    note_dataset(raw.wds, dataset)
    kept = tmp_path / "kept"
    shutil.copytree(raw.wds, kept / "wds")
    shutil.copytree(raw.parts, kept / "wds.parts")

    def everything() -> tuple:
        damages = find_damages(raw.wds, dataset, full=True)
        if damages:
            raise DataError(f"{damages[0].file}: {damages[0].what}", damages[0].fix)
        made = index_webdataset(raw.wds, raw.parts)
        samples = [[sample for sample in read_split(raw.wds, split)] for split in ("train", "val")]
        return read_json(dataset), made, samples

    whole, draw = everything(), random.Random(1)
    kinds = (
        "wds/sub*.tar",
        "wds/held*.tar",
        "wds/*.idx",
        "wds/.nv-meta/*",
        "wds.parts/*.stats.json",
        "wds.parts/*.samples.jsonl",
    )
    files = [path for kind in kinds for path in sorted(tmp_path.glob(kind))] + [dataset, notes_of(dataset)]
    for _ in range(5):
        for path in files:
            name, before = path.relative_to(tmp_path), path.read_bytes()
            status = os.stat(path)
            damage(path, draw)
            try:
                assert everything() == whole, name
            except SftError as error:
                assert path.name.split(".")[0] in str(error) or ".nv-meta" in str(error), (name, str(error))
            shutil.rmtree(raw.wds)
            shutil.rmtree(raw.parts)
            shutil.copytree(kept / "wds", raw.wds)
            shutil.copytree(kept / "wds.parts", raw.parts)
            if path.parent == tmp_path:
                path.write_bytes(before)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns)) if path.exists() else None
