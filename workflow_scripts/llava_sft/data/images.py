"""Encoded images → RGB, as training sees them: of the size that they are displayed in, 8 bits, opaque."""

from PIL import ExifTags, Image, ImageOps

from llava_sft.data.image_checks import open_image, to_8_bits
from llava_sft.model.processing import patch_grid


def image_grid(data: bytes, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in patches that an encoded image will have, from its header alone."""
    image = open_image(data)
    width, height = image.size
    # It lies on its side; of a TIFF Pillow gives the size as it will stand.
    if image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
        width, height = height, width
    return patch_grid(height, width, min_pixels, max_pixels)


def decode_rgb(data: bytes) -> Image.Image:
    """Decode to RGB: EXIF orientation applied, 16-bit scaled to 8, transparency laid on white, first frame only.

    Errors: ValueError for a picture whose numbers have no known range (`to_8_bits`); whatever Pillow raises for damage.
    """
    image = to_8_bits(ImageOps.exif_transpose(open_image(data)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
