"""What watching costs: blocks of steps with and without it, in turn, in one training of the tiny model.

    python benchmarks/watching.py        # needs `snakemake preflight_vqa` once; writes results/watching.json

Off means: no count of tokens and FLOPs, no judgement of the loss, no records. Noting sample ids is off throughout.
Pairs of neighbouring blocks share the machine's mood, so that the interval of their differences is narrow; the time of the
processor is given beside the time of the clock, for machines that do something else as well.
"""

import os
import shutil
import statistics
import time
from pathlib import Path

from llava_sft.files import read_json, write_json
from results import DEMO_RUN, row, single_process, write_results

BLOCK, PAIRS, WARM = 10, 40, 20
OUT = Path("/tmp/llava_sft_watching")


def main() -> None:
    resolved = read_json(DEMO_RUN)
    steps = WARM + 2 * BLOCK * PAIRS
    resolved["settings"] |= {"train_iters": steps, "lr_decay_iters": steps, "save_interval": 10 * steps}
    resolved["settings"] |= {"eval_iters": 0, "log_interval": BLOCK}
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    write_json(OUT / "resolved.json", resolved)
    os.environ |= single_process()
    write_results("watching", measure(resolved))


def measure(resolved: dict) -> list[dict]:
    from llava_sft.training import loop, process

    ends: list[tuple[float, float]] = []
    on = {"training_flops": loop.training_flops, "step": loop.Watch.step, "batch": loop.Watch.batch}
    original = loop.Loop.log

    def log(self, *given):
        watched = (len(ends) - WARM) // BLOCK % 2 == 0
        loop.training_flops = on["training_flops"] if watched else lambda *shape: 0.0
        loop.Watch.batch = on["batch"] if watched else lambda *values: None
        loop.Watch.step = on["step"] if watched else lambda *values: None
        original(self, *given)
        ends.append((time.perf_counter(), time.process_time()))

    loop.Loop.log = log
    process.main(str(OUT / "resolved.json"), str(OUT))

    rows = []
    for clock, name in enumerate(("wall", "cpu")):
        # The switch falls between two steps: a block is the steps whose log ran under it.
        seconds = [ends[i + BLOCK - 1][clock] - ends[i - 1][clock] for i in range(WARM, len(ends) - BLOCK + 1, BLOCK)]
        pairs = list(zip(seconds[::2], seconds[1::2], strict=False))
        off = statistics.median(without for _, without in pairs)
        shares = sorted((with_it - without) / off for with_it, without in pairs)
        middle = statistics.median(shares)
        low, high = (shares[len(shares) // 2 + place] for place in (-6, 6))  # order statistics, about 95 % for 40 pairs
        note = f"median of {len(pairs)} pairs of blocks of {BLOCK} steps, 95 % interval {low:.4f} … {high:.4f}; "
        note += f"a step without is {1000 * off / BLOCK:.1f} ms"
        rows.append(row("watching_overhead", middle, "of the step", 0.01, "lower", note, clock=name, experiment="vqa"))
    return rows


if __name__ == "__main__":
    main()
