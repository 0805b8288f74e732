"""Samples and megapixels a second out of the real loader, and how long a consumer of known speed waits for them.

    python benchmarks/make_photos.py PHOTOS        # photograph-sized pictures with records; convert and index them
    python benchmarks/loader.py WEBDATASETS TOKENIZER [--workers 1 2 4]     # writes results/loader.json

One loader after the other, packed to 8,192 tokens as in training; the first packs of each are not counted. The consumer takes a
pack and then sleeps as long as a step would take it that needs SHARE of what the workers delivered before.
"""

import argparse
import io
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

from PIL import Image  # noqa: E402

from llava_sft.data.heldout import read_split  # noqa: E402
from llava_sft.data.images import decode_rgb, smart_resize, to_patches  # noqa: E402
from llava_sft.data.loader import VlmTaskEncoder, train_loader, worker_config  # noqa: E402
from llava_sft.data.template import ChatTemplate  # noqa: E402
from results import row, write_results  # noqa: E402

SEQ_LENGTH, PIXELS = 8192, (3136, 1_000_000)
WARM, COUNTED, SHARE = 3, 12, 0.7
PATCH_PIXELS = 14 * 14


def measure(folder: Path, tokenizer: Path, workers: int) -> list[dict]:
    encoder = VlmTaskEncoder(ChatTemplate(tokenizer), SEQ_LENGTH, *PIXELS, packing=True)
    packs = iter(train_loader(folder, encoder, worker_config(0, 1, workers, 1), 1, packing_buffer_size=60))
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
    step = seconds / COUNTED / SHARE
    waited = 0.0
    for _ in range(COUNTED):
        asked = time.perf_counter()
        next(packs)
        waited += time.perf_counter() - asked
        time.sleep(step)
    note = f"a step of {step:.2f} s, which needs {SHARE:.0%} of what the workers delivered"
    share = waited / (waited + COUNTED * step)
    return [*rows, row("loader_wait_share", share, "of the step", 0.02, "lower", note, workers=workers)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="webdatasets/ folder, indexed")
    parser.add_argument("tokenizer", type=Path, help="folder with tokenizer.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    rows = parts(args.folder)
    for workers in args.workers:
        rows += measure(args.folder, args.tokenizer, workers)
    write_results("loader", rows, "python benchmarks/loader.py WEBDATASETS TOKENIZER")


if __name__ == "__main__":
    main()
