"""Processor of LLaVA-OneVision-1.5 for transformers 5: Qwen2-VL's image preprocessing and a Qwen tokenizer."""

from transformers import ProcessorMixin, Qwen2VLImageProcessorPil

IMAGE_TOKEN = "<|image_pad|>"
IMAGE_PLACEHOLDER = "<image>"  # how LLaVA data marks an image in text


class LLaVAOneVision1_5_ImageProcessor(Qwen2VLImageProcessorPil):
    """Qwen2-VL's preprocessing with single frames.

    A class of its own because the backend changes pixels slightly, and transformers takes torchvision in silence wherever
    it is installed, even if preprocessor_config.json names the PIL class. This one is always PIL.
    """

    temporal_patch_size = 1
    size = {"shortest_edge": 3136, "longest_edge": 1_000_000}


class LLaVAOneVision1_5_Processor(ProcessorMixin):
    """Text and images to `input_ids`, `attention_mask`, `pixel_values` [patches, 588], `image_grid_thw` [images, 3].

    `<|image_pad|>` in the text grows to one token per feature of its image. Where a text has none but images are given,
    `<image>` is taken as LLaVA data means it.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs):
        if images is not None and text is not None:
            full = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
            text = [t if IMAGE_TOKEN in t else t.replace(IMAGE_PLACEHOLDER, full) for t in _as_list(text)]
        return super().__call__(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return IMAGE_TOKEN * (patches // self.image_processor.merge_size**2)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)


def _as_list(text):
    return [text] if isinstance(text, str) else text


__all__ = ["LLaVAOneVision1_5_ImageProcessor", "LLaVAOneVision1_5_Processor"]
