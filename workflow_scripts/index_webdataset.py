"""Make a folder of converted shards a data set that energon opens: check the counts and rejects, write `.nv-meta`."""

import argparse
import sys
from pathlib import Path

from llava_sft.data.index import index_webdataset, read_finished
from llava_sft.data.plan import default_parts_dir
from llava_sft.errors import exits_cleanly
from llava_sft.files import write_json


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wds_dir", type=Path, metavar="WDS_DIR", help="folder with the shards (*.tar, *.tar.idx)")
    parser.add_argument(
        "--parts-dir", type=Path, help="statistics, rejects and index rows of the shards (WDS_DIR.parts)"
    )
    parser.add_argument(
        "--raw", nargs="+", default=[], metavar="FILE", help="where the raw files lie now, if they have moved since"
    )
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the records, 0 to 1, that may be rejected (%(default)s)",
    )
    parser.add_argument("--train-shards", type=int, metavar="N", help="shards of the plan (all that are there)")
    parser.add_argument("--heldout-shards", type=int, metavar="N", help="the same for the held-out split")
    parser.add_argument("--finished", action="store_true", help="the folder is indexed already: only count")
    parser.add_argument(
        "--output", type=Path, metavar="DATASET.json", help="fingerprint and counts of the data set (WDS_DIR.json)"
    )
    args = parser.parse_args()
    output = args.output or args.wds_dir.with_name(args.wds_dir.name + ".json")

    if args.finished:
        dataset = read_finished(args.wds_dir)
    else:
        dataset = index_webdataset(
            args.wds_dir,
            args.parts_dir or default_parts_dir(args.wds_dir),
            args.raw,
            args.max_reject_fraction,
            args.train_shards,
            args.heldout_shards,
        )
    write_json(output, dataset)
    train, heldout = dataset["train"], dataset["heldout"]
    print(
        f"{args.wds_dir}: {train['samples']:,} samples in {train['shards']} shards for training,"
        f" {heldout['samples']:,} in {heldout['shards']} held out"
        + ("" if args.finished else f", {dataset['images']:,} images, {dataset['rejected']:,} records rejected")
        + f" → {output}"
    )
    print(f"next: python {Path(sys.argv[0]).with_name('inspect_webdataset.py')} {args.wds_dir}")


if __name__ == "__main__":
    main()
