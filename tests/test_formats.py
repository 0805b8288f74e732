"""The same records in any format and any cut are the same samples; what is damaged is rejected and nothing else."""

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.webdatasets import Raw, contents, picture, record
from llava_sft.data import formats
from llava_sft.data.formats import FORMATS, format_of
from llava_sft.data.index import index_webdataset
from llava_sft.data.plan import plan_ranges
from llava_sft.data.records import parse_json, parse_record
from llava_sft.data.rejects import Rejected, read_rejects
from llava_sft.data.shards import convert_range
from llava_sft.errors import DataError
from llava_sft.files import write_json


def openai(number: int, image: str | None) -> dict:
    content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": f"Question {number}?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Answer {number}."}]
    return {"id": f"r{number}", "messages": messages} | ({"images": [image]} if image else {})


def convert(raw: Raw, path: Path, range_bytes: int = 600) -> list[dict]:
    raw.path = path
    raw.wds, raw.parts = raw.folder / path.stem, raw.folder / f"{path.stem}.parts"
    return raw.convert(range_bytes=range_bytes)


def samples(raw: Raw) -> list[tuple]:
    rows = [json.loads(line) for path in sorted(raw.parts.glob("*.samples.jsonl")) for line in path.open()]
    return [(row["id"], [image["hash"] for image in row["images"]]) for row in rows]


def write_parquet(path: Path, rows: list[dict], row_group: int = 4) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
    return path


def test_one_set_of_records_in_every_format_and_form_gives_the_same_samples(tmp_path):
    images = [[None, "a.png", "b.jpg"][i % 3] for i in range(30)]
    llava = [record(i, image) for i, image in enumerate(images)]
    raw = Raw(tmp_path, llava)
    embedded = [
        {
            "id": f"r{i}",
            "image": image and {"bytes": (raw.images / image).read_bytes(), "path": None},
            "conversations": llava[i]["conversations"],
        }
        for i, image in enumerate(images)
    ]
    listed = [row | {"image": None, "images": [row["image"]] if row["image"] else []} for row in embedded]
    (tmp_path / "compact.json").write_text(json.dumps(llava))
    (tmp_path / "pretty.json").write_bytes(b"\xef\xbb\xbf " + json.dumps(llava, indent=4).encode() + b"\n\n")
    (tmp_path / "openai.jsonl").write_text(
        "".join(json.dumps(openai(i, image)) + "\n" for i, image in enumerate(images))
    )
    (tmp_path / "lines.json").write_bytes(raw.path.read_bytes())  # JSON lines under the usual wrong name
    write_parquet(tmp_path / "hub.parquet", embedded)
    write_parquet(tmp_path / "list.parquet", listed)
    expected = [(r["id"], [] if image is None else [image]) for r, image in zip(llava, images, strict=True)]
    convert(raw, raw.path)
    told = samples(raw)
    assert [(name, len(hashes)) for name, hashes in told] == [(name, len(i)) for name, i in expected]
    for name in ("compact.json", "pretty.json", "openai.jsonl", "lines.json", "hub.parquet", "list.parquet"):
        stats = convert(raw, tmp_path / name)
        assert len(stats) > 3, name
        assert samples(raw) == told, name
        assert index_webdataset(raw.wds, raw.parts)["read"] == 30


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(alphabet='ab\\"[]{},é\n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='a"\\,{', max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=8), st.integers(1, 80), st.integers(1, 40), st.sampled_from([None, 1]))
def test_ranges_share_out_the_elements_of_any_array(values, range_bytes, block, indent):
    raw = json.dumps(values, indent=indent, ensure_ascii=False).encode()
    file = io.BytesIO(raw)
    kept, formats.BLOCK = formats.BLOCK, block
    try:
        starts = FORMATS["json"].starts(file, len(raw), range_bytes)
        found, digested = [], []
        for start, end in zip(starts, [*starts[1:], len(raw)], strict=True):
            found += [json.loads(line.data) for line in FORMATS["json"].read(file, start, end, digested.append)]
    finally:
        formats.BLOCK = kept
    assert found == values
    assert b"".join(digested) == raw


@given(st.binary(max_size=60), st.integers(0, 60), st.integers(1, 30))
@example(b'[{"a": "\\', 0, 5)
@example(b"[1, 2", 0, 5)
@example(b"[1] [2]", 0, 5)
def test_any_bytes_in_an_array_file_are_records_or_rejects_and_never_a_traceback(data, cut, range_bytes):
    good = json.dumps([record(1, None), record(2, None)]).encode()
    raw = good[: min(cut, len(good))] + data + good[cut:]
    file = io.BytesIO(b"[" + raw)
    starts = FORMATS["json"].starts(file, len(raw) + 1, range_bytes)
    for start, end in zip(starts, [*starts[1:], len(raw) + 1], strict=True):
        for line in FORMATS["json"].read(file, start, end, lambda _: None):
            try:
                parsed = parse_json(line)
                if parsed is not None:
                    parse_record(parsed)
            except Rejected as rejected:
                assert rejected.reason


def test_a_bad_element_of_an_array_costs_itself_alone(tmp_path):
    raw = Raw(tmp_path, [])
    elements = [json.dumps(record(i, None)) for i in range(9)]
    elements[2], elements[5] = '{"id": 2, nonsense}', "[1, 2]"
    (tmp_path / "raw.json").write_text("[\n" + ",\n".join(elements) + "\n]")
    stats = convert(raw, tmp_path / "raw.json", 300)
    assert [name for name, _ in samples(raw)] == [f"r{i}" for i in (0, 1, 3, 4, 6, 7, 8)]
    rejects = list(read_rejects(raw.parts, stats))
    assert [(r["word"], r["line"], r["reason"]) for r in rejects] == [
        ("record", 3, "invalid JSON"),
        ("record", 6, "not a JSON object"),
    ]


@pytest.mark.parametrize("ending", ["", ",", "\n, ", ', {"id": 7', "] x", "] ]"])
def test_an_array_that_is_cut_off_or_goes_on_is_noticed(tmp_path, ending):
    raw = Raw(tmp_path, [])
    (tmp_path / "raw.json").write_text("[" + ", ".join(json.dumps(record(i, None)) for i in range(3)) + ending)
    stats = convert(raw, tmp_path / "raw.json", 10_000)
    assert sum(s["rejected"] for s in stats) == 1
    assert sum(s["written"] for s in stats) >= 2


def test_appending_to_an_array_and_adding_row_groups_changes_the_last_range_only(tmp_path):
    records = [record(i, None) for i in range(40)]
    for name, write in (("raw.json", lambda p, r: p.write_text(json.dumps(r))), ("raw.parquet", write_parquet)):
        path = tmp_path / name
        write(path, records[:32])
        before = plan_ranges(path, 600)
        assert len(before) > 3
        write(path, records)
        assert plan_ranges(path, 600)[: len(before) - 1] == before[:-1]


def short_records(count: int, image: bool = True, words: int = 1) -> list[bytes]:
    asked = "<image>" * image + "What? " * words
    rest = {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "A cat."}]}
    return [json.dumps({"id": n, "image": "a.png" if image else None} | rest).encode() for n in range(count)]


