"""Everything in a Hugging Face folder that is not a weight: written the same way for every export and the tiny checkpoint.

The tokenizer comes from the source folder. config.json, image limits, chat template and code are written anew: they state
what training used, so that inference sees the same pixels and the same text. Of the source's settings for tokenizer and
generation those that inference needs are completed, and what could run code or is not known is left out; a line says each.
"""

import functools
import math
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava_sft.errors import CheckpointError, shown
from llava_sft.files import file_fingerprint, fingerprint, read_object, write_json
from llava_sft.model.config import LanguageConfig, ModelConfig, VisionConfig
from llava_sft.model.processing import CLIP_MEAN, CLIP_STD, MERGE_SIZE, PATCH_SIZE
from llava_sft.model.tokens import END_OF_TEXT, END_OF_TURN, START_OF_TURN, TOKEN_ID_KEYS

# Raised by hand where exports of earlier versions are to be made anew for what export_form does not see: their weights, or
# what is made of a tokenizer's own settings.
FORM = 4
HF_CODE_DIR = Path(__file__).parent / "hf"
CHAT_TEMPLATE_FILE = HF_CODE_DIR / "chat_template.jinja"
CODE_FILES = (
    "configuration_llavaonevision1_5.py",
    "modeling_llavaonevision1_5.py",
    "vision_llavaonevision1_5.py",
    "processing_llavaonevision1_5.py",
    CHAT_TEMPLATE_FILE.name,
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")  # taken over as they are
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")  # parsed and completed
PROCESSOR_CLASS = "LLaVAOneVision1_5_Processor"
_AUTO_MAP = {
    "AutoProcessor": f"processing_llavaonevision1_5.{PROCESSOR_CLASS}",
    "AutoImageProcessor": "processing_llavaonevision1_5.LLaVAOneVision1_5_ImageProcessor",
}


def write_hf_sidecars(
    target_dir: Path | str,
    source_hf_dir: Path | str,
    model: ModelConfig,
    min_pixels: int,
    max_pixels: int,
    dtype: str = "bfloat16",
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write all files but the weights into the existing folder `target_dir`.

    Args:
        source_hf_dir: a Hugging Face folder, or one with its files without the weights; only its tokenizer files are read.
        min_pixels, max_pixels: limits of height x width after resizing, as training used them.
        dtype: of the weights beside these files, "bfloat16" or "float32".
        extra_config: further top-level keys of config.json.

    Raises CheckpointError when the source has no tokenizer of this model.
    """
    target_dir, source_hf_dir = Path(target_dir), Path(source_hf_dir)
    ids = tokenizer_token_ids(source_hf_dir)
    if max(ids.values()) >= model.language.vocab_size:
        raise CheckpointError(
            f"{source_hf_dir}: the tokenizer has the id {max(ids.values())}, the model only {model.language.vocab_size} embeddings",
            "use the tokenizer that belongs to the model",
        )
    for name in CODE_FILES:
        shutil.copyfile(HF_CODE_DIR / name, target_dir / name)
    _write_tokenizer_files(target_dir, source_hf_dir, ids)
    files = _settings_files(model, ids, min_pixels, max_pixels, dtype)
    files["config.json"] |= {"transformers_version": version("transformers"), **(extra_config or {})}
    for name, content in files.items():
        write_json(target_dir / name, content)


@functools.cache
def export_form() -> str:
    """Stands for what an export holds beside its weights: another one as soon as a line of its code, or a setting that is
    written whatever the model, is another. Exports and what was answered with them depend on it."""
    language = LanguageConfig(
        num_layers=1, hidden_size=2, ffn_hidden_size=3, num_attention_heads=4, num_query_groups=2, kv_channels=6,
        vocab_size=7, rotary_base=8, max_position_embeddings=9,
    )  # fmt: skip
    vision = VisionConfig(num_layers=1, hidden_size=16, ffn_hidden_size=3, num_attention_heads=4)
    model = ModelConfig(name="any", language=language, vision=vision)
    ids = {token: number for number, token in enumerate((*TOKEN_ID_KEYS.values(), *_TURNS))}
    return fingerprint(
        [
            FORM,
            [file_fingerprint(HF_CODE_DIR / name) for name in CODE_FILES],
            _settings_files(model, ids, 1, 2, "bfloat16"),
            complete_tokenizer_config({}, ids, []),
            complete_generation_config({}, ids, []),
        ]
    )


def _settings_files(
    model: ModelConfig, ids: Mapping[str, int], min_pixels: int, max_pixels: int, dtype: str
) -> dict[str, dict[str, Any]]:
    """The settings that do not come from the source folder, by the names of their files."""
    return {
        "config.json": model.to_hf_config({key: ids[token] for key, token in TOKEN_ID_KEYS.items()}, dtype),
        "processor_config.json": {"processor_class": PROCESSOR_CLASS, "auto_map": _AUTO_MAP},
        "preprocessor_config.json": preprocessor_config(min_pixels, max_pixels),
    }


def preprocessor_config(min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """What processing.py does with an image, in the image processor's words."""
    return {
        "auto_map": _AUTO_MAP,
        "processor_class": PROCESSOR_CLASS,
        "image_processor_type": "LLaVAOneVision1_5_ImageProcessor",
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": 1,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }


def _write_tokenizer_files(target_dir: Path, source_hf_dir: Path, ids: Mapping[str, int]) -> None:
    """Tokenizer and settings of generating: taken over from the source and completed. Says what is changed."""
    elsewhere = source_hf_dir.resolve() != target_dir.resolve()
    for name in TOKENIZER_FILES if elsewhere else ():
        if (source_hf_dir / name).is_file():
            shutil.copyfile(source_hf_dir / name, target_dir / name)
    notes: list[str] = []
    given = {name: read_object(source_hf_dir / name, {}) for name in SETTINGS_FILES}
    tokenizer_config = complete_tokenizer_config(given["tokenizer_config.json"], ids, notes)
    write_json(target_dir / "tokenizer_config.json", tokenizer_config)
    if special := given["special_tokens_map.json"]:  # transformers 5 still reads it, and lets it win
        ends = {key: tokenizer_config[key] for key in ("eos_token", "pad_token")}
        write_json(target_dir / "special_tokens_map.json", special | ends)
    generation = complete_generation_config(given["generation_config.json"], ids, notes)
    write_json(target_dir / "generation_config.json", generation)
    if elsewhere:
        print("".join(f"{source_hf_dir}: {note}\n" for note in notes), end="", flush=True)


def complete_tokenizer_config(given: dict[str, Any], ids: Mapping[str, int], notes: list[str]) -> dict[str, Any]:
    """tokenizer_config.json for the export: batches are padded on the left, as generating needs it, and turns end."""
    config = {
        key: value for key, value in given.items() if key not in ("chat_template", "auto_map", "custom_tokenizer")
    }
    if "auto_map" in given:
        notes.append("tokenizer_config.json: auto_map (code of its own) is not taken over")
        config["tokenizer_class"] = "Qwen2Tokenizer"
    for key, token in (("eos_token", END_OF_TURN), ("pad_token", END_OF_TEXT)):
        found = config.get(key)
        found = found.get("content") if isinstance(found, dict) else found
        # Another end token than that of the turns in the training would never come.
        if found != token and not (key == "pad_token" and isinstance(found, str) and ids.get(found) in _controls(ids)):
            notes.append(f"tokenizer_config.json: {key} {shown(found)} → {token}")
            config[key] = token
    return config | {"padding_side": "left", "processor_class": PROCESSOR_CLASS}


COLDEST, HOTTEST = 0.001, 100.0  # temperatures that float32 can divide the scores by
# Settings of generating that a start folder may bring, and what they may be.
_SAMPLING: dict[str, Callable[[Any], bool]] = {
    "do_sample": lambda x: isinstance(x, bool),
    "temperature": lambda x: _is_number(x) and COLDEST <= x <= HOTTEST,
    "top_p": lambda x: _is_number(x) and 0 < x <= 1,
    "min_p": lambda x: _is_number(x) and 0 <= x <= 1,
    "top_k": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31,
    "repetition_penalty": lambda x: _is_number(x) and 0 < x <= 100,
    "max_new_tokens": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x < 2**31,
}
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")  # transformers refuses a 2 in place of 2.0
_TURNS = START_OF_TURN, END_OF_TURN, END_OF_TEXT
_TOKEN_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")


def _controls(ids: Mapping[str, int]) -> set[int]:
    """Tokens that may end, begin or pad a text: not those that stand for an image, which the model counts."""
    return {i for token, i in ids.items() if token not in TOKEN_ID_KEYS.values()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def complete_generation_config(given: dict[str, Any], ids: Mapping[str, int], notes: list[str]) -> dict[str, Any]:
    """generation_config.json for the export: the end of a turn and of the text end an answer, whatever was given."""
    known = {key: value for key, value in given.items() if key in _SAMPLING and _SAMPLING[key](value)}
    known |= {key: float(known[key]) for key in _FLOATS if key in known}
    unnamed = {"transformers_version", "_from_model_config", *_TOKEN_IDS}
    for key in sorted(given.keys() - known.keys() - unnamed):
        notes.append(f"generation_config.json: {shown(key)}: {shown(given[key])} is not taken over")
    controls = _controls(ids)
    found = given.get("eos_token_id")
    stops = [x for x in (found if isinstance(found, list) else [found]) if type(x) is int]
    ends = [ids[END_OF_TURN], ids[END_OF_TEXT]]
    # An end token that is ordinary text would cut answers short.
    kept = ends + [x for x in dict.fromkeys(stops) if x in controls and x not in ends]
    if set(kept) != set(stops):
        notes.append(f"generation_config.json: eos_token_id {shown(found)} → {kept}")
    pad = given.get("pad_token_id")
    if type(pad) is not int or pad not in controls:
        notes.append(f"generation_config.json: pad_token_id {shown(pad)} → {ids[END_OF_TEXT]}")
        pad = ids[END_OF_TEXT]
    bos = given.get("bos_token_id")
    begin = {"bos_token_id": bos} if type(bos) is int and bos in controls else {}
    return {**known, **begin, "eos_token_id": kept, "pad_token_id": pad}


def tokenizer_token_ids(hf_dir: Path | str) -> dict[str, int]:
    """The added tokens (control tokens) of the tokenizer in a folder: content -> id.

    Raises CheckpointError when there is no tokenizer, or it lacks a token that the model or the chat template needs.
    """
    hf_dir = Path(hf_dir)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (hf_dir / name).exists():
            raise CheckpointError(
                f"{hf_dir} has no {name}", "point to a complete Hugging Face folder of LLaVA-OneVision-1.5"
            )
    read_object(hf_dir / "tokenizer_config.json")
    ids = tokenizer_added_tokens(hf_dir)
    missing = [t for t in (*TOKEN_ID_KEYS.values(), *_TURNS) if t not in ids]
    if missing:
        raise CheckpointError(
            f"the tokenizer in {hf_dir} lacks {', '.join(missing)}", "use the tokenizer of LLaVA-OneVision-1.5"
        )
    return ids


def tokenizer_added_tokens(hf_dir: Path) -> dict[str, int]:
    added = read_object(hf_dir / "tokenizer.json").get("added_tokens", [])
    try:
        return {str(token["content"]): int(token["id"]) for token in added}
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{hf_dir / 'tokenizer.json'}: damaged: added_tokens is no list of tokens with their ids",
            "copy the file again",
        ) from None


def image_limits(folder: Path) -> tuple[int, int] | None:
    """Least and most pixels of an image after resizing, as a folder's preprocessor_config.json says; None if it does not."""
    given = read_object(folder / "preprocessor_config.json", {})
    size = given.get("size")
    if not isinstance(size, dict):
        size = {}
    least = size.get("shortest_edge", given.get("min_pixels"))
    most = size.get("longest_edge", given.get("max_pixels"))
    if type(least) is int and type(most) is int and 0 < least <= most:
        return least, most
    return None
