"""Rows of results, and the picture of them, from the raw figures of benchmarks/training.py's processes."""

import statistics
from typing import Any

from cases import CALIBRATION, CASE, PEAK
from llava_sft.model.config import load_model_config
from llava_sft.model.tensors import parameter_count
from results import ROOT, row

GOALS = {"bf16_8192": 0.52, "bf16_32768": 0.50}  # MFU
TRAINED = ("trainable_modules", "lora_rank", "lora_alpha", "lora_modules")  # settings of what is trained
VISION_GOALS = {"24x1024": 0.50, "6x4096": 0.45}


def figures(case: dict) -> dict[str, float]:
    """Median figures of the timed steps of one case."""
    timed = case["steps"][case["warm"] :]

    def rate(amount) -> float:
        return statistics.median(sum(amount(batch) for batch in step["batches"]) / step["seconds"] for step in timed)

    return {
        "mfu": rate(lambda batch: batch["flops"]) / PEAK,
        "useful_tokens_per_s": rate(lambda batch: sum(batch["segments"])),
        "data_wait": sum(step["waited"] for step in timed) / sum(step["seconds"] for step in timed),
        "peak_gib": case["peak_allocated_gib"],
        "step_ms": statistics.median(step["seconds"] for step in timed) * 1e3,
    }


