"""A loaded model that answers a conversation about pictures, token by token.

Notable: answers are greedy unless a temperature is given: those of the report.
"""

import threading
from collections.abc import Generator
from pathlib import Path

import torch

from llava_sft.chat.questions import Turn, without_marks
from llava_sft.errors import RunError, SettingsError
from llava_sft.evaluation.export import Export


class Model:
    """A Hugging Face folder, loaded to answer one conversation at a time."""

    def __init__(self, folder: Path, device: str, dtype: str, max_new_tokens: int, temperature: float):
        """`device`: auto, cpu or cuda; `dtype`: auto (as stored), float32 or bfloat16.

        Errors: CheckpointError where transformers cannot load `folder`; SettingsError without a GPU; RunError.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("--device cuda, and no GPU here that torch can use", "--device cpu")
        try:
            self.export = Export(folder, max_new_tokens, dtype, "" if device == "auto" else device)
        except (torch.OutOfMemoryError, MemoryError):
            raise out_of_memory() from None
        self.sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        self.longest, self.positions = max_new_tokens, self.export.model.config.text_config.max_position_embeddings
        self._free = threading.Lock()

    def __str__(self) -> str:
        dtype = next(self.export.model.parameters()).dtype
        return f"{str(dtype).removeprefix('torch.')} on {self.export.device}"

    @property
    def was_cut(self) -> bool:
        """Whether the last answer came to no end."""
        return self.export.was_cut

    def answer(self, turns: list[Turn]) -> Generator[str]:
        """Yield the answer to the last turn in pieces; closing the iterator ends it.

        Errors: RunError where memory or the model's positions do not suffice.
        """
        messages = [{"role": turn.role, "content": without_marks(turn)} for turn in turns]
        pictures = [picture for turn in turns for picture in turn.pictures]
        with self._free:
            length = self.export.encode([self.export.render(messages)], pictures)["input_ids"].shape[1]
            if length >= self.positions:
                problem = f"the conversation has {length:,} tokens, the model reads {self.positions:,}"
                raise RunError(problem, "begin another, or ask about fewer pictures")
            try:
                most = min(self.longest, self.positions - length)
                yield from self.export.stream(messages, pictures, max_new_tokens=most, **self.sampling)
            except (torch.OutOfMemoryError, MemoryError):
                torch.cuda.empty_cache()
                raise out_of_memory() from None


def out_of_memory() -> RunError:
    return RunError("not enough memory", "smaller or fewer pictures, --dtype bfloat16, or another --device")
