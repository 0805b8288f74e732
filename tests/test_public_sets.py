"""Sets as the hub serves them: read to the letter, or refused with a way on that works. None is trained on without its picture,
its options, or the text that it asks about."""

import json
import re
import shlex
import subprocess

import pytest

from helpers.webdatasets import Raw, picture, read_with_energon, tar_of
from llava_sft.data.adopt import adopt_webdataset
from llava_sft.data.formats import format_of
from llava_sft.data.forms import Reading
from llava_sft.data.image_checks import ImageRoot
from llava_sft.data.index import index_webdataset
from llava_sft.data.inspect import inspect_webdataset
from llava_sft.data.nv_meta import is_finished
from llava_sft.data.records import Line, parse_json, parse_record
from llava_sft.data.rejects import Rejected
from llava_sft.data.stored import read_split
from llava_sft.errors import DataError, many

Q, A = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Green."}
SEEN = [{"role": "user", "content": "<image>\nWhat?"}, A]
CAPTION = [{"role": "user", "content": "<image>\nDescribe the image."}, A]
PAIR = {"question": "What?", "answer": "Green."}
PICTURED = {"image": "a.png", **PAIR}

# Record, columns, the messages, the images.
READ = {
    "ChartQA, a list of one": ({"image": "a.png", "query": "What?", "label": ["Green."]}, {"answer": "label"}, SEEN, ["a.png"]),
    "COCO, a list of one": ({"image": "a.png", "caption": ["Green."]}, {}, CAPTION, ["a.png"]),
    "SQuAD": ({"question": "What?", "answers": {"text": ["Green."], "answer_start": [5]}}, {}, [Q, A], []),
    "M3IT": ({"instruction": "Look:", "inputs": "What?", "image_base64_str": ["a.png"], "outputs": "Green."}, {},
             [{"role": "user", "content": "<image>\nLook:\nWhat?"}, A], ["a.png"]),
    "a word under media": ({"media": "twitter", "messages": [Q, A]}, {}, [Q, A], []),
    "a credit under photo": ({"photo": "John Doe", "image_path": "a.png", **PAIR}, {}, SEEN, ["a.png"]),
    "a yes or no beside a question": ({"label": True, **PICTURED}, {"question": "question", "answer": "answer"}, SEEN, ["a.png"]),
    "a class as the answer": ({"image": "a.png", "question": "What?", "label": "Green."}, {"answer": "label"}, SEEN, ["a.png"]),
    "a caption of a class": ({"image": "a.png", "caption": "Green.", "label": True}, {"caption": "caption"}, CAPTION, ["a.png"]),
    "a question without its text": ({"context": "A long text.", **PAIR}, {"question": "question", "answer": "answer"}, [Q, A], []),
    "a text within the question": ({"hint": "what?  what?", **PAIR, "question": "What? What?"}, {}, [{"role": "user", "content": "What? What?"}, A], []),
    "Qwen's parts": ({"messages": [Q | {"content": [{"image": "a.png"}, {"text": "\nWhat?"}]}, A | {"content": [{"text": "Green."}]}]}, {}, SEEN, ["a.png"]),
    "a word under media of a turn": ({"messages": [Q | {"media": "twitter"}, A]}, {}, [Q, A], []),
    "the first of two pictures": ({"image_2": "b.png", **PICTURED}, {"image": "image"}, SEEN, ["a.png"]),
    "boxes as JSON": ({"messages": [Q, A | {"content": '[{"bbox_2d": [1, 2], "label": "leaf"}]'}]}, {}, [Q, A | {"content": '[{"bbox_2d": [1, 2], "label": "leaf"}]'}], []),
    "a caption by its key": ({"image": "a.png", "caption": "Green.", "question_id": 1}, {}, CAPTION, ["a.png"]),
    "a name of letters alone": ({"img": "leaf", **PAIR}, {}, SEEN, ["leaf"]),
    "one earlier text": ({"history": ["x"], **PAIR}, {}, [Q, A], []),
    "several findings": ({"history": ["cough", "fever"], **PAIR}, {"question": "question", "answer": "answer"}, [Q, A], []),
    "a talkative caption": ({"image": "a.png", "text": "A sign: model: T"}, {}, [CAPTION[0], {"role": "assistant", "content": "A sign: model: T"}], ["a.png"]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_public_set_is_read_to_the_letter(name):
    record, columns, messages, images = READ[name]
    sample = parse_record(record, None, Reading(columns))
    assert (sample.messages, sample.images) == (messages, images)


PNG = picture()
REJECTED = {
    "picture is not named": [
        {"图片": "a.png", **PAIR}, {"Figure_path": "x/a b.JPG", "messages": [Q, A]}, {"frames": ["a.png"], **PAIR},
        {"left": {"bytes": PNG, "path": None}, "right": {"bytes": PNG, "path": None}, **PAIR}, {"a": {"b": "a.png"}, **PAIR},
        {"image_id": 42, "caption": "Green."}, {"pic": "data:image/png;base64," + "A" * 200, **PAIR}, {"raw": PNG, **PAIR},
        {"image_id": 42, "dialog": [PAIR]},
    ],
    "preference data is not supported": [
        {"label": True, **PICTURED}, {"prompt": "q", "completion": "a", "label": "False"}, {"messages": [Q, A], "Label": False},
    ],
    "content is not a string": [{**PICTURED, "answer": True}, {**PICTURED, "answer": False}, {**PICTURED, "answer": 1.5}],
    "malformed conversation": [
        {"history": ["hi", "hello"], **PAIR}, {"history": '["hi", "hello"]', **PAIR}, {"conversations": ["q", "a"]},
        {"from": "human", "value": "q"}, {"content": "a", "role": "assistant"}, {"messages": [Q | {"content": '[{"type": "text", "text": "q"}]'}, A]},
    ],
    "turns under several keys": [{"history": ["hi", "hello"], "messages": [Q, A]}],
    "keys of several forms": [
        {"image": "a.png", "text": "Is it?", "label": "yes", "question_id": 1}, {"image": "a.png", "text": "Is it?", "question_id": 1},
        {"image": "a.png", "caption": "It is.", "label": 0},
    ],
    "conversation in a text": [
        {"image": "a.png", "text": text}
        for text in ('{"question": "q", "chosen": "c", "rejected": "r"}', "USER: q ASSISTANT: a", "### Human: q### Assistant: a", "[USER] q [ASSISTANT] a", '[{"from": "human", "value": "q"}]')
    ],
    "image under several keys": [{"image_2": "b.png", **PICTURED}, {"image": {"bytes": PNG}, "Image 2": {"bytes": PNG}, **PAIR}],
    "context is not read": [{"context": {"title": ["t"], "sentences": [["It is said."]]}, **PAIR}, {"instruction": "q", "context": "A long text.", "response": "a"}, {"hint": "Look up.", **PICTURED}],
    "options are not read": [{"hint": "Look up.", "A": "one", "B": "two", **PICTURED, "answer": "A"}],
    "empty conversation": [{"conversations": None}],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "number"), [(key, n) for key, rows in REJECTED.items() for n in range(len(rows))])
def test_what_a_public_set_would_be_trained_on_without_is_rejected_by_name(reason, number):
    with pytest.raises(Rejected) as rejected:
        parse_record(REJECTED[reason][number])
    assert rejected.value.reason == reason and len(str(rejected.value)) < 300


SETTLED = [
    {"image": "a.png", "question": "q", "answers": [{"text": "a"}, {"text": "b"}]}, {"question": "q", "answers": {"text": ["a", "b"]}},
    {"image": "a.png", "caption": ["a", "b"]}, {"image": "a.png", "question": "q", "answer": {"long": {"en": "a"}}},
    {"Figure_path": "a.png", "question": "q", "answer": "a"}, {"vqa": {"file": "a.png"}, "question": "q", "answer": "a"},
    {"image": "a.png", "text": "a", "question_id": 1}, {"image": "a.png", "text": "USER: q ASSISTANT: a"},
    {"context": "A long text.", "question": "q", "answer": "a"}, {"history": ["x", "y"], "question": "q", "answer": "a"},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SETTLED)))
