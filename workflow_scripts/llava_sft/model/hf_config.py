"""What a config.json says about the model beside it, whichever program wrote it.

Read are this model as it is published, as our exports have it and as the native class of transformers saves it
(huggingface/transformers#48896), and its parts alone: Qwen3, and RICE-ViT as published, which is transformers' MLCD class.
A key that is missing stands at the default of the class that wrote the file. What the code cannot compute is refused.
No torch.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llava_sft.errors import CheckpointError, shown
from llava_sft.model.config import (
    LANGUAGE_FIXED,
    LANGUAGE_KEYS,
    MODEL_TYPE,
    VISION_FIXED,
    VISION_KEYS,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    explain,
)

WHOLE = (MODEL_TYPE, "llava_onevision1_5")
LANGUAGE_ALONE = ("qwen3", "LLaVAOneVision1_5_text", "llava_onevision1_5_text")
VISION_ALONE = ("mlcd_vision_model", "mlcd")

_LANGUAGE_DEFAULTS = {  # of the published class and the native one: the 4B model
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
_QWEN3_DEFAULTS = _LANGUAGE_DEFAULTS | {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "rope_theta": 1e4,
    "max_position_embeddings": 32768,
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
}
_MLCD_KEYS = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "in_channels": "num_channels"}
_MLCD_DEFAULTS = {"hidden_size": 1664, "intermediate_size": 8192, "depth": 48}
# Read and refused at any other value, though a config.json of ours does not name them.
_VISION_READ = VISION_FIXED | {"attention_dropout": 0.0, "num_key_value_groups": 1, "patch_size": 14}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

Parts = dict[str, LanguageConfig | VisionConfig]  # by "language" and "vision"


def model_of_config(config: Mapping[str, Any], name: str = "from-hf") -> ModelConfig:
    """The whole model that a config.json describes; a language model alone stands beside the published vision tower.

    Raises CheckpointError when the folder holds another architecture, or a setting that this one does not have.
    """
    parts = parts_of_config(config)
    if "language" not in parts:
        raise CheckpointError(
            f"config.json says model_type {shown(config.get('model_type'))}: a vision tower alone",
            "name it in load_parts, as vision_model",
        )
    language, vision = parts["language"], parts.get("vision", _vision({}, "vision_config."))
    assert isinstance(language, LanguageConfig) and isinstance(vision, VisionConfig)
    return ModelConfig(name=name, language=language, vision=vision)


def parts_of_config(config: Mapping[str, Any]) -> Parts:
    """The parts of the model that a config.json describes, of one at least. Raises CheckpointError as `model_of_config`."""
    kind = config.get("model_type")
    _refuse_quantized(config, _section(config, "text_config") if kind in WHOLE else {})
    try:
        if kind in LANGUAGE_ALONE:  # whether it is tied is for its weights to say
            text = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
            return {"language": _language(text, "", _QWEN3_DEFAULTS if kind == "qwen3" else _LANGUAGE_DEFAULTS)}
        if kind in VISION_ALONE:
            vision = {ours: config[key] for ours, key in _MLCD_KEYS.items() if key in config}
            return {"vision": _vision(_MLCD_DEFAULTS | dict(config) | vision, "")}
        if kind in WHOLE:
            return _whole(config)
    except ValidationError as error:
        raise CheckpointError(f"config.json does not describe a possible model: {explain(error)}") from None
    raise CheckpointError(
        f"config.json says model_type {shown(kind)}; read are {', '.join((*WHOLE, 'qwen3', VISION_ALONE[0]))}",
        "point to a LLaVA-OneVision-1.5 checkpoint; load_parts also takes Qwen3 and RICE-ViT (MLCD)",
    )


def _whole(config: Mapping[str, Any]) -> Parts:
    text, vision = _section(config, "text_config"), _section(config, "vision_config")
    if flat := [key for key in ("hidden_size", "num_hidden_layers", "intermediate_size") if key in config and not text]:
        raise CheckpointError(
            f"config.json says {flat[0]} at its top level and has no text_config: a flat form that is not read",
            "put the language model's keys into text_config, those of the vision tower into vision_config",
        )
    _refuse_unless("tie_word_embeddings", bool(config.get("tie_word_embeddings")), False)
    language = _language(text, "text_config.", _LANGUAGE_DEFAULTS)
    # As it is published, and in the native class.
    widths = {key: vision[key] for key in ("text_hidden_size", "out_hidden_size") if key in vision}
    for key, width in (widths or {"text_hidden_size": 2560}).items():
        _refuse_unless(f"vision_config.{key}", width, language.hidden_size)
    return {"language": language, "vision": _vision(vision, "vision_config.")}


def _language(text: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> LanguageConfig:
    text = _with_rope_theta(text, where, "default")
    if "num_key_value_heads" in text and text["num_key_value_heads"] is None:
        text["num_key_value_heads"] = text.get("num_attention_heads") or defaults["num_attention_heads"]
    for key, fixed in LANGUAGE_FIXED.items():
        _refuse_unless(f"{where}{key}", text.get(key, fixed), fixed)
    layer_types = text.get("layer_types") or []
    for layer_type in layer_types if isinstance(layer_types, list) else [layer_types]:
        _refuse_unless(f"{where}layer_types", layer_type, "full_attention")
    values = dict(defaults) | {key: value for key, value in text.items() if value is not None}
    return LanguageConfig(**{ours: values[key] for ours, key in LANGUAGE_KEYS.items()})


def _vision(vision: Mapping[str, Any], where: str) -> VisionConfig:
    vision = _with_rope_theta(vision, where, "default", "axial")
    sides = vision.get("patch_size")
    if isinstance(sides, list) and sides and sides == sides[:1] * len(sides):
        vision["patch_size"] = sides[0]
    if "num_heads" not in vision and vision.get("num_attention_heads"):
        vision["num_heads"] = vision["num_attention_heads"]
    for key, fixed in _VISION_READ.items():
        _refuse_unless(f"{where}{key}", vision.get(key, fixed), fixed)
    values = _VISION_DEFAULTS | {key: value for key, value in vision.items() if value is not None}
    _refuse_unless(f"{where}embed_dim", values.get("embed_dim", values["hidden_size"]), values["hidden_size"])
    return VisionConfig(**{ours: values[key] for ours, key in VISION_KEYS.items()})


def _with_rope_theta(section: Mapping[str, Any], where: str, *plain: str) -> dict[str, Any]:
    """The section with `rope_theta`: transformers 5 saves it inside `rope_parameters`, older versions beside an empty
    `rope_scaling`."""
    rope = _section(section, "rope_parameters")
    scaling = _section(section, "rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", plain[0]))
    if kind not in plain:
        _refuse_unless(f"{where}rope_type", kind, plain[0])
    for key in sorted(scaling.keys() - _ROPE_KEYS):
        _refuse_unless(f"{where}rope_parameters.{key}", scaling[key], None)
    for given in (section, scaling):
        _refuse_unless(f"{where}partial_rotary_factor", given.get("partial_rotary_factor") or 1, 1)
    inside, beside = rope.get("rope_theta"), section.get("rope_theta")
    if inside is not None and beside is not None:
        _refuse_unless(
            f"{where}rope_parameters.rope_theta", inside, beside
        )  # versions of transformers read one or the other
    return dict(section) | ({"rope_theta": inside} if inside is not None else {})


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