def memory_and_time(processes: list[dict]) -> list[dict]:
    """What preflight predicts from: step time and peak memory of each case, with all that decides them."""
    parameters = {
        size: parameter_count(load_model_config(ROOT / f"config/models/{size}.yaml")) for size in ("4b", "8b")
    }
    note = "largest_chunk: tokens, patches, images, answers of the largest of the run; step_…: of the timed step"
    rows = []
    for process in processes:
        for case in process["cases"].values():
            if not case["images"] or {"profile", "attention"} & case.keys():  # preflight does not ask for attention
                continue
            timed = sorted(case["steps"][case["warm"] :], key=lambda step: step["seconds"])
            median = timed[(len(timed) - 1) // 2]
            settings = {
                "model": process["model"],
                "parameters": parameters[process["model"]],
                "optimizer_precision": process["optimizer_precision"],
                "gpus": process.get("gpus", 1),
                **{key: process["values"][key] for key in TRAINED if key in process.get("values", {})},
                **{key: case[key] for key in CASE if key not in ("steps", "warm", "images")},
                **({"inputs_kept": True} if case.get("inputs_kept") else {}),
                **amounts(case["steps"], median),
                "gpu": process["gpu"],
            }
            for metric in ("peak_gib", "peak_reserved_gib", "between_steps_gib"):
                value = case[metric.replace("peak_gib", "peak_allocated_gib")]
                rows.append(row(metric, value, "GiB", None, "lower", note, **settings))
            rows.append(row("step_ms", median["seconds"] * 1e3, "ms", None, "lower", note, **settings))
    return rows


def amounts(steps: list[dict], timed_step: dict) -> dict[str, Any]:
    """How much there was to do: in the largest chunk of all steps, and in the timed step."""
    every = [chunk for step in steps for batch in step["batches"] for chunk in batch["chunks"]]
    batches = timed_step["batches"]
    chunks = [chunk for batch in batches for chunk in batch["chunks"]]
    return {
        "largest_chunk": max(every, key=lambda chunk: (chunk[0] + chunk[1], chunk)),
        "step_chunks": len(chunks),
        "step_tokens": sum(sum(batch["segments"]) for batch in batches),
        "step_padded_tokens": sum(chunk[0] for chunk in chunks),
        "step_patches": sum(chunk[1] for chunk in chunks),
        "step_answers": sum(chunk[3] for chunk in chunks),
        "step_flops": sum(batch["flops"] for batch in batches),
    }


def profiles(found: list[dict]) -> list[dict]:
    """Milliseconds of one step by phase and by kind of kernel, for each profiled case."""
    result = []
    for process in found:
        for name, case in process["cases"].items():
            step = case["steps"][-1]
            if "kernels" not in step:
                continue
            kernels, flops = step["kernels"], sum(batch["flops"] for batch in step["batches"])
            note = f"step of {kernels['whole_ms']:.0f} ms, {kernels['kernels']:,} kernels, {flops / 1e12:.0f} TFLOP"
            parts = {"kernels": kernels["kinds_ms"] | {"nothing runs": kernels["idle_ms"]}, "phases": step["phases"]}
            for by, column in parts.items():
                for part, ms in column.items():
                    where = {"case": name, "by": by, "part": part, "fp8": case["fp8"], "gpu": process["gpu"]}
                    result.append(row("profile_ms", ms, "ms", None, "lower", note, **where))
            if case["pack_chunk_tokens"] == 4096:
                result.append(launch_idle_share(case, process["gpu"]))
    return result


def launch_idle_share(case: dict, gpu: str) -> dict:
    """Share of a step in which no kernel runs, in chunks of 4,096. The profiler slows the host down: kernels' time comes from the
    profiled step, by FLOP, the step's from those before it."""
    *timed, profiled = case["steps"][case["warm"] :]
    kernels = profiled["kernels"]
    flops = [sum(batch["flops"] for batch in step["batches"]) for step in (*timed, profiled)]
    busy = (kernels["whole_ms"] - kernels["idle_ms"]) / 1e3 / flops[-1]
    per_flop = sum(step["seconds"] for step in timed) / sum(flops[:-1])
    note = f"{kernels['idle_ms'] / kernels['whole_ms']:.3f} under the profiler"
    return row("launch_idle_share", 1 - busy / per_flop, "", 0.05, "lower", note, fp8=case["fp8"], gpu=gpu)


def speed(processes: list[dict]) -> list[dict]:
    """The figures that have goals, of all processes of one run."""
    cases, peers = {}, {}
    calibrating = {case["name"] for case in CALIBRATION}
    for process in processes:
        for name, case in process.get("cases", {}).items():
            if not case.get("profile") and name not in calibrating:
                cases[name] = figures(case) | case | {"of": process}
        if "peer" in process:
            peers[process["peer"]["name"]] = process["peer"] | {"of": process}
    rows = [each for name, case in cases.items() for each in case_rows(name, case)]
    rows += ratios(cases, peers)
    for name, peer in peers.items():
        rows.append(measured("peer_mfu", peer["mfu"], "", None, "higher", name, peer))
        rate, memory = peer["useful_tokens_per_s"], peer["peak_gib"]
        rows.append(measured("peer_useful_tokens_per_s", rate, "tokens/s", None, "higher", name, peer))
        rows.append(measured("peer_peak_memory_gib", memory, "GiB", None, "lower", name, peer))
    for process in processes:
        rows += vision_rows(process) + checkpoint_rows(process)
    return rows


def measured(
    metric: str, value: float, unit: str, goal: float | None, better: str, note: str, case: dict, **more: Any
) -> dict:
    """A row of a case (`case["of"]`: its process), with those of its settings that tell it from others."""
    process = case["of"]
    settings = {key: process[key] for key in ("model", "gpu")}
    if (gpus := process.get("gpus", 1)) != 1:
        settings["gpus"] = gpus
    if (precision := process.get("optimizer_precision")) not in (None, "bf16"):
        settings["optimizer_precision"] = precision
    telling = ["seq_length", "micro_batches", "fp8", "accumulate", "recompute"]
    telling += ["pack_chunk_tokens"] if case.get("pack_chunk_tokens") != CASE["pack_chunk_tokens"] else []
    telling += [] if case.get("images", True) else ["images"]
    telling += ["attention"]
    telling += [part for part in ("recompute_language", "recompute_vision") if case.get(part) == "full"]
    settings |= {key: case[key] for key in telling if key in case}
    return row(metric, value, unit, goal, better, note, **settings, **more)


def case_rows(name: str, case: dict) -> list[dict]:
    chip = "h100" if "H100" in case["of"]["gpu"] else "h200"
    fp8 = {"none": "", "tensorwise": "fp8_", "blockwise": "fp8_blockwise_"}[case["fp8"]]
    kind = fp8 or ("bf16_" if case["images"] else "language_")
    note = "median of the timed steps; vision tower counted, output layer for answers only, no recomputation"
    mfu = f"mfu_{kind}{case['seq_length']}_{chip}"
    return [
        measured(mfu, case["mfu"], "", GOALS.get(name), "higher", note, case),
        measured("useful_tokens_per_s", case["useful_tokens_per_s"], "tokens/s", None, "higher", name, case),
        measured("peak_memory_gib", case["peak_gib"], "GiB", None, "lower", name, case),
        measured("loader_wait_share", case["data_wait"], "", 0.02, "lower", name, case),
    ]


def ratios(cases: dict[str, dict], peers: dict[str, dict]) -> list[dict]:
    """Useful tokens/s of one case over those of another, where both were measured."""
    rate = {name: case["useful_tokens_per_s"] for name, case in (cases | peers).items()}
    packed = sorted((name for name in peers if peers[name]["packed"]), key=rate.get)
    best = {peers[name]["seq_length"]: name for name in packed}  # the fastest of a length comes last
    small = "bf16_8192 80 GB"
    rows = []
    for metric, first, second, unit, goal in (
        ("fp8_speedup", "fp8_8192", "bf16_8192", "×", 1.2),
        ("speedup_vs_transformers", "bf16_8192", best.get(8192), "×", 1.4),
        ("speedup_vs_transformers", "bf16_32768", best.get(32768), "×", 1.4),
        ("speedup_fp8_vs_transformers", "fp8_8192", best.get(8192), "×", 1.7),
        ("speedup_vs_unpacked", "bf16_8192", "transformers unpacked", "×", 4.0),
        ("dp2_efficiency", "two gpus gbs 4", f"{small} gbs 4", "", 0.97),
        ("dp2_efficiency", "two gpus", small, "", 0.97),
    ):
        if first in rate and second in rate:
            note = f"useful tokens/s of {first} over {second}: {rate[first]:,.0f} over {rate[second]:,.0f}"
            note += ", of one GPU" if "two" in first else ""
            rows.append(measured(metric, rate[first] / rate[second], unit, goal, "higher", note, cases[first]))
    return rows


def vision_rows(process: dict) -> list[dict]:
    rows = []
    for name, tower in process.get("vision", {}).items():
        note = f"{tower['ms']:.0f} ms forward and backward, the host busy for {tower['host_ms']:.0f} ms of the forward"
        where = {"model": process["model"], "gpu": process["gpu"], "images_and_patches": name}
        rows.append(row("mfu_vision_tower", tower["mfu"], "", VISION_GOALS.get(name), "higher", note, **where))
    return rows


def checkpoint_rows(process: dict) -> list[dict]:
    if not (saved := process.get("checkpoint")):
        return []
    where = {"model": process["model"], "gpu": process["gpu"]}
    rows = []
    for number, save in enumerate(saved["saves"], 1):
        note = f"{saved['bytes'] / 1e9:.1f} GB with the optimizer, written after {save['written_s']:.0f} s"
        settings = {**where, "async_save": saved["async"], "save": number}
        rows.append(row("save_stall_s", save["stall_s"], "s", 2, "lower", note, **settings))
    note = f"into the optimizer that there is, peak {saved['load_peak_gib']:.1f} GiB; all values the same"
    note = note if saved["same"] else "NOT the same"
    return [*rows, row("checkpoint_load_s", saved["load_s"], "s", None, "lower", note, **where)]


def token_rates(processes: list[dict], rows: list[dict]) -> list[tuple[str, float]]:
    """(name, useful tokens/s) of this project and its peers at 8,192 tokens, as far as they were measured."""
    names = {"fp8_8192": "this project, FP8", "bf16_8192": "this project, bf16"}
    peers = [process["peer"] for process in processes if "peer" in process]
    names |= {peer["name"]: peer["name"] for peer in peers if peer["seq_length"] == 8192}
    rates = {each["note"]: each["value"] for each in rows if "useful_tokens_per_s" in each["metric"]}
    return [(title, rates[name]) for name, title in names.items() if name in rates]


def picture(bars: list[tuple[str, float]], caption: str) -> str:
    """Horizontal bars as an SVG image."""
    longest = max(value for _, value in bars)
    lines = []
    for number, (name, value) in enumerate(bars):
        y, length = 12 + 30 * number, 340 * value / longest
        lines.append(f'<text x="250" y="{y + 15}" text-anchor="end">{name}</text>')
        lines.append(f'<rect x="260" y="{y}" width="{length:.0f}" height="20" fill="#4878a8"/>')
        lines.append(f'<text x="{265 + length:.0f}" y="{y + 15}">{value:,.0f}</text>')
    height = 30 * len(bars) + 36
    lines.append(f'<text x="260" y="{height - 8}">{caption}</text>')
    style = '<g font-family="sans-serif" font-size="13" fill="#444">'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{height}">'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="white"/>', style, *lines, "</g></svg>", ""])