@pytest.mark.parametrize("named", [False, True])
def test_the_columns_that_a_reject_names_settle_it(number, named):
    record, columns = SETTLED[number], {}
    if named:  # one that the user has given settles nothing else
        columns = {"answer": "answers"} if "answers" in record else {"id": "id"} if "id" in record else {}
    with pytest.raises(Rejected) as rejected:
        parse_record(record, None, Reading(columns))
    settle = re.search(r"columns: \{([^}]*)\}", rejected.value.detail)[1]
    sample = parse_record(record, None, Reading(dict(pair.split(": ") for pair in settle.split(", "))))
    assert sample.messages[-1]["content"] in ("a", record.get("text")) and len(sample.images) == ("png" in str(record))


def test_numbers_that_are_none_are_no_value_and_texts_keep_theirs():
    data = rb'{"question": "NaN, or [NaN]? \" NaN", "answer": "-Infinity", "score": NaN, "x": [1, -Infinity, Infinity]}'
    record = parse_json(Line(1, 0, data))
    assert record["score"] is None and record["x"] == [1, None, None]
    assert (record["question"], record["answer"]) == ('NaN, or [NaN]? " NaN', "-Infinity")
    with pytest.raises(Rejected, match="invalid JSON"):
        parse_json(Line(1, 0, b'{"question": NaN, "answer": "a}\n'))


def test_a_picture_is_read_by_its_file_url_below_the_image_root_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    assert ImageRoot(tmp_path).read(f"file://{tmp_path}/a.png") == PNG
    for name, reason in (("file:///etc/hostname", "outside the image root"), ("file://a/a.png", "an address")):
        with pytest.raises(Rejected, match=reason):
            ImageRoot(tmp_path).read(name)


