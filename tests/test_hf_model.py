"""The Hugging Face files as a user meets them: loaded from a folder with trust_remote_code, offline."""

import filecmp
import itertools
import json
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from helpers import MODELS, SCRIPTS
from helpers.models import TEXTS, published_names
from llava_sft.errors import CheckpointError
from llava_sft.model.config import load_model_config
from llava_sft.model.export_files import SETTINGS_FILES, TOKENIZER_FILES, write_hf_sidecars
from llava_sft.model.tiny import write_tiny_checkpoint

SIZES = [(56, 56), (60, 130), (200, 56), (84, 84)]  # height, width


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    """A tiny checkpoint whose norms and biases are random too, so that none of them can be forgotten unnoticed."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    write_tiny_checkpoint(folder, TEXTS, load_model_config(MODELS / "tiny.yaml"), seed=1)
    generator = torch.Generator().manual_seed(2)
    weights = load_file(folder / "model.safetensors")
    weights = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder, **kwargs):
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **kwargs
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_dir):
    return load(tiny_dir)


@pytest.fixture(scope="module")
def processor(tiny_dir):
    return AutoProcessor.from_pretrained(tiny_dir, trust_remote_code=True)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in SIZES]


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def conversations(images):
    """No image, one image, and three images over two turns."""
    return [
        [user("Which digit is larger, 3 or 8?")],
        [user(images[1], "Which digit is this?")],
        [user(images[0], images[2], "Which is larger?"), answer("It is 5."), user("And this?", images[3])],
    ]


def encode(processor, conversation, **kwargs):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(conversation, **options, **kwargs)


# --- names and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_names_and_shapes_equal_the_published_checkpoint(size):
    from llava_sft.model.hf.configuration_llavaonevision1_5 import Llavaonevision1_5Config
    from llava_sft.model.hf.modeling_llavaonevision1_5 import LLaVAOneVision1_5_ForConditionalGeneration

    config = Llavaonevision1_5Config(**load_model_config(MODELS / f"{size}.yaml").to_hf_config())
    with torch.device("meta"):
        model = LLaVAOneVision1_5_ForConditionalGeneration(config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published_names(size)


def test_config_class_defaults_are_the_published_4b_model():
    from llava_sft.model.hf.configuration_llavaonevision1_5 import Llavaonevision1_5Config

    full = Llavaonevision1_5Config(**load_model_config(MODELS / "4b.yaml").to_hf_config())
    empty = Llavaonevision1_5Config()
    assert empty.text_config.to_dict() | {"dtype": None} == full.text_config.to_dict() | {"dtype": None}
    assert empty.vision_config.to_dict() | {"dtype": None} == full.vision_config.to_dict() | {"dtype": None}
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        Llavaonevision1_5Config(tie_word_embeddings=True)


def test_tiny_checkpoint_is_deterministic_and_marked_untrained(tmp_path):
    for name in ("a", "b"):
        write_tiny_checkpoint(tmp_path / name, TEXTS, load_model_config(MODELS / "tiny.yaml"), seed=1)
    files = sorted(os.listdir(tmp_path / "a"))
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False) == (files, [], [])
    assert json.loads((tmp_path / "a/config.json").read_text())["untrained"] is True


@pytest.mark.parametrize("old_spelling", [False, True])
def test_both_spellings_on_disk_load_and_are_kept_on_save(tiny_dir, model, tmp_path, old_spelling):
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_dir.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny_dir / "model.safetensors")
    if old_spelling:
        weights = {
            k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v
            for k, v in weights.items()
        }
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    loaded = load(source)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])

    loaded.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(source, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == weights.keys()
    again = load(tmp_path / "saved")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)


def test_sidecars_replace_old_templates_and_keep_the_tokenizer(tiny_dir, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for name in {*TOKENIZER_FILES, *SETTINGS_FILES} & set(os.listdir(tiny_dir)):
        (source / name).write_bytes((tiny_dir / name).read_bytes())
    old = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**old, "chat_template": "{{ 'old' }}"}))
    config = load_model_config(MODELS / "tiny.yaml")
    write_hf_sidecars(target, source, config, min_pixels=6272, max_pixels=12544)

    processor = AutoProcessor.from_pretrained(target, trust_remote_code=True)
    assert processor.chat_template == AutoTokenizer.from_pretrained(target).chat_template == template()
    grid = processor.image_processor([Image.new("RGB", (500, 100))])["image_grid_thw"]
    assert grid.prod() * 14 * 14 <= 12544
    assert "untrained" not in json.loads((target / "config.json").read_text())
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        write_hf_sidecars(target, source, config, min_pixels=6272, max_pixels=12544)


def template() -> str:
    return (SCRIPTS / "llava_sft/model/hf/chat_template.jinja").read_text()


# --- text and images to tensors --------------------------------------------------------------------------------------


def test_template_renders_the_published_text(processor, images):
    conversation = [user(images[0], "Which?"), answer("5"), user("and ", images[1])]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image}Which?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        f"<|im_start|>user\nand {image}<|im_end|>\n<|im_start|>assistant\n"
    )
    as_strings = [
        {"role": "user", "content": "<image>Which?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "and <image>"},
    ]
    assert processor.apply_chat_template(as_strings, add_generation_prompt=True) == text
    own_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"}]
    assert processor.apply_chat_template(own_system) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
    )


def test_processor_ids_equal_the_tokenizers_own(processor, conversations):
    for conversation in conversations:
        inputs = encode(processor, conversation)
        grids = inputs.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long))
        # the tokenizer's template, with every image token repeated by hand
        plain = processor.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        counts = iter((grids.prod(-1) // 4).tolist())
        expected = [t for i in plain for t in [i] * (next(counts) if i == processor.image_token_id else 1)]
        assert inputs["input_ids"][0].tolist() == expected
        assert sum(1 for _ in counts) == 0


def test_placeholders_in_plain_text_and_literal_image_words(processor, images):
    inputs = processor(text="<image>\nWhich?", images=images[:1], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    literal = encode(processor, [user(images[0], "What does <image> mean?")])
    assert (literal["input_ids"] == processor.image_token_id).sum() == 4
    assert "What does <image> mean?" in processor.decode(literal["input_ids"][0])
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text="<|image_pad|> Which?")


def test_control_tokens_in_user_text_stay_text_when_asked(processor, images):
    conversation = [user(images[0], "say <|im_end|> and <|image_pad|>")]
    ids = encode(processor, conversation, sanitize_control_tokens=True)["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 4
    assert ids.count(processor.tokenizer.eos_token_id) == 2  # system's and user's end of turn


def test_assistant_mask_is_the_answer_and_its_end_of_turn(processor, conversations):
    conversation = [*conversations[2], answer("It is 7.")]
    out = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    chosen = [i for i, m in zip(out["input_ids"][0], out["assistant_masks"][0], strict=True) if m]
    assert processor.decode(chosen) == "It is 5.<|im_end|>It is 7.<|im_end|>"


def test_image_processor_is_pil_and_of_single_frames(tiny_dir, processor, images):
    pixels = processor.image_processor(images, return_tensors="pt")
    assert type(processor.image_processor).__mro__[1].__name__ == "Qwen2VLImageProcessorPil"
    assert pixels["pixel_values"].shape == (pixels["image_grid_thw"].prod(-1).sum(), 3 * 14 * 14)
    alone = AutoImageProcessor.from_pretrained(tiny_dir, trust_remote_code=True)(images, return_tensors="pt")
    assert torch.equal(alone["pixel_values"], pixels["pixel_values"])


# --- vision ----------------------------------------------------------------------------------------------------------


def naive_image_features(weights, pixels, rows, columns, heads):
    """RICE-ViT and merger for one image, written from the description with loops and no shared code. [tokens, hidden]"""
    w = {k.removeprefix("model.visual."): v for k, v in weights.items()}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)  # noqa: E731
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    gelu = lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))  # noqa: E731
    places = [
        (2 * block_row + r, 2 * block_column + c)
        for block_row in range(rows // 2)
        for block_column in range(columns // 2)
        for r in range(2)
        for c in range(2)
    ]
    embedded = [F.conv2d(p.view(1, 3, 14, 14), w["patch_embed.proj.weight"]).flatten() for p in pixels]
    x = norm(torch.stack([w["class_embedding"], *embedded]), "pre_layernorm")
    size = x.shape[-1] // heads
    quarter = size // 4
    angles = [w["class_pos_emb"][0].tolist()]
    for row, column in places:
        base = [10000.0 ** (-i / quarter) for i in range(quarter)]
        angles.append([row * f for f in base] + [column * f for f in base])
    angles = torch.tensor(angles)

    def rotate(vectors):  # [positions, head_dim]; pairs are (i, i + head_dim / 2)
        a, b = vectors[:, : size // 2], vectors[:, size // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)

    blocks = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))
    for i in range(blocks):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=1)
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = rotate(q[:, part]) @ rotate(k[:, part]).T / math.sqrt(size)
            mixed.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(mixed, dim=1), f"blocks.{i}.attn.proj")
        x = x + linear(gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    merged = norm(x[1:], "merger.ln_q").reshape(len(pixels) // 4, -1)
    return linear(gelu(linear(merged, "merger.mlp.0")), "merger.mlp.2")


@torch.no_grad()
def test_vision_tower_equals_a_naive_implementation(model, processor, images):
    for image in images:
        inputs = processor.image_processor([image], return_tensors="pt")
        (features,) = model.model.get_image_features(**inputs).pooler_output
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        expected = naive_image_features(
            model.state_dict(), inputs["pixel_values"], rows, columns, model.config.vision_config.num_heads
        )
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_of_several_images_has_the_features_it_has_alone(tiny_dir, processor, images, attention):
    model = load(tiny_dir, attn_implementation=attention)
    together = model.model.get_image_features(**processor.image_processor(images, return_tensors="pt"))
    assert len(together.pooler_output) == len(images)
    for image, features in zip(images, together.pooler_output, strict=True):
        alone = model.model.get_image_features(**processor.image_processor([image], return_tensors="pt"))
        torch.testing.assert_close(features, alone.pooler_output[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_flash_kernels_get_the_images_as_segments_of_variable_length(tiny_dir, model, processor, images):
    """A stand-in with the interface of the variable-length kernels, so that no GPU is needed."""
    seen = []

    def segments(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **kwargs):
        bounds = cu_seq_lens_q.tolist()
        seen.append((bounds, max_length_q, kwargs["is_causal"]))
        parts = [
            F.scaled_dot_product_attention(*(x[:, :, a:b] for x in (query, key, value)), scale=scaling)
            for a, b in itertools.pairwise(bounds)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    AttentionInterface.register("flash_attention_stand_in", segments)
    flash = load(tiny_dir)
    flash.model.visual.config._attn_implementation = "flash_attention_stand_in"
    inputs = processor.image_processor(images, return_tensors="pt")
    lengths = (inputs["image_grid_thw"].prod(-1) + 1).tolist()  # with the class token
    features = flash.model.get_image_features(**inputs).pooler_output
    assert seen == [([0, *itertools.accumulate(lengths)], max(lengths), False)] * 3
    for a, b in zip(features, model.model.get_image_features(**inputs).pooler_output, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_wrong_numbers_of_patches_and_image_tokens_are_errors(model, processor, conversations):
    inputs = encode(processor, conversations[1])
    with pytest.raises(ValueError, match="image tokens"):
        model(input_ids=inputs["input_ids"][:, :-20], pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])  # fmt: skip
    with pytest.raises(ValueError, match="image tokens"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="patches"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:-4]})
    with pytest.raises(ValueError, match="image_grid_thw"):
        model(**{**inputs, "image_grid_thw": torch.tensor([[2, 2, 10]])})


# --- language --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_logits(model, processor, conversations, side):
    batch = encode(processor, conversations, processor_kwargs={"padding": True, "padding_side": side})
    logits = model(**batch).logits
    assert (batch["attention_mask"] == 0).any()
    for i, conversation in enumerate(conversations):
        alone = model(**encode(processor, conversation)).logits[0]
        torch.testing.assert_close(logits[i][batch["attention_mask"][i] == 1], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_left_padded_batch_generates_what_each_sample_generates_alone(model, processor, conversations):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = encode(processor, conversations, processor_kwargs={"padding": True, "padding_side": "left"})
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for i, conversation in enumerate(conversations):
        inputs = encode(processor, conversation)
        alone = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert together[i].tolist() == alone.tolist()


@torch.no_grad()
def test_generation_with_cache_equals_the_argmax_without(model, processor, conversations):
    inputs = encode(processor, conversations[2])
    length = inputs["input_ids"].shape[1]
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    images = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    ids = inputs["input_ids"]
    for _ in range(8):
        ids = torch.cat([ids, model(input_ids=ids, **images).logits[:, -1:].argmax(-1)], dim=1)
    assert generated[0, length:].tolist() == ids[0, length:].tolist()
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=2, num_return_sequences=2, do_sample=False)
    assert beams.shape[0] == 2


def test_loss_counts_the_labelled_tokens_only(model, processor, conversations):
    inputs = encode(processor, conversations, processor_kwargs={"padding": True})
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :30] = -100
    with torch.no_grad():
        out = model(**inputs, labels=labels)
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)


def test_checkpointed_gradients_equal_plain_ones_and_reach_every_parameter(tiny_dir, processor, conversations):
    inputs = encode(processor, conversations, processor_kwargs={"padding": True})
    gradients = []
    for reentrant in (None, True, False):
        model = load(tiny_dir).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        for checkpointed in gradients[1:]:
            torch.testing.assert_close(checkpointed[name], plain, atol=1e-6, rtol=1e-5)
        assert plain.abs().max() > 0, name
