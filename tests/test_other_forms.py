"""What other projects write: nothing that changes a sample's meaning is passed over, and the message says what to do."""

import base64
import gzip
import json
from collections import Counter

import pytest

from helpers.webdatasets import Raw, record
from llava_sft.data.formats import format_of
from llava_sft.data.image_checks import ImageRoot
from llava_sft.data.index import index_webdataset, unread_note
from llava_sft.data.other_forms import Unread
from llava_sft.data.records import parse_record
from llava_sft.data.rejects import Rejected, too_many_rejects
from llava_sft.errors import DataError

Q, A = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Green."}


def one(**keys) -> dict:
    return {"id": "r", "messages": [Q, A]} | keys


def asked(text: str, answer: str = "Green.", **turn) -> dict:
    return {"messages": [{"role": "user", "content": text} | turn, A | {"content": answer}]}


CHANGED = {
    "image under another key": [asked("q", image="0.jpg"), asked("q", img_path="0.jpg")],
    "nested too deeply": [one(boxes=json.loads("[" * 900 + "]" * 900)), json.loads('{"turns":' * 900 + "1" + "}" * 900)],
    "image under several keys": [one(image_path="0.jpg", img="1.jpg")],
    "number of <image> differs from images": [one(image="0.jpg"), one(image_path="0.jpg"), one(screenshot="s.png")],
    "several keys for the answer": [{"question": "q", "answer": "a", "solution": "b"}],
    "several keys for the question": [{"question": "q", "prompt": "p", "answer": "a"}],
    "several keys for the caption": [{"image": "0.jpg", "caption": "c", "text": "t"}],
    "several answers": [{"question": "q", "answers": ["a", "b"]}, {"question": "q", "answers": "['a', 'b']"}, {"question": "q", "answers": "[a b]"}, {"question": "q", "answers": [{"answer": "a"}, {"answer": "b"}]}],
    "options are not read": [{"question": "q", "choices": ["a", "b"], "answer": 1}, {"question": "q", "options": "A. a", "answer": "A"}],
    "picture is not named": [{"question": "q", "answer": "a", "imageId": "1"}, {"query": "q", "response": "a", "image_id": 7}],
    "caption without a picture": [{"text": "a text"}, {"image": None, "caption": "c"}],
    "content is not a string": [{"question": "q", "answer": 1.5}, one(system=["S"])],
    "system prompts differ": [
        {"system": "S", "messages": [{"role": "system", "content": "T"}, Q, A]}, one(system="S", system_prompt="T"),
    ],
    "video is not supported": [
        one(video="v.mp4"), one(video_path="v"), one(Videos=["v"]), asked("<video>\nWhat?"), asked("<|video|> What?"), asked("<VIDEO>"),
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "v"}}]}, A]},
    ],
    "audio is not supported": [one(audios=["a.wav"]), one(audio_path="a"), asked("<audio>What?"), asked("q", audio="a.wav")],
    "preference data is not supported": [
        one(label=False), one(label=True), one(rejected_response="bad"), one(chosen="x"), one(rejectedMessages=[Q]),
        one(rejected_images=["a.png"]),
    ],
    "tools are not supported": [
        one(tools=[{"name": "f"}]), one(functions="[]x"), asked("q", tool_calls=[{"id": 1}]),
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "{}"}]},
    ],
    "weight of a turn is not supported": [
        asked("q", loss_scale=0.5), asked("q", train=True), asked("q", mask=[1]), {"messages": [Q, A | {"weight": 0.5}]}, {"messages": [Q, A | {"loss": ""}]},
    ],
    "weight of a record is not supported": [one(loss=False), one(train=False)],
    "no answer counts in the loss": [{"messages": [Q, A | {"loss": False}]}, {"messages": [Q, A | {"mask": True}]}],
    "placeholder that is not read": [
        asked("<image> and <img>0.jpg</img>"), asked("<image_1> What?"), asked("<|image|>"), asked("<|image_2|>"), asked("<Image>"), asked("<IMAGE>"), asked("<Image 1>"), asked("<IMG_2>"),
        asked("![leaf](0.jpg)"), asked("<image/>"), asked("<img src='a.png'> q"), asked("q", "at <bbox>"),
        asked("Where is <ref-object>?"), asked("<ImageHere>"), asked(f"<img src='{'a' * 600}.png'>"), asked(f"![{'a' * 300}]({'b' * 600}.png)"),
        asked("![leaf](data:image/png;base64,iVBO)"), asked("<img>a<b.png</img>"),
    ],
    "image and images differ": [
        one(image="0.jpg", images=["1.jpg"]),
        {"images": ["0.jpg"], "messages": [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}]}, A]},
    ],
    "empty image": [{"images": ["0.jpg", ""], **asked("<image><image>")}],
    "malformed conversation": [
        {"conversations": str([Q, A])}, {"conversations": {"from": ["human", "gpt"], "value": ["q"]}}, {"turns": ["q", "a"]},
    ],
    "unknown role": [{"conversations": [{"from": None, "value": None}]}],
    "empty caption": [{"file_name": "a.png", "text": ""}, {"image": "a.png", "Caption": None}],
    "empty answer": [{"question": "q", "answer": ""}], "empty question": [{"question": None, "answer": "a"}],
    "missing key": [{"id": "1", "image": "0.jpg", "title": "c"}, {"images": ["0.jpg"], "texts": [{"user": "q"}]}, {"question": "q"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "number"), [(reason, n) for reason, rows in CHANGED.items() for n in range(len(rows))]
)
def test_what_would_change_the_meaning_is_rejected_by_name(reason, number):
    with pytest.raises(Rejected) as rejected:
        parse_record(CHANGED[reason][number])
    assert rejected.value.reason == reason and len(str(rejected.value)) < 400


