"""What columns and keys name is what is read: what they are preferred to is said, and nothing is chosen, or lost, unasked."""

import io

import pytest

from llava_sft.data.formats import FORMATS
from llava_sft.data.forms import Reading
from llava_sft.data.other_forms import Unread
from llava_sft.data.records import parse_json, parse_record
from llava_sft.data.rejects import Rejected
from llava_sft.evaluation.questions import read_questions

Q, A = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Green."}
SYSTEM = {"role": "system", "content": "Be brief."}
OTHER = [{"from": "human", "value": "Other?"}, {"from": "gpt", "value": "Red."}]
SEEN = [Q | {"content": "<image>\nWhat?"}, A]
PAIR = {"question": "q", "answer": "a"}

# Record, columns, the messages, the images, the keys that are said not to be read.
READ = {
    "question and answer beside conversations": ({"q": "What?", "a": "Green.", "conversations": OTHER}, {"question": "q", "answer": "a"}, [Q, A], [], {"conversations"}),
    "turns beside conversations": ({"turns": [["What?", "Green."]], "messages": OTHER, "history": [["x", "y"]]}, {"conversations": "turns"}, [Q, A], [], {"messages", "history"}),
    "a caption beside a question": (
        {"image": "a.png", "caption": "Green.", **PAIR}, {"caption": "caption"},
        [Q | {"content": "<image>\nDescribe the image."}, A], ["a.png"], set(),
    ),
    "an own key of that name": ({"q": "What?", "question": "Other?", "answer": "Green."}, {"question": "q"}, [Q, A], [], {"question"}),
    "what lies beside the named": ({"vqa": {"q": "What?", "a": "Green.", "of": "x"}}, {"question": "vqa.q", "answer": "vqa.a"}, [Q, A], [], {"vqa"}),
    "one of several pictures": ({"images": ["a.png", "b.png"], "question": "What?", "answer": "Green."}, {"image": "images.0"}, SEEN, ["a.png"], {"images"}),
    "a picture, conversations": ({"file": "a.png", "conversations": SEEN}, {"image": "file"}, SEEN, ["a.png"], set()),
    "no picture in mixed data": ({"conversations": [Q, A], "note": "n"}, {"image": "file"}, [Q, A], [], set()),
    "an empty cell, a picture elsewhere": ({"file": "", "images": ["a.png"], "conversations": SEEN}, {"image": "file"}, SEEN, ["a.png"], set()),
    "roles in pairs": ({"conversations": [["system", "Be brief."], ["user", "What?"], ["assistant", "Green."]]}, {}, [SYSTEM, Q, A], [], set()),
    "the same twice": ({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Green."}], "messages": [Q, A]}, {}, [Q, A], [], set()),
    "messages beside no conversations": ({"conversations": None, "messages": [Q, A]}, {}, [Q, A], [], set()),
    "pairs with one system prompt": ({"conversation": [{"system": "Be brief.", "input": "What?", "output": "Green."}] * 2}, {}, [SYSTEM, Q, A, Q, A], [], set()),
    "a caption beside an empty question": ({"image": "a.png", "caption": "Green.", "question": ""}, {}, [Q | {"content": "<image>\nDescribe the image."}, A], ["a.png"], set()),
    "one question under two keys": ({"question": "What?", "prompt": "What?", "answer": "Green.", "response": "Green."}, {}, [Q, A], [], set()),
    "one caption and picture under two keys": (
        {"image_path": "a.png", "img": "a.png", "caption": "Green.", "text": "Green."}, {}, [Q | {"content": "<image>\nDescribe the image."}, A], ["a.png"], set(),
    ),
    "a count beside a question": ({"messages": 3, "question": "What?", "answer": "Green."}, {}, [Q, A], [], {"messages"}),
    "a box as text, listed": ({"question": "What?", "answers": ["[0.1, 0.2]"]}, {}, [Q, A | {"content": "[0.1, 0.2]"}], [], set()),
    "a box in a cell": ({"question": "What?", "answers": "[10, 20]"}, {}, [Q, A | {"content": "[10, 20]"}], [], set()),
    "a printed list as it stands": ({"question": "What?", "answers": "['x' 'y']"}, {"answer": "answers"}, [Q, A | {"content": "['x' 'y']"}], [], set()),
    "no history, as a table has it": ({"question": "What?", "answer": "Green.", "history": "[]"}, {}, [Q, A], [], set()),
}  # fmt: skip

# Columns beside a question that look like something else, and are only not read.
HARMLESS = [
    {"a": 1.0, "b": 2.5}, {"a": "1.0", "b": "-2e-3", "c": "nan"}, {"1": "x", "2": "y", "3": "z"}, {"answer_1": "Red.", "answer_2": "Blue.", "Answer-3": "Brown."},
    {"A": ["x"], "B": ["y"]}, {"a": "note", "b": 3}, {"options": {"temperature": 0.7, "top_p": 0.9}}, {"choices": []}, {"options": 4},
    {"messages": 3}, {"conversations": ["x"]}, {"messages": "none"}, {"texts": ["ocr"]}, {"turns": [1, 2]}, {"history": ["x"]}, {"texts": '["ocr", "words"]'}, {"history": "none"}, {"dialog": {"speakers": 2}}, {"chat": [["x"]]},
    {"texts": [{"text": "STOP", "bbox": [1, 2, 3, 4]}]}, {"qa": {"score": [1], "by": ["x"]}}, {"rounds": 3}, {"turns": "[1, 2]"}, {"history": [["x", 1]]},
    {"user": 17}, {"input": 512}, {"prompt": True}, {"system": 3}, {"speech": 0.2}, {"tools": "hammer, nail"}, {"functions": 3},
]  # fmt: skip


@pytest.mark.parametrize("columns", HARMLESS, ids=str)
def test_a_column_that_looks_like_something_else_rejects_nothing(columns):
    for record in (
        columns | {"question": "What?", "answer": "Green."},
        {"query": "What?", "response": "Green."} | columns,
    ):
        assert parse_record(record).messages == [Q, A]
    if not {"input", "user", "prompt", "messages", "conversations"} & columns.keys():
        caption = parse_record({"image": "a.png", "caption": "Green."} | columns)
        assert caption.messages[1] == A and caption.images == ["a.png"]


def test_the_video_that_a_picture_is_of_is_no_video_to_learn():
    for column in ({"video_id": "v17"}, {"videoId": 17}, {"audio_id": 3}):
        assert parse_record(PAIR | {"image": "a.png"} | column).images == ["a.png"]
        with pytest.raises(Rejected, match="is not supported"):
            parse_record(PAIR | column)


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("What?\n(A) red (B) Light  Blue", {"choices": ["Red", "light blue"]}), ("What?\nA. red\nB. blue", {"options": "A. red\nB. blue"}),
        ("What?\nA. red\nB. blue", {"A": "red", "B": "blue"}), ("是什么？A红色B蓝色", {"options": "['红色', '蓝色']"}), ("2 or 4?", {"choices": [2, 4]}),
    ],
)  # fmt: skip
def test_options_that_stand_in_the_question_are_not_missing(question, options):
    answer = "4" if question.startswith("2") else "A"
    assert parse_record({"question": question, "answer": answer} | options).messages[1]["content"] == answer


