"""LLaVA-OneVision-1.5 for transformers 5: RICE-ViT and a 2x2 merger feeding Qwen3.

Notable here:
- Qwen3 and the vision attention and MLP are the stock ones; what is written out is only what the stock parts lack:
  the class token of each image with its learned rotary angle, and the order of patches by merge blocks.
- Right for any number of images: no image attends to another, and each one's class token is dropped at its own place.
- Loads both spellings found on disk (`visual.…`, `model.layers.…` and `model.visual.…`, `model.language_model.…`);
  `save_pretrained` writes the spelling that the model was loaded from.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Qwen3Model
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger, VisionAttention, VisionMlp
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested

from .configuration_llavaonevision1_5 import Llavaonevision1_5Config, RiceConfig


class RicePatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, on patches that are already cut: one matrix product."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        kernel = (config.patch_size, config.patch_size)
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=kernel, stride=kernel, bias=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.flatten(1)  # [hidden, channels * patch * patch]
        return F.linear(pixel_values.to(weight.dtype), weight)  # [patches, hidden]


class RicePatchMerger(PatchMerger):
    def __init__(self, config: RiceConfig):
        super().__init__(config.text_hidden_size, config.hidden_size, config.spatial_merge_size)
        self.ln_q = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the stock one fixes another eps


class RiceBlock(GradientCheckpointingLayer):
    def __init__(self, config: RiceConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config.hidden_size, config.intermediate_size, config.hidden_act)

    # cos and sin are arguments of their own: reentrant checkpointing finds no gradient inside a tuple.
    def forward(self, hidden_states, cu_seqlens, max_seqlen, cos, sin):
        hidden_states = hidden_states + self.attn(
            self.norm1(hidden_states),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            position_embeddings=(cos, sin),
        )
        return hidden_states + self.mlp(self.norm2(hidden_states))


class LLaVAOneVision1_5_PreTrainedModel(PreTrainedModel):
    config: Llavaonevision1_5Config
    config_class = Llavaonevision1_5Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["RiceBlock", "Qwen3DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RiceVisionModel):
            init.normal_(module.class_embedding, std=module.config.hidden_size**-0.5)
            init.normal_(module.class_pos_emb)


class RiceVisionModel(LLaVAOneVision1_5_PreTrainedModel):
    """RICE-ViT (region-aware cluster ViT, Xie et al. 2025) as used in LLaVA-OneVision-1.5, merger included."""

    config: RiceConfig
    config_class = RiceConfig  # type: ignore[assignment]
    main_input_name = "pixel_values"

    def __init__(self, config: RiceConfig):
        super().__init__(config)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.class_pos_emb = nn.Parameter(torch.empty(1, config.hidden_size // config.num_heads // 2))
        self.patch_embed = RicePatchEmbed(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList([RiceBlock(config) for _ in range(config.depth)])
        self.merger = RicePatchMerger(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images, each on its own.

        Args:
            pixel_values: [patches, channels * patch_size * patch_size], all images one after the other, the patches of
                an image ordered by merge block (block row, block column, row in block, column in block).
            image_grid_thw: [images, 3], per image (1, rows, columns) in patches.

        Returns:
            `last_hidden_state` [patches, hidden] after the blocks, `pooler_output` [patches / merge^2, text hidden].
        """
        num_patches, num_images = pixel_values.shape[0], image_grid_thw.shape[0]
        lengths = self._check_grid(image_grid_thw, num_patches)  # list of patches per image, on the CPU
        device = pixel_values.device
        counts = torch.tensor(lengths, device=device)  # [images]
        image_index = torch.arange(num_images, device=device)
        image_of_patch = image_index.repeat_interleave(counts, output_size=num_patches)  # [patches]

        # Each image is its class token followed by its patches; the slots say where each row goes.
        class_slots = counts.cumsum(0) - counts + image_index  # [images]
        patch_slots = torch.arange(num_patches, device=device) + image_of_patch + 1  # [patches]
        slots = torch.cat([patch_slots, class_slots])

        def with_class_rows(patch_rows, class_row):
            rows = torch.cat([patch_rows, class_row.to(patch_rows.dtype).expand(num_images, -1)])
            return torch.zeros_like(rows).index_copy(0, slots, rows)  # [patches + images, …]

        hidden_states = with_class_rows(self.patch_embed(pixel_values), self.class_embedding)
        hidden_states = self.pre_layernorm(hidden_states)
        angles = self._patch_angles(image_grid_thw.to(device), counts, image_of_patch)
        angles = with_class_rows(angles, self.class_pos_emb)  # [patches + images, head_dim / 2], fp32
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        cu_seqlens = F.pad((counts + 1).cumsum(0, dtype=torch.int32), (1, 0))  # [images + 1]
        # Only the flash kernels want it; elsewhere the attention splits by image.
        max_seqlen = max(lengths) + 1 if is_flash_attention_requested(self.config) else None

        for block in self.blocks:
            hidden_states = block(hidden_states, cu_seqlens, max_seqlen, cos, sin)

        hidden_states = hidden_states[patch_slots]  # [patches, hidden]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.merger(hidden_states))

    def _check_grid(self, image_grid_thw, num_patches) -> list[int]:
        merge = self.config.spatial_merge_size
        grid = image_grid_thw.tolist()
        for t, h, w in grid:
            if t != 1 or h % merge or w % merge:
                raise ValueError(f"image_grid_thw {[t, h, w]}: want [1, rows, columns], both multiples of {merge}")
        lengths = [h * w for _, h, w in grid]
        if sum(lengths) != num_patches:
            raise ValueError(f"image_grid_thw describes {sum(lengths)} patches, pixel_values has {num_patches}")
        return lengths

    def _patch_angles(self, image_grid_thw, counts, image_of_patch) -> torch.Tensor:
        """2-D RoPE angles, row frequencies then column frequencies: [patches, head_dim / 2], fp32."""
        merge = self.config.spatial_merge_size
        starts = counts.cumsum(0) - counts  # [images]
        index = torch.arange(image_of_patch.shape[0], device=counts.device) - starts[image_of_patch]
        block, inside = index // merge**2, index % merge**2
        blocks_per_row = (image_grid_thw[:, 2] // merge)[image_of_patch]
        row = block // blocks_per_row * merge + inside // merge  # [patches]
        column = block % blocks_per_row * merge + inside % merge
        half = self.config.hidden_size // self.config.num_heads // 2
        exponent = torch.arange(0, half, 2, device=counts.device, dtype=torch.float32) / half
        frequencies = self.config.rope_theta**-exponent  # [head_dim / 4]
        return torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)


class LLaVAOneVision1_5_Model(LLaVAOneVision1_5_PreTrainedModel):
    def __init__(self, config: Llavaonevision1_5Config):
        super().__init__(config)
        self.visual = RiceVisionModel(config.vision_config)
        self.language_model = Qwen3Model(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `RiceVisionModel.forward`, with `pooler_output` a tuple of [tokens of the image, text hidden]."""
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

        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.get_image_features(pixel_values, image_grid_thw)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        prefill = cache is None or cache.get_seq_length() == 0
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
            pixel_values, image_grid_thw: the images of the whole batch, see `RiceVisionModel.forward`.
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


# transformers ignores a mapping on the class of remote code, but takes one registered for its name.
register_checkpoint_conversion_mapping(
    "LLaVAOneVision1_5_ForConditionalGeneration",
    [
        WeightRenaming(r"^visual\.", "model.visual."),
        WeightRenaming(r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
    ],
    overwrite=True,
)

__all__ = ["LLaVAOneVision1_5_ForConditionalGeneration", "LLaVAOneVision1_5_Model", "RiceVisionModel"]
