"""What other programs call on the configuration, tokenizer and processor of an export."""

import torch
import transformers
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from consumers.export import call, expect, expect_close

# ------------------------------------------------------------------------------------------------- configuration


@call("config.vocab_size, hidden_size, tie_word_embeddings (SGLang fork, AReaL)")
def _(export):
    config = export.config
    expect(config.vocab_size == export.model.lm_head.out_features, f"vocab_size {config.vocab_size}")
    expect(config.hidden_size == export.model.lm_head.in_features, f"hidden_size {config.hidden_size}")
    expect(config.tie_word_embeddings is False, "tie_word_embeddings")


@call("keys of config.json that converters index")
def _(export):
    text, vision = export.raw_config["text_config"], export.raw_config["vision_config"]
    for key in ("initializer_range", "use_cache", "sliding_window", "max_window_layers"):
        expect(key in text, f"text_config lacks {key}")
    expect("initializer_range" in vision, "vision_config lacks initializer_range")
    expect(export.raw_config["architectures"] == ["LLaVAOneVision1_5_ForConditionalGeneration"], "architectures")
    return export.raw_config["transformers_version"]


@call("tokenizer by itself")
def _(export):
    tokenizer = AutoTokenizer.from_pretrained(export.folder, **export.options)
    expect(tokenizer.padding_side == "left", f"padding_side {tokenizer.padding_side}")
    ids = tokenizer(export.text().replace("<|image_pad|>", ""))["input_ids"]
    expect(ids == [i for i in export.inputs["input_ids"][0].tolist() if i != export.config.image_token_id], "ids")


@call("image processor by itself")
def _(export):
    try:
        processor = AutoImageProcessor.from_pretrained(export.folder, **export.options)
    except ImportError as error:  # of some versions' AutoImageProcessor, whatever the folder holds
        if "AutoImageProcessor requires the Torchvision library" in str(error):
            return "AutoImageProcessor of this transformers needs torchvision"
        raise
    images = processor(export.image, return_tensors="pt")
    expect(torch.equal(images["pixel_values"], export.inputs["pixel_values"]), "pixel values")


# ------------------------------------------------------------------------------------------------- processor


@call("processor with videos=None, do_sample_frames=False (lmms-eval, VLMEvalKit, NeMo)")
def _(export):
    text, options = [export.text()], {"padding": True, "return_tensors": "pt"}
    for more in ({"videos": None}, {"videos": None, "do_sample_frames": False}, {"videos": []}):
        found = export.processor(text=text, images=[export.image], **more, **options)
        expect(torch.equal(found["input_ids"], export.inputs["input_ids"]), f"other ids with {more}")


@call("processor with images=[]")
def _(export):
    found = export.processor(text=[export.text(0)], images=[], return_tensors="pt")
    expect(set(found) == {"input_ids", "attention_mask"}, f"{sorted(found)}")


@call("apply_chat_template to tensors, pictures inside")
def _(export):
    content = [{"type": "image", "image": export.image}, {"type": "text", "text": export.question}]
    found = export.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    for key in ("input_ids", "pixel_values", "image_grid_thw"):
        expect(torch.equal(found[key], export.inputs[key]), f"another {key}")


@call("AutoProcessor with min_pixels, max_pixels; image_processor.min_pixels (lmms-eval)")
def _(export):
    limits = {"min_pixels": 28 * 28 * 12, "max_pixels": 28 * 28 * 16}
    processor = AutoProcessor.from_pretrained(export.folder, **limits, **export.options)
    images = processor.image_processor
    expect((images.min_pixels, images.max_pixels) == tuple(limits.values()), "limits are not those asked for")
    for side in (20, 900):
        grid = images(images=[export.image.resize((side, side))], return_tensors="pt")["image_grid_thw"]
        pixels = int(grid.prod()) * 14 * 14
        expect(limits["min_pixels"] <= pixels <= limits["max_pixels"], f"{side}×{side} became {pixels} pixels")
    own = export.processor.image_processor
    return own.min_pixels, own.max_pixels


@call("image_processor with do_resize=False (ms-swift)")
def _(export):
    image = export.image.resize((84, 56))
    found = export.processor.image_processor(images=[image], return_tensors="pt", do_resize=False)
    expect(found["image_grid_thw"].tolist() == [[1, 4, 6]], f"{found['image_grid_thw'].tolist()}")


@call("processor._get_num_multimodal_tokens (vLLM)")
def _(export):
    images = [export.image.resize((w, h)) for h, w in [(448, 448), (90, 120), (30, 800)]]
    grid = export.processor.image_processor(images=images, return_tensors="pt")["image_grid_thw"].prod(-1)
    data = export.processor._get_num_multimodal_tokens(image_sizes=[(i.height, i.width) for i in images])
    expect(list(data["num_image_patches"]) == grid.tolist(), f"{data}")
    expect(list(data["num_image_tokens"]) == (grid // 4).tolist(), f"{data}")


@call("return_mm_token_type_ids (vLLM)")
def _(export):
    found = export.processor(
        text=export.text(), images=[export.image], return_mm_token_type_ids=True, return_tensors="pt"
    )
    wanted = (export.inputs["input_ids"] == export.config.image_token_id).long()
    expect(torch.equal(torch.as_tensor(found["mm_token_type_ids"]), wanted), "not one where an image stands")
    with torch.no_grad():
        expect_close(export.model(**found).logits[0], export.logits, "logits")


@call("return_text_replacement_offsets (vLLM ≥ 0.33, transformers ≥ 5.15)")
def _(export):
    if not hasattr(transformers.ProcessorMixin, "return_text_replacement_offsets"):
        return "this transformers does not know it"
    found = export.processor(
        text=export.text(2), images=export.several(2), return_text_replacement_offsets=True, return_tensors="pt"
    )
    lengths = [x["replacement"].count("<|image_pad|>") for x in found["text_replacement_offsets"][0]]
    expect(lengths == (found["image_grid_thw"].prod(-1) // 4).tolist(), f"{lengths}")
