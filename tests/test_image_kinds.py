"""Size from the header and size from decoding agree, unusual numbers do not turn black, and damage is never an exception of
another kind."""

import contextlib
import io
import os
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers.webdatasets import Raw, picture, record
from llava_sft.data.image_checks import check_image, decode_image
from llava_sft.data.images import decode_rgb, image_grid
from llava_sft.data.rejects import Rejected
from llava_sft.model.processing import to_patches

LIMITS = 3136, 1_000_000
FUZZ = int(os.environ.get("LLAVA_SFT_FUZZ", "1"))  # times as many examples
WRITTEN = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "TIFF jpeg": {"compression": "jpeg"},
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", WRITTEN)
def test_the_grid_of_the_header_is_that_of_the_decoded_picture(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(kind.split()[0], (280, 140), exif=exif, **WRITTEN[kind])
    grid = to_patches(decode_rgb(data), *LIMITS)[1]
    assert image_grid(data, *LIMITS) == grid == ((20, 10) if orientation > 4 else (10, 20))
    assert sorted(check_image(data)[1:]) == sorted(decode_image(data)[1:]) == [140, 280]


def stored(pixels: np.ndarray, kind: str = "TIFF") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize(
    "pixels",
    [
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float32),
        (RAMP * 255).astype(np.int32),
        (RAMP * 1e6).astype(np.int32),
    ],
    ids=["float to 1", "float to 255", "int32 to 255", "int32"],
)
def test_numbers_without_a_known_range_are_rejected(pixels):
    with pytest.raises(Rejected, match=r"unreadable image mode: .*32-bit.*store it with 8 bits"):
        check_image(stored(pixels))


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
@pytest.mark.parametrize("brightest", [255, 1023, 4095])
def test_few_bits_in_sixteen_would_turn_black_and_are_rejected(kind, brightest):
    with pytest.raises(Rejected, match=rf"uses {brightest:,} of 65,535"):
        check_image(stored((RAMP * brightest).astype(np.uint16), kind))


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_sixteen_bits_are_scaled_by_their_range(kind):
    data = stored((RAMP * 65535).astype(np.uint16), kind)
    assert check_image(data)[1:] == (64, 64)
    assert np.asarray(decode_rgb(data)).max() == 255


def test_a_jpeg_without_a_scan_and_a_png_without_data_are_found_without_decoding_every_picture():
    jpeg, png = picture("JPEG", (64, 48)), picture("PNG", (64, 48))
    without = png[:33] + png[png.index(b"IEND") - 4 :]
    for data in (jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9", without, png[:40] + png[44:]):
        with pytest.raises(Rejected, match=r"truncated or damaged|not an image"):
            check_image(data)


@pytest.mark.parametrize(("begins", "kind"), [
    (b"\0\0\0\x1cftypavif", "AVIF"), (b"\0\0\0\x18ftypheic", "HEIC"), (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"), (b"\0\0\1\0\1\0", "ICO"),
    (b"P6\n4 4\n255\n", "PPM"), (b"%PDF-1.7", "PDF"), (b"<svg xmlns", "SVG"), (b"  <!DOCTYPE html>", "a web page"),
    (b"\0\0\0 ftypisom", "a video"),
])  # fmt: skip
def test_a_file_of_another_kind_is_named(begins, kind):
    with pytest.raises(
        Rejected, match=f"image format is not read: it is {kind}; read are BMP, GIF, JPEG, PNG, TIFF, WEBP"
    ):
        check_image(begins + bytes(60))


def test_texts_and_profiles_that_pillow_refuses_do_not_matter():
    info = PngInfo()
    info.add_itxt("raw", "x" * (2 << 20), zip=True)
    for data in (picture("PNG", (64, 48), pnginfo=info), picture("PNG", (64, 48), icc_profile=b"\0" * (2 << 20))):
        assert check_image(data)[1:] == decode_image(data)[1:] == (64, 48)
        assert image_grid(data, *LIMITS) and decode_rgb(data).size == (64, 48)


GOOD = [
    picture("JPEG", (64, 48)), picture("JPEG", (64, 48), "CMYK"), picture("JPEG", (64, 48), progressive=True), picture("PNG", (64, 48)),
    picture("PNG", (64, 48), "P"), picture("TIFF", (64, 48)), picture("WEBP", (64, 48)), picture("GIF", (64, 48), "P"),
    picture("BMP", (64, 48)), stored((RAMP * 65535).astype(np.uint16)), stored((RAMP * 65535).astype(np.uint16), "PNG"),
]  # fmt: skip


@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 1 << 14), st.binary(max_size=8)), max_size=4),
    st.integers(0, 1 << 14),
)
@settings(deadline=None, max_examples=150 * FUZZ, suppress_health_check=list(HealthCheck))
def test_whatever_the_bytes_a_picture_is_read_or_rejected(data, changes, length):
    damaged = bytearray(data)
    for place, new in changes:
        place %= len(damaged)
        damaged[place : place + len(new)] = new
    damaged = bytes(damaged if length % 3 else damaged[:length])
    try:
        check_image(damaged, 4_000_000)
        info = decode_image(damaged, 4_000_000)
    except Rejected as rejected:
        assert len(str(rejected)) < 400
        return
    _, grid = to_patches(decode_rgb(damaged), *LIMITS)
    assert image_grid(damaged, *LIMITS) == grid and min(info[1:]) >= 14


