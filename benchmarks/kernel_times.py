"""Where the time of a profiled step goes, by kernel and by kind of kernel."""

import collections
import json
import re
import tempfile
from pathlib import Path

import torch

KERNELS = {
    "communication": r"nccl",
    "matrix products": r"gemm|nvjet|cutlass(?!.*fmha)|xmma|splitK",
    "attention": r"fmha|flash|cudnn.*(sdpa|attention)|fused_attn|FlashAttention",
    "norms": r"rmsnorm|layer_?norm|ln_(fwd|bwd)|^_norm|^_totals",
    "rotary": r"rope",
    "cross entropy": r"cross_entropy",
    "SwiGLU, GELU": r"gelu|swiglu|silu|sigmoid",
    "casts to FP8": r"cast_transpose|quantize|amax|^_cast",
    "optimizer": r"multi_tensor|adam|l2norm|^_scale",
    "copies and fills": r"memcpy|memset|fill|copy",
    "other element-wise": r"elementwise|reduce|index|scatter|gather|cat",
}


def kernel_times(trace: dict) -> dict:
    """Milliseconds on the GPU by kind of kernel, and the time in which nothing runs."""
    events = [e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kinds: collections.Counter = collections.Counter()
    names: dict[str, list] = collections.defaultdict(lambda: [0, 0.0, 0])
    for event in events:
        one = names[event["name"][:160]]
        moved = event.get("args", {}).get("bytes", 0)  # of copies and fills
        one[:] = one[0] + 1, one[1] + event["dur"] / 1e3, one[2] + moved
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
        "names": sorted(([name, *one] for name, one in names.items()), key=lambda one: -one[2])[:80],
        "idle_ms": (whole - busy) / 1e3,
        "whole_ms": whole / 1e3,
        "kernels": len(events),
    }


def trace(profiler: torch.profiler.profile) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        return json.loads(Path(f"{folder}/trace.json").read_text())
