"""The merged index is what energon would have made itself, and nothing wrong or foreign slips into it."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest
import xxhash

from helpers import SCRIPTS
from helpers.webdatasets import Raw, contents, picture, read_with_energon, record
from llava_sft.data.adopt import adopt_webdataset
from llava_sft.data.index import index_webdataset
from llava_sft.errors import DamagedFileError, DataError


def indexed(raw: Raw, **options) -> dict:
    return index_webdataset(raw.wds, raw.parts, **options)


def both_splits(folder) -> tuple[Raw, Raw]:
    train = Raw(folder, [record(i, [None, "a.png", ["a.png", "b.jpg"]][i % 3], kind="ab"[i % 2]) for i in range(40)])
    heldout = Raw(folder, [record(100 + i) for i in range(4)], "heldout.jsonl")
    train.convert()
    heldout.convert("heldout")
    return train, heldout


def test_index_and_training_order_equal_those_of_energon_prepare(tmp_path):
    raw, _ = both_splits(tmp_path)
    indexed(raw)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for tar in raw.wds.glob("*.tar"):
        shutil.copy(tar, theirs)
    energon = [os.path.join(os.path.dirname(sys.executable), "energon"), "prepare", str(theirs), "--non-interactive"]
    splits = ["--split-parts", "train:subtaskdata-.*", "--split-parts", "val:heldout-.*"]
    subprocess.run([*energon, *splits, "--sample-type", "CrudeWebdataset"], check=True, capture_output=True)

    for idx in theirs.glob("*.idx"):
        assert (raw.wds / idx.name).read_bytes() == idx.read_bytes()
    tables = []
    for folder in (raw.wds, theirs):
        database = sqlite3.connect(folder / ".nv-meta" / "index.sqlite")
        names = database.execute(
            "SELECT type, name FROM sqlite_master WHERE tbl_name != 'sample_digests' ORDER BY name"
        ).fetchall()
        tables.append(
            (
                names,
                database.execute("SELECT * FROM samples ORDER BY 1, 3").fetchall(),
                database.execute("SELECT * FROM sample_parts ORDER BY 1, 2, 4").fetchall(),
            )
        )
        database.close()
    assert tables[0] == tables[1]
    assert json.loads((raw.wds / ".nv-meta/.info.json").read_bytes()) == json.loads(
        (theirs / ".nv-meta/.info.json").read_bytes()
    )
    ours, their_order = read_with_energon(raw.wds, theirs)
    assert ours == their_order
    assert ours["val"].count("h00000_000000") == 1


def test_dataset_file_counts_everything_and_names_content_only(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    one, _ = both_splits(tmp_path / "one")
    two, _ = both_splits(tmp_path / "two")
    dataset = indexed(one)
    assert dataset == indexed(two)
    assert contents(one.wds)[".nv-meta/index.uuid"] == contents(two.wds)[".nv-meta/index.uuid"]
    assert (dataset["train"]["samples"], dataset["heldout"]["samples"]) == (40, 4)
    assert (dataset["read"], dataset["rejected"], dataset["images"]) == (44, 0, 13 + 13 * 2 + 4)
    assert dataset["kinds"] == {"a": 20, "b": 20}
    (one.wds / "subtaskdata-00001.tar").unlink()
    one.convert(only={1})
    assert indexed(one) == dataset


def test_empty_shards_are_left_out(tmp_path):
    raw = Raw(tmp_path, [record(0, None, text="x" * 2000), record(1, None)])
    raw.convert()
    assert indexed(raw)["train"] == {"samples": 2, "shards": 2}
    assert b"00001" not in contents(raw.wds)[".nv-meta/split.yaml"]


def test_too_many_rejects_stop_with_the_first_reasons_and_the_share_that_accepts_them(tmp_path):
    lines = [record(i, "nowhere.png" if i in (3, 17, 30) else "a.png") for i in range(33)]
    raw = Raw(tmp_path, lines)
    raw.convert()
    with pytest.raises(DataError) as stopped:
        indexed(raw)
    message = str(stopped.value)
    assert "3 of 33 records were rejected" in message
    assert "line 18, id r17: missing image (nowhere.png" in message
    assert not (raw.wds / ".nv-meta").exists()
    proposed = float(message.split("--max-reject-fraction ")[1].rstrip(")"))
    assert indexed(raw, max_reject_fraction=proposed)["reasons"] == {"missing image": 3}
    with pytest.raises(DataError):
        indexed(raw, max_reject_fraction=0.05)


def test_nothing_written_is_an_error(tmp_path):
    raw = Raw(tmp_path, [record(0, "nowhere.png")])
    raw.convert()
    with pytest.raises(DataError, match="not one sample was written for train"):
        indexed(raw, max_reject_fraction=1)
    with pytest.raises(DataError, match="knows of no subtaskdata shard"):
        index_webdataset(tmp_path, tmp_path / "nowhere")


def test_raw_file_touched_is_fine_changed_within_is_not(tmp_path):
    raw = Raw(tmp_path, [record(i) for i in range(20)])
    raw.convert()
    dataset = indexed(raw)
    os.utime(raw.path, ns=(1, 1))
    assert indexed(raw) == dataset
    data = raw.path.read_bytes()
    raw.path.write_bytes(data.replace(b"Question 6?", b"Question 7?"))
    with pytest.raises(DataError, match=r"within the ranges of 1 shard: subtaskdata-00001"):
        indexed(raw)
    raw.path.write_bytes(data + b"{}\n")
    with pytest.raises(DataError, match="bytes now"):
        indexed(raw)
    raw.path.unlink()
    assert indexed(raw) == dataset  # what is converted may be gone


def test_missing_damaged_and_stale_shards_are_named(tmp_path):
    raw = Raw(tmp_path, [record(i) for i in range(20)])
    number = len(raw.convert())
    with pytest.raises(DataError, match=f"subtaskdata-{number:05d}"):
        indexed(raw, plan=[{"name": "", "weight": 1, "subtaskdata": [number + 1]}])
    tar = raw.wds / "subtaskdata-00002.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(DataError, match="subtaskdata-00002"):
        indexed(raw)
    tar.write_bytes(whole)
    # The raw file shrinks: its last shards are of no plan any more.
    for size, message in ((1200, "bytes now"), (1190, "several plans")):
        raw.path.write_bytes(raw.path.read_bytes()[:size])
        raw.convert()
        with pytest.raises(DataError, match=message):
            indexed(raw)
    assert (
        indexed(raw, plan=[{"name": "", "weight": 1, "subtaskdata": [2]}], max_reject_fraction=1)["train"]["shards"]
        == 2
    )


def test_the_statistics_of_another_shard_are_named_by_their_own_file(tmp_path):
    raw, _ = both_splits(tmp_path)
    first, second = sorted(raw.parts.glob("subtaskdata-*.stats.json"))[:2]
    shutil.copy(first, second)
    with pytest.raises(DamagedFileError, match=f"{second.name}: damaged: it is of 'subtaskdata-00000'"):
        indexed(raw)


def test_a_failed_index_leaves_the_old_one(tmp_path, monkeypatch):
    raw = Raw(tmp_path, [record(i) for i in range(5)])
    raw.convert()
    indexed(raw)
    before = contents(raw.wds)

    def disk_full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("llava_sft.data.nv_meta._write_index", disk_full)
    with pytest.raises(OSError, match="disk full"):
        indexed(raw)
    assert contents(raw.wds) == before


def test_by_hand_a_message_and_no_traceback(tmp_path):
    raw = Raw(tmp_path, [record(0), record(1, "nowhere.png")])
    raw.convert()
    script = [sys.executable, SCRIPTS / "index_webdataset.py", raw.wds]
    failed = subprocess.run(script, capture_output=True, text=True)
    assert (failed.returncode, "Traceback" in failed.stderr) == (1, False)
    assert "max_reject_fraction: 0.5" in failed.stderr
    done = subprocess.run([*script, "--max-reject-fraction", "0.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "wds.json").read_bytes())["rejected"] == 1


def digests_of(folder) -> list[tuple[bytes, bytes]]:
    """(found digest, noted digest) of all samples in an index, made from the tars' bytes at the places that it names."""
    names = list(json.loads((folder / ".nv-meta/.info.json").read_bytes())["shard_counts"])
    with sqlite3.connect(folder / ".nv-meta/index.sqlite") as database:
        rows = database.execute("SELECT * FROM samples NATURAL JOIN sample_digests").fetchall()
        parts = database.execute("SELECT * FROM sample_parts ORDER BY content_byte_offset").fetchall()
    found = []
    for tar, _, row, offset, size, noted in rows:
        data, at, known = (folder / names[tar]).read_bytes(), offset, b""
        for _, _, _, start, length in (part for part in parts if part[:2] == (tar, row)):
            known += data[at:start] + xxhash.xxh3_128_digest(data[start : start + length])
            at = start + length
        found.append((xxhash.xxh3_64_digest(known + data[at : offset + size]), noted))
    return found


def test_the_index_has_the_digest_of_every_sample_merged_and_adopted_ones_too(tmp_path):
    raw = Raw(tmp_path, [record(i, [None, "a.png", ["a.png", "b.jpg"]][i % 3]) for i in range(40)])
    for number in range(40):  # no two share an image
        (raw.images / f"{number}.png").write_bytes(picture(size=(28 + number, 28)))
    raw.path.write_text("".join(json.dumps(record(i, f"{i}.png")) + "\n" for i in range(40)))
    raw.convert()
    dataset = indexed(raw, val_fraction=0.2)
    adopt_webdataset(raw.wds, tmp_path / "adopted")
    for folder, count in ((raw.wds, 40 + dataset["heldout"]["samples"]), (tmp_path / "adopted", 40)):
        digests = digests_of(folder)
        assert len(digests) >= count
        assert all(found == noted for found, noted in digests)
