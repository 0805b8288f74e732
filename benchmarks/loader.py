"""Megapixels a second out of the real loader, and how long a consumer of known speed waits for them.

    python benchmarks/make_photos.py --output-dir PHOTOS     # photograph-sized pictures with records; convert and index them
    python benchmarks/loader.py WEBDATASETS TOKENIZER [--workers 1 2 4 8]     # writes results/loader.json

One loader after the other, packed to 8,192 tokens as in training; the first packs of each are not counted. Two consumers take a
pack and then sleep as long as a step: one that needs SHARE of what the workers delivered before, and one as fast as the 4B
model on an H200. Taking a finished pack out of the workers' queue counts as waiting; with a GPU a thread does it.

Image libraries, in one process: what each takes to decode a JPEG, and how far its pixels are from those of Pillow, which
the model's image processor uses. Those that are not installed are left out: `pip install simplejpeg opencv-python-headless`
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from llava_sft.data.images import decode_rgb
from llava_sft.data.loader import VlmTaskEncoder
from llava_sft.data.stored import read_split
from llava_sft.data.stream import Ranks, train_loader
from llava_sft.model.processing import PATCH_SIZE
from llava_sft.model.template import ChatTemplate
from results import row, write_results

SEQ_LENGTH, PIXELS = 8192, (3136, 1_000_000)
WARM, COUNTED, SHARE, STEP_S = 3, 12, 0.7, 0.53


def measure(folder: Path, tokenizer: Path, workers: int) -> list[dict]:
    encoder = VlmTaskEncoder(ChatTemplate(tokenizer), SEQ_LENGTH, *PIXELS, packing=True)
    packs = iter(train_loader(folder, encoder, Ranks(0, 1, workers), 1, packing_buffer_size=60))
    for _ in range(WARM):
        next(packs)
    began = time.perf_counter()
    batches = [next(packs) for _ in range(COUNTED)]
    seconds = time.perf_counter() - began
    megapixels = sum(len(batch.pixels) for batch in batches) * PATCH_SIZE**2 / 1e6  # of patches
    rows = [row("loader_mpixel_per_s", megapixels / seconds, "MPixel/s", None, "higher", "", workers=workers)]
    consumers = {f"takes {SHARE:.0%} of what they deliver": seconds / COUNTED / SHARE, "4B on an H200": STEP_S}
    for name, step in consumers.items():
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


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """JPEG → RGB pixels [height, width, 3], of each library that is there."""
    found = {"Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))}
    with contextlib.suppress(ImportError):
        import simplejpeg

        found["simplejpeg"] = simplejpeg.decode_jpeg
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return found


def libraries(folder: Path) -> list[dict]:
    images = [image for sample in read_split(folder, "train") for image in sample.images][:40]
    expected = [np.asarray(decode_rgb(data)) for data in images]
    megapixels = sum(pixels.shape[0] * pixels.shape[1] for pixels in expected) / 1e6
    rows = []
    for name, decode in decoders().items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            decoded = [decode(data) for data in images]
            times.append(time.perf_counter() - began)
        worst = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(decoded, expected, strict=True))
        note = "the same pixels" if not worst else f"pixels up to {worst} of 255 off"
        spent = 1e3 * min(times) / megapixels
        rows.append(row("library_ms_per_mpixel", spent, "ms", None, "lower", note, work="decode", library=name))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="webdatasets/ folder, indexed")
    parser.add_argument("tokenizer", type=Path, help="folder with tokenizer.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    rows = libraries(args.folder)
    for workers in args.workers:
        rows += measure(args.folder, args.tokenizer, workers)
    write_results("loader", rows, "python benchmarks/loader.py WEBDATASETS TOKENIZER")


if __name__ == "__main__":
    main()
