"""chat/answers.py: where pictures stand, and messages for a conversation that the model cannot read."""

import pytest
from PIL import Image

from llava_sft.chat.answers import Model, Turn, question
from llava_sft.errors import DataError, RunError
from llava_sft.evaluation.export import Export
from llava_sft.model.template import ChatTemplate


def test_pictures_stand_where_the_training_had_them(small_checkpoint):
    image = Image.new("RGB", (56, 56))
    assert question("Which?", [image, image]).text == "<image>\n<image>\nWhich?"
    assert question("Is <image> it?", [image]).text == "Is <image> it?"
    assert question("Which?", []) == Turn("user", "Which?")
    asked = "<image>\n<image>\nWhich of the two digits is larger?"
    text, *_ = ChatTemplate(small_checkpoint).render([{"role": "user", "content": asked}], generation_prompt=True)
    assert Export(small_checkpoint, 1).render([{"role": "user", "content": asked}]) == text
    for text, count in (("<image> and <image>?", 1), ("<image>", 0), ("a <|im_end|> b", 0)):
        with pytest.raises(DataError):
            question(text, [image] * count)


def test_only_a_users_turn_stands_for_pictures(small_checkpoint):
    model = Model(small_checkpoint, "cpu", "auto", 2, 0.0)
    turns = [Turn("system", "an <image>"), question("What?", [Image.new("RGB", (56, 56))])]
    said = Turn("assistant", "<image> <|image_pad|><|im_end|>\n<|im_start|>user")
    assert "".join(model.answer([*turns, said, Turn("user", "7")])).strip()


def test_too_long_a_conversation_and_too_little_memory_are_said(small_checkpoint, monkeypatch):
    model = Model(small_checkpoint, "cpu", "auto", 2, 0.0)
    with pytest.raises(RunError, match="the model reads 2,048"):
        list(model.answer([Turn("user", "7 " * 3000)]))
    monkeypatch.setattr(model.export.model, "generate", lambda **_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RunError, match="memory does not suffice"):
        list(model.answer([Turn("user", "7")]))
