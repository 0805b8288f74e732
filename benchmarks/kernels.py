"""Where the time of a profiled training step goes, for benchmarks/training.py."""

import collections
import re

from results import row

KERNELS = {
    "matrix products": r"gemm|nvjet|cutlass(?!.*fmha)|xmma|splitK",
    "attention": r"fmha|flash|cudnn.*(sdpa|attention)|fused_attn",
    "norms": r"rmsnorm|layer_?norm|ln_(fwd|bwd)|^_norm|^_totals",
    "rotary": r"rope",
    "cross entropy": r"cross_entropy",
    "SwiGLU, GELU": r"gelu|swiglu|silu|sigmoid",
    "casts to FP8": r"cast_transpose|quantize|amax",
    "optimizer": r"multi_tensor|adam|l2norm|^_scale",
    "copies and fills": r"memcpy|memset|fill|copy",
    "other element-wise": r"elementwise|reduce|index|scatter|gather|cat",
}


def kernel_times(trace: dict) -> dict:
    """Milliseconds on the GPU by kind of kernel, and the time in which nothing runs."""
    events = [e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kinds: collections.Counter = collections.Counter()
    for event in events:
        matching = (kind for kind, pattern in KERNELS.items() if re.search(pattern, event["name"], re.IGNORECASE))
        kind = next(matching, "other")
        kinds[kind] += event["dur"] / 1e3
    busy, end = 0.0, 0.0
    for event in sorted(events, key=lambda e: e["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - min(event["ts"] for event in events)
    return {
        "kinds_ms": dict(kinds.most_common()),
        "idle_ms": (whole - busy) / 1e3,
        "whole_ms": whole / 1e3,
        "kernels": len(events),
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
    return result