def turned(name: str) -> bytes:
    """A picture that EXIF turns by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(name, (33, 21), exif=exif)


def large_text() -> PngInfo:
    """As image editors write it: beyond what Pillow inflates."""
    info = PngInfo()
    info.add_text("raw", "x" * (3 << 20), zip=True)
    return info


def animated(name: str) -> bytes:
    frames = [Image.new("RGB", (33, 21), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, name, save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()


def sixteen_bit(kind: str = "PNG", brightest: int = 65535) -> bytes:
    gradient = np.asarray(Image.linear_gradient("L").resize((33, 21)), np.float64) / 255 * brightest
    buffer = io.BytesIO()
    Image.fromarray(gradient.astype(np.uint16)).save(buffer, kind)
    return buffer.getvalue()


# Every kind of file: (bytes, what a pixel of it shows in training; None where the gradient's own grey is seen).
KINDS = {
    "progressive": (picture("JPEG", (33, 21), progressive=True), None),
    "CMYK": (picture("JPEG", (33, 21), "CMYK"), None),
    "grey JPEG": (picture("JPEG", (33, 21), "L"), None),
    "16-bit": (sixteen_bit(), None),
    "16-bit TIFF": (sixteen_bit("TIFF"), None),
    "large text": (picture("PNG", (33, 21), pnginfo=large_text()), None),
    "palette": (picture("PNG", (33, 21), "P"), None),
    "one bit": (picture("PNG", (33, 21), "1"), None),
    "grey and alpha": (picture("PNG", (33, 21), "LA"), None),
    "alpha": (picture("WEBP", (33, 21), "RGBA", lossless=True), None),
    "GIF": (picture("GIF", (33, 21), "P"), None),
    "BMP": (picture("BMP", (33, 21)), None),
    "TIFF": (picture("TIFF", (33, 21)), None),
    "animated GIF": (animated("GIF"), (255, 0, 0)),
    "animated WebP": (animated("WEBP"), (255, 0, 0)),
    "turned": (turned("JPEG"), None),
    "turned PNG": (turned("PNG"), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_accepted_kept_as_it_is_and_read_right(tmp_path, kind):
    data, colour = KINDS[kind]
    for check in (check_image, decode_image):
        assert check(data)[1:] == (33, 21)
        assert check(data + b"\0\0")[1:] == (33, 21)  # padding behind the end marker
    raw = Raw(tmp_path, [record(0, "x.jpg")])
    (raw.images / "x.jpg").write_bytes(data)
    raw.convert()
    with tarfile.open(raw.wds / "subtaskdata-00000.tar") as tar:
        kept = tar.extractfile(tar.getmembers()[0]).read()
    assert kept == data
    pixels = decode_rgb(kept)
    assert pixels.mode == "RGB" and pixels.size == ((21, 33) if "turned" in kind else (33, 21))
    if colour:
        assert pixels.getpixel((16, 10)) == colour
    elif "one" not in kind:  # the gradient runs from black to white
        top, bottom = (20, 5), (1, 5)
        first, last = (
            pixels.getpixel(place)[0] for place in ((top, bottom) if "turned" in kind else ((5, 1), (5, 20)))
        )
        assert abs(first - 18) < 25 and abs(last - 243) < 25


def test_a_mode_that_pillow_can_not_turn_into_rgb_is_rejected(monkeypatch):
    def refuse(*_):
        raise ValueError("conversion not supported")

    tiff = picture("TIFF")
    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(Rejected, match="unreadable image mode"):
        check_image(tiff)


def test_sixteen_bits_are_scaled_and_transparency_lies_on_white():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(33 * 21, dtype=np.uint16).reshape(21, 33) * 94).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).getpixel((32, 20)) == (692 * 94 >> 8,) * 3
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).getpixel((3, 3)) == (255, 255, 255)


def test_pixel_limit_holds_before_anything_is_decoded():
    for name in ("PNG", "JPEG", "WEBP"):
        with pytest.raises(Rejected, match="too many pixels"):
            check_image(picture(name, (100, 100)), max_pixels=9_999)


def test_images_with_damage_never_raise_anything_but_a_rejection():
    good = [picture("PNG"), picture("JPEG"), picture("WEBP"), picture("GIF", mode="P"), picture("TIFF")]
    for image in good:
        for cut in range(0, len(image), max(1, len(image) // 40)):
            for data in (
                image[:cut],
                image[:cut] + b"\xff" * 9 + image[cut + 9 :],
                image[cut:],
                image[:cut] + image[-12:],
            ):
                with contextlib.suppress(Rejected):
                    check_image(data)
