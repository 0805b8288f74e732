"""Make a folder of tars a data set that energon opens: check counts and rejects, write `.nv-meta`.

Shards of stage2_sftdata2webdataset.py are indexed by what it noted beside them (WDS_DIR.parts). A folder that has an
index already is counted; one without notes gets an index from its tars; `--adopt` indexes another folder's tars through
links, and does not touch that folder.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from llava_sft.command_line import Parser
from llava_sft.data.adopt import adopt_webdataset
from llava_sft.data.index import index_webdataset, leak_note, read_finished
from llava_sft.data.nv_meta import is_finished
from llava_sft.data.plan import notes_of
from llava_sft.data.verify import note_dataset, require_whole
from llava_sft.errors import exits_cleanly, many, shown
from llava_sft.files import write_json


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("wds_dir", type=Path, metavar="WDS_DIR", help="folder with the shards (*.tar, *.tar.idx)")
    add("--parts-dir", type=Path, help="statistics, rejects and index rows of the shards (WDS_DIR.parts)")
    add("--adopt", type=Path, metavar="FOLDER",
        help="link this folder's tars into WDS_DIR; WDS_DIR itself, when it has its index: only count")  # fmt: skip
    add("--max-reject-fraction", type=float, default=0.0, metavar="SHARE",
        help="share of the records, 0 to 1, that may be rejected (%(default)s)")  # fmt: skip
    add("--val-fraction", type=float, default=0.0, metavar="SHARE",
        help="share to hold out when no shard is (%(default)s)")  # fmt: skip
    add("--split-seed", type=int, default=0, help="of --val-fraction (%(default)s)")
    add("--plan", type=json.loads, metavar="JSON", help="sources, weights, shards (all that are there)")
    add("--output", type=Path, metavar="DATASET.json", help="fingerprint and counts of the data set (WDS_DIR.json)")
    add("--verify", action="store_true", help="only read every sample and compare it with the hashes in the index")
    args = parser.parse_args()
    output = args.output or args.wds_dir.with_name(args.wds_dir.name + ".json")
    notes_dir = notes_of(args.wds_dir, args.parts_dir)
    if args.verify:
        return verify(args.wds_dir, output)

    source = args.adopt or args.wds_dir
    if args.plan or (notes_dir.is_dir() and not args.adopt):
        options = args.max_reject_fraction, args.plan, args.val_fraction, args.split_seed
        dataset = index_webdataset(args.wds_dir, notes_dir, *options)
    elif source == args.wds_dir and is_finished(source):
        dataset = read_finished(source)
    else:
        dataset = adopt_webdataset(source, args.wds_dir, args.max_reject_fraction)
    write_json(output, dataset, sealed=True)
    note_dataset(args.wds_dir, output)
    train, heldout = dataset["train"], dataset["heldout"]
    read = ""
    if dataset["read"] is not None:
        read = f", {many(dataset['images'] or 0, 'image')}, {many(dataset['rejected'] or 0, 'record')} rejected"
    print(
        f"{args.wds_dir}: {many(train['samples'], 'sample')} in {many(train['shards'], 'shard')} for training,"
        f" {heldout['samples']:,} in {heldout['shards']} held out{read} → {output}"
    )
    for key, count in dataset.get("unread", {}).items():
        print(f"note: not read: the key {key} of {many(count, 'record')}")
    if packed := dataset.get("packed_tars"):
        print(
            f"note: left out: {many(len(packed), 'packed tar')}, without places to read a sample at: {shown(packed[0])} …"
        )
    if leak := leak_note(dataset):
        print(f"note: {leak}")
    if not args.output:  # by hand
        print(f"next: python {Path(sys.argv[0]).with_name('inspect_webdataset.py')} {args.wds_dir}")


def verify(wds_dir: Path, dataset: Path) -> None:
    began = time.perf_counter()
    require_whole(wds_dir, dataset, full=True)
    size, took = sum(tar.stat().st_size for tar in wds_dir.rglob("*.tar")), time.perf_counter() - began
    print(f"{wds_dir} holds what was written: {size / 1e9:,.2f} GB read at {size / took / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
