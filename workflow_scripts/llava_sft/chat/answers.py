"""A loaded model that answers a conversation about pictures, token by token.

Notable: a picture is checked and decoded as those of the training, and stands where the training had it: in front of the
question, or where the question says `<image>`. Answers are greedy unless a temperature is given: those of the report.
"""

import threading
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from llava_sft.data.image_checks import decode_image
from llava_sft.data.images import decode_rgb
from llava_sft.data.rejects import Rejected
from llava_sft.errors import DataError, RunError, SettingsError
from llava_sft.evaluation.export import Export
from llava_sft.model.tokens import CONTROL_TOKEN, IMAGE


class Turn(NamedTuple):
    role: str  # system | user | assistant
    text: str  # a user's with one <image> for each picture
    pictures: tuple[Image.Image, ...] = ()


def read_picture(path: str) -> Image.Image:
    """Errors: DataError for a file that is missing or no picture."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"picture {path}: {error.strerror}", "the path of a picture file") from None
    return decode_picture(data, path)


def decode_picture(data: bytes, name: str) -> Image.Image:
    """RGB, as the training sees it. Errors: DataError for what the training would reject."""
    try:
        decode_image(data)
    except Rejected as rejected:
        raise DataError(f"picture {name}: {rejected}", "a whole JPEG, PNG, WebP, GIF, BMP or TIFF") from None
    return decode_rgb(data)


def checked(text: str) -> str:
    """Errors: DataError for a control token, which would forge a turn or a picture."""
    if token := CONTROL_TOKEN.search(text):
        raise DataError(f"{token[0]} in the text: a control token of the model", "ask without it")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError("the text has bytes that are not UTF-8", "write UTF-8, on a terminal of UTF-8: LC_ALL=C.UTF-8")
    return text


def question(text: str, pictures: list[Image.Image]) -> Turn:
    """A user's turn. Errors: DataError for a control token, or another number of `<image>` than of pictures."""
    marks = checked(text).count(IMAGE)
    if marks not in (0, len(pictures)):
        raise DataError(f"the question says {IMAGE} {marks} times, and has {len(pictures)} pictures", f"no {IMAGE}")
    return Turn("user", text if marks else f"{IMAGE}\n" * len(pictures) + text, tuple(pictures))


def without_marks(turn: Turn) -> str:
    """The text; where it is not a user's, without what stands for a picture or ends a turn: a model may write anything."""
    return turn.text if turn.role == "user" else CONTROL_TOKEN.sub("", turn.text).replace(IMAGE, "")


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
        self.positions = self.export.model.config.text_config.max_position_embeddings
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
                yield from self.export.stream(messages, pictures, **self.sampling)
            except (torch.OutOfMemoryError, MemoryError):
                torch.cuda.empty_cache()
                raise out_of_memory() from None


def out_of_memory() -> RunError:
    return RunError("the memory does not suffice", "smaller or fewer pictures, --dtype bfloat16, or another --device")
