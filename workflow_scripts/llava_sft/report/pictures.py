"""Encoded images as a page shows them: embedded in it, and no larger than it needs."""

import base64
import io

from llava_sft.data.image_checks import NO_PIXEL_LIMIT, decode_image
from llava_sft.data.images import decode_rgb

THUMBNAIL = 320  # pixels, longer side
INLINE_BYTES = 32 << 10  # a larger picture is shown as a thumbnail
SHOWN_BY_BROWSERS = {"jpg", "png", "webp", "gif"}


def data_uri(image: bytes) -> str:
    """An encoded image as it is embedded in a page."""
    kinds = {b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}
    kind = kinds.get(image[:4], "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def thumbnail(data: bytes, side: int = THUMBNAIL, inline_bytes: int = INLINE_BYTES) -> str:
    """The data URI of a picture as it is where it is small and browsers know its format, else of a small JPEG of it; "" for a
    damaged one. `side`: of that, the longer one, in pixels."""
    try:
        if len(data) <= inline_bytes and decode_image(data, NO_PIXEL_LIMIT).extension in SHOWN_BY_BROWSERS:
            return data_uri(data)
        image = decode_rgb(data)
    except Exception:  # Pillow's readers raise almost anything on damaged files
        return ""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return data_uri(buffer.getvalue())
