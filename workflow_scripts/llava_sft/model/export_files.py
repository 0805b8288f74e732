"""Everything in a Hugging Face folder that is not a weight: written the same way for every export and the tiny checkpoint.

The tokenizer and generation settings come from the source folder. config.json, image limits, chat template and code
are written anew: they state what training used, so that inference sees the same pixels and the same text.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_sft.data.images import CLIP_MEAN, CLIP_STD
from llava_sft.errors import CheckpointError
from llava_sft.files import read_json, write_json
from llava_sft.model.config import TOKEN_ID_KEYS, ModelConfig

HF_CODE_DIR = Path(__file__).parent / "hf"
CHAT_TEMPLATE_FILE = HF_CODE_DIR / "chat_template.jinja"
CODE_FILES = (
    "configuration_llavaonevision1_5.py",
    "modeling_llavaonevision1_5.py",
    "processing_llavaonevision1_5.py",
    CHAT_TEMPLATE_FILE.name,
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
)
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
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
    for name in TOKENIZER_FILES:
        if (source_hf_dir / name).is_file() and source_hf_dir.resolve() != target_dir.resolve():
            shutil.copyfile(source_hf_dir / name, target_dir / name)
    for name in CODE_FILES:
        shutil.copyfile(HF_CODE_DIR / name, target_dir / name)

    tokenizer_config = read_json(target_dir / "tokenizer_config.json")
    tokenizer_config.pop("chat_template", None)  # an older template in here would contradict chat_template.jinja
    tokenizer_config.pop("auto_map", None)
    write_json(target_dir / "tokenizer_config.json", {**tokenizer_config, "processor_class": PROCESSOR_CLASS})
    if not (target_dir / "generation_config.json").is_file():
        stop = [ids[END_OF_TURN], ids[END_OF_TEXT]]
        write_json(target_dir / "generation_config.json", {"eos_token_id": stop, "pad_token_id": ids[END_OF_TEXT]})

    hf_config = model.to_hf_config({key: ids[token] for key, token in TOKEN_ID_KEYS.items()}, dtype)
    write_json(target_dir / "config.json", {**hf_config, **(extra_config or {})})
    write_json(target_dir / "processor_config.json", {"processor_class": PROCESSOR_CLASS, "auto_map": _AUTO_MAP})
    write_json(
        target_dir / "preprocessor_config.json",
        {
            "auto_map": _AUTO_MAP,
            "processor_class": PROCESSOR_CLASS,
            "image_processor_type": "LLaVAOneVision1_5_ImageProcessor",
            "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
            "patch_size": model.vision.patch_size,
            "merge_size": model.vision.spatial_merge_size,
            "temporal_patch_size": 1,
            "do_resize": True,
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "do_convert_rgb": True,
        },
    )


def tokenizer_token_ids(hf_dir: Path | str) -> dict[str, int]:
    """The added tokens (control tokens) of the tokenizer in a folder: content -> id.

    Raises CheckpointError when there is no tokenizer, or it lacks a token that the model or the chat template needs.
    """
    hf_dir = Path(hf_dir)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (hf_dir / name).is_file():
            raise CheckpointError(
                f"{hf_dir} has no {name}", "point to a complete Hugging Face folder of LLaVA-OneVision-1.5"
            )
    ids = {token["content"]: token["id"] for token in read_json(hf_dir / "tokenizer.json").get("added_tokens", [])}
    missing = [t for t in (*TOKEN_ID_KEYS.values(), "<|im_start|>", END_OF_TURN, END_OF_TEXT) if t not in ids]
    if missing:
        raise CheckpointError(
            f"the tokenizer in {hf_dir} lacks {', '.join(missing)}", "use the tokenizer of LLaVA-OneVision-1.5"
        )
    return ids
