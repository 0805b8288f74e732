"""Image bytes → patches, exactly as the exported processor makes them (Qwen2-VL preprocessing, Pillow backend).

Notable: one bicubic resize, no float in between: patches leave as uint8 and are normalised on the accelerator.
Nothing here needs torch.
"""

import math

import numpy as np
from PIL import ExifTags, Image, ImageOps

from llava_sft.data.image_checks import MAX_ASPECT_RATIO, open_image, to_8_bits

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH_SIZE = 14
MERGE_SIZE = 2


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size an image is resized to: both sides multiples of 28, area within the limits, shape kept.

    Equals `smart_resize` of transformers' Qwen2-VL image processor, whose model the exported folder names.
    Raises ValueError for an aspect ratio above 200.
    """
    factor = PATCH_SIZE * MERGE_SIZE
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"aspect ratio of {width}×{height} is above {MAX_ASPECT_RATIO}")
    resized_height, resized_width = round(height / factor) * factor, round(width / factor) * factor
    if resized_height * resized_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        resized_height = max(factor, math.floor(height / beta / factor) * factor)
        resized_width = max(factor, math.floor(width / beta / factor) * factor)
    elif resized_height * resized_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        resized_height = math.ceil(height * beta / factor) * factor
        resized_width = math.ceil(width * beta / factor) * factor
    return resized_height, resized_width


def patch_grid(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in patches that an image of this size will have."""
    height, width = smart_resize(height, width, min_pixels, max_pixels)
    return height // PATCH_SIZE, width // PATCH_SIZE


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


def to_patches(image: Image.Image, min_pixels: int, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize an RGB image and cut it: uint8 [patches, 3·14·14] in merge-block order, and its (height, width) in patches."""
    rows, columns = patch_grid(image.height, image.width, min_pixels, max_pixels)
    size = columns * PATCH_SIZE, rows * PATCH_SIZE
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(
        rows // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, columns // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, 3
    )
    # [block rows, block columns, row in block, column in block, channel, y, x]
    patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1)
    return np.ascontiguousarray(patches), (rows, columns)


def image_tokens(grid: tuple[int, int]) -> int:
    """Number of `<|image_pad|>` tokens that an image of `grid` (height, width in patches) takes."""
    return grid[0] * grid[1] // MERGE_SIZE**2