@pytest.mark.parametrize(("name", "glue"), [("raw.jsonl", b"\n"), ("raw.json", b",\n")])
def test_short_records_with_images_are_cut_by_images_and_every_other_text_by_bytes(tmp_path, name, glue):
    def plan(records: list[bytes]) -> list:
        begin, end = (b"[", b"]") if glue != b"\n" else (b"", b"\n")
        (tmp_path / name).write_bytes(begin + glue.join(records) + end)
        return plan_ranges(tmp_path / name, stats_of=lambda shard: tmp_path / f"{shard}.stats.json")

    records = short_records(50_000)
    cut = plan(records)
    assert 5 <= len(cut) <= 10
    assert plan([*records, *short_records(9_000)])[: len(cut) - 1] == cut[:-1]
    assert len(plan(short_records(50_000, image=False))) == 1
    assert len(plan(short_records(5_000, words=200))) == 1
    assert len(plan(short_records(1_000))) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_a_data_set_that_is_cut_by_bytes_stays_cut_so(tmp_path, damaged):
    def stats_of(shard: int) -> Path:
        return tmp_path / f"{shard}.stats.json"

    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(b"\n".join(short_records(100_000)))
    before = plan_ranges(raw, file_number=1)
    assert [part.end - part.start > 4 << 20 for part in before] == [True, True]
    for part in before:
        noted = {"path": str(raw), "start": part.start, "end": part.end}
        write_json(stats_of(part.number), {"raw": noted}, sealed=True)
    if damaged:
        os.truncate(stats_of(before[0].number), 30)
    assert plan_ranges(raw, file_number=1, stats_of=stats_of) == before
    for part in before:
        stats_of(part.number).unlink()
    cut = plan_ranges(raw, file_number=1, stats_of=stats_of)
    assert len(cut) > 8
    first = {"path": str(raw), "start": 0, "end": cut[0].end}
    write_json(stats_of(cut[0].number), {"raw": first}, sealed=True)
    assert plan_ranges(raw, file_number=1, stats_of=stats_of) == cut


def test_the_plan_of_an_array_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([record(i, None) for i in range(30)]))
    plan = plan_ranges(path, 600, cache=tmp_path / "plans")
    scan = FORMATS["json"]
    monkeypatch.setitem(FORMATS, "json", scan._replace(starts=lambda *_: pytest.fail("scanned again")))
    assert plan_ranges(path, 600, cache=tmp_path / "plans") == plan
    monkeypatch.setitem(FORMATS, "json", scan)
    path.write_text(json.dumps([record(i, None) for i in range(60)]))
    assert plan_ranges(path, 600, cache=tmp_path / "plans")[-1].end == path.stat().st_size


