"""Images on their way into a shard: read from under the image root only, and checked without decoding where possible.

Notable: a JPEG or PNG whose header is plain and whose end marker stands costs a few microseconds; every other file is
decoded once with Pillow (imported only then). Bytes are never changed.
"""

import errno
import os
import stat
import struct
import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from llava_sft.data.records import Rejected
from llava_sft.errors import DataError

MAX_IMAGE_PIXELS = 100_000_000  # a decompression bomb by default; a setting
MIN_SIDE = 14  # pixels: the model's patch
MAX_ASPECT_RATIO = 200  # what the Qwen2-VL image processor accepts (smart_resize)

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
# Pillow may open these and no other: some of its readers (EPS) start other programs.
FORMATS = [name for name in EXTENSIONS if name != "MPO"]

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: Huffman coded, what Pillow reads
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"
PNG_MODES = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # colour type: bit depths

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
        """Return a file's bytes. Errors: `Rejected` if missing, empty, or outside the root (absolute, `..`, symlink)."""
        if not isinstance(path, str):
            raise Rejected("image path is not a string", f"a {type(path).__name__}")
        folder, _, name = path.rpartition("/")
        if folder not in self._inside or path[:1] == "/" or name in ("", "..") or "\0" in name:
            self._check(path, folder)
        full = f"{self.root}/{path}"
        try:
            # NOFOLLOW: links are looked at before they are followed. NONBLOCK: a named pipe must not hang the job.
            file = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return self._read_link(path, full)
            if error.errno in RECORD_ERRORS:
                raise Rejected("missing image", f"{path}: {os.strerror(error.errno)}") from None
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

    def _check(self, path: str, folder: str) -> None:
        if not path or "\0" in path:
            raise Rejected("missing image", f"{path!r} is no file name")
        if path.startswith("/") or ".." in path.split("/"):
            raise Rejected("image outside the image root", path)
        if path.endswith("/"):
            raise Rejected("missing image", f"{path} is a folder")
        if not self._holds(os.path.realpath(f"{self.root}/{folder}")):
            raise Rejected("image outside the image root", f"{path}: {folder} is a link that leads out")
        self._inside.add(folder)

    def _holds(self, real: str) -> bool:
        return real == self.root or real.startswith(self.root.rstrip("/") + "/")

    def _read_link(self, path: str, full: str) -> bytes:
        try:
            real = os.path.realpath(full, strict=True)
        except OSError as error:
            raise Rejected("missing image", f"{path}, a link: {os.strerror(error.errno)}") from None
        if not self._holds(real):
            raise Rejected("image outside the image root", f"{path} is a link that leads out")
        return self.read(os.path.relpath(real, self.root))


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
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked first, with our own reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise Rejected("not an image", f"begins with {data[:8].hex(' ')}") from None
        except Exception as error:  # Pillow's readers raise almost anything on damaged headers
            raise Rejected("truncated or damaged image", str(error)) from None
        _check_size(*image.size, max_pixels)
        try:
            image.load()
        except Exception as error:
            raise Rejected("truncated or damaged image", str(error)) from None
        try:
            image.convert("RGB")
        except ValueError:
            raise Rejected("unreadable image mode", image.mode) from None
    return ImageInfo(EXTENSIONS[image.format], *image.size)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Rejected("image has too many pixels", f"{width} x {height}, allowed are {max_pixels:,}")
    if min(width, height) < MIN_SIDE:
        raise Rejected("image side under the patch size", f"{width} x {height}, a side needs {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise Rejected("absurd aspect ratio", f"{width} x {height}, allowed is 1:{MAX_ASPECT_RATIO}")


def _jpeg_info(data: bytes) -> ImageInfo | None:
    """Walk the segments to the frame header (ITU T.81, B.2.2); None when only a decoder can tell."""
    position, last = 2, len(data) - 10
    while position < last and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in JPEG_FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            plain = precision == 8 and components in (1, 3, 4) and width and height
            return ImageInfo("jpg", width, height) if plain else None
        if 0xC0 <= marker <= 0xFE and marker != 0xDA and not 0xD0 <= marker <= 0xD9:
            position += 2 + (data[position + 2] << 8 | data[position + 3])
        else:
            return None
    return None


def _png_info(data: bytes) -> ImageInfo | None:
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    plain = width and height and depth in PNG_MODES.get(colour, ())
    return ImageInfo("png", width, height) if plain else None
