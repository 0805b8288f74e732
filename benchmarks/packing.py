"""Useful tokens of packs, and whether an epoch is one: no sample seen again before all others.

    python benchmarks/packing.py [share] [epoch]      # writes results/packing.json

share: useful tokens of the packs made online, over a buffer of samples. Lengths are drawn from real ones, of which the
percentiles stand below: short VQA: the answers with lectures to 4,241 ScienceQA questions, with a picture of 640 × 480;
mixed: those, 240 answers of chat models about 1 to 4 pictures of a megapixel, and documents; long documents: 751 Python
Enhancement Proposals. A token is taken as four characters. A sample longer than a pack is cut to it, as a document of
many turns would be.

epoch: how often each sample has been seen, in the order that the loader deals out (tests/test_loader.py: with any number
of ranks and workers).
"""

import argparse
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Iterator

from llava_sft.data.order import GlobalOrder, SourceLengths
from llava_sft.settings.resolve import auto_packing_buffer
from results import row, write_results

SAMPLES = 100_000
SMALL = 20_000  # a set of this size packs as well
PASSES = (0.5, 1, 1.5, 3)
STEP = 4  # packs
GOALS = {8192: 0.995, 32768: 0.99}
TEMPLATE, PICTURE, MEGAPIXEL = 40, 391, 1225  # tokens of the chat template, of an image of 640 × 480, of a megapixel
# Lengths in tokens at 0, 5, … 100 %.
LECTURES = [7, 18, 20, 55, 103, 128, 139, 156, 182, 187, 200, 215, 226, 242, 273, 295, 342, 366, 416, 506, 875]
ANSWERS = [38, 144, 184, 212, 232, 247, 269, 289, 300, 314, 325, 336, 354, 367, 386, 398, 412, 440, 465, 522, 663]
DOCUMENTS = [51, 706, 1082, 1343, 1688, 1950, 2116, 2407, 2711, 3146, 3462]
DOCUMENTS += [3988, 4490, 4941, 5482, 6205, 6934, 7993, 9834, 14270, 30363]


def drawn(draw: random.Random, percentiles: list[int]) -> int:
    step, share = divmod(draw.random() * 20, 1)
    low, high = percentiles[int(step)], percentiles[int(step) + 1]
    return round(low + share * (high - low)) + TEMPLATE


def short_vqa(draw: random.Random) -> int:
    return PICTURE + drawn(draw, LECTURES)


def long_documents(draw: random.Random) -> int:
    return drawn(draw, DOCUMENTS)


def mixed(draw: random.Random) -> int:
    kind = draw.random()
    if kind < 0.5:
        return short_vqa(draw)
    return draw.randint(1, 4) * MEGAPIXEL + drawn(draw, ANSWERS) if kind < 0.8 else long_documents(draw)


def packs(lengths: list[int], capacity: int) -> int:
    """Number of packs of a first pass over samples of these lengths."""
    order = GlobalOrder([SourceLengths(lengths)], capacity, auto_packing_buffer(lengths, capacity), seed=0)
    return sum(1 for _ in order.first_pass()[0])


def shares() -> Iterator[dict]:
    distributions = {"short VQA": short_vqa, "mixed": mixed, "long documents": long_documents}
    for (capacity, goal), (name, distribution) in itertools.product(GOALS.items(), distributions.items()):
        draw = random.Random(1)
        lengths = [min(distribution(draw), capacity) for _ in range(SAMPLES)]
        settings = {"lengths": name, "method": "online"}
        began = time.perf_counter()
        share = sum(lengths) / (packs(lengths, capacity) * capacity)
        each = 1e6 * (time.perf_counter() - began) / SAMPLES
        note = f"{each:.2f} µs a sample, buffer of {auto_packing_buffer(lengths, capacity):,}"
        mean = round(sum(lengths) / SAMPLES)
        yield row(f"packing_{capacity}", share, "useful", goal, "higher", note, **settings, mean_length=mean)
        few = lengths[:SMALL]
        share = sum(few) / (packs(few, capacity) * capacity)
        yield row(f"packing_{capacity}", share, "useful", goal, "higher", "", **settings, samples=SMALL)


def exactness() -> Iterator[dict]:
    """Share of samples whose count is the floor or the ceiling of samples drawn over samples there are: the worst of
    PASSES, each rounded up to a whole step of STEP packs."""
    for samples in (37, 500, 3_000, 20_000):
        draw = random.Random(3)
        lengths = [min(mixed(draw), 8192) for _ in range(samples)]
        for capacity in (8192, None):
            order = GlobalOrder([SourceLengths(lengths)], capacity, auto_packing_buffer(lengths, 8192), seed=1)
            seen, drawn_samples, shares = Counter(), 0, []
            for passes in PASSES:
                while drawn_samples < passes * samples:
                    for pack in itertools.islice(order, STEP):
                        seen.update(pack)
                        drawn_samples += len(pack)
                mean = drawn_samples / samples
                right = sum(math.floor(mean) <= seen[n] <= math.ceil(mean) for n in range(samples))
                shares.append(right / samples)
            note = ", ".join(f"{share:.4f} after {passes}" for share, passes in zip(shares, PASSES, strict=True))
            settings = {"samples": samples, "packing": capacity is not None, "packs_a_step": STEP}
            yield row("epoch_exactness", min(shares), "", 1.0, "higher", note, **settings)


SECTIONS = {"share": shares, "epoch": exactness}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=", ".join(SECTIONS))
    for section in parser.parse_args().sections:
        write_results("packing", list(SECTIONS[section]()))


if __name__ == "__main__":
    main()
