"""Whatever the JSON, a record becomes a sample or a reject with one short reason."""

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_sft.data.forms import TARGETS, Reading
from llava_sft.data.records import Line, parse_json, parse_record
from llava_sft.data.rejects import Rejected
from llava_sft.model.tokens import IMAGE

FUZZ = int(os.environ.get("LLAVA_SFT_FUZZ", "1"))  # times as many examples
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.binary(max_size=6)
)
KEYS = st.sampled_from(
    ["id", "image", "images", "conversations", "messages", "from", "value", "role", "content", "type", "text", "image_url", "url", "bytes",
     "path", "system", "loss", "label", "video", "tools", "Images", "img", "texts", "user", "assistant", "question", "answer", "answers",
     "caption", "history", "turns", "Question", "A", "b", "query", "response", "choices", "image_path", "file_name", "weight", "conversation", "source"]
) | st.text(max_size=6)  # fmt: skip
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=20
)
TEXT = st.lists(
    st.sampled_from(
        [
            IMAGE,
            "<img>",
            "<video>",
            "<|im_end|>",
            "<|box_start|>",
            "![a](b.png)",
            "word ",
            "\0",
            "<bbox>",
            "é",
            "\ud800",
        ]
    )
    | st.text(max_size=5)
).map("".join)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "gpt", None]), "content": TEXT | JSON}
)
RECORD = st.dictionaries(KEYS, JSON, max_size=6) | st.fixed_dictionaries(
    {"messages": st.lists(TURN, max_size=4)}, optional={"image": JSON, "images": JSON, "system": TEXT, "id": JSON}
)


READING = st.builds(
    Reading,
    st.dictionaries(
        st.sampled_from(TARGETS), st.sampled_from(["question", "answers.0", "texts.0.user", "img"]), max_size=2
    ),
    image_first=st.booleans(),
)


@given(RECORD, READING)
@settings(deadline=None, max_examples=300 * FUZZ, suppress_health_check=list(HealthCheck))
def test_a_record_is_a_sample_or_a_reject(record, reading):
    try:
        sample = parse_record(record, None, reading)
    except Rejected as rejected:
        assert len(str(rejected)) < 400
        return
    assert sample.messages[-1]["role"] == "assistant" and sample.messages[-1]["content"].strip()
    assert sample.answers()
    assert sum(message["content"].count(IMAGE) for message in sample.messages) == len(sample.images)


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(deadline=None, max_examples=200 * FUZZ)
def test_a_line_is_an_object_blank_or_a_reject(data):
    try:
        assert isinstance(parse_json(Line(1, 0, data)), dict | None)
    except Rejected as rejected:
        assert len(str(rejected)) < 400
