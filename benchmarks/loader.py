"""Samples and megapixels a second out of the real loader, and how long a consumer of known speed waits for them.

    python benchmarks/make_photos.py PHOTOS        # photograph-sized pictures with records; convert and index them
    python benchmarks/loader.py WEBDATASETS TOKENIZER [--workers 1 2 4 8]     # writes results/loader.json

One loader after the other, packed to 8,192 tokens as in training; the first packs of each are not counted. Two consumers take a
pack and then sleep as long as a step: one that needs SHARE of what the workers delivered before, and one as fast as the 4B
model on an H200. Taking a finished pack out of the workers' queue counts as waiting; with a GPU a thread does it.

Image libraries, in one process: what each takes to decode a JPEG (or to scale it down), and how far its pixels are from
those of Pillow, which the model's image processor uses. Those that are not installed are left out:
`pip install simplejpeg opencv-python-headless imagecodecs pyvips pyvips-binary`
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from llava_sft.data.heldout import read_split  # noqa: E402
from llava_sft.data.images import decode_rgb  # noqa: E402
from llava_sft.data.loader import VlmTaskEncoder  # noqa: E402
from llava_sft.data.stream import Ranks, train_loader  # noqa: E402
from llava_sft.model.processing import PATCH_SIZE, smart_resize, to_patches  # noqa: E402
from llava_sft.model.template import ChatTemplate  # noqa: E402
from results import row, write_results  # noqa: E402

SEQ_LENGTH, PIXELS = 8192, (3136, 1_000_000)
WARM, COUNTED, SHARE, STEP_S = 3, 12, 0.7, 0.53
PATCH_PIXELS = PATCH_SIZE**2
SMALL = 500_000  # pixels that pictures are scaled down to for the comparison


def measure(folder: Path, tokenizer: Path, workers: int) -> list[dict]:
    encoder = VlmTaskEncoder(ChatTemplate(tokenizer), SEQ_LENGTH, *PIXELS, packing=True)
    packs = iter(train_loader(folder, encoder, Ranks(0, 1, workers), 1, packing_buffer_size=60))
    for _ in range(WARM):
        next(packs)
    began = time.perf_counter()
    batches = [next(packs) for _ in range(COUNTED)]
    seconds = time.perf_counter() - began
    samples = sum(len(batch.lengths) for batch in batches)
    megapixels = sum(len(batch.pixels) for batch in batches) * PATCH_PIXELS / 1e6
    rows = [
        row("loader_samples_per_s", samples / seconds, "samples/s", None, "higher", "", workers=workers),
        row("loader_mpixel_per_s", megapixels / seconds, "MPixel/s", None, "higher", "", workers=workers),
    ]
    for name, step in (
        (f"takes {SHARE:.0%} of what they deliver", seconds / COUNTED / SHARE),
        ("4B on an H200", STEP_S),
    ):
        waits = []
        for _ in range(COUNTED):
            asked = time.perf_counter()
            next(packs)
            waits.append(time.perf_counter() - asked)
            time.sleep(step)
        note = f"a step of {step:.2f} s; median {1e3 * statistics.median(waits):.1f} ms to take a pack"
        share = sum(waits) / (sum(waits) + COUNTED * step)
        rows.append(row("loader_wait_share", share, "of the step", 0.02, "lower", note, workers=workers, consumer=name))
    return rows


def parts(folder: Path) -> list[dict]:
    """Milliseconds a megapixel of the original picture, of each part of the work on it, in one process."""
    images = [image for sample in read_split(folder, "train") for image in sample.images][:40]
    spent = {"decode": 0.0, "decode at reduced size": 0.0, "resize": 0.0, "cut into patches": 0.0}
    pixels = 0
    for data in images:
        began = time.perf_counter()
        picture = decode_rgb(data)
        spent["decode"] += time.perf_counter() - began
        height, width = smart_resize(picture.height, picture.width, *PIXELS)
        began = time.perf_counter()
        reduced = Image.open(io.BytesIO(data))
        reduced.draft("RGB", (width, height))
        reduced.load()
        spent["decode at reduced size"] += time.perf_counter() - began
        began = time.perf_counter()
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        spent["resize"] += time.perf_counter() - began
        began = time.perf_counter()
        to_patches(resized, *PIXELS)
        spent["cut into patches"] += time.perf_counter() - began
        pixels += picture.width * picture.height
    note = f"Pillow; {len(images)} pictures of {pixels / len(images) / 1e6:.2f} megapixels on average"
    return [
        row("image_ms_per_mpixel", 1e3 * seconds / (pixels / 1e6), "ms", None, "lower", note, part=part)
        for part, seconds in spent.items()
    ]


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """JPEG → RGB pixels [height, width, 3], of each library that is there."""
    found = {"Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))}
    with contextlib.suppress(ImportError):
        import simplejpeg

        found["simplejpeg"] = simplejpeg.decode_jpeg
        found["simplejpeg, fast"] = partial(simplejpeg.decode_jpeg, fastdct=True, fastupsample=True)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    with contextlib.suppress(ImportError):
        import imagecodecs

        found["imagecodecs"] = imagecodecs.jpeg8_decode
    with contextlib.suppress(ImportError):
        import pyvips

        found["libvips"] = lambda data: pyvips.Image.new_from_buffer(data, "").numpy()
    return found


def scalers() -> dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]]:
    """Pixels, (width, height) → pixels of that size."""
    found = {"Pillow": lambda pixels, size: np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))}
    with contextlib.suppress(ImportError):
        import cv2

        found["OpenCV, cubic"] = lambda pixels, size: cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
        found["OpenCV, area"] = lambda pixels, size: cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return found


def libraries(folder: Path) -> list[dict]:
    images = [image for sample in read_split(folder, "train") for image in sample.images][:40]
    decoded = [np.asarray(decode_rgb(data)) for data in images]
    sizes = [smart_resize(*pixels.shape[:2], 3136, SMALL)[::-1] for pixels in decoded]
    scaled = [scalers()["Pillow"](*each) for each in zip(decoded, sizes, strict=True)]
    megapixels = sum(pixels.shape[0] * pixels.shape[1] for pixels in decoded) / 1e6
    rows = []
    for work, candidates, inputs, expected in (
        ("decode", decoders(), [(data,) for data in images], decoded),
        (f"scale down to {SMALL:,} pixels", scalers(), list(zip(decoded, sizes, strict=True)), scaled),
    ):
        for name, function in candidates.items():
            times = []
            for _ in range(3):
                began = time.perf_counter()
                made = [function(*each) for each in inputs]
                times.append(time.perf_counter() - began)
            worst = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(made, expected, strict=True))
            note = "the same pixels" if not worst else f"pixels up to {worst} of 255 off"
            rows.append(
                row(
                    "library_ms_per_mpixel",
                    1e3 * min(times) / megapixels,
                    "ms",
                    None,
                    "lower",
                    note,
                    work=work,
                    library=name,
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="webdatasets/ folder, indexed")
    parser.add_argument("tokenizer", type=Path, help="folder with tokenizer.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    rows = parts(args.folder) + libraries(args.folder)
    for workers in args.workers:
        rows += measure(args.folder, args.tokenizer, workers)
    write_results("loader", rows, "python benchmarks/loader.py WEBDATASETS TOKENIZER")


if __name__ == "__main__":
    main()