def test_a_missing_conversation_names_the_keys_that_there_are():
    with pytest.raises(Rejected, match="found: id, image, title"):
        parse_record(CHANGED["missing key"][0])


KEPT = [
    one(image=None), one(image=""), one(image={}), one(image={"bytes": None, "path": None}), one(images=[]), one(image=b""),
    one(image={"bytes": b"", "path": None}), one(system="", tools=[], videos=None, label="cat", weight=3),
    one(source="coco", url="http://x", width=640, image_id=7, score=0.5, objects=[], rejected=False),
    asked("How does <b>HTML</b> use 2 < 3?", "`<video>` plays, <box>(1,2)</box> is text", loss=True, weight=1),
    {"conversations": [], "messages": [Q, A]},
    {"system": "S", "messages": [{"role": "system", "content": "S"}, Q, A]},
    asked("q", loss=False, weight=0, train=False),  # of a question, which never counts
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(KEPT)))
def test_what_says_nothing_or_is_plain_text_is_kept(number):
    assert parse_record(KEPT[number]).images == []


def test_a_part_of_a_content_names_its_picture():
    parts = [
        {"type": "image", "image": "0.jpg"},
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "1.jpg"}},
    ]
    sample = parse_record({"messages": [{"role": "user", "content": parts}, A]})
    assert sample.images == ["0.jpg", "1.jpg"] and sample.messages[0]["content"] == "<image>What?<image>"
    assert (
        parse_record({"images": ["0.jpg", "1.jpg"], "messages": [{"role": "user", "content": parts}, A]}).images
        == sample.images
    )


def test_keys_that_are_not_read_are_counted_and_said(tmp_path, capsys):
    unread = Unread()
    parse_record(
        one(
            boxes=[[1, 2]], image="0.jpg", image_path="x/0.jpg", reward=2,
            messages=[Q | {"content": "<image>", "note": "n" * 999}, A],
        ),
        unread,
    )  # fmt: skip
    assert unread == {"boxes": 1, "image_path": 1, "note of a turn": 1, "reward": 1}
    assert unread.examples["boxes"] == "[[1, 2]]" and len(unread.examples["note of a turn"]) < 99
    raw = Raw(tmp_path, [record(i, boxes=[[1, 2]]) for i in range(5)])
    raw.convert()
    dataset = index_webdataset(raw.wds, raw.parts)
    assert dataset["unread"] == {"boxes": 5}
    assert "not read, with their records: boxes (5); inspect.html" in unread_note(dataset)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("data:image/png;base64," + "A" * 901, "base64 image"), ("data:image/png,%89PNG", "base64 image"),
        ("/9j/" + "4AA?" * 500, "base64 image"), ("https://example.org/a.png", "image is an address"),
        ("s3://bucket/a.png", "image is an address"), ("/etc/hostname", "image outside the image root"),
        ("../a.png", "image outside the image root"),
    ],
)  # fmt: skip
def test_an_image_that_is_no_file_below_the_root_is_said_for_what_it_is(tmp_path, path, reason):
    with pytest.raises(Rejected) as rejected:
        ImageRoot(tmp_path).read(path)
    assert rejected.value.reason == reason and len(rejected.value.detail) <= 201