def test_a_reject_for_options_names_the_columns_that_accept_the_record():
    record = {"query": "q", "response": "a", "choices": ["x", "y"]}
    with pytest.raises(Rejected, match=r"columns: \{question: query, answer: response\}"):
        parse_record(record)
    assert (
        parse_record(record, None, Reading({"question": "query", "answer": "response"})).messages[0]["content"] == "q"
    )


@pytest.mark.parametrize("form", READ)
def test_what_columns_name_is_read_and_what_gives_way_is_noted(form):
    raw, columns, messages, images, not_read = READ[form]
    unread = Unread()
    sample = parse_record(raw, unread, Reading(columns))
    assert (sample.messages, sample.images) == (messages, images)
    assert set(unread) == not_read


# Reason → records, and the columns that they are read with.
REJECTED = {
    "conversations and messages differ": [({"conversations": OTHER, "messages": [Q, A]}, {}), ({"conversations": OTHER, "messages": [Q, A]}, {"image": "file"})],
    "keys of several forms": [({**PAIR, "turns": [["q", "a"]]}, {}), ({"question": "q", "texts": [{"user": "q", "assistant": "a"}]}, {}), ({"answers": ["a"], "chat": '[["q", "a"]]'}, {})],
    "columns of several forms": [({"q": "q", "a": "a", "c": "c"}, {"question": "q", "answer": "a", "caption": "c"})],
    "several keys for the conversations": [({"turns": [["q", "a"]], "dialog": [["q", "b"]]}, {})],
    "turns under several keys": [
        ({"messages": [Q, A], "history": [["q", "a"]]}, {}), ({"conversations": OTHER, "Messages": [Q, A]}, {}),
    ],
    "several keys for the question": [({"Question": "q", "question": "r", "answer": "a"}, {})],
    "several keys for the answer": [({"question": "q", "answer": "a", "Answer": "b"}, {})],
    "several keys for the caption": [({"image": "a.png", "caption": "a", "CAPTION": "b"}, {})],
    "empty answer": [({"query": "q", "response": "", "history": [["x", "y"]]}, {}), ({"query": "q", "response": "a", "history": [["x", ""]]}, {}), ({"q": "q", "a": None}, {"question": "q", "answer": "a"})],
    "empty question": [({"q": "", "a": "a", "image": "a.png"}, {"question": "q", "answer": "a"}), ({"q": float("nan"), "a": "a"}, {"question": "q", "answer": "a"})],
    "empty caption": [({"image": "a.png", "c": ""}, {"caption": "c"})],
    "empty conversation": [({"t": "", **PAIR}, {"conversations": "t"})],
    "missing key": [({"query": "", "response": "", "history": [["x", "y"]]}, {}), ({**PAIR, "history": [{"q": "hi", "a": "hello"}]}, {})],
    "options are not read": [
        ({"question": "q", "A": "a", "B": "b", "answer": "A"}, {}), ({"question": "q", "option_a": "a", "option_b": "b", "answer": "A"}, {}), ({**PAIR, "a": "x", "b": "y", "c": "z"}, {}),
        ({**PAIR, "choice0": "x", "choice1": "y"}, {}), ({"question": "Red or blue?", "answer": 0, "choices": ["red", "blue"]}, {}),
        *(({"question": "How many?", "answer": answer, "options": ["10", "20"]}, {}) for answer in ("b", "(B)", "BC", "A, B", "Option B")),
        ({"question": "How many?", "answer": "B", "A": 2, "B": "4"}, {}), ({"question": "How many?", "answer": 1, "options": [2, 4]}, {}),
        ({**PAIR, "options": "['red', 'blue']"}, {}), ({**PAIR, "options": {"A": "red", "B": "blue"}}, {}),
        ({"question": "Is it bored?", "answer": "x", "choices": {"label": ["A", "B"], "text": ["red", "blue"]}}, {"question": "question"}),
    ],
    "several answers": [({"question": "q", "answers": cell}, {}) for cell in ("['x' 'y']", "['x'\n 'y']", "['x', 'y']", ["x", "y"])],
    "wrong turn order": [({"conversation": [{"system": s, "input": "q", "output": "a"} for s in ("S", "T")]}, {}), ({"conversations": [["user", "q"]]}, {})],
    "malformed conversation": [
        *(({**PAIR, "history": history}, {}) for history in ("User: hi\nAssistant: hello", "**Human**: hi\n\nGPT：hello")),
        ({"conversations": [["user", "q"], ["Where?", "a"]]}, {}), ({"conversations": [{"from": "human", "value": "q", "content": "r"}, OTHER[1]]}, {}),
    ],
    "missing column": [({"conversations": OTHER, "pic": "a.png"}, {"image": "file"}), ({"conversations": OTHER, "pic": [{"bytes": b"x"}]}, {"image": "file"}), ({"conversations": OTHER}, {"question": "q"})],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "number"), [(reason, n) for reason, rows in REJECTED.items() for n in range(len(rows))]
)
def test_a_record_that_can_be_read_in_two_ways_is_rejected_by_name(reason, number):
    record, columns = REJECTED[reason][number]
    with pytest.raises(Rejected) as rejected:
        parse_record(record, None, Reading(columns))
    assert rejected.value.reason == reason and len(str(rejected.value)) < 400


