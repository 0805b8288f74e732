"""Training speed and memory on one GPU, side by side: this project, and the same model in transformers' Trainer.

    python benchmarks/training.py WEBDATASETS TOKENIZER [--parts ours transformers unpacked calibration]

One command, one process after another on the same GPU, on the same batches of real images: `make_photos.py` and the
two data scripts make WEBDATASETS, TOKENIZER is any folder with the model's tokenizer. Weights are random, at the true shape.
- ours: the trainer and the loader that `train_X` runs, in bf16 and FP8, at 8,192 and 32,768 tokens, the language model
  alone (the ceiling: same packs, no images) and the vision tower alone; step time and memory over settings, which
  preflight predicts from (results/memory_time.json); where the time of a step goes (results/profile.json);
- transformers: the project's Hugging Face file in the Trainer, packed: bf16, flex attention, fused AdamW, recomputation
  only where memory needs it; the batches are loaded and normalised before the clock runs;
- unpacked: the same one sample at a time, everything recomputed: what users of the model run today;
- calibration: more for preflight: float32 moments, and 8B;
- 8b: of these, 8B alone;
- flash4: bf16 and FP8 at 8,192 and 32,768 tokens with FlashAttention-4, and bf16 beside it with cuDNN's attention;
- checkpoint: 4B trained in no more memory than an 80 GB GPU has, saved with its optimizer and loaded, timed;
- two_gpus: the same on two GPUs, data parallel, as many packs for each.
docs/performance.md says what counts in MFU. Useful tokens: without padding.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cases import (
    CALIBRATION,
    CALIBRATION_8B,
    CALIBRATION_FP32,
    CHECKPOINT,
    FLASH4,
    OURS,
    PEER,
    PEERS,
    PROFILE,
    TWO_GPUS,
)
from results import ROOT, seconds_left, single_process, write_results
from training_rows import memory_and_time, picture, profiles, speed, token_rates

PARTS = ["ours", "transformers", "unpacked", "calibration", "8b", "flash4", "checkpoint", "two_gpus"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webdatasets", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--parts", nargs="+", default=PARTS[:3], choices=PARTS)
    parser.add_argument("--model", default="4b")
    parser.add_argument("--output", type=Path, help="folder for the raw figures; results/ is then left as it is")
    parser.add_argument("--read", type=Path, help="folder of raw figures, of another machine: write results/ from them")
    parser.add_argument("--minutes", type=float, default=8, help="longest time of one process")
    parser.add_argument("--worker", choices=["ours", "peers"], help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=json.loads, help="JSON list of cases, in place of a part's own")
    parser.add_argument("--values", type=json.loads, default={}, help="JSON of further settings")
    parser.add_argument("--vision", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        work(args)
    elif args.read:
        write([json.loads(path.read_text()) for path in sorted(args.read.glob("*.json"))])
    else:
        folder = args.output or Path(tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        raw = [figures for part in args.parts for figures in measure(part, args, folder)]
        if not args.output:
            write(raw)


def work(args: argparse.Namespace) -> None:
    """What one process does."""
    if args.worker == "peers":
        import peers

        peers.train(args)
        return
    environment = single_process()  # of two each has its own already
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import ours  # not earlier: torch and Megatron look at the environment

    ours.train(args)


def processes(part: str, args: argparse.Namespace) -> list[tuple[str, list[dict], list[str]]]:
    """(worker, cases, further arguments) of each process of a part."""
    model = ["--model", args.model]
    given = [*model, "--values", json.dumps(args.values)]
    if part in PEERS:
        return [("peers", [PEER | case], model) for case in args.cases or PEERS[part]]
    if part == "ours":
        cases = sorted(CALIBRATION + OURS + PROFILE, key=lambda case: "fp8" in case)  # FP8 copies of the weights stay
        return [("ours", args.cases or cases, ["--vision", *given])]
    if part in ("checkpoint", "flash4"):
        return [("ours", args.cases or {"checkpoint": CHECKPOINT, "flash4": FLASH4}[part], given)]
    eight = ("ours", CALIBRATION_8B, ["--model", "8b"])
    if part == "8b":
        return [eight]
    if part == "two_gpus":
        values = json.dumps({"gpus_per_node": 2, "global_batch_size": 8} | args.values)
        return [("ours", args.cases or TWO_GPUS, [*model, "--values", values])]
    fp32 = json.dumps({"optimizer_precision": "fp32"})
    return [("ours", CALIBRATION_FP32, [*model, "--values", fp32]), eight]


def measure(part: str, args: argparse.Namespace, folder: Path) -> list[dict]:
    """Raw figures of the processes of a part, which run one after another."""
    count = 2 if part == "two_gpus" else 1
    raw = []
    for number, (worker, cases, more) in enumerate(processes(part, args)):
        if seconds_left() <= 0:
            break
        result = folder / f"{part}_{number}.json"
        command = [__file__, str(args.webdatasets), str(args.tokenizer), "--worker", worker]
        command += ["--cases", json.dumps(cases), *more]
        began = time.perf_counter()
        code = run(command, result, args.minutes, count)
        print(f"{part} {number}: {time.perf_counter() - began:.0f} s, exit code {code}", flush=True)
        if result.is_file():
            raw.append(json.loads(result.read_text()))
    return raw


def run(arguments: list[str], result: Path, minutes: float, count: int = 1) -> int:
    """Exit code of `count` processes of ours, the first of which writes `result`, killed after `minutes`; the figures are
    printed, all else is in the log beside it."""
    command, log = [sys.executable, *arguments, "--result", str(result)], result.with_suffix(".log")
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} for rank in range(count)]
    environments = [single_process() | rank for rank in ranks] if count > 1 else [{}]
    with open(log, "w") as file:
        processes = [
            subprocess.Popen(
                command, env=os.environ | environment, text=True,
                stdout=file if number else subprocess.PIPE, stderr=file if number else subprocess.STDOUT,
            )
            for number, environment in enumerate(environments)
        ]  # fmt: skip
        timer = threading.Timer(60 * minutes, lambda: [process.kill() for process in processes])
        timer.start()
        for line in processes[0].stdout:
            print(line, end="", file=file, flush=True)
            if re.match("CASE|VISION", line):
                print(line, end="", flush=True)
        timer.cancel()
        codes = [process.wait() for process in processes]
    return next(filter(None, codes), 0)


def write(raw: list[dict]) -> None:
    """The result files, of the processes of one run on one machine."""
    for process in raw:
        process["cases"] = {name: case for name, case in process.get("cases", {}).items() if "steps" in case}
    source = {"command": "python benchmarks/training.py WEBDATASETS TOKENIZER", **raw[0]["machine"]}
    ours = [process for process in raw if process["cases"]]
    if rows := memory_and_time(ours):
        write_results("memory_time", rows, **source)
    if rows := profiles(ours):
        write_results("profile", rows, **source)
    if rows := speed(raw):
        write_results("training", rows, **source)
        if bars := token_rates(raw, rows):
            caption = f"useful tokens/s, 4B, 8,192 tokens, one {raw[0]['gpu']}"
            (ROOT / "docs/performance.svg").write_text(picture(bars, caption))


if __name__ == "__main__":
    main()
