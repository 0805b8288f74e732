"""What benchmarks/scaling.py says of its raw figures, and writes to results/: the figures to scaling.json, and the runs that
preflight learns from to preflight.json (then `python benchmarks/preflight.py errors`)."""

import math

from results import row, write_results

GOALS = {"dp2": 0.97, "tp2": 0.80, "pp2": 0.90}
# Largest relative difference of losses: of each of the first 10 steps, of means of 10 in the first 30. Tensor-parallel ranks
# round what they sum to bf16, the other layouts compute what one GPU does.
LOSS_GOALS = {"dp2": (1e-3, 5e-3), "tp2": (1e-2, 2e-2), "pp2": (1e-3, 5e-3)}


# All of a run's settings that preflight's formulas look at.
FORETELLING = [
    "model",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "packing",
    "pack_chunk_tokens",
    "bf16",
    "fp8",
]
FORETELLING += ["optimizer_precision", "recompute_language", "recompute_vision", "trainable_modules", "gpus_per_node"]
FORETELLING += [
    "nodes",
    "nproc_per_node",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "first_stage_layers",
]


def differences(losses: list[float], reference: list[float]) -> tuple[float, float]:
    """Largest relative difference of one of the first 10 losses, and of means of 10 in the first 30."""
    pairs = list(zip(losses, reference, strict=False))[:30]
    means = [[sum(column) for column in zip(*pairs[at : at + 10], strict=True)] for at in range(0, len(pairs), 10)]
    single, mean = (max((abs(a - b) / abs(b) for a, b in each), default=math.nan) for each in (pairs[:10], means))
    return single, mean


def compare(raw: dict[str, dict]) -> None:
    """Print every layout beside one GPU."""
    one = raw.get("one")
    for name, found in raw.items():
        steps = len(found["losses"])
        print(f"{name}: {found['gpu']}, {steps} losses, {found['losses'][:1]} … {found['losses'][-1:]}", end="")
        if found.get("unlike_copies"):
            print(f", COPIES DIFFER: {found['unlike_copies'][:5]}", end="")
        if one:
            print(
                ", from one GPU's: one of 10 by {:.1e}, ten of 30 by {:.1e}".format(
                    *differences(found["losses"], one["losses"])
                ),
                end="",
            )
        print(f", norms {found.get('gradient_norms', [])[:3]}")
        if one and (theirs := one.get("first_gradients")):
            for kind, norm in found.get("first_gradients", {}).items():
                if abs(norm - theirs[kind]) > 0.02 * theirs[kind]:
                    print(f"    GRADIENT of {kind}: norm {norm:.4g}, of one GPU {theirs[kind]:.4g}")
        for packs, speed in found["speed"].items():
            memory = ", ".join(f"{gib:.1f}" for gib in speed["peak_gib"])
            line = f"    {packs} packs for each GPU: {speed['tokens_per_s']:,.0f} tokens/s, {speed['step_s']:.3f} s, {memory} GiB"
            if one and name != "one" and packs in one["speed"]:
                line += f", efficiency {speed['tokens_per_s'] / 2 / one['speed'][packs]['tokens_per_s']:.3f}"
            if foretold := found.get("predicted", {}).get(packs):
                line += f"; predicted {foretold['step_s']:.3f} s, {foretold['memory_gib']:.1f} GiB"
            print(line, flush=True)
        for rank, times in enumerate(found.get("profile", ())):
            kinds = ", ".join(f"{kind} {ms:.0f}" for kind, ms in times.get("kinds_ms", {}).items())
            print(f"    rank {rank}: {times.get('whole_ms', 0):.0f} ms, idle {times.get('idle_ms', 0):.0f}, {kinds}")


def write(raw: dict[str, dict]) -> None:
    """The rows: efficiencies of 4B at 16 packs carry a goal, others a name of their own."""
    rows, runs, one = [], [], raw.get("one", {"losses": [], "speed": {}})
    for name, found in raw.items():
        about = {"model": found["model"], "gpu": found["gpu"], **found["settings"]}
        model = "" if found["model"] == "4b" else f"_{found['model']}"
        cut = name != "pp2" and found["settings"]["pack_chunk_tokens"] < found["settings"]["seq_length"]
        if name == "tp2" and cut:
            model += "_chunks"
        for packs, speed in found["speed"].items():
            suffix = model + ("" if packs == "16" else f"_gbs{packs}")
            here = about | {"packs_per_gpu": int(packs)}
            rows.append(row(f"{name}_tokens_per_s{suffix}", speed["tokens_per_s"], "tokens/s", None, "higher", **here))
            rows.append(row(f"{name}_peak_gib{suffix}", max(speed["peak_gib"]), "GiB", None, "lower", **here))
            if foretold := found.get("predicted", {}).get(packs):
                run = f"{len(speed['peak_gib'])} × {found['gpu']}, {found['model']}: {name}, {packs} packs a GPU"
                if first := foretold["run"]["values"]["first_stage_layers"]:
                    run += f", {first} layers on the first stage"
                if name != "pp2" and not cut:
                    run += ", whole packs"
                known, note = {"run": run, **foretold["run"]}, "allocated by PyTorch"
                runs.append(row("peak_memory_gib", max(speed["peak_gib"]), "GiB", None, "lower", note, **known))
                runs.append(row("step_s", speed["step_s"], "s", None, "lower", "", **known))
            if name != "one" and packs in one["speed"] and "layers" not in found["settings"]:
                share = speed["tokens_per_s"] / 2 / one["speed"][packs]["tokens_per_s"]
                goal = GOALS[name] if not suffix else None
                note = f"one GPU: pack_chunk_tokens {one['settings']['pack_chunk_tokens']}"
                note += f"; bound {int(packs) * 2 / (int(packs) * 2 + 1):.3f}" if name == "pp2" else ""
                rows.append(row(f"{name}_efficiency{suffix}", share, "of two GPUs", goal, "higher", note, **here))
        if name != "one" and min(len(found["losses"]), len(one["losses"])) >= 30:
            notes = "largest relative difference of one of the first 10 losses", "of means of 10 in the first 30"
            found_and_goal = zip(
                differences(found["losses"], one["losses"]), LOSS_GOALS[name], notes, (10, 30), strict=True
            )
            for worst, goal, note, steps in found_and_goal:
                rows.append(
                    row(f"{name}_loss_difference_{steps}{model}", worst, "relative", goal, "lower", note, **about)
                )
    machine = next(iter(raw.values()))["machine"]
    write_results("scaling", rows, "python benchmarks/scaling.py WEBDATASETS TOKENIZER", **machine)
    if runs:
        write_results("preflight", runs, "python benchmarks/scaling.py WEBDATASETS TOKENIZER", **machine)
