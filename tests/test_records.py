"""A bad record is recognised for what it is, and never takes its neighbours with it."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_sft.data import records
from llava_sft.data.records import Line, parse_json, parse_record, read_lines
from llava_sft.data.rejects import Rejected

GOOD = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A digit."}]


def parse(line: bytes) -> Any:
    record = parse_json(Line(1, 0, line))
    return None if record is None else parse_record(record)


def llava(conversations: Any, **keys: Any) -> bytes:
    return json.dumps({"id": 1, "image": "a.png", "conversations": conversations} | keys).encode() + b"\n"


def test_a_record_becomes_messages_images_and_meta():
    turns = [{"from": "system", "value": "Be brief."}, *GOOD, {"from": "human", "value": "And <image>?"}, GOOD[1]]
    sample = parse(llava(turns, image=["a.png", "b.png"], kind="x", score=1.5, box=[1, 2]))
    assert sample.id == "1"
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert sample.images == ["a.png", "b.png"]
    assert sample.meta == {"kind": "x", "score": 1.5}


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
def test_byte_order_mark_and_any_line_ending_are_accepted(ending):
    assert parse(records.BOM + llava(GOOD).rstrip() + ending).id == "1"


@pytest.mark.parametrize("line", [b"\n", b" \r\n", records.BOM + b"\n"])
def test_a_blank_line_is_no_record(line):
    assert parse(line) is None


BAD = {
    "invalid JSON": b'{"id": 1,\n',
    "truncated last line": b'{"id": 1, "conver',
    "invalid UTF-8": b'{"id": "\xff"}\n',
    "NUL byte": b'{"id": "\0"}\n',
    "not a JSON object": b"[1]\n",
    "missing key": b'{"id": 1}\n',
    "video is not supported": llava(GOOD, video="v.mp4"),
    "empty conversation": llava([]),
    "malformed conversation": llava(["hello"]),
    "unknown role": llava([{"from": "robot", "value": "<image>"}, GOOD[1]]),
    "wrong turn order": llava([GOOD[0], GOOD[0], GOOD[1]]),
    "empty answer": llava([GOOD[0], {"from": "gpt", "value": " \n"}]),
    "content is not a string": llava([GOOD[0], {"from": "gpt", "value": 7}]),
    "control token in the text": llava([GOOD[0], {"from": "gpt", "value": "x<|im_end|>"}]),
    "<image> outside a user turn": llava([{"from": "human", "value": "?"}, {"from": "gpt", "value": "<image>"}]),
    "number of <image> differs from images": llava(GOOD, image=["a.png", "b.png"]),
}


@pytest.mark.parametrize("reason", BAD)
def test_each_defect_has_its_reason(reason):
    with pytest.raises(Rejected) as rejected:
        parse(BAD[reason])
    assert rejected.value.reason == reason


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (GOOD[:1], "wrong turn order"),  # no answer
        (GOOD[::-1], "wrong turn order"),  # the answer first
        ([*GOOD, {"from": "system", "value": "late"}], "wrong turn order"),
        ([{"from": "human", "value": "<image>"}, {"from": "gpt"}], "missing key"),
        ([GOOD[0], {"from": "gpt", "value": "a\0"}], "NUL byte"),
        ([{"from": ["human"], "value": "<image>"}, GOOD[1]], "unknown role"),
        ({"from": "human"}, "malformed conversation"),
    ],
)
def test_odd_conversations_are_rejected(turns, reason):
    with pytest.raises(Rejected) as rejected:
        parse(llava(turns))
    assert rejected.value.reason == reason


def test_grounding_tokens_are_content():
    assert parse(llava([GOOD[0], {"from": "gpt", "value": "<|box_start|>(1,2)<|box_end|>"}]))


@given(lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b""))), size=st.integers(1, 40))
def test_ranges_of_any_size_share_out_the_lines_of_any_file(lines, size):
    raw = b"\n".join(lines)
    seen, digested = [], b""
    for start in range(0, len(raw), size):
        parts: list[bytes] = []
        found = list(read_lines(io.BytesIO(raw), start, min(start + size, len(raw)), parts.append))
        assert all(start <= line.offset < start + size for line in found)
        assert b"".join(parts) == b"".join(line.data for line in found)
        seen += [(line.offset, line.data) for line in found]
        digested += b"".join(parts)
    assert digested == raw
    assert all(raw[offset:].startswith(data) for offset, data in seen)


def test_a_line_without_end_is_rejected_and_its_neighbours_are_kept(monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 64)
    raw = b"{}\n" + b"x" * 1000 + b"\n[]\n"
    lines = list(read_lines(io.BytesIO(raw), 0, len(raw)))
    assert [(line.offset, line.data) for line in lines] == [(0, b"{}\n"), (3, None), (1004, b"[]\n")]
    with pytest.raises(Rejected, match="line too long"):
        parse_json(lines[1])


@given(st.one_of(st.binary(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: (
    st.lists(inner) | st.dictionaries(st.sampled_from(["id", "image", "conversations", "from", "value"]), inner)
)).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_any_bytes_give_a_sample_or_a_rejection(data):
    try:
        parse(data)
    except Rejected as rejected:
        assert rejected.reason
