"""The published vocabulary: token ids and counts, the chat template, what is content and what is control, inspection."""

import itertools
import json

import pytest
from transformers import Qwen2Tokenizer

from helpers.published_tokenizer import ADDED, GROUNDING, PLAIN, VOCABULARY, ranks, write_tokenizer
from helpers.webdatasets import Raw, record
from llava_sft.data.findings import TokenCounter
from llava_sft.data.index import index_webdataset
from llava_sft.data.inspect import inspect_webdataset
from llava_sft.model.export_files import CHAT_TEMPLATE_FILE, tokenizer_token_ids
from llava_sft.model.template import ChatTemplate, UnusableSample

TEXTS = [
    "Hello, world!", "你好", "Größe? 你好，世界 — ¿qué?", "1234567 and 3.14", "def f(x):\n\n    return x  # <b>\n", "  spaces  \n\n",
    "👩‍👩‍👧‍👦 🇩🇪", "I'm they'LL", "\t\ttabs\r\n", "日本語とカタカナ", "Ελληνικά Русский العربية",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("published") / "tokenizer")


@pytest.fixture(scope="module")
def template(folder):
    return ChatTemplate(folder)


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' own tokenizer of these files, with the chat template of our exports."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE_FILE.read_text()
    return tokenizer


def ids_of(template: ChatTemplate, text: str) -> list[int]:
    return template.tokenizer.encode(text, add_special_tokens=False).ids


def test_ids_are_those_of_the_published_tokenizer(template, folder):
    assert ids_of(template, "Hello, world!") == [9707, 11, 1879, 0]
    assert ids_of(template, "你好") == [108386]
    assert (template.pad_token_id, template.end_token_id, template.image_token_id) == (151643, 151645, 151655)
    assert {token: number for token, number in tokenizer_token_ids(folder).items() if number > 151664} == {
        "<tool_response>": 151665, "</tool_response>": 151666, "<think>": 151667, "</think>": 151668,
    }  # fmt: skip
    assert template.tokenizer.get_vocab_size() == 151_669 < VOCABULARY


def by_rank(word: bytes) -> list[int]:
    """Byte-pair encoding as tiktoken does it, without merges: join the neighbours that are the token of lowest rank."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks()[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks()]
        if not pairs:
            return [ranks()[part] for part in parts]
        place = min(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@pytest.mark.parametrize("text", TEXTS)
def test_merges_give_what_the_ranks_say(template, text):
    words = template.tokenizer.pre_tokenizer.pre_tokenize_str(text)
    expected = [token for _, (start, stop) in words for token in by_rank(text[start:stop].encode())]
    assert ids_of(template, text) == expected
    assert template.tokenizer.decode(expected) == text


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [
    *(turns(text, text) for text in TEXTS),
    turns("Where is it?", "<|object_ref_start|>a leaf<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"),
    turns("Think.", "<think>\n\n</think>\n\nYes.", "And call.", '<tool_call>\n{"name": "f"}\n</tool_call>'),
    [{"role": "system", "content": "简短。"}, *turns("<image>\n这是什么？", "叶子。", "再说<image>一次", "\n叶子")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations_are_rendered_as_by_the_tokenizers_own_chat_template(template, reference, messages):
    images = sum(message["content"].count("<image>") for message in messages)
    encoded = template.encode(messages, [1] * images, 10**6)
    assert encoded.input_ids.tolist() == reference.apply_chat_template(messages, tokenize=True)["input_ids"]
    answers = "".join(message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant")
    said = template.tokenizer.decode(encoded.input_ids[encoded.answer_mask].tolist(), skip_special_tokens=False)
    assert said.replace("\n", "") == answers.replace("\n", "")


@pytest.mark.parametrize("token", list(ADDED))
def test_grounding_and_tool_tokens_are_one_token_of_content_and_control_tokens_are_refused(template, token):
    content = token in PLAIN or token[2:-2] in GROUNDING
    if not content:
        with pytest.raises(UnusableSample, match="control token"):
            template.encode(turns("What?", f"a {token} b"), [], 100)
        return
    encoded = template.encode(turns("What?", f"a{token}b"), [], 100)
    assert encoded.input_ids[encoded.answer_mask].tolist().count(ADDED[token]) == 1


def test_an_image_takes_its_tokens_and_a_cut_falls_between_turns(template):
    messages = turns("<image>\n这是什么？", "叶子。", "<image>Again?", "Yes.")
    whole = template.encode(messages, [40, 7], 10**6)
    assert (whole.input_ids == 151655).sum() == 47
    cut = template.encode(messages, [40, 7], len(whole.input_ids) - 1)
    assert (cut.num_images, cut.turns_cut) == (1, 1)
    assert cut.input_ids.tolist() == template.encode(messages[:2], [40], 10**6).input_ids.tolist()


def test_inspection_counts_the_published_tokens(template, reference, folder, tmp_path):
    records = [record(n, None) for n in range(3)]
    for each, text in zip(records, ("你好，世界", "Hello, world!", "<|box_start|>(1,2)<|box_end|>"), strict=True):
        each["conversations"][1]["value"] = text
    forged = record(9, None)
    forged["conversations"][1]["value"] = "<|im_end|>"
    raw = Raw(tmp_path, [*records, forged])
    raw.convert()
    dataset = index_webdataset(raw.wds, raw.parts, max_reject_fraction=0.5)
    assert dataset["reasons"] == {"control token in the text": 1}
    report, _ = inspect_webdataset(raw.wds, raw.parts, dataset, tokens=TokenCounter(folder, 40, 3136, 10**6))
    lengths = [
        len(reference.apply_chat_template(turns(*(turn["value"] for turn in each["conversations"])))["input_ids"])
        for each in records
    ]
    assert report["ok"], json.dumps(report["problems"])
    assert report["distributions"]["tokens"]["max"] == max(lengths)
