"""Conversation → token ids and loss mask, in the "qwen2-vl" chat template of the model.

Notable:
- the whole conversation is tokenized at once, so the ids equal those of the tokenizer's `apply_chat_template`;
- the loss falls on each answer and its closing `<|im_end|>`, unless its message has loss: False. A token belongs to the answer when any of its characters
  does: an answer that begins with a newline merges with the newline before it, and that token counts;
- a conversation that is too long is cut at the end of a turn, together with the images that fall out;
- text cannot smuggle control tokens in: a sample whose text holds one is refused. Grounding tokens (<|box_start|> …) are
  content: each is one token, as in the published data.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from llava_sft.errors import DataError, many
from llava_sft.model.tokens import (
    CONTROL_TOKEN,
    END_OF_TEXT,
    END_OF_TURN,
    IMAGE,
    IMAGE_PAD,
    IMAGE_TEXT,
    START_OF_TURN,
    SYSTEM_PROMPT,
)

TEMPLATE_VERSION = 2  # of what a conversation is rendered to: raised with a change, so that tokens are counted again


class UnusableSample(ValueError):
    """This sample cannot be trained on; the message says why."""


@dataclass
class EncodedConversation:
    """Token ids, whether each carries loss, and how many of the sample's images are still in it."""

    input_ids: np.ndarray  # int64 [tokens]
    answer_mask: np.ndarray  # bool [tokens]
    num_images: int
    turns_cut: int


class Span(NamedTuple):
    """A piece of a rendered conversation: whether its tokens count in the loss, and whether `seq_length` cuts them off."""

    text: str
    counts: bool
    cut: bool


class ChatTemplate:
    """Renders conversations with the tokenizer of a checkpoint folder (`tokenizer.json`)."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path}: no tokenizer there", "name the checkpoint's folder that holds tokenizer.json")
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.image_token_id = self._id(IMAGE_PAD)
        self.end_token_id = self._id(END_OF_TURN)
        self.pad_token_id = self._id(END_OF_TEXT)

    def _id(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise DataError(
                f"the tokenizer has no token {token}", "use the tokenizer of a LLaVA-OneVision-1.5 checkpoint"
            )
        return number

    def render(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The text, the character range [start, stop) of each answer that counts with its `<|im_end|>`, and each turn's end."""
        text, answers, turn_ends = "", [], []
        if messages[0]["role"] != "system":
            text = f"{START_OF_TURN}system\n{SYSTEM_PROMPT}{END_OF_TURN}\n"
        for message in messages:
            content = message["content"]
            if token := CONTROL_TOKEN.search(content):
                raise UnusableSample(f"control token {token[0]} in the text of a message of {message['role']}")
            text += f"{START_OF_TURN}{message['role']}\n"
            start = len(text)
            if message["role"] == "user":  # elsewhere `<image>` is text, as in the chat template
                content = content.replace(IMAGE, IMAGE_TEXT)
            text += content + END_OF_TURN
            if message["role"] == "assistant" and message.get("loss") is not False:
                answers.append((start, len(text)))
            text += "\n"
            if message["role"] == "assistant":
                turn_ends.append(len(text))
        return text, answers, turn_ends

    def encode(self, messages: list[dict], image_tokens: list[int], seq_length: int) -> EncodedConversation:
        """Encode a conversation whose i-th `<image>` takes `image_tokens[i]` tokens.

        Raises UnusableSample when even the first answer does not fit into `seq_length` tokens.
        """
        text, answers, turn_ends = self.render(messages)
        placeholders = text.count(IMAGE_PAD)
        if placeholders != len(image_tokens):
            raise UnusableSample(f"{many(placeholders, f'{IMAGE} placeholder')}, {many(len(image_tokens), 'image')}")
        ids, mask, stops = self._tokens(text, answers)[:3]

        # One <|image_pad|> in the text stands for all tokens of its image.
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self.image_token_id] = image_tokens
        lengths = np.cumsum(repeats)
        turns_cut = 0
        if lengths[-1] > seq_length:
            fitting = [end for end in turn_ends if lengths[np.searchsorted(stops, end, side="right") - 1] <= seq_length]
            if not fitting:
                raise UnusableSample(f"the first answer ends after {seq_length} tokens (seq_length)")
            keep = np.searchsorted(stops, fitting[-1], side="right")
            ids, mask, repeats = ids[:keep], mask[:keep], repeats[:keep]
            turns_cut = len(turn_ends) - len(fitting)
            if not mask.any():
                raise UnusableSample(
                    f"the first answer that counts in the loss ends after {seq_length} tokens (seq_length)"
                )
        return EncodedConversation(
            input_ids=np.repeat(ids, repeats),
            answer_mask=np.repeat(mask, repeats),
            num_images=int((ids == self.image_token_id).sum()),
            turns_cut=turns_cut,
        )

    def _tokens(
        self, text: str, answers: list[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of a rendered text: ids, whether each carries loss, and where each stops and starts in it."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        starts, stops = np.array(encoding.offsets, dtype=np.int64).T
        mask = np.zeros(len(stops), dtype=bool)
        for start, stop in answers:
            mask |= (stops > start) & (starts < stop)
        return np.array(encoding.ids, dtype=np.int64), mask, stops, starts

    def spans(self, messages: list[dict], image_tokens: list[int], seq_length: int) -> list[Span]:
        """The text that `encode` makes ids of, token by token in pieces, as people read it."""
        text, answers, _ = self.render(messages)
        ids, mask, _, starts = self._tokens(text, answers)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self.image_token_id] = image_tokens
        try:
            kept = len(self.encode(messages, image_tokens, seq_length).input_ids)
        except UnusableSample:
            kept = 0
        cut = np.cumsum(repeats) > kept
        edges = [*starts.tolist(), len(text)]
        pieces = groupby(range(len(ids)), lambda token: (bool(mask[token]), bool(cut[token])))
        return [Span(text[edges[(run := list(tokens))[0]] : edges[run[-1] + 1]], *key) for key, tokens in pieces]
