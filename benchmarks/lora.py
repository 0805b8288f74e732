"""LoRA on one GPU, beside full training of the same model: memory on cards of 24, 40 and 48 GB, speed there and without a cap.

    python benchmarks/lora.py WEBDATASETS TOKENIZER [--only 4b-lora full] [--output FOLDER]

One process for each set of trained parts, one after another on the same GPU, on the same batches of real images, with random
weights at the true shape (as benchmarks/training.py), samples of up to 4,000 tokens (`make_photos.py --longest 4000`). A
smaller card is this one with PyTorch's memory capped (`torch.cuda.set_per_process_memory_fraction`) to what such a card has
left beside CUDA's own: 22 GiB of 24, 38 of 40, 46 of 48. Chunks are cut between samples: with samples of 4,000 tokens those of 2,048 are as long, those of 4,096 half as long again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from results import row, seconds_left, write_results
from training import run
from training_rows import figures, memory_and_time

RANK = 32
BY_PAIRS = {"trainable_modules": ["language_model"], "lora_rank": RANK, "lora_alpha": RANK, "lr": 1e-4}
BY_PAIRS |= {"load": "the weights of a benchmark are random"}
LONG = {"steps": 10, "warm": 3}
SHORT = {"micro_batches": 4, "steps": 5, "warm": 2}
CHUNKS, FULL = {"pack_chunk_tokens": 4096}, {"recompute_language": "full"}
CARDS = [
    {"name": "22 GiB, chunks of 2,048", "gpu_gib": 22, "pack_chunk_tokens": 2048},
    {"name": "22 GiB, recomputed", "gpu_gib": 22, **FULL},
    {"name": "38 GiB", "gpu_gib": 38},
    {"name": "chunks", **CHUNKS},
    {"name": "whole packs"},
    {"name": "whole packs, profile", "profile": True},
    {"name": "whole packs, fp8", "fp8": "tensorwise"},
]
CARDS_8B = [
    {"name": "38 GiB, chunks", "gpu_gib": 38, **CHUNKS},
    {"name": "38 GiB, recomputed", "gpu_gib": 38, **FULL},
    {"name": "46 GiB, chunks", "gpu_gib": 46, **CHUNKS},
    {"name": "whole packs"},
]
PROCESSES = {  # name: worker, model, settings, cases
    "4b-lora": ("ours", "4b", BY_PAIRS, CARDS),
    "full": ("ours", "4b", {}, [{"name": "chunks", **CHUNKS}]),
    "language": (
        "ours", "4b", {"trainable_modules": ["language_model"]}, [{"name": "chunks", **CHUNKS}, {"name": "whole packs"}],
    ),
    # Each from its process' first batch on: the same batches.
    "long-language": ("ours", "4b", {"trainable_modules": ["language_model"]}, [{"name": "whole packs", **LONG}]),
    "long-lora": (
        "ours", "4b", BY_PAIRS,
        [{"name": "whole packs", **LONG}, {"name": "whole packs, q k v made again", **LONG, "keep_inputs": False}],
    ),
    "long-full": ("ours", "4b", {}, [{"name": "chunks", **CHUNKS, **LONG}]),
    "8b-lora": ("ours", "8b", BY_PAIRS, CARDS_8B),
    "peft": (
        "peers", "4b", {},
        [{"name": "peft", "packed": True, "attention": "flex_attention", "seq_length": 8192, "accumulate": 8, "warm": 2,
          "steps": 2, "recompute": ["none", "full"], "lora_rank": RANK}],
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webdatasets")
    parser.add_argument("tokenizer")
    parser.add_argument("--only", nargs="+", default=list(PROCESSES), choices=PROCESSES)
    parser.add_argument("--cases", nargs="+", help="of these names alone")
    parser.add_argument("--output", type=Path, help="folder for the raw figures; results/ is then left as it is")
    parser.add_argument("--read", type=Path, help="folder of raw figures, of another machine: write results/ from them")
    args = parser.parse_args()
    folder = args.read or args.output or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    for name in [] if args.read else args.only:
        if seconds_left() <= 0:
            continue
        worker, model, values, cases = PROCESSES[name]
        cases = [SHORT | case for case in cases] if worker == "ours" else cases
        cases = [case for case in cases if case["name"] in (args.cases or case["name"])]
        command = [__file__.replace("lora.py", "training.py"), args.webdatasets, args.tokenizer, "--worker", worker]
        command += ["--model", model, "--values", json.dumps(values), "--cases", json.dumps(cases)]
        began = time.perf_counter()
        code = run(command, folder / f"{name}.json", 6)
        print(f"{name}: {time.perf_counter() - began:.0f} s, exit code {code}", flush=True)
    if not args.output:
        paths = {name: folder / f"{name}.json" for name in PROCESSES}
        raw = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
        source = {"command": "python benchmarks/lora.py WEBDATASETS TOKENIZER"} | next(iter(raw.values()))["machine"]
        write_results("lora", rows(raw), **source)
        write_results("memory_time", memory_and_time(recorded(raw)), **source)


def recorded(raw: dict[str, dict]) -> list[dict]:
    """Our processes, one for each case, with what they trained, for preflight; of cases that differ by the cap alone, the one
    with most memory, and of two processes that did the same, the first."""
    alike = ("pack_chunk_tokens", "recompute_language", "fp8")
    kept: dict[tuple, dict] = {}
    for name, process in raw.items():
        for each, case in sorted(
            process.get("cases", {}).items(), key=lambda case: case[1].get("gpu_gib", 999), reverse=True
        ):
            if not {"profile", "keep_inputs", "out_of_memory"} & case.keys():
                values = PROCESSES[name][2]
                what = process["model"], str(values), *(case[key] for key in alike), case.get("inputs_kept", False)
                kept.setdefault(what, process | {"values": values, "cases": {each: case}})
    return list(kept.values())


def rows(raw: dict[str, dict]) -> list[dict]:
    """The table of the processes of one run; not all need have run."""
    found: dict[str, dict[str, dict]] = {}
    for name, process in raw.items():
        cases = {"peft": process["peer"]} if "peer" in process else process["cases"]
        found[name] = {each: case for each, case in cases.items() if not case.get("out_of_memory")}
    rate = {
        (name, each): case["useful_tokens_per_s"]
        if "useful_tokens_per_s" in case
        else figures(case)["useful_tokens_per_s"]
        for name, cases in found.items()
        for each, case in cases.items()
    }
    gpu = next(iter(raw.values()))["gpu"]
    result = []
    for (name, each), tokens in rate.items():
        result.append(row("useful_tokens_per_s", tokens, "tokens/s", None, "higher", run=f"{name}: {each}", gpu=gpu))
        if "peak_reserved_gib" in found[name][each]:
            gib = found[name][each]["peak_reserved_gib"]
            result.append(row("peak_reserved_gib", gib, "GiB", None, "lower", run=f"{name}: {each}", gpu=gpu))
    full, lora = rate.get(("full", "chunks")), found.get("long-lora", {}).get("whole packs")
    for model, gib in (("4b", 22), ("8b", 38)):
        cases = found.get(f"{model}-lora", {})
        if not (capped := {each: case for each, case in cases.items() if each.startswith(f"{gib} GiB")}):
            continue
        best = max(capped, key=lambda each: rate[f"{model}-lora", each])
        note = f"of {gib} GiB that PyTorch may take: {best}"
        result.append(
            row(f"lora_peak_gib_{model}", capped[best]["peak_reserved_gib"], "GiB", gib, "lower", note, gpu=gpu)
        )
        if model == "4b" and full:
            result.append(row("lora_speedup_capped", rate["4b-lora", best] / full, "×", 1.15, "higher", note, gpu=gpu))
    peer = rate.get(("peft", "peft"))
    not_capped = [("4b-lora", "chunks"), ("4b-lora", "whole packs"), ("long-lora", "whole packs")]
    fastest = max((rate[run] for run in not_capped if run in rate), default=None)
    for metric, other, goal, note in (
        ("lora_speedup", full, 1.5, "against full training of all parts, in chunks of 4,096"),
        ("lora_speedup_peft", peer, 2, "against transformers' Trainer with PEFT"),
    ):
        if fastest and other:
            result.append(row(metric, fastest / other, "×", goal, "higher", note, gpu=gpu))
    for metric, name, other, goal, note in (
        ("lora_speedup_same_parts", "whole packs", "long-language", 1.2, "the language model alone, whole packs, too"),
        ("lora_speedup", "chunks", "long-full", 1.5, "full training of all parts, in chunks of 4,096"),
    ):
        if lora and (case := found.get(other, {}).get(name)):
            note = f"against {note}, on the same batches"
            result.append(row(metric, on_same_batches(lora, case), "×", goal, "higher", note, gpu=gpu))
    return result


def on_same_batches(case: dict, other: dict) -> float:
    """How many times as fast a case was as another in the timed steps, which both trained on the same samples."""
    timed = [each["steps"][each["warm"] :] for each in (case, other)]
    samples = [[batch["segments"] for step in steps for batch in step["batches"]] for steps in timed]
    if samples[0] != samples[1]:
        raise SystemExit("the batches are not the same")
    seconds = [sum(step["seconds"] for step in steps) for steps in timed]
    return seconds[1] / seconds[0]


if __name__ == "__main__":
    main()
