"""Data as people have it: each form is read to the same conversation and picture, to the byte, and what does not count does not."""

import base64
import csv
import gzip
import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.webdatasets import Raw, picture, record, tar_of
from llava_sft.data.adopt import adopt_webdataset
from llava_sft.data.findings import TokenCounter
from llava_sft.data.formats import FORMATS, format_of
from llava_sft.data.forms import Reading
from llava_sft.data.index import index_webdataset
from llava_sft.data.inspect import inspect_webdataset
from llava_sft.data.other_forms import Unread
from llava_sft.data.plan import plan_ranges
from llava_sft.data.records import parse_json, parse_record
from llava_sft.data.rejects import Rejected
from llava_sft.data.shards import convert_range
from llava_sft.data.stored import read_split
from llava_sft.errors import DataError, SettingsError
from llava_sft.model.template import ChatTemplate, UnusableSample
from llava_sft.report.inspection import inspection_page
from llava_sft.settings.layers import load_settings
from llava_sft.sources import find_sources
from llava_sft.workflow import _reading_options

Q, A = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Green."}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Green."}
SEEN = [{"role": "user", "content": "<image>\nWhat?"}, A]
CAPTION = [{"role": "user", "content": "<image>\nDescribe the image."}, {"role": "assistant", "content": "A leaf."}]
PNG = picture()
IN_TEXT = base64.b64encode(PNG).decode()