def test_a_picture_in_base64_and_an_absolute_path_below_the_root_are_read(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "x")
    picture = bytes([0xFF, 0xD8, 0xFF, 0xE0]) + bytes(range(256))
    (tmp_path / "x/a.jpg").write_bytes(picture)
    text = base64.b64encode(picture).decode()
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    root = ImageRoot(tmp_path)
    for name in (
        "x/a.jpg",
        "x\\a.jpg",
        tmp_path / "x/a.jpg",
        tmp_path / "link/a.jpg",
        text,
        lines,
        f"data:image/jpeg;base64,{text}",
    ):
        assert root.read(str(name)) == picture


LINE = json.dumps(
    {"conversations": [{"from": "human", "value": "问题是什么？"}, {"from": "gpt", "value": "答案"}]},
    ensure_ascii=False,
)
FILES = {
    "is gzip, and holds no text": gzip.compress(b"PAR1" + bytes(50), mtime=0), "damaged gzip": gzip.compress(LINE.encode(), mtime=0)[:20],
    "a zip archive or an Excel file": b"PK\3\4" + bytes(50), "xz": b"\xfd7zXZ\0" + bytes(9),
    "UTF-16": LINE.encode("utf-16"), "gb18030": (LINE + "\n").encode("gbk") * 3, "one JSON object with the keys data": json.dumps({"data": [json.loads(LINE)]}).encode(),
    "one JSON object with the keys 17, 18": json.dumps({"17": json.loads(LINE), "18": json.loads(LINE)}).encode(),
    "go over several lines": 2 * (json.dumps(json.loads(LINE), indent=1) + "\n").encode(), "one JSON object": json.dumps({"version": 1, "rows": [1]}, indent=1).encode(), "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid",
    "a web page": b"<!DOCTYPE html><html>",
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ""])
@pytest.mark.parametrize("kind", FILES)
def test_a_whole_file_of_another_kind_is_one_message(tmp_path, kind, suffix):
    path = tmp_path / f"raw{suffix}"
    path.write_bytes(FILES[kind])
    with pytest.raises(DataError) as error:
        format_of(path)
    assert kind in error.value.problem and error.value.fix and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("data", "known"),
    [
        (json.dumps([json.loads(LINE)]).encode(), "json"), (json.dumps([json.loads(LINE)], indent=1).encode(), "json"),
        (LINE.encode() + b"\n", "jsonl"), (b"\n\n" + LINE.encode(), "jsonl"), (b'{"id": 1}\n\xff\xfe broken\n' + LINE.encode(), "jsonl"),
        (b"[1]\n", "jsonl"), (b"", "jsonl"), (b"not json, at all? {\n" + LINE.encode(), "jsonl"),
        (b"image,question,answer\n0.jpg,q,a\n", "table"), (b"image\tquestion\n0.jpg\tq\n", "table"),
        (gzip.compress(LINE.encode(), mtime=0), "gzip"), (b"\xff\xff\xff\xff\0\0", "arrow"),
    ],
)  # fmt: skip
def test_records_are_read_whatever_the_name_and_with_bad_neighbours(tmp_path, data, known):
    path = tmp_path / "raw.jsonl"
    path.write_bytes(data)
    assert format_of(path) == known


@pytest.mark.parametrize(("rejected", "read"), [(1, 3), (1, 10), (99_996, 100_000), (9_999_999, 10_000_000), (2, 7)])
def test_the_share_that_a_message_advises_is_accepted(rejected, read):
    advised = too_many_rejects(rejected, read, 0, [], "there").fix.split("max_reject_fraction: ")[1].split()[0]
    assert float(advised) < 1 and rejected <= float(advised) * read


def test_to_leave_out_everything_is_never_advised():
    message = too_many_rejects(8, 8, 0, [], "there")
    assert "max_reject_fraction:" not in message.fix and "LLaVA (conversations of" in message.fix


@pytest.mark.parametrize("reason", ["options are not read", "several keys for the answer", "keys of several forms"])
def test_where_all_are_rejected_for_what_columns_settle_the_way_out_is_columns(reason):
    assert "`columns`" in too_many_rejects(8, 8, 0, [], "there", Counter({reason: 8})).fix


def test_rejects_are_listed_with_their_true_lines(tmp_path):
    lines = [record(i, None) for i in range(40)]
    lines[17], lines[38] = b"{\n", record(38, "missing.png")
    raw = Raw(tmp_path, lines)
    raw.convert()
    with pytest.raises(DataError, match=r"line 18: invalid JSON(.|\n)*line 39, id r38: missing image"):
        index_webdataset(raw.wds, raw.parts)
    rejects = [json.loads(line) for line in (raw.parts / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["id"]) for reject in rejects] == [(18, None), (39, "r38")]
