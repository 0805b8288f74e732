"""What stands in a raw file reaches the samples as it was written: ids of any length, tables as spreadsheets save them."""

import contextlib
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.webdatasets import Raw, picture, tar_of
from llava_sft.data.adopt import adopt_webdataset
from llava_sft.data.formats import FORMATS
from llava_sft.data.index import index_webdataset
from llava_sft.data.plan import plan_ranges
from llava_sft.data.records import Line, parse_json, parse_record
from llava_sft.data.rejects import Rejected
from llava_sft.data.shards import convert_range
from llava_sft.data.stored import read_split
from llava_sft.data.values import exact_json

PAIR = {"question": "What?", "answer": "This."}
LONG = ["18446744073709551616", "-9223372036854775809", "123456789012345678901234567890", "9" * 300]
ODD = [*LONG, "1.10", "1e5", "0.30000000000000001"]


def with_id(written: str, **more) -> bytes:
    return json.dumps({"id": "ID"} | PAIR | more).replace('"ID"', written).encode()


def samples(tmp_path, name: str, data: bytes) -> list:
    raw = Raw(tmp_path, [])
    (tmp_path / name).write_bytes(data)
    for part in plan_ranges(tmp_path / name, 100):
        convert_range(tmp_path / name, raw.images, raw.wds, raw.parts, "subtaskdata", part)
    assert index_webdataset(raw.wds, raw.parts)["rejected"] == 0
    return list(read_split(raw.wds, "train"))


@pytest.mark.parametrize("name", ["raw.jsonl", "raw.json"])
def test_ids_are_those_that_were_written_whatever_their_size(tmp_path, name):
    lines = [with_id(written, group=7) for written in ODD]
    found = samples(tmp_path, name, b"\n".join(lines) if name == "raw.jsonl" else b"[" + b",".join(lines) + b"]")
    assert [sample.id for sample in found] == ODD and all(sample.meta == {"group": 7} for sample in found)


def test_ids_beside_pictures_in_tars_are_those_that_were_written(tmp_path):
    turns = json.dumps([{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}])
    record = '{"id": %s, "conversations": %s}'
    files = {}
    for number, written in enumerate(ODD):
        files |= {f"{number}.jpg": picture("JPEG"), f"{number}.json": (record % (written, turns)).encode()}
    tar_of(tmp_path / "theirs/a.tar", files)
    adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")
    assert sorted(sample.id for sample in read_split(tmp_path / "ours", "train")) == sorted(ODD)


@given(st.integers(-(10**30), 10**30))
def test_whole_numbers_anywhere_in_a_record_keep_their_digits(number):
    held = exact_json(f'{{"a": {number}, "b": [{{"c": {number}, "d": 1.5}}], "e": 1e30}}'.encode())
    fits = -(1 << 63) <= number < 1 << 64
    assert held == {"a": number if fits else str(number), "b": [{"c": held["a"], "d": 1.5}], "e": 1e30}


def test_another_number_of_a_record_stays_a_number():
    sample = parse_record(parse_json(Line(1, 0, with_id("7", score=1.50, size=2e20))))
    assert (sample.id, sample.meta) == ("7", {"score": 1.5, "size": 2e20})


@pytest.mark.parametrize(
    "record", [with_id("1" * 400), b'{"id": 18446744073709551616, "x": ' + b"[" * 900 + b"]" * 900 + b"}"]
)
def test_what_cannot_be_kept_is_rejected(record):
    with contextlib.suppress(Rejected):
        assert parse_json(Line(1, 0, record))["id"] == "18446744073709551616"


TABLE = "image,question,answer\na.png,What?,This.\nb.jpg,Which one?,That; other.\n"
FIRST = {
    "sep=,": ",",
    "sep=;": ";",
    "SEP=;": ";",
    '"sep=;"': ";",
    "sep=|": "|",
    "sep=\t": "\t",
    "sep=^": "^",
    "sep=,,,": ",",
}


@pytest.mark.parametrize("before", FIRST)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_first_line_of_excels_names_the_separator_and_is_no_row(tmp_path, before, mark):
    text = (
        f"{before}\n" + TABLE.replace(",", FIRST[before])
        if FIRST[before] != ";"
        else f"{before}\n" + TABLE.replace("That;", "That").replace(",", ";")
    )
    found = samples(tmp_path, "raw.csv", mark + text.replace("\n", "\r\n").encode())
    questions = [sample.messages[0]["content"] for sample in found]
    assert questions == ["<image>\nWhat?", "<image>\nWhich one?"] and found[0].messages[1]["content"] == "This."


@given(st.lists(st.sampled_from(["a;b", "sep=;", "c", "é"]), min_size=1, max_size=6), st.integers(1, 40))
def test_ranges_share_out_the_rows_below_such_a_line(cells, range_bytes):
    data = ("sep=,\nfirst,second\n" + "".join(f"{cell},x\n" for cell in cells)).encode()
    file, found, digested = io.BytesIO(data), [], []
    starts = FORMATS["table"].starts(file, len(data), range_bytes)
    for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
        found += [parse_json(line) for line in FORMATS["table"].read(file, start, end, digested.append)]
    assert [row["first"] for row in found if row] == cells and b"".join(digested) == data


def test_a_column_of_that_name_is_a_column(tmp_path):
    found = samples(tmp_path, "raw.csv", b"sep=1,question,answer\nx,What?,This.\n")
    assert len(found) == 1 and found[0].meta == {"sep=1": "x"}
