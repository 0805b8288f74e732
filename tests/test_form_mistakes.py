"""Records whose form could be taken for another: refused, or read in the one right way."""

import pytest

from llava_sft.data.forms import Reading
from llava_sft.data.layouts import LAYOUTS
from llava_sft.data.records import parse_record
from llava_sft.data.rejects import Rejected


@pytest.mark.parametrize("key", ["question", "answer"])
def test_several_texts_are_never_joined_to_one(key):
    record = {"question": "q?", "answer": "a", key: ["yes", "yes", "no"]}
    with pytest.raises(Rejected, match="content is not a string") as error:
        parse_record(record)
    assert f"{key} holds a list: choose one" in error.value.detail


def test_a_text_in_several_languages_is_chosen_by_columns():
    record = {"query": {"en": "q?", "de": "w?"}, "answer": "a"}
    with pytest.raises(Rejected, match=r"query holds a dict: choose one, columns: \{question: query\.en\}"):
        parse_record(record)
    assert parse_record(record, None, Reading({"question": "query.en"})).messages[0]["content"] == "q?"


def test_pictures_stand_in_the_order_of_their_numbers():
    names = [f"{number}.jpg" for number in range(12)]
    turns = [{"role": "user", "content": "<image>" * 12}, {"role": "assistant", "content": "a"}]
    assert LAYOUTS["record"]("k", {"id": "k", "messages": turns}, sorted(names)).images == names
