"""The architecture of LLaVA-OneVision-1.5 in Megatron's names, and its translation to and from a Hugging Face config.json.

Notable here:
- No torch: importing this module costs a tenth of a second, so planning and preflight can use it.
- Tensors with their names and shapes stand in tensors.py.
- Token ids are not part of the architecture. They come from the tokenizer; `to_hf_config` takes them as an argument.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from llava_sft.errors import CheckpointError, SettingsError, shown
from llava_sft.model.processing import CHANNELS, MERGE_SIZE, PATCH_SIZE
from llava_sft.model.tokens import PUBLISHED_TOKEN_IDS, TOKEN_ID_KEYS

MODEL_TYPE = "llavaonevision1_5"

# Our field -> the key in config.json, one table for both directions.
_LANGUAGE_KEYS = {
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
_VISION_KEYS = {
    "num_layers": "depth",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "layer_norm_eps",
}
# What a key missing in config.json means: the defaults of the published configuration classes, which are the 4B model.
_LANGUAGE_DEFAULTS = {
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 5e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
}
_VISION_DEFAULTS = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "rope_theta": 1e4,
    "layer_norm_eps": 1e-5,
    "text_hidden_size": 2560,
}
# What this architecture fixes: written into every config.json, and any other value read from one is refused.
_LANGUAGE_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
_VISION_FIXED = {"hidden_act": "gelu", "in_channels": CHANNELS, "temporal_patch_size": 1}


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
    rotary_base: PositiveFloat
    layernorm_epsilon: PositiveFloat = 1e-6
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
    rotary_base: PositiveFloat = 1e4
    layernorm_epsilon: PositiveFloat = 1e-5

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
                "AutoModelForImageTextToText": "modeling_llavaonevision1_5.LLaVAOneVision1_5_ForConditionalGeneration",
            },
            "model_type": MODEL_TYPE,
            "dtype": dtype,
            "tie_word_embeddings": False,
            **{key: token_ids[key] for key in TOKEN_ID_KEYS},
            "text_config": {
                "model_type": "LLaVAOneVision1_5_text",
                **{hf: text[ours] for ours, hf in _LANGUAGE_KEYS.items()},
                **_LANGUAGE_FIXED,
            },
            "vision_config": {
                "model_type": "rice_vit",
                **{hf: vision[ours] for ours, hf in _VISION_KEYS.items()},
                "embed_dim": self.vision.hidden_size,
                "text_hidden_size": self.language.hidden_size,
                **_VISION_FIXED,
            },
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], name: str = "from-hf") -> "ModelConfig":
        """Read a config.json (published, or ours as saved by any transformers). A missing key means the published default.

        Raises CheckpointError when the folder holds another architecture, or a setting that this one does not have.
        """
        if (
            config.get("model_type") == "qwen3"
        ):  # a language model alone: the keys of `text_config`, but tying is for its weights to say
            text = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
            vision = {"text_hidden_size": text.get("hidden_size", _VISION_DEFAULTS["text_hidden_size"])}
            config = {"model_type": MODEL_TYPE, "text_config": text, "vision_config": vision}
        if config.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"config.json says model_type {shown(config.get('model_type'))}, not {MODEL_TYPE!r}",
                "point to a LLaVA-OneVision-1.5 checkpoint",
            )
        text, vision = _section(config, "text_config"), _section(config, "vision_config")
        if flat := [
            key for key in ("hidden_size", "num_hidden_layers", "intermediate_size") if key in config and not text
        ]:
            raise CheckpointError(
                f"config.json says {flat[0]} at its top level and has no text_config: a flat form that is not read",
                "put the language model's keys into text_config, those of the vision tower into vision_config",
            )
        _refuse_quantized(config, text)
        # transformers 5 saves the RoPE base inside `rope_parameters`, older versions beside an empty `rope_scaling`.
        rope = _section(text, "rope_parameters")
        if "rope_theta" in rope:
            text["rope_theta"] = rope["rope_theta"]
        scaling = _section(text, "rope_scaling") or rope
        _refuse_unless("text_config.rope_type", scaling.get("rope_type", scaling.get("type", "default")), "default")
        _refuse_unless("tie_word_embeddings", bool(config.get("tie_word_embeddings")), False)
        for key, fixed in _LANGUAGE_FIXED.items():
            _refuse_unless(f"text_config.{key}", text.get(key, fixed), fixed)
        layer_types = text.get("layer_types") or []
        for layer_type in layer_types if isinstance(layer_types, list) else [layer_types]:
            _refuse_unless("text_config.layer_types", layer_type, "full_attention")
        for key, fixed in _VISION_FIXED.items():
            _refuse_unless(f"vision_config.{key}", vision.get(key, fixed), fixed)
        text, vision = {**_LANGUAGE_DEFAULTS, **text}, {**_VISION_DEFAULTS, **vision}
        _refuse_unless("vision_config.text_hidden_size", vision["text_hidden_size"], text["hidden_size"])
        _refuse_unless("vision_config.embed_dim", vision.get("embed_dim", vision["hidden_size"]), vision["hidden_size"])
        try:
            return cls(
                name=name,
                language=LanguageConfig(**{ours: text[hf] for ours, hf in _LANGUAGE_KEYS.items()}),
                vision=VisionConfig(**{ours: vision[hf] for ours, hf in _VISION_KEYS.items()}),
            )
        except ValidationError as error:
            raise CheckpointError(f"config.json does not describe a possible model: {_explain(error)}") from None


def load_model_config(path: Path | str) -> ModelConfig:
    """Read one of `config/models/*.yaml`. Raises SettingsError with the file, key, value and rule."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none in that folder"
        raise SettingsError(f"model config {path} does not exist", f"write one of: {known}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid YAML: {error}", "compare with config/models/4b.yaml") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}", "a file that you may read") from None
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{path}: {_explain(error)}", "compare with config/models/4b.yaml") from None


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json: {key} is {shown(found)}, no object", "copy the config.json again")
    return dict(found)


def _refuse_quantized(config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key) or text.get(key):
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise CheckpointError(
                f"config.json has a {key} ({shown(method)}): quantized weights cannot be trained on",
                "the same model in bfloat16 or float32",
            )


def _refuse_unless(key: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise CheckpointError(
            f"config.json says {key} = {shown(value)}; LLaVA-OneVision-1.5 has {expected!r} there",
            "use a checkpoint of this architecture, or correct the config.json if it was edited or copied",
        )


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}"
        + ("" if isinstance(e["input"], dict) else f" (got {e['input']!r})")
        for e in error.errors()
    )
