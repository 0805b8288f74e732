"""What a training on many GPUs takes, from what was measured on one or two and from stated assumptions: a table in Markdown.

    python benchmarks/sizing.py [--gpus 8 32 256 1024] [--packs 1024] [--link 40] [--model 4b]

Nothing here was run on more than two GPUs. Measured: results/{training,loader,slurm,conversion}.json. All else is an option:
its default stands in the help. docs/cluster.md has the table, and says what follows from it.
"""

import argparse
import json

from llava_sft.model.config import load_model_config
from llava_sft.model.tensors import parameter_count
from results import RESULTS, ROOT

PACK = 8192  # tokens
PATCHES = 24_000  # of a pack of photographs (docs/performance.md), each of 14 × 14 pixels
BACKWARD = 2 / 3  # of a pack's time; gradients are reduced during that of the last
DAY_S = 86_400


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 256, 1024])
    parser.add_argument("--model", default="4b", help="its size; speed and checkpoint are measured for 4b")
    parser.add_argument(
        "--packs", type=int, default=1024, help="of 8,192 tokens in a step, on all GPUs; at least one each"
    )
    parser.add_argument(
        "--link", type=float, default=40, help="GB/s of a GPU to other nodes: 400 Gb/s each, 80 %% of it"
    )
    parser.add_argument("--nvlink", type=float, default=300, help="GB/s of a GPU to others of its node of 8")
    parser.add_argument("--file-system", type=float, default=10, help="GB/s, of all nodes together")
    parser.add_argument("--bits-per-pixel", type=float, default=2, help="of a JPEG")
    parser.add_argument("--gpu-days-per-failure", type=float, default=2112,
                        help="419 unexpected interruptions in 54 days of 16,384 GPUs (arXiv:2407.21783, section 3.3.4)")  # fmt: skip
    parser.add_argument("--down", type=float, default=270,
                        help="seconds from a failure to the load: 90 until noticed, 120 in Slurm's queue, 60 of imports")  # fmt: skip
    parser.add_argument("--save-every", type=float, default=30, help="minutes")
    return parser.parse_args()


def measured(name: str, metric: str, note: str = "", **settings: object) -> float:
    """The one such row of a result file."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    (value,) = (
        row["value"]
        for row in rows
        if row["metric"] == metric
        and row["note"].startswith(note)
        and all(row["settings"].get(key) == value for key, value in settings.items())
    )
    return value


def column(gpus: int, args: argparse.Namespace) -> dict[str, str]:
    """What so many GPUs take."""
    h100 = {"gpu": "NVIDIA H100 80GB HBM3"}
    parameters = parameter_count(load_model_config(ROOT / "config/models" / f"{args.model}.yaml"))
    rate = measured("training", "useful_tokens_per_s", "bf16_8192 80 GB", micro_batches=16, **h100)
    packs, nodes = max(1, args.packs // gpus), max(1, gpus // 8)
    link = 1e9 * (args.nvlink if gpus <= 8 else args.link)
    sent = 2 * parameters * (gpus - 1) / gpus  # bf16: gradients once, and the weights once
    computed = packs * PACK / rate
    waits = sent / link + max(0, sent / link - BACKWARD * PACK / rate)
    pixels = PATCHES * 14**2 * packs / (computed + waits)
    worker = 1e6 * measured("loader", "loader_mpixel_per_s", workers=1)
    written_by_one = measured("training", "save_stall_s", "37.9 GB", async_save=False)
    read_by_one = measured("training", "checkpoint_load_s")
    weights, size, disk = 2 * parameters, 8 * parameters, 1e9 * args.file_system
    # Every rank reads all weights, from its node's page cache but for the first, and its share of the optimizer's state.
    alone = read_by_one * (weights + (size - weights) / gpus) / size
    load = max(alone, (nodes * weights + size - weights) / disk)
    failures = gpus / args.gpu_days_per_failure
    cost = args.down + load + 30 * args.save_every
    return {
        "packs of 8,192 a GPU and step": f"{packs}",
        "GB each GPU sends and receives a step: gradients, weights": f"{sent / 1e9:.1f} + {sent / 1e9:.1f}",
        "step: seconds of computing + of waiting for the network": f"{computed:.2f} + {waits:.2f}",
        "efficiency": f"{computed / (computed + waits):.0%}",
        "useful tokens/s": f"{gpus * packs * PACK / (computed + waits):,.0f}",
        "loader processes a GPU that keep up": f"{pixels / worker:.2f}",
        "pictures read, MB/s in all": f"{gpus * pixels * args.bits_per_pixel / 8e6:,.0f}",
        "checkpoint: GB, seconds to write it beside the training": f"{size / 1e9:.0f}, "
        f"{max(written_by_one / gpus, size / disk):.0f}",
        "seconds to load it": f"{load:.0f}",
        "failures a day": f"{failures:.2f}",
        "minutes that each costs": f"{cost / 60:.0f}",
        "time lost to failures": f"{failures * cost / DAY_S:.2%}",
    }


def main() -> None:
    args = arguments()
    columns = [column(gpus, args) for gpus in args.gpus]
    print(f"| {args.model}, GPUs | {' | '.join(f'{gpus:,}' for gpus in args.gpus)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(each[name] for each in columns)} |")


if __name__ == "__main__":
    main()