ROWS = [["a.png", "q", "x, y"], ["b.png", "r", "z"]]
# Text of a table → its rows; a reject by its detail.
TABLES = {
    "a blank first line": ("\n\nimage,question,answer\na.png,q,\"x, y\"\nb.png,r,z\n", ROWS),
    "empty rows around": ("\ufeff,,\nimage,question,answer\n,,\na.png,q,\"x, y\"\n\nb.png,r,z\n,,\n", ROWS),
    "empty columns to the right": ("image,question,answer,,\na.png,q,\"x, y\",,\nb.png,r,z,,\n", ROWS),
    "a cell without a name": ("image,question,answer,,\na.png,q,\"x, y\",,note\nb.png,r,z\n", ["cells: 5, columns: 3", ROWS[1]]),
    "spaces behind the commas": ("image, question, answer\na.png, q, \"x, y\"\nb.png, r, z\n", ROWS),
    "spaces and empty columns": ('\nimage, question, answer,,\na.png, q, "x, y",,\nb.png, r, z,,\n', ROWS),
    "spaces in some rows": ("image,question,answer\na.png, \"q\",x\nb.png,r,z\n", ["a space before the quote", ROWS[1]]),
    "a text that begins so": ('image,question,answer\na.png," ""q""",x\n', [["a.png", ' "q"', "x"]]),
    "a quote that takes the next row": ('image,question,answer\na.png,"q,x\nb.png,"r",z\nb.png,r,z\n', ["expected after", ["b.png", "r", "z"], ROWS[1]]),
    "a rest that looks like a row": ('image,question,answer\na.png,"q" s,"x\nb.png,r,z"\nb.png,r,z\n', ["expected after", "left open in the row before", ROWS[1]]),
}  # fmt: skip


