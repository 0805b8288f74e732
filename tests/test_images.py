"""Training sees the very pixels that the exported processor makes, for any size and any kind of image file."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as published_smart_resize

from helpers.models import MAX_PIXELS, MIN_PIXELS
from llava_sft.data.images import decode_rgb
from llava_sft.model.processing import CLIP_MEAN, CLIP_STD, image_tokens, smart_resize, to_patches


@pytest.fixture(scope="module")
def processor(small_checkpoint):
    return AutoProcessor.from_pretrained(small_checkpoint, trust_remote_code=True).image_processor


def normalised(patches: np.ndarray) -> np.ndarray:
    """As the vision tower does it: [patches, 3·14·14] uint8 → float32."""
    mean, std = (np.repeat(np.float32(value), 14 * 14) for value in (CLIP_MEAN, CLIP_STD))
    return (patches.astype(np.float32) / np.float32(255) - mean) / std


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Noise over a gradient, so that a shifted, flipped or smoothed pixel shows."""
    rng = np.random.default_rng(height * 10_000 + width)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    pixels = (ramp + rng.integers(0, 16, (height, width, 3))).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_same_patches(processor, theirs: Image.Image, ours: Image.Image):
    expected = processor([theirs], return_tensors="np")
    patches, grid = to_patches(ours, MIN_PIXELS, MAX_PIXELS)
    assert expected["image_grid_thw"].tolist() == [[1, *grid]]
    assert patches.dtype == np.uint8 and patches.shape == (grid[0] * grid[1], 3 * 14 * 14)
    assert image_tokens(grid) == len(patches) // 4
    np.testing.assert_allclose(normalised(patches), expected["pixel_values"], rtol=0, atol=1e-6)


SIZES = [
    (1, 1), (1, 2), (3, 2), (13, 14), (27, 27), (28, 28), (29, 55), (42, 42), (56, 56), (57, 56), (70, 98),  # tiny
    (1, 199), (199, 1), (3, 600), (600, 3), (28, 2_000), (2_000, 28),  # extreme shapes
    (223, 224), (224, 223), (250, 200), (300, 171),  # about MAX_PIXELS
    (640, 480), (1_023, 767), (1_500, 2_000), (3_000, 40),  # far above it
]  # fmt: skip


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_patches_equal_the_exported_processors_for_every_size(processor, height, width):
    image = picture(height, width)
    assert_same_patches(processor, image, image)


def rgba():
    image = picture(60, 90, "RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def transparent_palette():
    return encoded(picture(60, 90).quantize(16), "PNG", transparency=3)


def animation(kind):
    frames = [picture(60, 90), picture(60, 90).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


FILES = {
    "grey PNG": lambda: encoded(picture(60, 90, "L"), "PNG"),
    "black and white PNG": lambda: encoded(picture(60, 90, "1"), "PNG"),
    "palette PNG": lambda: encoded(picture(60, 90, "P"), "PNG"),
    "palette PNG with transparency": transparent_palette,
    "RGBA PNG": lambda: encoded(rgba(), "PNG"),
    "RGBA WebP": lambda: encoded(rgba(), "WEBP", lossless=True),
    "LA PNG": lambda: encoded(rgba().convert("LA"), "PNG"),
    "RGB JPEG": lambda: encoded(picture(60, 90), "JPEG"),
    "progressive JPEG": lambda: encoded(picture(60, 90), "JPEG", progressive=True),
    "grey JPEG": lambda: encoded(picture(60, 90, "L"), "JPEG"),
    "CMYK JPEG": lambda: encoded(picture(60, 90, "CMYK"), "JPEG"),
    "animated GIF": lambda: animation("GIF"),
    "animated WebP": lambda: animation("WEBP"),
    "BMP": lambda: encoded(picture(60, 90), "BMP"),
}


@pytest.mark.parametrize("name", FILES)
def test_patches_equal_the_exported_processors_for_every_kind_of_file(processor, name):
    data = FILES[name]()
    assert_same_patches(processor, Image.open(io.BytesIO(data)), decode_rgb(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_seen_upright(processor, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(60, 90), "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((90, 60) if orientation < 5 else (60, 90))
    assert_same_patches(processor, upright, decode_rgb(data))


def test_16_bit_grey_keeps_its_shades():
    """Pillow's own conversion would clip everything above 255 to white."""
    deep = np.linspace(0, 65_535, 60 * 90).reshape(60, 90).astype(np.uint16)
    image = decode_rgb(encoded(Image.fromarray(deep), "PNG"))
    assert image.mode == "RGB"
    assert (np.asarray(image) == (deep >> 8)[..., None]).all()


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (30, 30), (10, 20, 30, 0))
    assert decode_rgb(encoded(clear, "PNG")).getpixel((3, 3)) == (255, 255, 255)


def test_an_animation_shows_its_first_frame():
    image = decode_rgb(animation("WEBP"))
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(picture(60, 90)).astype(int))
    assert difference.mean() < 12


def test_smart_resize_equals_the_published_one():
    rng = np.random.default_rng(0)
    limits = [(3136, 1_000_000), (3136, 3136), (MIN_PIXELS, MAX_PIXELS), (200_704, 1_003_520), (784, 12_845_056)]
    sizes = [*SIZES, *(tuple(map(int, np.exp(rng.uniform(0, 8, 2)) + 1)) for _ in range(2_000))]
    compared = 0
    for height, width in sizes:
        if max(height, width) > 200 * min(height, width):
            continue
        for low, high in limits:
            ours = smart_resize(height, width, low, high)
            assert ours == published_smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert ours[0] % 28 == ours[1] % 28 == 0
            compared += 1
    assert compared > 5_000


def test_an_aspect_ratio_that_the_processor_refuses_is_refused(processor):
    image = picture(1, 201)
    with pytest.raises(ValueError, match="200"):
        processor([image])
    with pytest.raises(ValueError, match="200"):
        to_patches(image, MIN_PIXELS, MAX_PIXELS)
