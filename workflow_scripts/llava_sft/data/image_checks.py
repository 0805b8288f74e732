"""Images on their way into a shard: read from under the image root only, and checked without decoding where possible.

Notable: a JPEG or PNG whose header is plain, which has picture data and whose end marker stands, costs a few microseconds;
every other file is decoded once with Pillow (imported only then). Damage within the picture data is found by decoding
alone: `decode_images: true`. Bytes are never changed.

Pictures are trained on in 8 bits. 16 bits are scaled by their full range; a 16-bit picture that uses less than a sixteenth
of it (12 bits in 16, say) would turn black, and is rejected, as are 32-bit and float pictures: their range is not known.
"""

import base64
import binascii
import errno
import os
import re
import stat
import struct
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llava_sft.data.rejects import Rejected
from llava_sft.errors import DataError
from llava_sft.model.processing import MAX_ASPECT_RATIO, PATCH_SIZE

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_PIXELS = 100_000_000  # a decompression bomb by default; a setting
NO_PIXEL_LIMIT = 1 << 40  # of what is in a shard: the limit is the conversion's

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
# Pillow may open these and no other: some of its readers (EPS) start other programs.
FORMATS = [name for name in EXTENSIONS if name != "MPO"]

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: Huffman coded, what Pillow reads
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"
PNG_MODES = {0: (1, 2, 4, 8), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # colour type: bit depths
PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}  # Pillow refuses those that inflate beyond 1 MiB; we need none of them
BLACK = 16  # a picture whose lightest value is below has nothing to see in it

SHORTEST_BASE64 = 100  # characters: any picture that is large enough has more
BASE64 = re.compile(r"data:[\w/+.-]+[;,]|/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK")
# Other kinds of file, by how they begin, as a person calls them.
OTHER_KINDS = {
    b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"\0\0\1\0": "ICO", b"P5": "PGM", b"P6": "PPM",
    b"<svg": "SVG", b"<?xml": "SVG", b"%PDF": "PDF", b"%!PS": "PostScript", b"8BPS": "Photoshop", b"<!DO": "a web page",
    b"<htm": "a web page", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"version https://git-lfs": "a Git LFS pointer",
}  # fmt: skip
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"), **dict.fromkeys((b"heic", b"heix"), "HEIC"), b"mif1": "HEIF",
    **dict.fromkeys((b"mp42", b"isom"), "a video"),
}  # fmt: skip

# Errors that are the record's; any other (a failing disk, too many open files) must stop the job.
RECORD_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENXIO}


class ImageInfo(NamedTuple):
    extension: str  # of the real format
    width: int  # pixels, as stored (before EXIF orientation)
    height: int


class ImageRoot:
    """Reads images under one folder and nothing outside it."""

    def __init__(self, root: Path | str):
        if not os.path.isdir(root):
            raise DataError(f"image root {root} is not a folder", "set it to the folder that image paths start from")
        self.root = os.path.realpath(root)
        self._inside: set[str] = set()  # folders already seen to lie under the root

    def read(self, path: str) -> bytes:
        """Return a file's bytes, or those that `path` itself is in base64.

        Errors: `Rejected` if missing, empty, or outside the root (`..`, symlink).
        """
        if not isinstance(path, str):
            raise Rejected("image path is not a string", f"a {type(path).__name__}")
        if (len(path) > SHORTEST_BASE64 or path[:5] == "data:") and BASE64.match(path):
            return _decoded(path)
        folder, _, name = path.rpartition("/")
        if folder not in self._inside or path[:1] == "/" or name in ("", "..") or "\0" in name:
            path = self._checked(path, folder)
        full = f"{self.root}/{path}"
        try:
            # NOFOLLOW: links are looked at before they are followed. NONBLOCK: a named pipe must not hang the job.
            file = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return self._read_link(path, full)
            if error.errno in RECORD_ERRORS:
                if "\\" in path:  # as Windows writes it
                    return self.read(path.replace("\\", "/"))
                raise Rejected("missing image", f"{path}: {error.strerror}; image_root is {self.root}") from None
            raise
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("missing image", f"{path} is not a regular file")
            data = os.read(file, status.st_size)
            while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
                data += more
        finally:
            os.close(file)
        if not data:
            raise Rejected("zero-byte image", path)
        return data

    def _checked(self, path: str, folder: str) -> str:
        """The path relative to the root."""
        if not path or "\0" in path:
            raise Rejected("missing image", f"{path[:80]!r} is no file name")
        if path.startswith("file:///"):
            return self._checked(path.removeprefix("file://"), folder)
        if re.match(r"\w{2,10}://", path):
            raise Rejected("image is an address", f"{path}: nothing is downloaded: name a file under the image root")
        if path.startswith("/"):
            real = os.path.realpath(path)
            if self._holds(real) and real != self.root:
                return os.path.relpath(real, self.root)
            raise Rejected("image outside the image root", f"{path}: image_root is {self.root}")
        if ".." in path.split("/"):
            raise Rejected("image outside the image root", path)
        if path.endswith("/"):
            raise Rejected("missing image", f"{path} is a folder")
        if not self._holds(os.path.realpath(f"{self.root}/{folder}")):
            raise Rejected("image outside the image root", f"{path}: {folder} is a link that leads out")
        self._inside.add(folder)
        return path

    def _holds(self, real: str) -> bool:
        return real == self.root or real.startswith(self.root.rstrip("/") + "/")

    def _read_link(self, path: str, full: str) -> bytes:
        try:
            real = os.path.realpath(full, strict=True)
        except OSError as error:
            raise Rejected("missing image", f"{path}, a link to {os.readlink(full)}: {error.strerror}") from None
        if not self._holds(real):
            raise Rejected("image outside the image root", f"{path} is a link that leads out")
        return self.read(os.path.relpath(real, self.root))


