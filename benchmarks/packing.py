"""Useful tokens of packed sequences, and the number of packs that preflight predicts against what the loader makes.

    python benchmarks/packing.py [share] [epoch]      # writes results/packing.json

share: this project's packer (over a buffer of samples, online), against packing greedily in the order
of the samples, against an offline pass with hash buckets over the whole set (each sequence takes the longest sample that
still fits), and against one sample a sequence. Lengths are drawn from real ones, of which the percentiles stand below:
short VQA: the answers with lectures to 4,241 ScienceQA questions, with a picture of 640 × 480; mixed: those, 240 answers
of chat models about 1 to 4 pictures of a megapixel, and documents; long documents: 751 Python Enhancement Proposals.
A token is taken as four characters. A sample longer than a sequence is cut to it, as a document of many turns would be.

epoch: one epoch of a text-only set through the real loader with its workers, counted in packs.
"""

import argparse
import bisect
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

from llava_sft.config import auto_packing_buffer  # noqa: E402
from llava_sft.data.index import index_webdataset  # noqa: E402
from llava_sft.data.lengths import Limits, sample_sizes  # noqa: E402
from llava_sft.data.packing import epoch_packs, select_packs  # noqa: E402
from llava_sft.data.plan import Range  # noqa: E402
from llava_sft.data.shards import convert_range  # noqa: E402
from results import row, write_results  # noqa: E402

SAMPLES = 100_000
EPOCH_SAMPLES = 6_000
TOKENIZER = ROOT / "output/demo/LLaVA-OneVision-1.5-tiny"
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


def online(lengths: list[int], capacity: int) -> Iterator[list[int]]:
    buffer = auto_packing_buffer(lengths, capacity)
    for start in range(0, len(lengths), buffer):
        yield from select_packs(lengths[start : start + buffer], capacity, seed=0)


def greedy(lengths: list[int], capacity: int) -> Iterator[list[int]]:
    pack: list[int] = []
    filled = 0
    for index, length in enumerate(lengths):
        if filled + length > capacity:
            yield pack
            pack, filled = [], 0
        pack.append(index)
        filled += length
    yield pack


def hash_buckets(lengths: list[int], capacity: int) -> Iterator[list[int]]:
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        buckets[length].append(index)
    keys = sorted(buckets)
    while keys:
        pack, room = [], capacity
        while place := bisect.bisect_right(keys, room):
            length = keys[place - 1]
            pack.append(buckets[length].pop())
            room -= length
            if not buckets[length]:
                del keys[place - 1]
        yield pack


def shares() -> Iterator[dict]:
    methods: dict[str, Callable] = {
        "online": online,
        "greedy": greedy,
        "offline hash buckets": hash_buckets,
        "one sample a sequence": lambda lengths, capacity: ([index] for index in range(len(lengths))),
    }
    for capacity, goal in GOALS.items():
        for name, distribution in (("short VQA", short_vqa), ("mixed", mixed), ("long documents", long_documents)):
            draw = random.Random(1)
            lengths = [min(distribution(draw), capacity) for _ in range(SAMPLES)]
            for method, pack in methods.items():
                began = time.perf_counter()
                packs = sum(1 for _ in pack(lengths, capacity))
                each = 1e6 * (time.perf_counter() - began) / SAMPLES
                share = sum(lengths) / (packs * capacity)
                own = method == "online"
                note = f"{each:.2f} µs a sample" + (
                    f", buffer of {auto_packing_buffer(lengths, capacity):,}" if own else ""
                )
                settings = {"lengths": name, "method": method, "mean_length": round(sum(lengths) / SAMPLES)}
                yield row(f"packing_{capacity}", share, "useful", goal if own else None, "higher", note, **settings)


def epoch() -> Iterator[dict]:
    """Packs of one epoch: counted from lengths before, and what the loader made until each sample had come once."""
    from llava_sft.data.loader import VlmTaskEncoder, train_loader, worker_config
    from llava_sft.data.template import ChatTemplate

    limits = Limits(8192, 3136, 1_000_000)
    for name, distribution in (("short VQA", short_vqa), ("mixed", mixed)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_texts(folder / "raw.jsonl", distribution)
            stats = []
            size = (folder / "raw.jsonl").stat().st_size
            for index, start in enumerate(range(0, size, 8 << 20)):
                part = Range(index, start, min(size, start + (8 << 20)))
                stats.append(
                    convert_range(folder / "raw.jsonl", folder, folder / "wds", folder / "parts", "subtaskdata", part)
                )
            index_webdataset(folder / "wds", folder / "parts")
            lengths = sample_sizes(folder / "wds", TOKENIZER, limits).tokens
            buffer = auto_packing_buffer(lengths, limits[0])
            predicted = sum(1 for _ in epoch_packs(lengths, limits[0], buffer, seed=1))
            for workers in (1, 2):
                encoder = VlmTaskEncoder(ChatTemplate(TOKENIZER), *limits, packing=True)
                loader = iter(train_loader(folder / "wds", encoder, worker_config(0, 1, workers, 1), 1, buffer))
                packs = samples = tokens = 0
                while samples < len(lengths):
                    batch = next(loader)
                    packs, samples, tokens = packs + 1, samples + len(batch.lengths), tokens + sum(batch.lengths)
                # The last pack ends a few samples behind the epoch, and those samples are not just these.
                real = packs * sum(lengths) / tokens
                note = f"predicted {predicted:,} packs, made {packs:,} with {samples:,} samples of an epoch's {len(lengths):,}"
                settings = {"lengths": name, "workers": workers, "seq_length": limits[0]}
                yield row("packs_predicted_error", abs(predicted / real - 1), "", 0.005, "lower", note, **settings)


def write_texts(raw: Path, distribution: Callable[[random.Random], int]) -> None:
    draw = random.Random(2)
    words = [str(draw.randint(0, 99999)) for _ in range(1000)]
    with open(raw, "w") as file:
        for number in range(EPOCH_SAMPLES):
            answer = " ".join(draw.choices(words, k=max(1, min(distribution(draw), 8000) // 6)))
            turns = [{"from": "human", "value": "Go on."}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")


SECTIONS = {"share": shares, "epoch": epoch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=", ".join(SECTIONS))
    for section in parser.parse_args().sections:
        write_results("packing", list(SECTIONS[section]()))


if __name__ == "__main__":
    main()
