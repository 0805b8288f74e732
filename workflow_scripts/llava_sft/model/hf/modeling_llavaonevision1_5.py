"""LLaVA-OneVision-1.5 for transformers 4.57 and newer: RICE-ViT and a 2x2 merger feeding Qwen3.

Notable here:
- Qwen3 is the stock one, under the published names, by which other programs find, wrap and split the model.
- Right for any number of images: no image attends to another, and each one's class token is dropped at its own place.
- Loads both spellings found on disk (`visual.…`, `model.layers.…` and `model.visual.…`, `model.language_model.…`);
  `save_pretrained` writes the one that the model was loaded from, except in some older versions.
"""

import torch
from torch import nn

from .configuration_llavaonevision1_5 import Llavaonevision1_5Config  # isort: skip  first: it checks the version

from transformers import PreTrainedModel, Qwen3Model
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.utils.generic import can_return_tuple

from .vision_llavaonevision1_5 import RiceTransformerPretrainedModel

# As older checkpoints, the published ones among them, spell the names → as the modules here do.
_PUBLISHED_NAMES = {"^visual": "model.visual", r"^model(?!\.(language_model|visual))": "model.language_model"}


class LLaVAOneVision1_5_PreTrainedModel(PreTrainedModel):
    config: Llavaonevision1_5Config
    config_class = Llavaonevision1_5Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["RiceBlock", "LLaVAOneVision1_5_DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers', for both spellings of the names, and never with weights that are left random.

        transformers has mappings of its own for names, but before 5.9 not for code that comes with a checkpoint: the
        language model would be random, and only a report of missing weights would say so.

        Raises ValueError when a weight is missing, unless `output_loading_info` is asked for.
        """
        asked = kwargs.pop("output_loading_info", False)
        kwargs = {"key_mapping": _PUBLISHED_NAMES, **kwargs, "output_loading_info": True}
        model, info = super().from_pretrained(*args, **kwargs)
        if info["missing_keys"] and not asked:
            first, *others = sorted(info["missing_keys"])
            more = f" and {len(others)} more" if others else ""
            raise ValueError(f"missing in the checkpoint, and would be left random: {first}{more}")
        return (model, info) if asked else model


class LLaVAOneVision1_5_DecoderLayer(Qwen3DecoderLayer):
    """Qwen3's, under the name by which other programs wrap and split the model."""


class LLaVAOneVision1_5_TextModel(Qwen3Model):
    _no_split_modules = ["LLaVAOneVision1_5_DecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:  # built anew, they would take their memory and random numbers twice
            layer.__class__ = LLaVAOneVision1_5_DecoderLayer


class LLaVAOneVision1_5_Model(LLaVAOneVision1_5_PreTrainedModel):
    def __init__(self, config: Llavaonevision1_5Config):
        super().__init__(config)
        self.visual = RiceTransformerPretrainedModel(config.vision_config)
        self.language_model = LLaVAOneVision1_5_TextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `RiceTransformerPretrainedModel.forward`, with `pooler_output` a tuple of [tokens of the image, text hidden]."""
        outputs = self.visual(pixel_values, image_grid_thw)
        tokens = image_grid_thw.prod(-1) // self.visual.config.spatial_merge_size**2
        outputs.pooler_output = outputs.pooler_output.split(tokens.tolist())
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """`mm_encoder_outputs` holds images that `generate` has encoded; `mm_token_type_ids`, which the processors of
        related models produce, is not needed and not read."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        prefill = cache is None or cache.get_seq_length() == 0
        images = (mm_encoder_outputs or {}).get("image")
        # `generate` of older versions passes the pixels on with every token that it has made.
        if images is None and pixel_values is not None and (prefill or inputs_embeds.shape[1] > 1):
            images = self.get_image_features(pixel_values, image_grid_thw)
        if images is not None or (input_ids is not None and prefill):
            inputs_embeds = self._place_images(input_ids, inputs_embeds, images)
        return self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    def _place_images(self, input_ids, inputs_embeds, images):
        if input_ids is None:
            raise ValueError("images need input_ids: the places of their tokens cannot be seen in inputs_embeds")
        is_image = input_ids == self.config.image_token_id  # [batch, sequence]
        num_tokens = int(is_image.sum())
        num_features = sum(len(f) for f in images.pooler_output) if images is not None else 0
        if num_tokens != num_features:
            raise ValueError(f"input_ids has {num_tokens} image tokens, but the images give {num_features} features")
        if images is None:
            return inputs_embeds
        features = torch.cat(tuple(images.pooler_output)).to(inputs_embeds)  # [image tokens, text hidden]
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features)


class LLaVAOneVision1_5_ForConditionalGeneration(LLaVAOneVision1_5_PreTrainedModel, GenerationMixin):
    def __init__(self, config: Llavaonevision1_5Config):
        super().__init__(config)
        self.model = LLaVAOneVision1_5_Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @property
    def visual(self):
        return self.model.visual

    @property
    def language_model(self):
        return self.model.language_model

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """As `LLaVAOneVision1_5_Model.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Each beam, and each of several answers, sees all images of its question in their order.

        transformers before 5.18 would repeat single patches, and some later versions single images.
        """
        names = ("pixel_values", "image_grid_thw", "mm_encoder_outputs")
        given = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        if expand_size > 1 and (encoded := given.get("mm_encoder_outputs", {}).get("image")) is not None:
            features = encoded.pooler_output
            order = self._order_of_copies(input_ids, expand_size, [len(f) for f in features])
            encoded.pooler_output = tuple(features[image] for image in order)
        elif expand_size > 1 and "pixel_values" in given:
            grid = given["image_grid_thw"]
            patches = grid.prod(-1).tolist()
            merged = self.config.vision_config.spatial_merge_size**2
            order = self._order_of_copies(input_ids, expand_size, [n // merged for n in patches])
            pieces = given["pixel_values"].split(patches)
            given |= {"pixel_values": torch.cat([pieces[image] for image in order]), "image_grid_thw": grid[order]}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | given

    def _order_of_copies(self, input_ids, copies: int, tokens: list[int]) -> list[int]:
        """Indices of the images, with all of a question's for each of its copies; `tokens` of each image."""
        order, image = [], 0
        for rest in (input_ids == self.config.image_token_id).sum(-1).tolist():
            first = image
            while rest > 0 and image < len(tokens):
                rest, image = rest - tokens[image], image + 1
            order += list(range(first, image)) * copies
        return order

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, kept sequence, vocab], and with `labels` the loss of the next token (-100 is not counted).

        Args:
            input_ids: [batch, sequence], one image token per feature of each image, images in order of appearance.
            attention_mask: [batch, sequence], 0 on padding, which may stand on either side.
            pixel_values, image_grid_thw: the images of the whole batch, see `RiceTransformerPretrainedModel.forward`.
            labels: [batch, sequence], not shifted.
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.

        Raises ValueError when the number of image tokens is not the number of image features.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        rest = {key: value for key, value in outputs.items() if key != "last_hidden_state"}  # cache, hidden states …
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)


__all__ = [
    "LLaVAOneVision1_5_ForConditionalGeneration",
    "LLaVAOneVision1_5_Model",
    "RiceTransformerPretrainedModel",
]
