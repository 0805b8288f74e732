"""Turn raw instruction data (JSONL, a JSON array, CSV, Parquet, Arrow; images beside it or inside) into WebDataset shards, a job per
range of a file.

Without --shard, --start and --end whole files are planned and converted, one shard after the other.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sft.command_line import Parser
from llava_sft.data.forms import add_reading, reading_of
from llava_sft.data.image_checks import MAX_IMAGE_PIXELS
from llava_sft.data.plan import HELDOUT_PREFIX, TRAIN_PREFIX, Range, default_notes_dir, plan_ranges
from llava_sft.data.shards import convert_range
from llava_sft.errors import SettingsError, exits_cleanly, many
from llava_sft.progress import Progress


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="RAW", help="LLaVA or ShareGPT/OpenAI records")
    add("--image-root", help="the folder that the records' image paths start from (beside the file)")
    add("--output-dir", type=Path, required=True, metavar="WDS_DIR", help="gets the shards")
    add("--parts-dir", type=Path, help="gets statistics, rejects and index rows (WDS_DIR.parts)")
    add("--prefix", choices=[TRAIN_PREFIX, HELDOUT_PREFIX], default=TRAIN_PREFIX,
        help=f"name of the shards: {TRAIN_PREFIX} for training (default), {HELDOUT_PREFIX} for validation")  # fmt: skip
    add("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, metavar="N",
        help="reject larger images (%(default)s)")  # fmt: skip
    add("--max-shard-bytes", type=int, metavar="N", help="a tar that grows beyond is an error")
    add("--decode-images", choices=["True", "False"], default="False", help="decode every image (%(default)s)")
    add_reading(add)
    add("--range-bytes", type=int, metavar="N",
        help="whole files: bytes of raw data a shard is made from (8 MiB of text, 256 MiB of Parquet)")  # fmt: skip
    add("--shard", type=int, metavar="N", help="one job: number of the shard")
    add("--start", type=int, metavar="BYTE", help="one job: records that start here …")
    add("--end", type=int, metavar="BYTE", help="one job: … and before here")
    args = parser.parse_args()
    notes_dir = args.parts_dir or default_notes_dir(args.output_dir)
    job = (args.shard, args.start, args.end)
    if any(value is not None for value in job) and None in job:
        raise SettingsError(f"--shard, --start, --end are {job}; they go together", "give all three or none")

    reading = reading_of(args)

    def convert(raw: str, cut: Range, progress: Callable[..., Any] = lambda *_: None) -> dict[str, Any]:
        image_root = args.image_root or os.path.dirname(raw) or "."
        limits = args.max_image_pixels, args.max_shard_bytes, args.decode_images == "True"
        return convert_range(raw, image_root, args.output_dir, notes_dir, args.prefix, cut, *limits, progress, reading)

    if args.shard is not None:
        all_stats = [convert(args.input[0], Range(*job))]
    else:
        files = enumerate(args.input)
        ranges = [(raw, cut) for number, raw in files for cut in plan_ranges(raw, args.range_bytes, number)]
        all_stats = convert_all(ranges, convert)
    read, written, rejected = (sum(stats[key] for stats in all_stats) for key in ("read", "written", "rejected"))
    names = ", ".join(args.input)
    print(f"{names}: {many(read, 'record')} read, {written:,} written, {rejected:,} rejected → {args.output_dir}")
    if rejected:
        print(f"  why: {notes_dir}/{args.prefix}-*.rejects.jsonl")
    if args.shard is None:
        print(f"next: python {Path(sys.argv[0]).with_name('index_webdataset.py')} {args.output_dir}")


def convert_all(ranges: list[tuple[str, Range]], convert: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert one range after the other, saying how far it is."""
    all_stats: list[dict[str, Any]] = []
    progress = Progress(sum(cut.end - cut.start for _, cut in ranges) / 1e6, "MB")
    for raw, cut in ranges:

        def show(raw_bytes: int, records: int, begun: float = progress.done) -> None:
            progress.add(begun + raw_bytes / 1e6 - progress.done)

        all_stats.append(convert(raw, cut, show))
    return all_stats


if __name__ == "__main__":
    main()
