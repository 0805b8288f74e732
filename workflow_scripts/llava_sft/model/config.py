"""The architecture of LLaVA-OneVision-1.5 in Megatron's names, and its translation to a Hugging Face config.json.

Notable here:
- No torch: importing this module costs a tenth of a second, so planning and preflight can use it.
- Tensors with their names and shapes stand in tensors.py; hf_config.py reads a config.json.
- Token ids are not part of the architecture. They come from the tokenizer; `to_hf_config` takes them as an argument.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from llava_sft.errors import READABLE, SettingsError, nearest
from llava_sft.model.processing import CHANNELS, MERGE_SIZE, PATCH_SIZE
from llava_sft.model.tokens import PUBLISHED_TOKEN_IDS, TOKEN_ID_KEYS

MODEL_TYPE = "llavaonevision1_5"

# Our field -> the key in config.json, one table for both directions.
LANGUAGE_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
VISION_KEYS = {
    "num_layers": "depth",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "layer_norm_eps",
}
# What this architecture fixes: written into every config.json, and any other value read from one is refused.
LANGUAGE_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
VISION_FIXED = {"hidden_act": "gelu", "in_channels": CHANNELS, "temporal_patch_size": 1}
# Not used here, but written: converters of other programs index these keys.
_LANGUAGE_UNUSED = {"initializer_range": 0.02, "use_cache": True, "sliding_window": None}


Base = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # a checkpoint's config.json may give these
Epsilon = Annotated[float, Field(gt=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LanguageConfig(_Frozen):
    """Qwen3: pre-norm RMSNorm, grouped-query attention with q/k norm per head, SwiGLU, no biases, 1-D RoPE."""

    num_layers: Annotated[int, Field(gt=0, le=1000)]  # a damaged figure here would take all memory for names
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    kv_channels: PositiveInt
    vocab_size: PositiveInt
    rotary_base: Base
    layernorm_epsilon: Epsilon = 1e-6
    max_position_embeddings: PositiveInt
    # A tied copy of a config silently drops the trained lm_head, so a tied model cannot even be written down here.
    untie_embeddings_and_output_weights: Literal[True] = True

    @model_validator(mode="after")
    def _heads_fit(self):
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_query_groups {self.num_query_groups}"
            )
        if self.kv_channels % 2:
            raise ValueError(f"kv_channels {self.kv_channels} must be even: RoPE rotates pairs")
        return self


class VisionConfig(_Frozen):
    """RICE-ViT: pre-LN blocks with biases, exact GELU, 2-D RoPE, one class token per image."""

    num_layers: Annotated[int, Field(gt=0, le=1000)]  # a damaged figure here would take all memory for names
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    patch_size: Literal[14] = PATCH_SIZE  # a file of sizes may state them, but patches are cut in no other way
    spatial_merge_size: Literal[2] = MERGE_SIZE
    rotary_base: Base = 1e4
    layernorm_epsilon: Epsilon = 1e-5

    @model_validator(mode="after")
    def _heads_fit(self):
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 x num_attention_heads {self.num_attention_heads}: "
                "2-D RoPE rotates pairs for rows and for columns"
            )
        return self

    @property
    def kv_channels(self) -> int:
        return self.hidden_size // self.num_attention_heads


class ModelConfig(_Frozen):
    """The sizes of one model. Everything else about the architecture is the same for all sizes."""

    name: str
    language: LanguageConfig
    vision: VisionConfig

    def to_hf_config(
        self, token_ids: Mapping[str, int] = PUBLISHED_TOKEN_IDS, dtype: str = "bfloat16"
    ) -> dict[str, Any]:
        """The content of config.json. `token_ids` maps the keys of `TOKEN_ID_KEYS` to the tokenizer's ids."""
        text, vision = self.language.model_dump(), self.vision.model_dump()
        return {
            "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
            "auto_map": {
                "AutoConfig": "configuration_llavaonevision1_5.Llavaonevision1_5Config",
                "AutoModel": "modeling_llavaonevision1_5.LLaVAOneVision1_5_Model",
                **{
                    auto: "modeling_llavaonevision1_5.LLaVAOneVision1_5_ForConditionalGeneration"
                    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText")
                },
            },
            "model_type": MODEL_TYPE,
            "dtype": dtype,
            "tie_word_embeddings": False,
            **{key: token_ids[key] for key in TOKEN_ID_KEYS},
            "text_config": {
                "model_type": "LLaVAOneVision1_5_text",
                **{hf: text[ours] for ours, hf in LANGUAGE_KEYS.items()},
                **LANGUAGE_FIXED,
                **_LANGUAGE_UNUSED,
                "max_window_layers": self.language.num_layers,
            },
            "vision_config": {
                "model_type": "rice_vit",
                **{hf: vision[ours] for ours, hf in VISION_KEYS.items()},
                "embed_dim": self.vision.hidden_size,
                "text_hidden_size": self.language.hidden_size,
                **VISION_FIXED,
                "initializer_range": 0.02,
            },
        }


def load_model_config(path: Path | str) -> ModelConfig:
    """Read one of `config/models/*.yaml`. Raises SettingsError with the file, key, value and rule."""
    path = Path(path)
    if not path.is_file():
        folder = path.parent if any(path.parent.glob("*.yaml")) else Path("config/models")
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        meant = f"did you mean {near}? " if (near := nearest(path.stem, known)) else ""
        raise SettingsError(
            f"model: {path.stem}: no file {path}",
            f"{meant}model: one of {', '.join(known) or 'none, for that folder has none'}; another size: a copy of one of them",
        )
    try:
        values = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid YAML: {error}", "compare with config/models/4b.yaml") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}", READABLE) from None
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{path}: {explain(error)}", "compare with config/models/4b.yaml") from None


def explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}"
        + ("" if isinstance(e["input"], dict) else f" (got {e['input']!r})")
        for e in error.errors()
    )