# Record, the settings it is read with, the messages, the images.
READ = {
    "image and caption": ({"id": 1, "image": "a.png", "caption": "A leaf."}, {}, CAPTION, ["a.png"]),
    "image and text": ({"image": "a.png", "text": "A leaf."}, {}, CAPTION, ["a.png"]),
    "a table of a folder of images": ({"file_name": "a.png", "text": "A leaf."}, {}, CAPTION, ["a.png"]),
    "caption and a prompt": (
        {"image": "a.png", "txt": "A leaf."}, {"caption_prompt": "<image>What is seen?"},
        [{"role": "user", "content": "<image>What is seen?"}, CAPTION[1]], ["a.png"],
    ),
    "The Cauldron": (
        {"images": [{"bytes": PNG, "path": None}], "texts": [{"user": "What?", "assistant": "Green.", "source": "x"}] * 2},
        {}, [*SEEN, Q, A], [PNG],
    ),
    "pairs in lists": ({"conversations": [["What?", "Green."]] * 2}, {}, [Q, A, Q, A], []),
    "pairs of XTuner": ({"conversation": [{"system": "Be brief.", "input": "What?", "output": "Green."}]}, {}, [SYSTEM, Q, A], []),
    "parts with a data URL": (
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IN_TEXT}"}}, {"type": "text", "text": "\nWhat?"},
        ]}, A]}, {}, SEEN, [f"data:image/png;base64,{IN_TEXT}"],
    ),
    "parts of Anthropic": (
        {"messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IN_TEXT}}, "\nWhat?",
        ]}, A]}, {}, SEEN, [IN_TEXT],
    ),
    "a struct of lists": ({"image": "a.png", "conversations": {"from": ["human", "gpt"], "value": ["<image>\nWhat?", "Green."]}}, {}, SEEN, ["a.png"]),
    "JSON in a string": ({"image": '["a.png"]', "conversations": json.dumps([HUMAN, GPT])}, {}, SEEN, ["a.png"]),
    "system beside the turns": ({"conversations": [HUMAN, GPT], "system": "Be brief.", "tools": "", "image": "a.png"}, {}, [SYSTEM, *SEEN], ["a.png"]),
    "ms-swift": (
        {"query": "<image>\nWhat?", "response": "Green.", "history": [["What?", "Green."]], "system": "Be brief.", "images": ["a.png"]},
        {}, [SYSTEM, Q, A, *SEEN], ["a.png"],
    ),
    "Alpaca": ({"instruction": "What", "input": "now?", "output": "Green."}, {}, [{"role": "user", "content": "What\nnow?"}, A], []),
    "prompt and completion of messages": ({"prompt": [SYSTEM, Q], "completion": [A]}, {}, [SYSTEM, Q, A], []),
    "VQAv2": (
        {"question": "What?", "answers": [{"answer": "Red.", "answer_id": 1}], "multiple_choice_answer": "Green.", "image": {"bytes": None, "path": "a.png"}},
        {}, SEEN, ["a.png"],
    ),
    "several equal answers in a cell": ({"question": "What?", "answers": '["Green.", "Green."]', "image": "['a.png']"}, {}, SEEN, ["a.png"]),
    "VQAv2 in a cell": (
        {"question": "What?", "answers": "[{'answer': 'Green.', 'answer_id': 1}, {'answer': 'Green.', 'answer_id': 2}]", "image": "{'path': 'a.png'}"},
        {}, SEEN, ["a.png"],
    ),
    "several equal answers": ({"question": "What?", "answers": ["Green."] * 10, "image": "a.png"}, {}, SEEN, ["a.png"]),
    "the first of several answers": (
        {"question": "What?", "answers": [{"text": "Green."}, {"text": "b"}], "image": "a.png"},
        {"columns": {"answer": "answers.0.text"}}, SEEN, ["a.png"],
    ),
    "columns": ({"q": "What?", "a": "Green.", "file": "a.png"}, {"columns": {"question": "q", "answer": "a", "image": "file"}}, SEEN, ["a.png"]),
    "an answer chosen among keys": ({"question": "What?", "answer": "Green.", "solution": "x"}, {"columns": {"answer": "answer"}}, [Q, A], []),
    "Qwen-VL": (
        {"conversations": [{"from": "user", "value": "Picture 1: <img>a/b.png</img>\nWhat?"}, {"from": "assistant", "value": "Green."}]},
        {}, [{"role": "user", "content": "Picture 1: <image>\nWhat?"}, A], ["a/b.png"],
    ),
    "Qwen-VL with a long name": ({"messages": [Q | {"content": f"<img>{'a' * 999}.png</img>\nWhat?"}, A]}, {}, SEEN, ["a" * 999 + ".png"]),
    "image_path": ({"image_path": "a.png", "messages": [SEEN[0], A]}, {}, SEEN, ["a.png"]),
    "image_first": ({"images": ["a.png", "b.png"], "messages": [SYSTEM, Q, A]}, {"image_first": True},
                    [SYSTEM, {"role": "user", "content": "<image>\n<image>\nWhat?"}, A], ["a.png", "b.png"]),
    "other roles": ({"conversations": [{"from": "User", "value": "What?"}, {"from": "chatgpt", "value": "Green."}]}, {}, [Q, A], []),
    "loss: false": ({"messages": [Q, A | {"loss": False}, Q, A | {"loss": True}]}, {}, [Q, A | {"loss": False}, Q, A], []),
    "weight: 0": ({"messages": [Q, A | {"weight": 0}, Q, A | {"weight": 1}]}, {}, [Q, A | {"loss": False}, Q, A], []),
    "loss: false of a pair": ({"texts": [{"user": "What?", "assistant": "Green.", "loss": False}, {"user": "What?", "assistant": "Green."}]},
                              {}, [Q, A | {"loss": False}, Q, A], []),
}  # fmt: skip


@pytest.mark.parametrize("form", READ)
def test_each_form_is_read_to_the_letter(form):
    raw, reading, messages, images = READ[form]
    unread = Unread()
    sample = parse_record(raw, unread, Reading(**reading))
    assert (sample.messages, sample.images) == (messages, images)
    assert set(unread) <= {"answers"}


def test_columns_that_the_record_lacks_are_said_with_those_that_there_are():
    with pytest.raises(Rejected, match=r"missing column: columns names q, there are: question"):
        parse_record({"question": "What?"}, None, Reading({"question": "q"}))


@pytest.fixture(scope="module")
def template(small_checkpoint):
    return ChatTemplate(small_checkpoint)


