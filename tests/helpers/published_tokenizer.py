"""The tokenizer of the published checkpoints, rebuilt from the byte-pair ranks that the package `dashscope` carries.

Its files are those of a folder on the hub: tokenizer.json, vocab.json, merges.txt, added_tokens.json and the settings.
"""

import base64
import importlib.util
import json
from functools import cache
from pathlib import Path

from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = 151_936  # rows of the embedding
FIRST_ADDED = 151_643
CONTROL = ("endoftext", "im_start", "im_end")
GROUNDING = ("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end")
VISION = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
SPECIAL = [f"<|{name}|>" for name in (*CONTROL, *GROUNDING, *VISION)]
PLAIN = [  # added, and not special: they stay when special tokens are left out of a text
    "<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in
    ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
    "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip
ADDED = {token: FIRST_ADDED + number for number, token in enumerate(SPECIAL + PLAIN)}


@cache
def ranks() -> dict[bytes, int]:
    package = importlib.util.find_spec("dashscope")  # found without importing it
    lines = (Path(package.origin).parent / "resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """As vocab.json and merges.txt hold them. A token's merge is the pair that is left of its bytes when all merges of lower
    rank are done."""
    known, letters = ranks(), bytes_to_unicode()
    spelled = {token: "".join(letters[byte] for byte in token) for token in known}
    merges = []
    for token, rank in known.items():
        if len(token) == 1:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
        parts = splits[0] if len(splits) == 1 else [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [known.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            lowest = min(range(len(pairs)), key=pairs.__getitem__)
            parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
        merges.append((rank, spelled[parts[0]], spelled[parts[1]]))
    return {text: known[token] for token, text in spelled.items()}, [pair for _, *pair in sorted(merges)]


def write_tokenizer(folder: Path) -> Path:
    """The tokenizer's files as the hub serves them."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = vocabulary_and_merges()
    backend = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())  # normalizer, split pattern, decoder
    backend["model"] |= {"vocab": vocabulary, "merges": merges}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {token: {"content": token, **flags, "special": token in SPECIAL} for token in ADDED}
    backend["added_tokens"] = [{"id": number, **added[token]} for token, number in ADDED.items()]
    (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
        "unk_token": None, "add_prefix_space": False, "add_bos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": 131072, "errors": "replace", "split_special_tokens": False,
        "additional_special_tokens": SPECIAL[1:],
        "added_tokens_decoder": {str(number): added[token] for token, number in ADDED.items()},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {"additional_special_tokens": SPECIAL[1:], "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder
