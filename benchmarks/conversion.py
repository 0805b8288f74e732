"""Raw data to WebDataset against `tar cf` and webdataset.ShardWriter, its memory, its scaling.

Every contestant is a process of its own and takes turns with the others; the wall time of the whole process counts,
start of Python included. Files are read once before, so that all find them in the page cache. The machine's load before
is in the result: on a busy one compare ratios only.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import xxhash

from llava_sft.data.index import index_webdataset
from llava_sft.data.plan import TRAIN_PREFIX, Range, shard_name
from llava_sft.data.shards import convert_range
from llava_sft.data.tars import read_at, walk_tar
from llava_sft.data.verify import find_changed_sample
from results import ROOT, row, timed, write_results

SCRIPTS = ROOT / "workflow_scripts"
CONVERT = [sys.executable, str(SCRIPTS / "stage2_sftdata2webdataset.py")]
SHARD_WRITER = """
import json, sys, webdataset
with webdataset.ShardWriter(sys.argv[2] + "/x-%05d.tar", maxcount=10**9, maxsize=1e12, verbose=0) as sink:
    for number, line in enumerate(open(sys.argv[1], "rb")):
        record = json.loads(line)
        with open(sys.argv[3] + "/" + record["image"], "rb") as file:
            sink.write({"__key__": f"{number:07d}", "jpg": file.read(), "json": line})
"""


def jpeg(bytes_wanted: int, seed: int) -> bytes:
    import numpy as np
    from PIL import Image

    side = max(32, int((bytes_wanted * 3) ** 0.5))
    pixels = np.random.default_rng(seed).integers(0, 256, (side // 2, side // 2, 3), np.uint8)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    low, high = 5, 95
    while high - low > 1:
        quality = (low + high) // 2
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        low, high = (quality, high) if buffer.tell() < bytes_wanted else (low, quality)
    return buffer.getvalue()


def record(number: int, image: str | None, text: str = "A fine answer.") -> bytes:
    question = ("<image>\n" if image else "") + f"What about {number}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
    return json.dumps({"id": f"r{number}", **({"image": image} if image else {}), "conversations": turns}).encode()


def make_images(folder: Path, count: int, size: int) -> Path:
    images = folder / "images"
    if not (folder / "raw.jsonl").is_file():
        pictures = [jpeg(size, seed) for seed in range(32)]
        names = [f"{n // 1000:03d}/{n:06d}.jpg" for n in range(count)]
        for n, name in enumerate(names):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).write_bytes(pictures[n % 32])
        (folder / "list").write_text("\n".join(names))
        (folder / "raw.jsonl").write_bytes(b"".join(record(n, name) + b"\n" for n, name in enumerate(names)))
    for name in (folder / "list").read_text().split():
        (images / name).read_bytes()
    return images


def side_by_side(out: Path, *commands: list) -> float:
    """Wall seconds of commands that run at the same time, into an empty folder."""
    for folder in (out, f"{out}.parts"):
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    os.sync()
    began = time.perf_counter()
    processes = [subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) for command in commands]
    assert not any([process.wait() for process in processes]), commands
    return time.perf_counter() - began


def against_tar(work: Path, count: int, size: int, rounds: int) -> Iterator[dict]:
    folder = work / f"{count}x{size}"
    images, raw, out = make_images(folder, count, size), folder / "raw.jsonl", work / "out"
    ours = [*CONVERT, "--input", raw, "--image-root", images, "--output-dir", out]
    whole = [*ours, "--range-bytes", 1 << 40]
    half = raw.stat().st_size // 2 + 1  # two processes on two halves, against one on both: the same ranges
    halves = ((0, 0, half), (1, half, raw.stat().st_size))
    contestants = {
        "tar": [["tar", "cf", out / "x.tar", "-C", images, "-T", folder / "list"]],
        "ours": [whole],
        "ShardWriter": [[sys.executable, "-c", SHARD_WRITER, raw, out, images]],
        "one": [[*ours, "--range-bytes", half]],
        "two": [[*ours, "--shard", n, "--start", start, "--end", end] for n, start, end in halves],
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, commands in contestants.items():
            times[name].append(side_by_side(out, *commands))
    best = {name: min(values) for name, values in times.items()}
    all_runs = "; ".join(f"{name} {', '.join(f'{v:.2f}' for v in values)} s" for name, values in times.items())
    settings = {"images": count, "bytes_each": (images / "000/000000.jpg").stat().st_size}
    note = f"best of {rounds} each: {all_runs}"
    yield row("conversion_vs_tar", best["ours"] / best["tar"], "×", 1.1, "lower", note, **settings)
    yield row("conversion_vs_shardwriter", best["ours"] / best["ShardWriter"], "×", None, "lower", **settings)
    yield row("conversion_two_processes", best["one"] / best["two"], "×", 1.8, "higher", note, **settings)
    shutil.rmtree(out)


def text_only(work: Path, name: str, records: int, length: int) -> Iterator[dict]:
    """A JSON array or JSON lines without images: plan, conversion, memory."""
    raw, out = work / name, work / "out"
    work.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    if not raw.is_file():
        words = [str(draw.random()) for _ in range(1000)]
        start, between, end = (b"[", b",\n", b"]") if name.endswith(".json") else (b"", b"\n", b"\n")
        with open(raw, "wb") as file:
            for n in range(records):
                text = " ".join(draw.choices(words, k=length // 19))
                file.write((between if n else start) + record(n, None, text))
            file.write(end)
    code = "import sys; from llava_sft.data.plan import plan_ranges; print(len(plan_ranges(sys.argv[1])))"
    plan = timed(sys.executable, "-c", code, raw, cwd=SCRIPTS)
    shutil.rmtree(out, ignore_errors=True)
    converted = timed(*CONVERT, "--input", raw, "--output-dir", out, "--parts-dir", work / "out.parts")
    settings = {"file": name, "records": records, "gb": round(raw.stat().st_size / 1e9, 2), "jobs": int(plan.output)}
    yield row("conversion_peak_mb", converted.peak_mb, "MB", 200, "lower", "one process, all ranges", **settings)
    note = f"{records / converted.seconds:,.0f} records/s"
    yield row("conversion_seconds", converted.seconds, "s", None, "lower", note, **settings)
    yield row("conversion_plan_s", plan.seconds, "s", 10, "lower", "a process of its own", **settings)
    index = [sys.executable, SCRIPTS / "index_webdataset.py", out, "--output", work / "dataset.json"]
    seconds, peak, _ = timed(*index, "--val-fraction", 0)
    yield row("index_seconds", seconds, "s", None, "lower", f"peak {peak:.0f} MB", **settings, val_fraction=0)
    shutil.rmtree(out)
    shutil.rmtree(work / "out.parts")
    raw.unlink()


def trust(work: Path, count: int, size: int, rounds: int) -> Iterator[dict]:
    """What the samples' digests cost the conversion (their work done once more, alone), and how fast all are compared."""
    folder, out = work / f"{count}x{size}", work / "out"
    images, raw = make_images(folder, count, size), folder / "raw.jsonl"
    converting, noting = [], []
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        began = time.process_time()
        convert_range(raw, images, out, work / "out.parts", TRAIN_PREFIX, Range(0, 0, raw.stat().st_size))
        converting.append(time.process_time() - began)
        tar = out / f"{shard_name(TRAIN_PREFIX, 0)}.tar"
        samples = walk_tar(tar)
        with open(tar, "rb") as file:
            texts = [read_at(file.fileno(), sample.members[-1][1:]) for sample in samples]
        header, digest, padding, pending = bytes(512), bytes(16), bytes(256), []
        began = time.process_time()
        for text in texts:
            pending += (header, digest, padding)
            pending += (header, xxhash.xxh3_128_digest(text), padding)
            xxhash.xxh3_64_hexdigest(b"".join(pending))
            pending.clear()
        noting.append(time.process_time() - began)
    settings = {"images": count, "bytes_each": (images / "000/000000.jpg").stat().st_size}
    yield row("noting_digests_share", min(noting) / min(converting), "", 0.02, "lower", "CPU seconds", **settings)
    index_webdataset(out, work / "out.parts")
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        assert find_changed_sample(tar, out, 0, count) is None
        seconds.append(time.perf_counter() - began)
    note = "from the page cache, one process"
    yield row("comparing_gb_s", tar.stat().st_size / min(seconds) / 1e9, "GB/s", 1, "higher", note, **settings)
    shutil.rmtree(out)
    shutil.rmtree(work / "out.parts")


SECTIONS = {
    "trust": lambda work, rounds: trust(work, 20_000, 80_000, rounds),
    "photos": lambda work, rounds: against_tar(work, 20_000, 80_000, rounds),
    "small": lambda work, rounds: against_tar(work, 200_000, 2_000, rounds),
    "array": lambda work, rounds: text_only(work, "array.json", 500_000, 3_900),
    "text": lambda work, rounds: text_only(work, "text.jsonl", 1_000_000, 400),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--work", type=Path, default=Path("/tmp/llava_sft_bench"), help="scratch folder (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for section in args.sections:
        for each in SECTIONS[section](args.work, args.rounds):
            write_results("conversion", [each])


if __name__ == "__main__":
    main()
