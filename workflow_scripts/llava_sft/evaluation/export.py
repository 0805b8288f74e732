"""An exported folder, loaded as a user would, and its greedy answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging

from llava_sft.model.tokens import END_OF_TEXT, END_OF_TURN


def load_export(folder: Path, dtype: str, device: str) -> tuple[Any, torch.nn.Module]:
    """Processor and model of an exported folder."""
    logging.disable_progress_bar()  # of the weights
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    return processor, model.to(device).eval()


def answer_greedily(model: Any, token_ids: Mapping[str, int], max_new_tokens: int) -> list[int]:
    """Make `model.generate` take the best token each time, whatever generation_config.json says; returns the end tokens."""
    ends = [token_ids[END_OF_TURN], token_ids[END_OF_TEXT]]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=token_ids[END_OF_TEXT], do_sample=False, max_new_tokens=max_new_tokens
    )
    return ends
