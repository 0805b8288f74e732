"""An RGB image → patches, exactly as the exported processor makes them (Qwen2-VL preprocessing, Pillow backend).

Notable: one bicubic resize, no float in between: patches leave as uint8 and are normalised on the accelerator.
Conversion jobs ask for the limits alone: NumPy and Pillow are imported where pixels are touched. Nothing here needs torch.
"""

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CHANNELS = 3
PATCH_SIZE: Final = 14  # pixels, both sides
MERGE_SIZE: Final = 2  # patches, both sides, that become one token of the language model
PATCH_VALUES = CHANNELS * PATCH_SIZE**2  # of one patch, flattened
MIN_PIXELS, MAX_PIXELS = 3136, 1_000_000  # of a resized image, where nobody asks for other limits
MAX_ASPECT_RATIO = 200  # what the Qwen2-VL image processor accepts


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


def to_patches(image: "Image.Image", min_pixels: int, max_pixels: int) -> "tuple[np.ndarray, tuple[int, int]]":
    """Resize an RGB image and cut it: uint8 [patches, 3·14·14] in merge-block order, and its (height, width) in patches."""
    import numpy as np
    from PIL import Image

    rows, columns = patch_grid(image.height, image.width, min_pixels, max_pixels)
    size = columns * PATCH_SIZE, rows * PATCH_SIZE
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(
        rows // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, columns // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, CHANNELS
    )
    # [block rows, block columns, row in block, column in block, channel, y, x]
    patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1)
    return np.ascontiguousarray(patches), (rows, columns)


def image_tokens(grid: tuple[int, int]) -> int:
    """Number of `<|image_pad|>` tokens that an image of `grid` (height, width in patches) takes."""
    return grid[0] * grid[1] // MERGE_SIZE**2
