"""A loaded model that answers a conversation about pictures, token by token.

Notable: a picture is checked and decoded as those of the training, and stands where the training had it: in front of the
question, or where the question says `<image>`. Answers are greedy unless a temperature is given: those of the report.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer

from llava_sft.data.image_checks import decode_image
from llava_sft.data.images import decode_rgb
from llava_sft.data.rejects import Rejected
from llava_sft.errors import CheckpointError, DataError, RunError, SettingsError
from llava_sft.evaluation.export import load_export
from llava_sft.model.export_files import tokenizer_token_ids
from llava_sft.model.tokens import CONTROL_TOKEN, END_OF_TEXT, END_OF_TURN, IMAGE


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
    return text


def question(text: str, pictures: list[Image.Image]) -> Turn:
    """A user's turn. Errors: DataError for a control token, or another number of `<image>` than of pictures."""
    marks = checked(text).count(IMAGE)
    if marks not in (0, len(pictures)):
        raise DataError(f"the question says {IMAGE} {marks} times, and has {len(pictures)} pictures", f"no {IMAGE}")
    return Turn("user", text if marks else f"{IMAGE}\n" * len(pictures) + text, tuple(pictures))


class Model:
    """A Hugging Face folder, loaded to answer one conversation at a time."""

    def __init__(self, folder: Path, device: str, dtype: str, max_new_tokens: int, temperature: float):
        """`device`: auto, cpu or cuda; `dtype`: auto (as stored), float32 or bfloat16. Raises CheckpointError, RunError."""
        if device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("--device cuda, and no GPU here that torch can use", "--device cpu")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self.processor, self.model = load_export(folder, dtype, device)
        except (torch.OutOfMemoryError, MemoryError):
            raise out_of_memory(device) from None
        except Exception as error:  # of many libraries
            problem = f"{folder}: transformers cannot load this model: {str(error)[:300]}"
            raise CheckpointError(problem, "another version of transformers, or another copy of the folder") from error
        ids = tokenizer_token_ids(folder)
        self.ends = (ids[END_OF_TURN], ids[END_OF_TEXT])
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self.model.generation_config = GenerationConfig(
            eos_token_id=list(self.ends), pad_token_id=ids[END_OF_TEXT], max_new_tokens=max_new_tokens, **sampling
        )
        self.longest = self.model.config.text_config.max_position_embeddings
        self.was_cut = False  # the last answer, by max_new_tokens
        self._free = threading.Lock()

    def __str__(self) -> str:
        parameter = next(self.model.parameters())
        return f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device.type}"

    def answer(self, turns: list[Turn]) -> Iterator[str]:
        """Yield the answer to the last turn in pieces. Closing the iterator ends the answer.

        Errors: RunError where memory or positions do not suffice.
        """
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        pictures = [picture for turn in turns for picture in turn.pictures]
        inputs = self.processor(text=[text], images=pictures or None, return_tensors="pt").to(self.model.device)
        if (length := inputs["input_ids"].shape[1]) >= self.longest:
            raise RunError(
                f"the conversation has {length:,} tokens, the model reads {self.longest:,}", "begin another: /reset"
            )
        with self._free:
            yield from self._generate(inputs)

    def _generate(self, inputs: Any) -> Iterator[str]:
        pieces, stop = Pieces(self.processor.tokenizer, self.ends), Stop()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, streamer=pieces, stopping_criteria=[stop])
            except BaseException as error:
                errors.append(error)
                pieces.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from pieces
        finally:
            stop.set()
            thread.join()
        if errors and isinstance(errors[0], torch.OutOfMemoryError | MemoryError):
            torch.cuda.empty_cache()
            raise out_of_memory(self.model.device.type)
        if errors:
            raise errors[0]
        self.was_cut = not pieces.ended


def out_of_memory(device: str) -> RunError:
    of = "the GPU's memory" if device == "cuda" else "this machine's memory"
    return RunError(f"{of} does not suffice", "smaller or fewer pictures, --dtype bfloat16, or another --device")


class Pieces(TextIteratorStreamer):
    """The text of an answer as it comes, without the token that ends it; grounding tokens are content."""

    def __init__(self, tokenizer: Any, ends: tuple[int, ...]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.ends, self.ended = ends, False

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or int(value[-1]) not in self.ends:
            super().put(value)
        else:
            self.ended = True


class Stop(StoppingCriteria, threading.Event):
    """Ends the generation once it is set."""

    def __init__(self):
        threading.Event.__init__(self)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_set(), device=input_ids.device)
