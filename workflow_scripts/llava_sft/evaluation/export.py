"""An exported folder, loaded as a user would, and its greedy answers: of a batch of questions, or of one while it is made."""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, TextIteratorStreamer
from transformers.utils import logging

from llava_sft.errors import CheckpointError
from llava_sft.evaluation.judge import Answer
from llava_sft.model.export_files import tokenizer_token_ids
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


class Export:
    """Processor and model of an exported folder on a GPU if there is one, and what ends an answer of it."""

    def __init__(self, folder: Path, max_new_tokens: int, dtype: str = "auto", device: str = ""):
        """Errors: CheckpointError where transformers cannot load `folder`."""
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        token_ids = tokenizer_token_ids(folder)
        try:
            self.processor, self.model = load_export(folder, dtype, self.device)
        except Exception as error:  # of many libraries
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                raise
            raise CheckpointError(
                f"{folder}: transformers cannot load this model: {str(error)[:300]}",
                "copy the folder again, and check that transformers can load it",
            ) from error
        self.ends = answer_greedily(self.model, token_ids, max_new_tokens)
        self.processor.tokenizer.pad_token = END_OF_TEXT  # whatever tokenizer_config.json says

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation, up to where the next answer begins. `<image>` stands in it for each picture."""
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def encode(self, texts: list[str], images: list[Image.Image]) -> Any:
        """What `model.generate` takes: a batch of rendered conversations, padded on the left. `images`: of all, in order."""
        return self.processor(text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt")

    @torch.inference_mode()
    def answer(self, inputs: Any) -> list[Answer]:
        """The greedy answers to an encoded batch."""
        output = self.model.generate(**inputs.to(self.device))[:, inputs["input_ids"].shape[1] :]
        return [read_answer(self.processor.tokenizer, tokens, self.ends) for tokens in output.tolist()]

    def stream(self, messages: list[dict[str, str]], images: list[Image.Image], **options: Any) -> Iterator[str]:
        """The answer to one conversation, piece by piece while it is made; it stops where the iterator is closed. Then
        `was_cut` says whether it came to no end.

        Args:
            options: of `model.generate`, over the greedy ones: `max_new_tokens`, `do_sample`, `temperature` …

        Errors: whatever `generate` raises, after the pieces before it.
        """
        self.was_cut = True
        inputs = self.encode([self.render(messages)], images).to(self.device)
        closed, errors = threading.Event(), list[Exception]()
        tokenizer = self.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, clean_up_tokenization_spaces=False)

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), closed.is_set(), device=ids.device)

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, streamer=streamer, stopping_criteria=[stop], **options)
            except Exception as error:
                errors.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                for end in tokenizer.convert_ids_to_tokens(self.ends):
                    self.was_cut &= not piece.endswith(end)
                    piece = piece.removesuffix(end)
                if piece:
                    yield piece
        finally:
            closed.set()
            thread.join()
        if errors:
            raise errors[0]


def read_answer(tokenizer: Any, tokens: list[int], ends: list[int]) -> Answer:
    """The text before the first end token; grounding tokens are special to the tokenizer and content to us."""
    end = next((position for position, token in enumerate(tokens) if token in ends), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answer(text.strip(), end is None)
