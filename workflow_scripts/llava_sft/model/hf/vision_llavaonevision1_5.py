"""The vision tower of LLaVA-OneVision-1.5 and its merger: RICE-ViT for transformers 4.57 and newer.

The attention and the MLP are stock ones; what is written out is what those lack: the class token of each image with its
learned rotary angle, and the order of patches by merge blocks.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_llavaonevision1_5 import RiceConfig  # isort: skip  first: it checks the version

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger, VisionAttention, VisionMlp

try:
    from transformers import initialization as init  # leaves alone what was loaded
except ImportError:  # transformers 4
    from torch.nn import init


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
            position_embeddings=(cos, sin),
            **({} if max_seqlen is None else {"max_seqlen": max_seqlen}),
        )
        return hidden_states + self.mlp(self.norm2(hidden_states))


class RiceTransformerPretrainedModel(PreTrainedModel):
    """RICE-ViT (region-aware cluster ViT, Xie et al. 2025) as used in LLaVA-OneVision-1.5, merger included."""

    config: RiceConfig
    config_class = RiceConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RiceBlock"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

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

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RiceTransformerPretrainedModel):
            init.normal_(module.class_embedding, std=module.config.hidden_size**-0.5)
            init.normal_(module.class_pos_emb)

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images, each on its own.

        Args:
            pixel_values: [patches, channels * patch_size * patch_size], all images one after the other, the patches of
                an image ordered by merge block (block row, block column, row in block, column in block).
            grid_thw: [images, 3], per image (1, rows, columns) in patches.

        Returns:
            `last_hidden_state` [patches, hidden] after the blocks, `pooler_output` [patches / merge^2, text hidden].
        """
        num_patches, num_images = pixel_values.shape[0], grid_thw.shape[0]
        lengths = self._check_grid(grid_thw, num_patches)  # list of patches per image, on the CPU
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
        angles = self._patch_angles(grid_thw.to(device), counts, image_of_patch)
        angles = with_class_rows(angles, self.class_pos_emb)  # [patches + images, head_dim / 2], fp32
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        cu_seqlens = F.pad((counts + 1).cumsum(0, dtype=torch.int32), (1, 0))  # [images + 1]
        # Only the flash kernels want it; elsewhere the attention splits by image.
        max_seqlen = max(lengths) + 1 if "flash" in str(self.config._attn_implementation) else None

        for block in self.blocks:
            hidden_states = block(hidden_states, cu_seqlens, max_seqlen, cos, sin)

        hidden_states = hidden_states[patch_slots]  # [patches, hidden]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.merger(hidden_states))

    def _check_grid(self, grid_thw, num_patches) -> list[int]:
        merge = self.config.spatial_merge_size
        grid = grid_thw.tolist()
        for t, h, w in grid:
            if t != 1 or h % merge or w % merge:
                raise ValueError(f"image_grid_thw {[t, h, w]}: want [1, rows, columns], both multiples of {merge}")
        lengths = [h * w for _, h, w in grid]
        if sum(lengths) != num_patches:
            raise ValueError(f"image_grid_thw describes {sum(lengths)} patches, pixel_values has {num_patches}")
        return lengths

    def _patch_angles(self, grid_thw, counts, image_of_patch) -> torch.Tensor:
        """2-D RoPE angles, row frequencies then column frequencies: [patches, head_dim / 2], fp32."""
        merge = self.config.spatial_merge_size
        starts = counts.cumsum(0) - counts  # [images]
        index = torch.arange(image_of_patch.shape[0], device=counts.device) - starts[image_of_patch]
        block, inside = index // merge**2, index % merge**2
        blocks_per_row = (grid_thw[:, 2] // merge)[image_of_patch]
        row = block // blocks_per_row * merge + inside // merge  # [patches]
        column = block % blocks_per_row * merge + inside % merge
        half = self.config.hidden_size // self.config.num_heads // 2
        exponent = torch.arange(0, half, 2, device=counts.device, dtype=torch.float32) / half
        frequencies = self.config.rope_theta**-exponent  # [head_dim / 4]
        return torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)