def test_an_answer_that_does_not_count_is_in_the_text_and_not_in_the_loss(template):
    turns = [Q, {"role": "assistant", "content": "\nFirst."}, Q, {"role": "assistant", "content": "Second."}]
    off = [turn | {"loss": False} if turn["content"] == "\nFirst." else turn for turn in turns]
    plain, masked = (template.encode(conversation, [], 10**6) for conversation in (turns, off))
    assert masked.input_ids.tolist() == plain.input_ids.tolist()
    tokenizer = template.tokenizer
    assert tokenizer.decode(masked.input_ids[masked.answer_mask], skip_special_tokens=False) == "Second.<|im_end|>"
    assert (
        tokenizer.decode(plain.input_ids[plain.answer_mask & ~masked.answer_mask], skip_special_tokens=False).strip()
        == "First.<|im_end|>"
    )
    spans = template.spans(off, [], 10**6)
    assert [span.text for span in spans if span.counts] == ["Second.<|im_end|>"]
    assert "".join(span.text for span in spans) == template.render(off)[0]
    fits = len(template.encode(turns[:2], [], 10**6).input_ids) + 2
    with pytest.raises(UnusableSample, match="that counts in the loss"):
        template.encode(off, [], fits)
    assert [span.cut for span in template.spans(turns, [], fits)][-1]


def write_table(path: Path, rows: list[dict], separator: str = ",", ending: str = "\n") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator, lineterminator=ending)
        table.writeheader()
        table.writerows(rows)
    return path


