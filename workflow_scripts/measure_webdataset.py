"""Count tokens and image patches of every training sample, and time a loader process: what preflight works from.

Shards whose counts still hold (--kept) are not read again.
"""

from pathlib import Path

from llava_sft.checkpoint.verify import sidecars_damage
from llava_sft.command_line import Parser
from llava_sft.data.sizes import Limits, measure
from llava_sft.errors import CheckpointError, exits_cleanly, many
from llava_sft.files import read_json, write_json


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("wds_dir", type=Path, metavar="WDS_DIR", help="indexed folder")
    add("--dataset", type=Path, required=True, help="what index_webdataset.py wrote of it")
    add("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    add("--kept", type=Path, required=True, help="folder for the counts of each shard")
    add("--output", type=Path, required=True, metavar="SIZES.json")
    add("--processes", type=int, default=1, help="shards counted side by side (%(default)s)")
    for name in Limits._fields:
        add(f"--{name.replace('_', '-')}", type=int, required=True, metavar="N", help="as in the settings")
    args = parser.parse_args()
    limits = Limits(*(getattr(args, name) for name in Limits._fields))
    if damage := sidecars_damage(args.tokenizer):
        raise CheckpointError(
            f"{args.tokenizer}: {damage}: damaged since it was written",
            f"delete {args.tokenizer.parent} and the .done.json beside it: the same command converts it again",
        )
    sizes = measure(args.wds_dir, read_json(args.dataset), args.tokenizer, limits, args.kept, args.processes)
    write_json(args.output, sizes, indent=None, sealed=True)
    print(
        f"{many(len(sizes['tokens']), 'sample')} of {sum(sizes['tokens']):,} tokens, {len(sizes['left_out']):,} left out"
        f" → {args.output}\na loader process prepares {sizes['prepared_tokens_per_s']:,.0f} tokens/s here"
    )


if __name__ == "__main__":
    main()
