"""Turn raw instruction data (LLaVA JSONL and an image folder) into WebDataset shards, a job per byte range of the file.

Without --shard, --start and --end the whole file is planned and converted, one shard after the other.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sft.data.image_checks import MAX_IMAGE_PIXELS
from llava_sft.data.plan import DEFAULT_RANGE_BYTES, HELDOUT_PREFIX, TRAIN_PREFIX, Range, default_parts_dir, plan_ranges
from llava_sft.data.shards import convert_range
from llava_sft.errors import SettingsError, exits_cleanly


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, metavar="RAW.jsonl", help="one LLaVA record a line")
    parser.add_argument("--image-root", required=True, help="the folder that the records' image paths start from")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="WDS_DIR", help="gets the shards")
    parser.add_argument("--parts-dir", type=Path, help="gets statistics, rejects and index rows (WDS_DIR.parts)")
    parser.add_argument(
        "--prefix",
        choices=[TRAIN_PREFIX, HELDOUT_PREFIX],
        default=TRAIN_PREFIX,
        help=f"name of the shards: {TRAIN_PREFIX} for training (default), {HELDOUT_PREFIX} for validation",
    )
    parser.add_argument(
        "--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, metavar="N", help="reject larger images (%(default)s)"
    )
    parser.add_argument(
        "--range-bytes",
        type=int,
        default=DEFAULT_RANGE_BYTES,
        metavar="N",
        help="whole file: bytes of the raw file a shard is made from (%(default)s)",
    )
    parser.add_argument("--shard", type=int, metavar="N", help="one job: number of the shard")
    parser.add_argument("--start", type=int, metavar="BYTE", help="one job: records that start here …")
    parser.add_argument("--end", type=int, metavar="BYTE", help="one job: … and before here")
    args = parser.parse_args()
    parts_dir = args.parts_dir or default_parts_dir(args.output_dir)
    job = (args.shard, args.start, args.end)
    if any(value is not None for value in job) and None in job:
        raise SettingsError(f"--shard, --start, --end are {job}; they go together", "give all three or none")

    def convert(part: Range, *progress: Callable[..., Any]) -> dict[str, Any]:
        return convert_range(
            args.input, args.image_root, args.output_dir, parts_dir, args.prefix, part, args.max_image_pixels, *progress
        )

    if args.shard is not None:
        all_stats = [convert(Range(*job))]
    else:
        all_stats = convert_all(plan_ranges(args.input, args.range_bytes), convert)
    read, written, rejected = (sum(stats[key] for stats in all_stats) for key in ("read", "written", "rejected"))
    print(f"{args.input}: {read:,} records read, {written:,} written, {rejected:,} rejected → {args.output_dir}")
    if rejected:
        print(f"  why: {parts_dir}/{args.prefix}-*.rejects.jsonl")
    if args.shard is None:
        print(f"next: python {Path(sys.argv[0]).with_name('index_webdataset.py')} {args.output_dir}")


def convert_all(ranges: list[Range], convert: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert one range after the other, under a progress bar with records/s, MB/s of shards and the time left."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("converting"), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}")
    all_stats: list[dict[str, Any]] = []
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=ranges[-1].end)

        def show(raw_bytes: int, records: int, tar_bytes: int) -> None:
            records += sum(stats["read"] for stats in all_stats)
            tar_bytes += sum(stats["tar"]["bytes"] for stats in all_stats)
            seconds = bar.tasks[0].elapsed or 1e-3
            rate = f"{records / seconds:,.0f} records/s, {tar_bytes / seconds / 1e6:,.0f} MB/s"
            bar.update(task, description=rate, completed=ranges[len(all_stats)].start + raw_bytes)

        for part in ranges:
            all_stats.append(convert(part, show))
    return all_stats


if __name__ == "__main__":
    main()