def write_stream(path: Path, rows: list[dict]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def convert(raw: Raw, path: Path, range_bytes: int = 300, **reading) -> list[dict]:
    raw.wds, raw.parts = raw.folder / f"{path.name}.wds", raw.folder / f"{path.name}.parts"
    return [
        convert_range(path, raw.images, raw.wds, raw.parts, "subtaskdata", part, reading=Reading(**reading))
        for part in plan_ranges(path, range_bytes)
    ]


def test_tables_packed_files_and_arrow_give_the_same_samples_and_pictures(tmp_path):
    raw = Raw(tmp_path, [])
    rows = [
        {
            "id": f"r{i}",
            "image": ["a.png", "b.jpg"][i % 2],
            "question": f'Is "{i}", or\n{i + 1}?',
            "answer": f"数 {i}; yes",
        }
        for i in range(12)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {
        "raw.jsonl": lines, "raw.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + lines), "raw.json.gz": gzip.compress(json.dumps(rows).encode()),
        "in.jsonl": "".join(json.dumps(row | {"image": IN_TEXT if row["image"] == "a.png" else str(raw.images / "b.jpg")}) + "\n" for row in rows).encode(),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    write_table(tmp_path / "raw.csv", rows)
    write_table(tmp_path / "raw.tsv", rows, "\t", "\r\n")
    write_table(tmp_path / "excel.csv", rows, ";", "\r\n").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "excel.csv").read_bytes()
    )
    (tmp_path / "raw.csv.gz").write_bytes(gzip.compress((tmp_path / "raw.csv").read_bytes()))
    write_stream(
        tmp_path / "data-00000-of-00001.arrow",
        [row | {"image": {"bytes": (raw.images / row["image"]).read_bytes(), "path": None}} for row in rows],
    )
    seen = {}
    for path in [
        *(tmp_path / name for name in files),
        *tmp_path.glob("*.*sv"),
        tmp_path / "raw.csv.gz",
        *tmp_path.glob("*.arrow"),
    ]:
        stats = convert(raw, path)
        assert index_webdataset(raw.wds, raw.parts)["rejected"] == 0
        assert (len(stats) > 1) == (path.suffix in (".jsonl", ".csv", ".tsv")), path
        seen[path.name] = [(s.id, s.messages, s.images) for s in read_split(raw.wds, "train")]
    expected = seen["raw.jsonl"]
    assert expected[0][1][0]["content"] == '<image>\nIs "0", or\n1?' and expected[0][2] == [
        (raw.images / "a.png").read_bytes()
    ]
    assert len(seen) == 9 and [name for name, found in seen.items() if found != expected] == []


@given(
    st.lists(st.lists(st.text('ab",;\t\n\ré', max_size=5), min_size=2, max_size=2).filter(any), max_size=8),
    st.sampled_from("\t,;"), st.integers(1, 40),
)  # fmt: skip
def test_ranges_share_out_the_rows_of_any_table(rows, separator, range_bytes):
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([["first", "second"], *rows])
    data = text.getvalue().encode()
    file, found, digested = io.BytesIO(data), [], []
    starts = FORMATS["table"].starts(file, len(data), range_bytes)
    assert FORMATS["table"].starts(io.BytesIO(data + data), 2 * len(data), range_bytes)[: len(starts)] == starts
    for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
        found += [parse_json(line) for line in FORMATS["table"].read(file, start, end, digested.append)]
    assert [list(row.values()) for row in found if row] == rows
    assert b"".join(digested) == data


BAD_ROWS = {
    b"0.jpg,What, now?,a\n": "cells differ from the first row", b'0.jpg,"a" b,c\n': "malformed row", b"0.jpg,\xff\xfe,a\n": "invalid UTF-8",
}  # fmt: skip


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_of_a_table_costs_itself_alone_and_is_named_by_its_row(tmp_path, row):
    raw = Raw(tmp_path, [])
    path = tmp_path / "raw.csv"
    path.write_bytes(b"image,question,answer\na.png,q,a\n" + row + b"a.png,q,a\n")
    convert(raw, path, 10**6)
    with pytest.raises(DataError, match=f"row 3: {BAD_ROWS[row]}") as error:
        index_webdataset(raw.wds, raw.parts)
    assert "1 of 3 records" in error.value.problem


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'image,question\n0.jpg,"q\n1.jpg,q\n', "never closed"), (b"image,image\n0.jpg,q\n", "two columns are named 'image'"), (b"image,\xff\n0.jpg,q\n", "first row is not UTF-8"),
        (gzip.compress(b"image,question\n" + b"0.jpg,q\n" * 99, mtime=0)[:-9], "damaged gzip"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_one_message_and_no_shard(tmp_path, data, said):
    raw = Raw(tmp_path, [])
    path = tmp_path / ("raw.csv.gz" if data.startswith(b"\x1f") else "raw.csv")
    path.write_bytes(data)
    with pytest.raises(DataError, match=said):
        convert(raw, path)
    assert not list(raw.wds.glob("*.tar"))


def test_one_way_out_is_said_where_all_records_lack_the_same(tmp_path):
    raw = Raw(tmp_path, [])
    path = write_table(tmp_path / "raw.csv", [{"file": "a.png", "q": "q", "a": "a"}] * 30)
    convert(raw, path, 10**6)
    with pytest.raises(
        DataError, match=r"row 4: missing key .*found: file, q, a.*, and 27 more for the same reason\n.*columns:"
    ):
        index_webdataset(raw.wds, raw.parts)
    convert(raw, path, 10**6, columns={"image": "file", "question": "q", "answer": "a"})
    assert index_webdataset(raw.wds, raw.parts)["train"]["samples"] == 30


def test_records_beside_their_pictures_in_tars_are_adopted(tmp_path):
    jpg, png = picture("JPEG", (40, 30)), picture()
    two = [{"from": "human", "value": "<image><image>Which?"}, GPT]
    tar_of(tmp_path / "theirs/a.tar", {
        "0.jpg": jpg, "0.json": {"caption": "A leaf.", "url": "http://x"}, "0.txt": b"A leaf.",
        "1.jpeg": jpg, "1.json": {"id": "one", "image": "photos/1.jpeg", "conversations": [HUMAN, GPT]},
        "2.0.png": png, "2.1.jpg": jpg, "2.json": {"images": ["2.1.jpg", "2.0.png"], "conversations": two},
        "3.json": {"messages": [Q, A | {"loss": False}, Q, A], "images": []},
    })  # fmt: skip
    dataset = adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")
    assert (dataset["train"]["samples"], dataset["rejected"]) == (4, 0)
    samples = list(read_split(tmp_path / "ours", "train"))
    assert [sample.images for sample in samples] == [[jpg], [jpg], [jpg, png], []]
    assert [sample.messages for sample in samples[:2]] == [CAPTION, SEEN] and samples[1].id == "one"
    assert samples[3].answers() == [3] and samples[3].before(3).messages[1]["loss"] is False
    report, _ = inspect_webdataset(tmp_path / "ours", dataset=dataset)
    assert report["ok"], report["problems"]


def test_an_inspection_shows_unread_keys_leaks_and_what_counts_in_the_loss(tmp_path, small_checkpoint):
    rows = [record(i, "a.png", boxes=[[1, "<b>"]], note="n", system="S") for i in range(6)]
    long = record(7, "a.png")
    long["conversations"] += [{"from": "human", "value": "<i>x</i> " * 60}, {"from": "gpt", "value": "</mark>End."}]
    off = record(8, None)
    off["conversations"] = [
        {"from": "human", "value": "q"},
        GPT | {"loss": False},
        {"from": "human", "value": "q"},
        GPT,
    ]
    raw = Raw(tmp_path, [*rows, long, off])
    raw.convert()
    Raw(tmp_path, [rows[0], record(9, "b.jpg"), record(10, "a.png"), record(11, None)], "heldout.jsonl").convert(
        "heldout"
    )
    index_webdataset(raw.wds, raw.parts)
    report, gallery = inspect_webdataset(raw.wds, raw.parts, tokens=TokenCounter(small_checkpoint, 90, 3136, 1_000_000))
    assert report["unread"] == {"boxes": {"records": 7, "example": "[[1, '<b>']]"}}
    assert report["kept_keys"] == {"note": {"records": 7, "example": "'n'"}}
    assert report["trained_on"] == {"records": 1, "images": 2, "of": 4, "first": ["r0"]}
    assert any("1 of 4 held-out samples are trained on (25.0%" in note for note in report["notes"])
    rendered = [(sample["id"], sample["rendered"]) for sample in gallery if "rendered" in sample]
    assert 2 <= len(rendered) <= 5 and any(span["cut"] for span in dict(rendered)["r7"])
    page = inspection_page(report, gallery)
    assert "&lt;b&gt;" in page and "<i>x" not in page and "</mark>End" not in page and "× 6&lt;|vision_end|&gt;" in page
    assert page.count("<mark><b>▸</b>") == sum(
        span["counts"] and not span["cut"] for _, spans in rendered for span in spans
    )


def test_columns_are_checked_and_a_folder_in_place_of_files_is_said(tmp_path):
    given = {"raw_data": str(tmp_path / "x"), "exp_dir": str(tmp_path)}
    with pytest.raises(SettingsError, match="columns"):
        load_settings("vqa", given | {"columns": {"quesiton": "q"}})
    (tmp_path / "x").mkdir()
    write_stream(tmp_path / "x/data-00000-of-00001.arrow", [{"id": "1"}])
    with pytest.raises(DataError, match=r"is a folder\n.*raw_data: .*/x/data-00000-of-00001.arrow"):
        find_sources(load_settings("vqa", given), lambda path: False)
    assert format_of(tmp_path / "x/data-00000-of-00001.arrow") == "arrow"


def test_how_records_are_read_is_part_of_a_job_only_where_it_is_no_default(tmp_path):
    given = {"raw_data": str(tmp_path / "raw.csv"), "exp_dir": str(tmp_path), "heldout_data": None}
    (tmp_path / "raw.csv").write_text("q,a\n")
    options = []
    for more in ({}, {"columns": {"question": "it's"}, "image_first": True, "caption_prompt": "-What?"}):
        settings = load_settings("vqa", given | more)
        shard = SimpleNamespace(source=find_sources(settings, lambda path: False)[0])
        options.append(shlex.split(_reading_options(shard, settings)))
    assert options == [[], ["--columns", '{"question": "it\'s"}', "--caption-prompt=-What?", "--image-first=True"]]
