"""Configuration of LLaVA-OneVision-1.5 for transformers 4.57 and newer: RICE-ViT, a 2x2 merger, Qwen3.

The defaults are those of the published configuration classes (the 4B model), because a saved config.json leaves out
every key that equals its default.
"""

import transformers
from packaging.version import Version

NEEDED_TRANSFORMERS = "4.57"


def check_transformers() -> None:
    """Raise ImportError, with what to do, where transformers is too old; before a name that it lacks is imported."""
    if Version(transformers.__version__) < Version(NEEDED_TRANSFORMERS):
        raise ImportError(
            f"LLaVA-OneVision-1.5 needs transformers {NEEDED_TRANSFORMERS} or newer, and {transformers.__version__} is "
            "installed: pip install --upgrade transformers"
        )


check_transformers()

from transformers import PretrainedConfig, Qwen3Config  # 5 says PreTrainedConfig, and knows this name too

_TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "tie_word_embeddings": False,
}


class RiceConfig(PretrainedConfig):
    """The vision tower and its merger. `hidden_size` is the tower's width, `text_hidden_size` what the merger puts out."""

    model_type = "rice_vit"
    base_config_key = "vision_config"
    attribute_map = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}

    def __init__(
        self,
        depth=24,
        embed_dim=1024,
        hidden_size=1024,
        hidden_act="gelu",
        intermediate_size=4096,
        num_heads=16,
        in_channels=3,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=1,
        initializer_range=0.02,
        layer_norm_eps=1e-5,
        rope_theta=10000.0,
        text_hidden_size=2560,
        **kwargs,
    ):
        if embed_dim != hidden_size:
            raise ValueError(f"vision_config: embed_dim {embed_dim} and hidden_size {hidden_size} must be equal")
        self.depth = depth
        self.embed_dim = embed_dim
        self.hidden_size = hidden_size
        self.hidden_act = hidden_act
        self.intermediate_size = intermediate_size
        self.num_heads = num_heads
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.temporal_patch_size = temporal_patch_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.text_hidden_size = text_hidden_size
        super().__init__(**kwargs)


class LLaVAOneVision1_5_TextConfig(Qwen3Config):
    """Qwen3 with other defaults."""

    model_type = "LLaVAOneVision1_5_text"
    base_config_key = "text_config"

    def __init__(self, **kwargs):
        super().__init__(**{**_TEXT_DEFAULTS, **kwargs})


class Llavaonevision1_5Config(PretrainedConfig):
    """The whole model. The token ids are those of the tokenizer in the same folder."""

    model_type = "llavaonevision1_5"
    sub_configs = {"vision_config": RiceConfig, "text_config": LLaVAOneVision1_5_TextConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
        **kwargs,
    ):
        if text_config is None or isinstance(text_config, dict):
            text_config = LLaVAOneVision1_5_TextConfig(**(text_config or {}))
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = RiceConfig(**(vision_config or {}))
        if tie_word_embeddings or text_config.tie_word_embeddings:
            # Tying would drop the trained lm_head of the checkpoint without a word.
            raise ValueError(
                "config.json says tie_word_embeddings; this model has an lm_head of its own: set it to false"
            )
        self.text_config = text_config
        self.vision_config = vision_config
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        super().__init__(tie_word_embeddings=False, **kwargs)

    # Programs written for the flat configurations of language models look for both here.
    @property
    def vocab_size(self):
        return self.text_config.vocab_size

    @property
    def hidden_size(self):
        return self.text_config.hidden_size


__all__ = ["LLaVAOneVision1_5_TextConfig", "Llavaonevision1_5Config", "RiceConfig"]