def test_bad_rows_of_a_parquet_file_are_rejected_with_their_number(tmp_path):
    raw = Raw(tmp_path, [])
    png = picture()
    blobs = [png, b"", png[:50], None, png]
    rows = [record(i, "x") | {"image": {"bytes": blob, "path": "nowhere.png"}} for i, blob in enumerate(blobs)]
    stats = convert(raw, write_parquet(tmp_path / "raw.parquet", rows, 2), 1)
    assert [(r["word"], r["line"], r["reason"]) for r in read_rejects(raw.parts, stats)] == [
        ("row", 2, "zero-byte image"),
        ("row", 3, "truncated or damaged image"),
        ("row", 4, "missing image"),
    ]
    assert [s["read"] for s in stats] == [2, 2, 1]


def test_a_text_that_is_no_utf8_costs_its_own_row(tmp_path):
    raw = Raw(tmp_path, [])
    rows = [record(i, None) for i in range(3)]
    table = pa.Table.from_pylist(rows)
    ids = pa.array([b"a", b"\xff", b"c"]).cast(pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("id"), "id", ids), tmp_path / "raw.parquet")
    stats = convert(raw, tmp_path / "raw.parquet")
    assert stats[0]["reasons"] == {"invalid UTF-8": 1}
    assert stats[0]["written"] == 2


def test_a_damaged_row_group_costs_its_rows_and_no_others(tmp_path):
    raw = Raw(tmp_path, [])
    path = write_parquet(tmp_path / "raw.parquet", [record(i, None) for i in range(12)], 4)
    group = pq.ParquetFile(path).metadata.row_group(1)
    data = bytearray(path.read_bytes())
    for column in map(group.column, range(group.num_columns)):
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    stats = convert(raw, path)
    assert sum(s["read"] for s in stats) == 12
    assert [name for name, _ in samples(raw)] == [f"r{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert {reject["reason"] for reject in read_rejects(raw.parts, stats)} == {"damaged row group"}


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"PAR1"])
def test_a_damaged_parquet_file_is_one_message(tmp_path, damage):
    path = write_parquet(tmp_path / "raw.parquet", [record(i, None) for i in range(9)])
    path.write_bytes(damage(path.read_bytes()))
    raw = Raw(tmp_path, [])
    with pytest.raises(DataError, match=r"raw\.parquet"):
        convert(raw, path)


def test_a_format_is_known_by_its_content_where_the_name_does_not_say(tmp_path):
    for name, data, expected in (
        ("a.json", b" \n[{}]", "json"),
        ("b.json", b"{}\n{}", "jsonl"),
        ("c", b"PAR1....", "parquet"),
        ("d.JSONL", b"[1]\n", "jsonl"),
    ):
        (tmp_path / name).write_bytes(data)
        assert format_of(tmp_path / name) == expected


def test_a_tar_that_grows_too_large_names_the_setting_and_a_value_that_fits(tmp_path):
    raw = Raw(tmp_path, [record(i) for i in range(40)])
    (raw.images / "a.png").write_bytes(os.urandom(50_000).join([picture(), b""]) + picture())
    part = plan_ranges(raw.path, 1 << 20)[0]
    with pytest.raises(DataError, match="max_shard_bytes") as error:
        convert_range(raw.path, raw.images, raw.wds, raw.parts, "subtaskdata", part, max_shard_bytes=1_000_000)
    finer = int(error.value.fix.split("shard_bytes: ")[1])
    assert not (raw.wds / "subtaskdata-00000.tar").exists()
    for part in plan_ranges(raw.path, finer):
        convert_range(raw.path, raw.images, raw.wds, raw.parts, "subtaskdata", part, max_shard_bytes=1_000_000)
    assert index_webdataset(raw.wds, raw.parts)["train"]["samples"] == 40


def test_shards_of_several_files_keep_their_names_when_one_grows(tmp_path):
    raw = Raw(tmp_path, [record(i) for i in range(20)])
    names = [f"{n}.jsonl" for n in range(3)]
    for name in names:
        (tmp_path / name).write_bytes(raw.path.read_bytes())

    def convert_all() -> None:
        for number, name in enumerate(names):
            for part in plan_ranges(tmp_path / name, 600, number):
                convert_range(tmp_path / name, raw.images, raw.wds, raw.parts, "subtaskdata", part)

    convert_all()
    before = contents(raw.wds)
    with open(tmp_path / names[0], "ab") as file:
        file.write(b"".join(json.dumps(record(100 + i)).encode() + b"\n" for i in range(9)))
    convert_all()
    changed = {name for name, data in before.items() if contents(raw.wds)[name] != data}
    assert all(name.startswith("subtaskdata-0") for name in changed)
    assert index_webdataset(raw.wds, raw.parts)["train"]["samples"] == 69
