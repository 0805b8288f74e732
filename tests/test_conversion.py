"""Nothing is lost, nothing bad is let in, and the same input always gives the same bytes."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import SCRIPTS
from helpers.webdatasets import Raw, contents, picture, record
from llava_sft.data.plan import Range, plan_ranges
from llava_sft.data.shards import TarWriter, convert_range, idx_bytes
from llava_sft.errors import DataError


def rows(raw: Raw, kind: str) -> list[dict]:
    lines = [line for path in sorted(raw.parts.glob(f"*.{kind}.jsonl")) for line in path.read_bytes().splitlines()]
    return [json.loads(line) for line in lines]


def test_members_hold_the_original_bytes_and_the_json_names_them_in_order(tmp_path):
    raw = Raw(tmp_path, [record(0, ["b.jpg", "wrong_name.gif"], kind="two"), record(1, None)])
    (raw.images / "wrong_name.gif").write_bytes(picture())
    raw.convert()
    with tarfile.open(raw.wds / "subtaskdata-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(members) == ["00000_000000.000.jpg", "00000_000000.001.png", "00000_000000.json", "00000_000001.json"]
    assert members["00000_000000.000.jpg"] == (raw.images / "b.jpg").read_bytes()
    sample = json.loads(members["00000_000000.json"])
    assert sample["images"] == ["000.jpg", "001.png"]
    assert sample["meta"] == {"kind": "two"}
    assert sample["messages"][1] == {"role": "assistant", "content": "Answer 0."}


def test_tar_reads_what_is_written_and_so_does_the_system_tar(tmp_path):
    members = {f"00000_{size:06d}.json": os.urandom(size) for size in (0, 1, 511, 512, 513, 300_000)}
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        tar = TarWriter(file)
        offsets = [tar.add(name, data) for name, data in members.items()]
        tar.finish()
    raw = path.read_bytes()
    assert all(raw[at : at + len(data)] == data for at, data in zip(offsets, members.values(), strict=True))
    with tarfile.open(path) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == members
    assert subprocess.check_output(["tar", "tf", path], text=True).split() == list(members)


def test_every_defect_is_rejected_with_its_reason_and_the_neighbours_are_kept(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture())
    jpeg, png = picture("JPEG", (64, 64)), picture("PNG", (64, 64))
    files = {
        "empty.png": b"",
        "text.png": b"this is text",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "tiny.png": picture(size=(13, 64)),
        "strip.png": picture(size=(14, 2801)),
        "bomb.png": picture(size=(10_001, 10_000), mode="1"),
    }
    expected = {
        "nowhere.png": "missing image",
        "folder": "missing image",
        "a\0b.png": "missing image",
        "empty.png": "zero-byte image",
        "text.png": "not an image",
        "cut.jpg": "truncated or damaged image",
        "cut.png": "truncated or damaged image",
        "tiny.png": "image side under the patch size",
        "strip.png": "absurd aspect ratio",
        "bomb.png": "image has too many pixels",
        str(outside): "image outside the image root",
        "../outside.png": "image outside the image root",
        "link.png": "image outside the image root",
        "linked_folder/outside.png": "image outside the image root",
        "circle.png": "missing image",
    }
    bad = [record(i, image) for i, image in enumerate(expected)] + [b"{nonsense\n", b'{"id": 9}\n']
    good = [record(100 + i) for i in range(len(bad) + 1)]
    mixed = [line for pair in zip(good, bad, strict=False) for line in pair] + [good[-1]]
    raw = Raw(tmp_path, mixed)
    for name, data in files.items():
        (raw.images / name).write_bytes(data)
    (raw.images / "folder").mkdir()
    (raw.images / "link.png").symlink_to(outside)
    (raw.images / "linked_folder").symlink_to(tmp_path)
    (raw.images / "circle.png").symlink_to("circle.png")
    stats = raw.convert()
    rejects = rows(raw, "rejects")
    assert [reject["reason"] for reject in rejects] == [*expected.values(), "invalid JSON", "missing key"]
    assert [reject["id"] for reject in rejects] == [f"r{i}" for i in range(len(expected))] + [None, "9"]
    lines = raw.path.read_bytes()
    assert all(lines[: reject["byte"]].endswith(b"\n") for reject in rejects)
    assert [sample["id"] for sample in rows(raw, "samples")] == [line["id"] for line in good]
    assert sum(s["read"] for s in stats) == len(mixed) == sum(s["written"] + s["rejected"] for s in stats)


def test_a_link_within_the_image_root_is_followed(tmp_path):
    raw = Raw(tmp_path, [record(0, "link.png")])
    (raw.images / "link.png").symlink_to("a.png")
    assert raw.convert()[0]["written"] == 1


def test_same_input_gives_the_same_bytes_in_any_order_of_jobs(tmp_path):
    records = [record(i, "b.jpg" if i % 3 else None) for i in range(50)]
    one, two = Raw(tmp_path / "one", records), Raw(tmp_path / "two", records)
    numbers = [stats["shard"] for stats in one.convert()]
    assert len(numbers) > 5
    for number in reversed(range(len(numbers))):
        two.convert(only={number})
    assert contents(one.wds) == contents(two.wds)


def test_appending_changes_the_last_range_only(tmp_path):
    raw = Raw(tmp_path, [record(i) for i in range(20)])
    before_plan = plan_ranges(raw.path, 600)
    raw.convert()
    before = contents(raw.wds)
    with open(raw.path, "ab") as file:
        file.write(json.dumps(record(20)).encode() + b"\n")
    plan = plan_ranges(raw.path, 600)
    assert plan[: len(before_plan) - 1] == before_plan[:-1]
    assert plan[len(before_plan) - 1] != before_plan[-1]
    raw.convert()
    changed = {name for name, data in contents(raw.wds).items() if before.get(name) != data}
    assert all(int(name[12:17]) >= len(before_plan) - 1 for name in changed)


def test_a_range_without_a_record_start_gives_an_empty_shard(tmp_path):
    raw = Raw(tmp_path, [record(0, None, text="x" * 2000), record(1, None)])
    stats = raw.convert()
    assert [s["written"] for s in stats] == [1, 0, 0, 1]
    with tarfile.open(raw.wds / "subtaskdata-00001.tar") as tar:
        assert tar.getmembers() == []


def test_a_user_mistake_is_one_clear_message(tmp_path):
    raw = Raw(tmp_path, [record(0)])
    size = raw.path.stat().st_size
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((tmp_path / "no.jsonl", raw.images, raw.wds, Range(0, 0, 1)), "does not exist"),
        ((raw.path, tmp_path / "no", raw.wds, Range(0, 0, size)), "is not a folder"),
        ((raw.path, raw.images, tmp_path / "file" / "wds", Range(0, 0, size)), "cannot write to"),
        ((raw.path, raw.images, raw.wds, Range(0, size, size + 5)), "does not lie in"),
    ):
        source, images, wds, part = arguments
        with pytest.raises(DataError, match=message):
            convert_range(source, images, wds, raw.parts, "subtaskdata", part)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        plan_ranges(tmp_path / "empty.jsonl")


def test_a_job_that_fails_leaves_no_shard_that_counts(tmp_path, monkeypatch):
    raw = Raw(tmp_path, [record(i) for i in range(3)])
    raw.convert()

    def broken_disk(data, max_pixels):
        raise OSError("disk failure")

    monkeypatch.setattr("llava_sft.data.shards.check_image", broken_disk)
    with pytest.raises(OSError, match="disk failure"):
        raw.convert()
    assert "subtaskdata-00000.stats.json" not in contents(raw.parts)
    assert not [name for name in contents(raw.wds, raw.parts) if name.endswith(".tmp")]


def test_planning_needs_the_standard_library_only():
    code = "import llava_sft.data.plan, sys; print(sorted({'torch', 'PIL', 'orjson', 'yaml', 'pydantic'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=SCRIPTS).strip() == "[]"


def test_by_hand_the_whole_file_is_converted_and_the_next_step_named(tmp_path):
    raw = Raw(tmp_path, [record(i) for i in range(10)])
    script = [sys.executable, SCRIPTS / "stage2_sftdata2webdataset.py", "--input", raw.path, "--output-dir", raw.wds]
    done = subprocess.run([*script, "--image-root", raw.images, "--range-bytes", "600"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "10 records read, 10 written, 0 rejected" in done.stdout
    assert "index_webdataset.py" in done.stdout
    failed = subprocess.run([*script, "--image-root", tmp_path / "no"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "image root" in failed.stderr


names = st.text(alphabet="abcXYZ019_.é", min_size=1, max_size=30)


@given(st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6))
def test_any_members_are_read_back_and_the_index_holds_their_places(members):
    buffer = BytesIO()
    tar = TarWriter(buffer)
    starts = []
    for number, (name, data) in enumerate(members):
        starts.append(tar.offset)
        tar.add(f"{number:02d}_{name}", data)
    end = tar.offset
    tar.finish()
    idx = BytesIO()
    idx.write(idx_bytes(starts, end))
    assert [int.from_bytes(idx.getvalue()[i : i + 8], "little") for i in range(0, len(idx.getvalue()), 8)] == [
        *starts,
        end,
    ]
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as read:
        infos = read.getmembers()
        assert [(info.name[3:], read.extractfile(info).read()) for info in infos] == members
        assert [info.offset for info in infos] == starts


def test_eight_jobs_at_once_give_the_bytes_of_one(tmp_path):
    records = [record(i, ["a.png", "b.jpg", None][i % 3]) for i in range(200)]
    one, eight = Raw(tmp_path / "one", records), Raw(tmp_path / "eight", records)
    one.convert()
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        job = functools.partial(convert_range, eight.path, eight.images, eight.wds, eight.parts, "subtaskdata")
        stats = pool.map(job, plan_ranges(eight.path, 600), chunksize=1)
    assert sum(s["written"] for s in stats) == 200
    assert contents(one.wds) == contents(eight.wds)


def test_twenty_kills_cost_nothing_but_time(tmp_path):
    records = [record(i, ["a.png", None][i % 2]) for i in range(3000)]
    undisturbed, killed = Raw(tmp_path / "one", records), Raw(tmp_path / "two", records)
    undisturbed.convert(range_bytes=40_000)
    job = (
        "import sys; from pathlib import Path; from llava_sft.data.plan import plan_ranges;"
        "from llava_sft.data.shards import convert_range; raw, images, wds, parts = map(Path, sys.argv[1:]);"
        "print('ready', flush=True);"
        "[convert_range(raw, images, wds, parts, 'subtaskdata', part) for part in plan_ranges(raw, 40_000)"
        " if not (parts / f'subtaskdata-{part.number:05d}.stats.json').exists()]"
    )
    command = [sys.executable, "-c", job, killed.path, killed.images, killed.wds, killed.parts]
    draw = random.Random(7)
    for attempt in range(21):
        process = subprocess.Popen(command, cwd=SCRIPTS, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        if attempt < 20:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, 0.03))
            process.kill()
        process.communicate()
        for stats in killed.parts.glob("*.stats.json"):  # what counts as made is whole
            made = json.loads(stats.read_bytes())
            assert (killed.wds / f"{made['shard']}.tar").stat().st_size == made["tar"]["bytes"]
    assert process.returncode == 0
    whole = contents(killed.wds)
    assert {name: data for name, data in whole.items() if not name.endswith(".tmp")} == contents(undisturbed.wds)
    assert not [name for name in whole if name.endswith(".tmp")]
