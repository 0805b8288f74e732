"""Processor of LLaVA-OneVision-1.5 for transformers 4.57 and newer: Qwen2-VL's image preprocessing and a Qwen tokenizer."""

from .configuration_llavaonevision1_5 import check_transformers  # isort: skip

check_transformers()

from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, MultiModalData

try:
    from transformers import Qwen2VLImageProcessorPil
except ImportError:  # before 5.4 this one was of Pillow
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil

IMAGE_TOKEN = "<|image_pad|>"
IMAGE_PLACEHOLDER = "<image>"  # how LLaVA data marks an image in text
_LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # option → its key in `size`


class LLaVAOneVision1_5_ImageProcessor(Qwen2VLImageProcessorPil):
    """Qwen2-VL's preprocessing with single frames.

    A class of its own because the backend changes pixels slightly, and transformers takes torchvision in silence wherever
    it is installed, even if preprocessor_config.json names the PIL class. This one is always PIL.
    """

    temporal_patch_size = 1
    size = {"shortest_edge": 3136, "longest_edge": 1_000_000}

    def __init__(self, **kwargs):
        super().__init__(**{"temporal_patch_size": 1, "size": dict(type(self).size), **kwargs})

    @property
    def min_pixels(self):
        return self.size["shortest_edge"]

    @min_pixels.setter
    def min_pixels(self, value):
        self.size = {**dict(self.size), "shortest_edge": value}

    @property
    def max_pixels(self):
        return self.size["longest_edge"]

    @max_pixels.setter
    def max_pixels(self, value):
        self.size = {**dict(self.size), "longest_edge": value}

    def _standardize_kwargs(self, size=None, min_pixels=None, max_pixels=None, **kwargs):
        # Attributes stand in for options that a call leaves out: as if passed, with a warning, and against its `size`.
        given = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        changed = {key: value for key, value in given.items() if value not in (None, self.size[key])}
        if changed:
            size = {**dict(size or self.size), **changed}
        return super()._standardize_kwargs(size=size, **kwargs)


class LLaVAOneVision1_5_Processor(ProcessorMixin):
    """Text and images to `input_ids`, `attention_mask`, `pixel_values` [patches, 588], `image_grid_thw` [images, 3].

    `<|image_pad|>` in the text grows to one token per feature of its image. Where a text has none but images are given,
    `<image>` is taken as LLaVA data means it. There is no video: `videos` may be None or empty.
    """

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4
        attributes = ["image_processor", "tokenizer"]
        image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        if not _is_empty(videos):
            raise ValueError("videos: this model takes images; give the frames of a video as images")
        kwargs.pop("do_sample_frames", None)
        images = None if _is_empty(images) else images
        if images is not None and text is not None:
            full = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
            text = [t if IMAGE_TOKEN in t else t.replace(IMAGE_PLACEHOLDER, full) for t in _as_list(text)]
        if hasattr(ProcessorMixin, "get_text_with_replacements"):
            return super().__call__(images=images, text=text, **kwargs)
        return self._encode(images, text, **kwargs)

    def _encode(self, images, text, **kwargs):
        """What `ProcessorMixin` does by itself since 5.10."""
        kwargs.pop("audio", None)
        nested = {name: kwargs.pop(name, None) or {} for name in ("common_kwargs", "images_kwargs", "text_kwargs")}
        options = nested["common_kwargs"] | {k: v for k, v in kwargs.items() if not k.endswith("_kwargs")}
        names = {*ImagesKwargs.__annotations__, *_LIMITS} - {"return_tensors"}
        for_images = {k: v for k, v in options.items() if k in names} | nested["images_kwargs"]
        for_text = {k: v for k, v in options.items() if k not in names} | nested["text_kwargs"]
        return_tensors = for_text.pop("return_tensors", None)
        with_types = for_text.pop("return_mm_token_type_ids", False)
        if text is None and images is None:
            raise ValueError("give text, images, or both")
        image_inputs = {} if images is None else dict(self.image_processor(images=images, **for_images))
        if text is None:
            return BatchFeature(image_inputs, tensor_type=return_tensors)
        count = len(image_inputs.get("image_grid_thw", ()))
        replacements = iter([self.replace_image_token(image_inputs, i) for i in range(count)])
        pieces = [t.split(IMAGE_TOKEN) for t in _as_list(text)]
        if (wanted := sum(map(len, pieces)) - len(pieces)) != count:
            given = f"{count} images were passed" if count else "no images were passed"
            raise ValueError(f"found {wanted} {IMAGE_TOKEN} tokens in the text, but {given}")
        texts = [first + "".join(next(replacements) + piece for piece in rest) for first, *rest in pieces]
        text_inputs = dict(self.tokenizer(texts, **for_text))
        if with_types:
            ids = text_inputs["input_ids"]
            text_inputs["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in ids]
        return BatchFeature({**text_inputs, **image_inputs}, tensor_type=return_tensors)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return IMAGE_TOKEN * (patches // self.image_processor.merge_size**2)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Patches and tokens of images of these sizes, (height, width) each; vLLM asks before it has a picture."""
        given = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        size = {**dict(self.image_processor.size), **(given.get("size") or {})}
        limits = {name: given.get(name) or size[key] for name, key in _LIMITS.items()}
        count = self.image_processor.get_number_of_image_patches
        patches = [count(height, width, limits) for height, width in image_sizes or ()]
        tokens = [n // self.image_processor.merge_size**2 for n in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)


def _as_list(text):
    return [text] if isinstance(text, str) else text


def _is_empty(items) -> bool:
    """Whether there is nothing in it: None, [], or a list of such for each text of a batch."""
    return items is None or (isinstance(items, list | tuple) and all(map(_is_empty, items)))


__all__ = ["LLaVAOneVision1_5_ImageProcessor", "LLaVAOneVision1_5_Processor"]
