"""A complete Hugging Face checkpoint with random weights and a tokenizer trained on the spot, to start small runs from.

Same texts, model and seed give the same bytes in every file.
"""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from llava_sft.errors import SettingsError
from llava_sft.files import atomic_dir
from llava_sft.model.config import ModelConfig
from llava_sft.model.export_files import write_hf_sidecars
from llava_sft.model.processing import MAX_PIXELS, MIN_PIXELS
from llava_sft.model.tensors import tensor_rows
from llava_sft.model.tokens import CONTROL_TOKENS, END_OF_TEXT, END_OF_TURN

INIT_STD = 0.04


def write_tiny_checkpoint(
    directory: Path | str,
    texts: Iterable[str],
    model: ModelConfig,
    seed: int,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write the Hugging Face folder `directory`, whole or not at all. Its config.json says `"untrained": true`.

    Args:
        texts: what the tokenizer is trained on; without control tokens.
        model: its vocab_size is the number of embeddings; the tokenizer may use fewer.
        min_pixels, max_pixels: limits of height x width after resizing, for the preprocessor config.
    """
    with atomic_dir(directory) as folder:
        tokenizer = train_tokenizer(texts, model.language.vocab_size, model.language.max_position_embeddings)
        tokenizer.save_pretrained(folder)
        write_hf_sidecars(
            folder, folder, model, min_pixels, max_pixels, dtype="float32", extra_config={"untrained": True}
        )
        weights = save(random_weights(model, seed), metadata={"format": "pt"})
        (folder / "model.safetensors").write_bytes(weights)


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's pre-tokenization (every digit alone) and at most `vocab_size` tokens in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned_size = vocab_size - len(CONTROL_TOKENS)
    if learned_size < len(alphabet):
        raise SettingsError(
            f"vocab_size {vocab_size} is too small for a byte-level tokenizer",
            f"use at least {len(alphabet) + len(CONTROL_TOKENS)}",
        )
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=learned_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    bpe = json.loads(backend.to_str())["model"]
    # Like in the published tokenizer, after the learned vocabulary.
    vocab = bpe["vocab"] | {token: len(bpe["vocab"]) + i for i, token in enumerate(CONTROL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        model_max_length=model_max_length,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def random_weights(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Norms one, biases zero, everything else normal with a standard deviation of 0.04: fp32, by name as in memory."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    # The order of the random numbers: with another one the same seed would give other weights.
    rows = sorted(tensor_rows(model), key=lambda row: ("vision_model", "adapter", "language_model").index(row.part))
    for name, shape in chain.from_iterable(row.hf.items() for row in rows):
        if name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        elif "norm" in name or "ln_q" in name:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * INIT_STD
    return weights
