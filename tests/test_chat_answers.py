"""What chat.py looks at before it makes or loads a model; where pictures stand, and messages for a conversation that the
model cannot read."""

import io
import sys
from types import ModuleType

import pytest
from PIL import Image

import chat
from helpers.webdatasets import picture
from llava_sft.chat import web
from llava_sft.chat.answers import Model
from llava_sft.chat.questions import Turn, question
from llava_sft.errors import DataError, RunError
from llava_sft.evaluation.export import Export
from llava_sft.model.template import ChatTemplate
from llava_sft.model.tokens import ANSWER_OPENING


def test_pictures_stand_where_the_training_had_them(small_checkpoint):
    image = Image.new("RGB", (56, 56))
    assert question("Which?", [image, image]).text == "<image>\n<image>\nWhich?"
    assert question("Is <image> it?", [image]).text == "Is <image> it?"
    assert question("Which?", []) == Turn("user", "Which?")
    asked = "<image>\n<image>\nWhich of the two digits is larger?"
    text, *_ = ChatTemplate(small_checkpoint).render([{"role": "user", "content": asked}])
    assert Export(small_checkpoint, 1).render([{"role": "user", "content": asked}]) == text + ANSWER_OPENING
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
    given = []
    monkeypatch.setattr(model.export.model, "generate", lambda max_new_tokens, **_: given.append(max_new_tokens))
    for model.longest in (2, 5000):
        list(model.answer([Turn("user", "7")]))
    assert given[0] == 2 and 1900 < given[1] < 2048, "no position more than there are"
    monkeypatch.setattr(model.export.model, "generate", lambda **_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RunError, match="not enough memory"):
        list(model.answer([Turn("user", "7")]))


def encoded(size: tuple[int, int], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L", size).save(file, kind)
    return file.getvalue()


PICTURES = {  # content, and what the fix says
    "empty": (b"", "a whole"), "text": (b"a,b\n1,2\n", "a whole"), "cut": (picture()[:-60], "a whole"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a whole"), "pdf": (b"%PDF-1.7\n", "a whole"),
    "large": (encoded((20_000, 12_000)), "scale or crop"), "small": (encoded((300, 5)), "scale or crop"),
    "long": (encoded((9_000, 20)), "scale or crop"), "folder": (None, "the path of a picture"),
}  # fmt: skip
WORDS = {
    "empty": ["m", ""], "blank": ["m", " \n"], "empty with a picture": ["m", "", "--image", "right.png"],
    "control": ["m", "a <|vision_start|>"], "marks": ["m", "<image>?"], "system": ["m", "--system", "<|im_end|>"],
    "bytes": ["m", "\udcff"], "page, question": ["m", "What?", "--web"], "page, picture": ["m", "--web", "--image", "right.png"],
    "cold": ["m", "--temperature", "1e-30"], "hot": ["m", "--temperature", "1e30"], "below": ["m", "--temperature", "-1"],
    "no number": ["m", "--temperature", "nan"], "endless": ["m", "--temperature", "inf"], "no token": ["m", "--max-new-tokens", "0"],
    **{name: ["m", "--image", name, "What?"] for name in PICTURES},
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_what_is_typed_is_looked_at_before_a_model_is_made(case, tmp_path, monkeypatch, capsys):
    """A 4B run takes minutes to export."""
    monkeypatch.chdir(tmp_path)
    for name, (content, _) in {**PICTURES, "right.png": (picture(), "")}.items():
        (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(chat, "find_model", lambda name: pytest.fail("a model is made"))
    monkeypatch.setattr(web, "find_spec", lambda name: True)
    monkeypatch.setattr(sys, "argv", ["chat.py", *WORDS[case]])
    with pytest.raises(SystemExit) as end:
        chat.main()
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (1, "")
    assert said.err.startswith("error: ") and PICTURES.get(case, (b"", "fix"))[1] in said.err


@pytest.mark.parametrize("temperature", [chat.COLDEST, 1.0, chat.HOTTEST])
def test_temperatures_that_are_allowed_can_be_computed(small_checkpoint, temperature):
    for dtype in ("float32", "bfloat16"):
        model = Model(small_checkpoint, "cpu", dtype, 3, temperature)
        assert any(list(model.answer([Turn("user", "7")])) for _ in range(5))  # one may be drawn to end at once


def test_the_page_is_for_names_of_this_machine_alone(monkeypatch):
    """Whatever a user's own configuration of Streamlit says: options of the command line win."""
    asked = []
    streamlit = ModuleType("streamlit.web")
    streamlit.cli = ModuleType("cli")
    streamlit.cli.main = lambda words, **_: asked.extend(words)
    monkeypatch.setitem(sys.modules, "streamlit", ModuleType("streamlit"))
    monkeypatch.setitem(sys.modules, "streamlit.web", streamlit)
    for name in ("model", "title", "first"):
        monkeypatch.setattr(web.Shown, name, None, raising=False)
    web.serve(None, "m", [], 7860)
    assert "--server.address=127.0.0.1" in asked
    assert [word for word in asked if "allowedHosts" in word] == [
        "--server.allowedHosts=127.0.0.1",
        "--server.allowedHosts=localhost",
    ]