WRAPPED = {
    "DocVQA": ({"version": "1", "data": [PICTURED] * 2}, {}),
    "GQA": ({"17": {"imageId": "1", **PICTURED}, "18": PICTURED}, {"id": "17"}),
    "COCO": ({"info": {}, "images": [{"id": 4, "file_name": "a.png"}], "annotations": [{"id": 9, "image_id": 4, "caption": "Green."}] * 2}, {"id": 9}),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["line", "indented", "long"])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_command_that_takes_records_out_of_an_object_is_one_that_works(tmp_path, name, layout):
    whole, known = WRAPPED[name]
    if layout == "long":  # far more than is looked at to tell the format
        more = {str(n): PICTURED for n in range(100, 2000)} if name == "GQA" else {}
        whole = whole | more | {key: value * 4000 for key, value in whole.items() if isinstance(value, list)}
    path = tmp_path / "it's raw.json"
    path.write_text(json.dumps(whole, indent=1 if layout == "indented" else None))
    with pytest.raises(DataError, match="holds one JSON object with the keys") as error:
        format_of(path)
    new = tmp_path / "new.json"
    try:
        new.write_bytes(subprocess.check_output(shlex.split(error.value.fix.split("instance: ")[1].split(" > ")[0])))
    except FileNotFoundError:
        pytest.skip("there is no jq on this machine")
    record = json.loads(new.read_text())[0]
    assert format_of(new) == "json" and record.items() >= known.items()
    assert parse_record(record).images == ["a.png"]


@pytest.mark.parametrize("more", ["\n", "\n{}\n"])
def test_a_long_record_of_an_unknown_form_is_no_object_of_records_unless_it_is_alone(tmp_path, more):
    path = tmp_path / "raw.jsonl"
    path.write_text(json.dumps({"contents": [{"role": "user", "data": "A" * (1 << 16)}]}) + more)
    if len(more) > 1:
        assert format_of(path) == "jsonl"
    else:
        with pytest.raises(DataError, match="holds one JSON object with the keys contents"):
            format_of(path)


@pytest.mark.parametrize("beside", [{}, {"json": {"url": "http://x", "width": 3}}])
def test_captions_beside_their_pictures_in_tars_are_adopted_and_trained_on(tmp_path, beside):
    texts = {"x/0": ("png", "txt", "A leaf."), "x/1": ("jpg", "caption", "叶子\n")}
    members = {}
    for key, (kind, word, text) in texts.items():
        members |= {f"{key}.{kind}": picture("JPEG" if kind == "jpg" else "PNG"), f"{key}.{word}": text.encode()}
        members |= {f"{key}.{name}": content for name, content in beside.items()}
    tar_of(tmp_path / "theirs/a.tar", members)
    dataset = adopt_webdataset(tmp_path / "theirs", tmp_path / "ours")
    samples = list(read_split(tmp_path / "ours", "train"))
    assert [sample.messages[1]["content"] for sample in samples] == ["A leaf.", "叶子"]
    assert {sample.messages[0]["content"] for sample in samples} == {CAPTION[0]["content"]}
    report, _ = inspect_webdataset(tmp_path / "ours", dataset=dataset)
    assert report["ok"] and is_finished(tmp_path / "ours"), report["problems"]
    seen = {tuple(sample[1]) for sample in read_with_energon(tmp_path / "ours", full=True)[0]["train"]}
    assert seen == {(CAPTION[0]["content"], text) for text in ("A leaf.", "叶子")}


def test_tars_without_records_are_refused_with_what_they_hold_and_a_caption_that_is_missing_costs_itself(tmp_path):
    tar_of(tmp_path / "classes/a.tar", {"0.jpg": picture("JPEG"), "0.cls": b"3"})
    with pytest.raises(DataError, match=r"the first has jpg, cls\n.*KEY.txt, a caption"):
        adopt_webdataset(tmp_path / "classes", tmp_path / "ours")
    bad = {"1.jpg": picture("JPEG"), "2.txt": b"no picture", "3.jpg": picture("JPEG"), "3.txt": b"\xff\xfe"}
    tar_of(tmp_path / "captions/a.tar", {"0.jpg": picture("JPEG"), "0.txt": b"A leaf."} | bad)
    with pytest.raises(DataError, match="3 of 4 records"):
        adopt_webdataset(tmp_path / "captions", tmp_path / "theirs")
    dataset = adopt_webdataset(tmp_path / "captions", tmp_path / "theirs", 0.75)
    assert dataset["reasons"] == {"no caption member": 1, "caption without a picture": 1, "invalid UTF-8": 1}


def test_where_all_lines_are_no_json_the_way_out_is_not_their_form(tmp_path):
    raw = Raw(tmp_path, [json.dumps(PAIR).encode() + b",\n"] * 3)
    raw.convert()
    with pytest.raises(DataError, match=r"3 of 3 records(.|\n)*json\.dumps, one a line and without a comma"):
        index_webdataset(raw.wds, raw.parts)


def test_one_is_counted_as_one():
    assert [many(count, "record") for count in (0, 1, 2000)] == ["0 records", "1 record", "2,000 records"]