def _decoded(text: str) -> bytes:
    """The picture in a base64 text, or a data URL."""
    what, _, content = text.rpartition(",") if text.startswith("data:") else ("", "", text)
    if what and not what.endswith(";base64"):
        raise Rejected("base64 image", f"{text[:40]}…: a data URL in another coding than base64")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except binascii.Error as error:
        raise Rejected("base64 image", f"{text[:24]}… ({len(text):,} characters): damaged: {error}") from None


def check_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageInfo:
    """Return format and size of an image that training can use. Errors: `Rejected`."""
    if not data:
        raise Rejected("zero-byte image")
    info = None
    if data.startswith(JPEG_START) and data.endswith(JPEG_END):
        info = _jpeg_info(data)
    elif data.startswith(PNG_START) and data.endswith(PNG_END):
        info = _png_info(data)
    if info is None:
        return decode_image(data, max_pixels)
    _check_size(info.width, info.height, max_pixels)
    return info


def decode_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageInfo:
    """Like `check_image`, by decoding the whole image with Pillow."""
    from PIL import UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = open_image(data)
        except UnidentifiedImageError:
            if kind := _kind_of(data):
                read = ", ".join(sorted(set(EXTENSIONS) - {"MPO"}))
                raise Rejected("image format is not read", f"it is {kind}; read are {read}") from None
            raise Rejected("not an image", f"begins with {data[:8].hex(' ')}") from None
        except Exception as error:  # Pillow's readers raise almost anything on damaged headers
            raise Rejected("truncated or damaged image", str(error)) from None
        stored = image.size
        _check_size(*stored, max_pixels)
        try:
            image.load()
        except Exception as error:
            raise Rejected("truncated or damaged image", str(error)) from None
        try:
            to_8_bits(image).convert("RGB")
        except ValueError as error:
            raise Rejected("unreadable image mode", str(error)) from None
    if sorted(image.size) != sorted(stored):
        raise Rejected("truncated or damaged image", f"its header says {stored}, it decodes to {image.size}")
    return ImageInfo(EXTENSIONS[str(image.format)], *stored)


def open_image(data: bytes) -> "Image.Image":
    """Pillow's image of one of FORMATS, not decoded yet. Errors: whatever Pillow raises."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked first, with our own reason
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except ValueError:
        if not data.startswith(PNG_START[:8]):
            raise
        return Image.open(BytesIO(_without_text(data)), formats=FORMATS)


def to_8_bits(image: "Image.Image") -> "Image.Image":
    """A 16-bit picture scaled to 8 bits; others as they are. Errors: ValueError where the range of values is not known."""
    import numpy as np
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode}: 32-bit values, whose range is not known: store it with 8 bits")
    if not image.mode.startswith("I;16"):
        return image
    scaled = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
    if scaled.max(initial=0) < BLACK:
        raise ValueError(
            f"{image.mode}: uses {int(np.asarray(image).max(initial=0)):,} of 65,535: store it with 8 bits"
        )
    return Image.fromarray(scaled)


def _without_text(png: bytes) -> bytes:
    """A PNG without its texts and colour profile."""
    kept, position = [png[:8]], 8
    while position + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, position)
        chunk = png[position : position + 12 + length]
        if chunk[4:8] not in PNG_TEXT:
            kept.append(chunk)
        position += 12 + length
    return b"".join(kept)


def _kind_of(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return BRANDS.get(data[8:12], "a video, or HEIF")
    head = data[:64].lstrip()
    return next((name for start, name in OTHER_KINDS.items() if head.startswith(start)), None)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Rejected("image has too many pixels", f"{width} x {height}, allowed are {max_pixels:,}")
    if min(width, height) < PATCH_SIZE:
        raise Rejected("image side under the patch size", f"{width} x {height}, a side needs {PATCH_SIZE}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise Rejected("absurd aspect ratio", f"{width} x {height}, allowed is 1:{MAX_ASPECT_RATIO}")


def _jpeg_info(data: bytes) -> ImageInfo | None:
    """Walk the segments to the first scan (ITU T.81, B.2.2); None when only a decoder can tell."""
    position, last, info = 2, len(data) - 10, None
    while position < last and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in JPEG_FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            if info or precision != 8 or components not in (1, 3, 4) or not width or not height:
                return None
            info = ImageInfo("jpg", width, height)
        elif marker == 0xDA:
            return info
        if 0xC0 <= marker <= 0xFE and not 0xD0 <= marker <= 0xD9:
            position += 2 + (data[position + 2] << 8 | data[position + 3])
        else:
            return None
    return None


def _png_info(data: bytes) -> ImageInfo | None:
    """Walk the chunks; None when only a decoder can tell."""
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if not (width and height and depth in PNG_MODES.get(colour, ())):
        return None
    position, end, pixels = 8, len(data), False
    while position + 12 <= end:
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        if kind in PNG_TEXT or (kind == b"IEND" and position + 12 != end):
            return None
        pixels |= kind == b"IDAT" and length > 0
        position += 12 + length
    return ImageInfo("png", width, height) if pixels and position == end else None
