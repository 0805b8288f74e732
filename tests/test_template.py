"""Conversations become the ids of the tokenizer's own chat template, with loss on the answers and nothing else."""

import json
import unicodedata

import pytest
from PIL import Image
from transformers import AutoProcessor

from helpers.models import TEXTS
from llava_sft.errors import DataError
from llava_sft.model.template import ChatTemplate, UnusableSample
from llava_sft.model.tokens import ANSWER_OPENING

LONG = 10**6


@pytest.fixture(scope="module")
def template(small_checkpoint):
    return ChatTemplate(small_checkpoint)


@pytest.fixture(scope="module")
def processor(small_checkpoint):
    return AutoProcessor.from_pretrained(small_checkpoint, trust_remote_code=True)


def messages(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


CONVERSATIONS = {
    "default system": messages("Which digit is this?", "It is 5."),
    "own system": messages("Hi", "Hello.", system="Be brief.\nAnd kind."),
    "empty system": messages("Hi", "Hello.", system=""),
    "multi-turn": messages("Which digit?", "5", "And this?", "7", "The larger?", "7."),
    "one image": messages("<image>\nWhich digit is this?", "It is 5."),
    "image behind the text": messages("Which digit is this? <image>", "It is 5."),
    "images in later turns": messages("Hi", "Hello.", "<image>Which digit?", "5", "And <image>this?", "7"),
    "several images in one turn": messages("<image><image> or\n<image>: which is larger?", "The second."),
    "unicode": messages("Größe? 你好，世界 — ¿qué?", "Ääh… 数字是五。"),
    "emoji": messages("👩‍👩‍👧‍👦 🇩🇪 what?", "🙂👍🏽!"),
    "decomposed letters": messages("Cafe\u0301?", "e\u0301te\u0301 \u1100\u1161"),
    "spaces around": messages("  Which digit?  \n\n", " It is 5. \n"),
    "code": messages("Write it.", "def f(x):\n\n    return x  # <b>\n"),
    "markup that is no control token": messages("<|box_start|> <|im_ start|> <im_end>", "<tool> | <|"),
    "<image> named in an answer": messages("What marks an image?", "<image> does."),
}
PICTURE_TOKENS = [4, 9, 16]


def pictures(count):
    return [Image.new("RGB", (28 * side, 28 * side), "grey") for side in (2, 3, 4)[:count]]


def placeholders(conversation):
    return sum(m["content"].count("<image>") for m in conversation if m["role"] == "user")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_equal_those_of_the_tokenizers_chat_template(template, processor, name):
    conversation = CONVERSATIONS[name]
    encoded = template.encode(conversation, [1] * placeholders(conversation), LONG)
    expected = processor.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
    assert encoded.input_ids.tolist() == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_equal_those_of_the_exported_processor_with_its_images(template, processor, name):
    conversation = CONVERSATIONS[name]
    count = placeholders(conversation)
    encoded = template.encode(conversation, PICTURE_TOKENS[:count], LONG)
    text = processor.apply_chat_template(conversation, tokenize=False)
    inputs = processor(text=[text], images=pictures(count) or None)
    assert encoded.input_ids.tolist() == inputs["input_ids"][0]
    assert encoded.num_images == count


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_loss_falls_on_each_answer_with_its_end_of_turn_and_on_nothing_else(template, processor, name):
    conversation = CONVERSATIONS[name]
    encoded = template.encode(conversation, [1] * placeholders(conversation), LONG)
    chosen = processor.tokenizer.decode(encoded.input_ids[encoded.answer_mask])
    answers = [m["content"] for m in conversation if m["role"] == "assistant"]
    assert chosen == unicodedata.normalize("NFC", "".join(f"{answer}<|im_end|>" for answer in answers))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_loss_mask_equals_the_tokenizers_assistant_mask(template, processor, name):
    conversation = CONVERSATIONS[name]
    encoded = template.encode(conversation, [1] * placeholders(conversation), LONG)
    theirs = processor.tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.answer_mask.astype(int).tolist() == theirs["assistant_masks"]


@pytest.fixture(scope="module")
def merging(small_checkpoint, tmp_path_factory):
    """The same tokenizer with tokens for two and three newlines, and for a newline with spaces, as large ones have."""
    from llava_sft.model.tiny import train_tokenizer

    folder = tmp_path_factory.mktemp("merging")
    train_tokenizer([*TEXTS, *(["a\n\nb", "a\n\n\nb", "a \n b", "\n\n", "\n \n"] * 90)], 700, 2048).save_pretrained(
        folder
    )
    (folder / "chat_template.jinja").write_bytes((small_checkpoint / "chat_template.jinja").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("answer", "shared"),  # `shared`: the newline behind `assistant`, when it is one token with the answer's beginning
    [("\nIt is 5.", "\n"), ("\n\nIt is 5.", "\n"), ("\n", "\n"), (" \n5", "\n"), ("   5", ""), ("\n  5", "\n")],
)
def test_an_answer_owns_the_token_that_its_beginning_shares_with_the_template(merging, answer, shared):
    from transformers import AutoTokenizer

    tokenizer, template = AutoTokenizer.from_pretrained(merging), ChatTemplate(merging)
    conversation = messages("Which digit?", answer)
    encoded = template.encode(conversation, [], LONG)
    assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(conversation, return_dict=False)
    chosen = tokenizer.decode(encoded.input_ids[encoded.answer_mask])
    assert chosen == f"{shared}{answer}<|im_end|>"


def test_the_prompt_of_the_answer_ends_where_the_chat_template_ends_it(template, processor):
    conversation = messages("<image>Which digit?", "5", "And now?")
    text, _, _ = template.render(conversation)
    assert text + ANSWER_OPENING == processor.apply_chat_template(conversation, add_generation_prompt=True)


# --- too long --------------------------------------------------------------------------------------------------------

THREE_TURNS = messages("<image>Which digit?", "It is 5.", "<image><image>And these?", "7 and 8.", "The larger?", "8.")


def test_a_long_conversation_is_cut_at_the_end_of_a_turn_with_the_images_that_fall_out(template):
    lengths = [
        len(template.encode(THREE_TURNS[: 2 * turns], PICTURE_TOKENS[:images], LONG).input_ids)
        for turns, images in ((1, 1), (2, 3), (3, 3))
    ]
    whole = template.encode(THREE_TURNS, PICTURE_TOKENS, LONG)
    assert (len(whole.input_ids), whole.num_images, whole.turns_cut) == (lengths[2], 3, 0)
    for limit in range(lengths[0], lengths[2] + 2):
        turns = sum(length <= limit for length in lengths)
        cut = template.encode(THREE_TURNS, PICTURE_TOKENS, limit)
        assert len(cut.input_ids) == lengths[turns - 1] <= limit
        assert cut.input_ids.tolist() == whole.input_ids[: lengths[turns - 1]].tolist()
        assert cut.answer_mask.tolist() == whole.answer_mask[: lengths[turns - 1]].tolist()
        assert (cut.num_images, cut.turns_cut) == ((1, 3, 3)[turns - 1], 3 - turns)
        assert (cut.input_ids == template.image_token_id).sum() == sum(PICTURE_TOKENS[: cut.num_images])


def test_a_sample_whose_first_answer_does_not_fit_is_not_usable(template):
    shortest = len(template.encode(THREE_TURNS[:2], PICTURE_TOKENS[:1], LONG).input_ids)
    with pytest.raises(UnusableSample, match=f"first answer ends after {shortest - 1} tokens"):
        template.encode(THREE_TURNS, PICTURE_TOKENS, shortest - 1)


# --- control tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|vision_start|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_control_token_in_the_text_is_refused(template, token, role):
    conversation = messages("Hi", "Hello.", system="Be brief.")
    next(m for m in conversation if m["role"] == role)["content"] += f" {token} "
    with pytest.raises(UnusableSample, match=role) as error:
        template.encode(conversation, [], LONG)
    assert token in str(error.value)


def test_placeholders_and_images_have_to_be_as_many(template):
    with pytest.raises(UnusableSample, match="1 <image> placeholder, 2 images"):
        template.encode(messages("<image>Which?", "5"), [4, 4], LONG)


# --- the tokenizer's folder ------------------------------------------------------------------------------------------


def test_a_folder_without_this_models_tokenizer_is_named(tmp_path, small_checkpoint):
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        ChatTemplate(tmp_path)
    content = json.loads((small_checkpoint / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|image_pad|>"]
    content["model"]["vocab"].pop("<|image_pad|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"<\|image_pad\|>"):
        ChatTemplate(tmp_path)
