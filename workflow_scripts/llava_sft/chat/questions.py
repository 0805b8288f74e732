"""What is asked: text and pictures, checked before a model is loaded (no torch).

Notable: a picture is checked and decoded as those of the training, and stands where the training had it: in front of the
question, or where the question says `<image>`.
"""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava_sft.data.image_checks import decode_image
from llava_sft.data.images import decode_rgb
from llava_sft.data.rejects import Rejected
from llava_sft.errors import DataError, many
from llava_sft.model.tokens import CONTROL_TOKEN, IMAGE

OF_SIZE = ("image has too many pixels", "image side under the patch size", "absurd aspect ratio")


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
        if not data:
            raise Rejected("zero-byte image")
        decode_image(data)
    except Rejected as rejected:
        fix = "scale or crop it" if rejected.reason in OF_SIZE else "a whole JPEG, PNG, WebP, GIF, BMP or TIFF"
        raise DataError(f"picture {name}: {rejected}", fix) from None
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
        raise DataError(
            f"the question says {IMAGE} {many(marks, 'time')}, and the number of pictures is {len(pictures)}",
            f"leave {IMAGE} out",
        )
    return Turn("user", text if marks else f"{IMAGE}\n" * len(pictures) + text, tuple(pictures))


def without_marks(turn: Turn) -> str:
    """The text; where it is not a user's, without what stands for a picture or ends a turn: a model may write anything."""
    return turn.text if turn.role == "user" else CONTROL_TOKEN.sub("", turn.text).replace(IMAGE, "")