@pytest.mark.parametrize("separator", ",;|")
@pytest.mark.parametrize("name", TABLES)
def test_each_row_of_a_table_is_read_or_rejected_by_itself(name, separator):
    text, expected = TABLES[name]
    data = text.replace(",", separator).encode()
    for range_bytes in (1 << 20, 9):
        file, found = io.BytesIO(data), []
        starts = FORMATS["table"].starts(file, len(data), range_bytes)
        for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
            for line in FORMATS["table"].read(file, start, end, lambda _: None):
                try:
                    found += [list(row.values())] if (row := parse_json(line)) else []
                except Rejected as rejected:
                    found.append(rejected.detail)
        wanted = [row if isinstance(row, str) else [cell.replace(",", separator) for cell in row] for row in expected]
        assert len(found) == len(wanted)
        assert all(
            want in got if isinstance(want, str) else want == got for want, got in zip(wanted, found, strict=True)
        ), found


def test_questions_of_a_raw_file_are_read_with_columns_and_known_by_them(tmp_path):
    (tmp_path / "ask.csv").write_text("q,a\nWhat?,Green.\n")
    asked = [
        read_questions(tmp_path / "ask.csv", None, "val", None, None, Reading({"question": one, "answer": other}))
        for one, other in ("qa", "aq")
    ]
    assert [each.samples[0].messages[0]["content"] for each in asked] == ["What?", "Green."]
    assert asked[0].fingerprint != asked[1].fingerprint
