"""RICE-ViT and the adapter, in Megatron-Core: uint8 patches of any number of images in, LLM embeddings out.

Notable:
- every image is one segment [class token, patches], all images of a batch go through the blocks in one call;
- patches come in merge-block order, so that four consecutive ones become one LLM token;
- pixels are normalised here, on the accelerator: the loader ships bytes.
Source of the architecture: the released configuration of LLaVA-OneVision-1.5; RICE-ViT, arXiv:2507.20025.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from llava_sft.model.attention import VisionSeqParams, packed_seq_params
from llava_sft.model.config import ModelConfig, VisionConfig
from llava_sft.model.processing import CLIP_MEAN, CLIP_STD

Grid = tuple[int, int]  # height and width of an image in patches


@lru_cache(maxsize=4096)
def patch_positions(height: int, width: int, merge: int) -> Tensor:
    """Row and column of each patch of a `height` × `width` grid in merge-block order, [patches, 2], float32."""
    rows = torch.arange(height).view(height // merge, 1, merge, 1).expand(-1, width // merge, -1, merge)
    columns = torch.arange(width).view(1, width // merge, 1, merge).expand(height // merge, -1, merge, -1)
    return torch.stack((rows.flatten(), columns.flatten()), dim=-1).float()


@lru_cache(maxsize=8)
def _constants(vision: VisionConfig, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary frequencies [head_dim/4], pixel mean and reciprocal deviation [3·patch_size²], all float32.

    No buffers: Megatron casts those to bf16 together with the weights.
    """
    half = head_dim // 2
    frequencies = vision.rotary_base ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
    mean, std = (
        torch.tensor(value, dtype=torch.float32).repeat_interleave(vision.patch_size**2)
        for value in (CLIP_MEAN, CLIP_STD)
    )
    return frequencies.to(device), (255 * mean).to(device), (1 / (255 * std)).to(device)


class RiceViT(MegatronModule):
    """The vision tower: `pixels` [patches, 3·patch_size²] (uint8, or float that is normalised already) and the grids
    of the images → [patches, hidden_size], class tokens dropped."""

    def __init__(self, config: TransformerConfig, vision: VisionConfig, layer_spec: ModuleSpec, pg_collection):
        super().__init__(config=config)
        self.vision, self.head_dim = vision, config.kv_channels
        self.begins_frozen = False  # what comes before the layers is frozen, and they are not
        self.patch_embed = nn.Linear(3 * vision.patch_size**2, vision.hidden_size, bias=False)
        # The released models keep the class token and its rotary vector as constants: they are never trained.
        self.class_embedding = nn.Parameter(torch.randn(vision.hidden_size), requires_grad=False)
        self.class_pos_emb = nn.Parameter(torch.randn(1, self.head_dim // 2), requires_grad=False)
        self.pre_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layernorm_epsilon)
        self.decoder = TransformerBlock(
            config=config,
            spec=layer_spec,
            pre_process=True,
            post_process=True,
            post_layer_norm=False,
            pg_collection=pg_collection,
        )

    def forward(self, pixels: Tensor, grids: list[Grid]) -> Tensor:
        dtype, device = self.patch_embed.weight.dtype, pixels.device
        frequencies, pixel_mean, pixel_scale = _constants(self.vision, self.head_dim, device)
        if pixels.dtype == torch.uint8:
            pixels = (pixels.float() - pixel_mean) * pixel_scale
        patches = self.patch_embed(pixels.to(dtype))  # [patches, hidden]

        # Image i starts with its class token, so its patches stand i + 1 places later than in `pixels`.
        lengths = [height * width for height, width in grids]
        shift = torch.arange(1, len(grids) + 1).repeat_interleave(torch.tensor(lengths))
        patch_index = (torch.arange(sum(lengths)) + shift).to(device, non_blocking=True)
        tokens = sum(lengths) + len(grids)

        positions = torch.cat([patch_positions(h, w, self.vision.spatial_merge_size) for h, w in grids])
        positions = positions.to(device, non_blocking=True)
        angles = (positions.unsqueeze(-1) * frequencies).flatten(1)  # [patches, head_dim/2]: rows, then columns
        angles = self.class_pos_emb.float().expand(tokens, -1).index_copy(0, patch_index, angles)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)  # [tokens, 1, head_dim]
        segments = packed_seq_params(
            [length + 1 for length in lengths],
            device,
            VisionSeqParams,
            rotary_cos=angles.cos(),
            rotary_sin=angles.sin(),
        )

        hidden = self.class_embedding.to(dtype).expand(tokens, -1).index_copy(0, patch_index, patches)
        hidden = self.pre_layernorm(hidden).unsqueeze(1)  # [tokens, 1, hidden]
        if self.begins_frozen and torch.is_grad_enabled():
            hidden.requires_grad_()  # as of embeddings (llava.py)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=segments)
        return hidden.squeeze(1).index_select(0, patch_index)


class Adapter(MegatronModule):
    """LayerNorm, four neighbouring patches joined, two linear layers: [patches, vision hidden] →
    [patches / spatial_merge_size², LLM hidden]."""

    def __init__(self, config: TransformerConfig, model: ModelConfig):
        super().__init__(config=config)
        vision = model.vision
        self.joined = vision.hidden_size * vision.spatial_merge_size**2
        self.layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layernorm_epsilon)
        self.linear_fc1 = nn.Linear(self.joined, self.joined)
        self.linear_fc2 = nn.Linear(self.joined, model.language.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        joined = self.layernorm(patches).view(-1, self.joined)
        return self.linear_fc2(F.gelu(self.linear_fc1(joined)))
