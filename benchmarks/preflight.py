"""Recorded runs that preflight predicts from, and how far each is from a prediction made of all the others.

    python benchmarks/preflight.py run      # trains the tiny model at ten settings, a minute each at most: adds rows
    python benchmarks/preflight.py gpu      # takes over the runs of results/memory_time.json (benchmarks/training.py)
    python benchmarks/preflight.py errors   # of all recorded rows, whatever machine they are from

`run` needs `snakemake preflight_vqa` once. The factors that preflight predicts with (preflight/factors.json of the
package) are fitted anew to the rows of results/preflight.json: change neither by hand.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from calibration import Recorded, calibrate, of_device, recorded, write_factors
from llava_sft.data.sizes import Limits, global_order, sample_sizes
from llava_sft.files import read_json, write_json
from llava_sft.machine import gpu, this_machine
from llava_sft.model.tensors import PARTS
from llava_sft.preflight import predict
from llava_sft.preflight.cost import MicroBatch
from llava_sft.run.records import read_metrics
from llava_sft.settings.layers import load_settings
from llava_sft.settings.resolve import Epoch, packing_window, resolve
from results import DEMO_RUN, RESULTS, ROOT, row, single_process, write_results
from training_rows import TRAINED

OUT = Path("/tmp/llava_sft_preflight")
STEPS, WARM = 9, 3
PACKED = {"packing": True, "packing_buffer_size": 500}
RUNS = [
    PACKED | {"seq_length": 1024, "micro_batch_size": 1},
    PACKED | {"seq_length": 2048, "micro_batch_size": 1},
    PACKED | {"seq_length": 2048, "micro_batch_size": 2},
    PACKED | {"seq_length": 1024, "micro_batch_size": 8},
    PACKED | {"seq_length": 2048, "micro_batch_size": 8},
    PACKED | {"seq_length": 2048, "micro_batch_size": 4, "recompute_language": "full", "recompute_vision": "full"},
    PACKED | {"seq_length": 2048, "micro_batch_size": 8, "recompute_vision": "full"},
    PACKED | {"seq_length": 1024, "micro_batch_size": 16},
    {"micro_batch_size": 64},
    {"micro_batch_size": 128, "recompute_language": "full"},
]
# What the settings of a recorded run are made of: all that the formulas look at.
RECORDED = ["model", "seq_length", "micro_batch_size", "global_batch_size", "packing", "pack_chunk_tokens"]
RECORDED += ["bf16", "fp8", "optimizer_precision", "recompute_language", "recompute_vision", *TRAINED]
RECORDED += ["gpus_per_node", "nodes", "nproc_per_node", "tensor_model_parallel_size", "pipeline_model_parallel_size"]


def record() -> None:
    before = read_json(DEMO_RUN)
    for overrides in RUNS:
        batch = overrides["micro_batch_size"]
        settings = load_settings("vqa", overrides | {"global_batch_size": 2 * batch, "train_iters": STEPS})
        limits = Limits(settings.seq_length, settings.min_pixels, settings.max_pixels)
        folder = Path(before["data"]["path"])
        sizes = sample_sizes(folder, Path(before["start"]["sidecars"]), limits, OUT / "sizes")
        window = packing_window(settings, sizes.tokens)
        capacity = settings.seq_length if settings.packing else None
        epoch = Epoch(window, *global_order(folder, sizes, capacity, window, settings.seed).first_pass())
        settled, _ = resolve(settings, len(sizes.tokens), epoch=epoch)
        values = settled.model_copy(update={"save_interval": 10 * STEPS, "log_interval": 1, "eval_iters": 0})
        mean, largest = predict.mean_and_largest(sizes, values, epoch.packs if settings.packing else None)
        machine = this_machine(values.gpus_per_node, values.nproc_per_node)
        folder = OUT / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "run.json", before | {"settings": values.dump()})
        environment = single_process() | {"PYTHONPATH": str(ROOT / "workflow_scripts")}
        command = [sys.executable, "-m", "llava_sft.training", folder / "run.json", folder]
        with open(OUT / "log", "w") as log:
            subprocess.run(command, env=os.environ | environment, check=True, stdout=log, stderr=log)
        metrics = read_metrics(folder)
        seconds = [entry["step_s"] for entry in metrics[WARM:]]
        memory = max(entry["memory_gib"] for entry in metrics)
        of_run = values.model_dump(mode="json", include=set(RECORDED))
        name = ", ".join(f"{key} {value}" for key, value in overrides.items() if key != "packing_buffer_size")
        known = {"run": f"CPU: {name}", "values": of_run, "machine": machine, "mean": mean, "largest": largest}
        spread = f"{min(seconds):.2f} … {max(seconds):.2f} s in {len(seconds)} steps"
        peak = row("peak_memory_gib", memory, "GiB", None, "lower", "resident, libraries included", **known)
        step = row("step_s", statistics.median(seconds), "s", None, "lower", f"median; {spread}", **known)
        write_results("preflight", [peak, step])


GPU_RUN = {"packing": True, "bf16": True, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
GPU_RUN |= {"trainable_modules": ["vision_model", "language_model", "adapter"]}


def take_over() -> list[dict]:
    """Rows of the runs that benchmarks/training.py recorded on GPUs.

    It notes images and not the lengths of samples: an image's patches are taken as equal in a batch, and a sample as one
    image with its text.
    """
    runs: dict[str, dict] = {}
    for each in read_json(RESULTS / "memory_time.json")["rows"]:
        key = json.dumps(each["settings"], sort_keys=True)
        runs.setdefault(key, {"settings": each["settings"]})[each["metric"]] = each["value"]
    rows = []
    for measured in runs.values():
        given = measured["settings"]
        tokens, patches, images, _ = given["largest_chunk"]
        of_image, of_sample = patches / images, tokens / images
        step = given["step_padded_tokens"] / given["micro_batches"], given["step_patches"] / given["micro_batches"]
        gpus = given.get("gpus", 1)
        # A run that did not keep queries, keys and values is one on a card that it filled.
        least = given.get("lora_rank") and not given.get("inputs_kept")
        machine = gpu(given["gpu"], measured["peak_reserved_gib"] if least else None)
        values = GPU_RUN | {name: given[name] for name in RECORDED if name in given}
        values |= {"global_batch_size": given["micro_batches"] * given["micro_batch_size"] * gpus}
        values |= {"gpus_per_node": gpus, "nodes": 1, "nproc_per_node": gpus}
        named = ("seq_length", "pack_chunk_tokens", "micro_batch_size", "micro_batches", "fp8", "recompute_language")
        known = {
            "run": f"{gpus} × {given['gpu']}, {given['model']}: "
            + ", ".join(
                f"{name} {given[name]}"
                for name in (*named, "recompute_vision", "optimizer_precision", *TRAINED, "inputs_kept")
                if name in given
            ),
            "values": values,
            "machine": machine,
            "mean": MicroBatch(step[0], step[0] * of_sample, step[1], step[1] * of_image),
            "largest": MicroBatch(tokens, tokens * of_sample, patches, patches * of_image),
        }
        note = "reserved by PyTorch, fragmentation included"
        rows.append(row("peak_memory_gib", measured["peak_reserved_gib"], "GiB", None, "lower", note, **known))
        rows.append(row("step_s", measured["step_ms"] / 1000, "s", None, "lower", "", **known))
    return rows


USUAL = {"model": "4b", "seq_length": 8192, "micro_batch_size": 1, "pack_chunk_tokens": 8192}
USUAL |= {"fp8": "none", "optimizer_precision": "bf16", "recompute_language": "none", "recompute_vision": "none"}


def short(run: Recorded) -> str:
    """What is unusual about a recorded run of a GPU, and its packs a step; of a CPU, its batch."""
    if run.case.machine.device == "CPU":
        what = "packs" if run.case.values.packing else "samples"
        unusual = {name: getattr(run.case.values, name) for name in ("recompute_language", "recompute_vision")}
        given = [f"{run.case.values.micro_batch_size} {what} of {run.case.values.seq_length:,} at once"]
    else:
        unusual = {name: getattr(run.case.values, name) for name in USUAL}
        gpus = run.case.values.nproc_per_node
        shared = {"TP": run.case.values.tensor_model_parallel_size, "PP": run.case.values.pipeline_model_parallel_size}
        given = [f"{run.case.values.global_batch_size} packs" + (f" on {gpus} GPUs" if gpus > 1 else "")]
        given += [f"{name} {size}" for name, size in shared.items() if size > 1]
    parts, rank = run.case.values.trainable_modules, run.case.values.lora_rank
    given += [f"LoRA of rank {rank}"] if rank else [f"{', '.join(parts)} alone"] if len(parts) < len(PARTS) else []
    return "; ".join(given + [f"{name}: {value}" for name, value in unusual.items() if value != USUAL[name]])


def errors() -> list[dict]:
    """Of each recorded run: predicted from all others of its device, against what was measured. Prints the table of docs/figures.md."""
    rows = []
    runs = recorded()
    by_device: dict[str, list[tuple[float, float]]] = {}
    print("| device | run | GiB: predicted, measured | s a step: predicted, measured |\n|---|---|---|---|")
    for each in sorted(runs, key=lambda run: run.case.machine.device, reverse=True):
        others = of_device(each.case.machine.device, [other for other in runs if other is not each])
        factors = calibrate(others)
        guess = predict.predict(each.case, factors)
        wrong = guess.memory_gib / each.memory_gib - 1, guess.step_s / each.step_s - 1
        by_device.setdefault(each.case.machine.device, []).append(wrong)
        memory = f"{guess.memory_gib:.3g}, {each.memory_gib:.3g} ({wrong[0]:+.1%})"
        seconds = f"{guess.step_s:.3g}, {each.step_s:.3g} ({wrong[1]:+.1%})"
        print(f"| {each.case.machine.device} | {short(each)} | {memory} | {seconds} |")
    for device, found in by_device.items():
        for metric, goal, column in (("preflight_memory_error", 0.05, 0), ("preflight_time_error", 0.10, 1)):
            wrong = [abs(error[column]) for error in found]
            median = statistics.median(wrong)
            note = f"worst of {len(wrong)} settings, each predicted from the others; median {median:.3f}"
            rows.append(row(metric, max(wrong), "", goal, "lower", note, device=device))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "gpu", "errors"])
    what = parser.parse_args().what
    if what == "run":
        record()
    elif what == "gpu":
        write_results("preflight", take_over())
    recorded.cache_clear()
    write_factors()
    write_results("preflight", errors())


if __name__ == "__main__":
    main()
