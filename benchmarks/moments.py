"""Adam's second moment in bf16: how wrong it is, and what a step costs. On a GPU, with Transformer Engine.

    python benchmarks/moments.py

Rows: `second_moment_error` after one gradient of 1.0 and then 0.01, and of noise; `optimizer_step_ms` for the 4.7
billion parameters of 4B.
"""

import time

import torch
from torch import nn
from transformer_engine.pytorch.optimizers import FusedAdam

from llava_sft.megatron.adam import round_evenly
from results import row, write_results

BETAS2 = (0.95, 0.99, 0.995, 0.999)
# name → precision of both moments, and whether `round_evenly` is on
VARIANTS = {
    "float32 moments": (torch.float32, torch.float32, False),
    "bf16 moments, to the nearest": (torch.bfloat16, torch.bfloat16, False),
    "bf16 and float32": (torch.bfloat16, torch.float32, False),
    "bf16 moments, evenly (used)": (torch.bfloat16, torch.bfloat16, True),
}
SHAPES = 36 * [(6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)] + [(151936, 2560)] * 2 + 24 * [(12288, 1024)]


def adam(parameters: list[nn.Parameter], variant: str, lr: float, beta2: float) -> FusedAdam:
    first, second, evenly = VARIANTS[variant]
    precision = {"exp_avg_dtype": first, "exp_avg_sq_dtype": second}
    precision |= {"master_weights": True, "use_decoupled_grad": True, "store_param_remainders": True}
    optimizer = FusedAdam(parameters, lr=lr, betas=(0.9, beta2), eps=1e-8, **precision)
    if evenly:
        round_evenly(optimizer, seed=42)
    return optimizer


def second_moment_error(variant: str, beta2: float, noise: bool, steps: int = 4000) -> float:
    """Root mean square over 4,096 elements, relative to the exact moment."""
    generator = torch.Generator("cuda").manual_seed(1)
    weight = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16, device="cuda"))
    optimizer = adam([weight], variant, 1e-6, beta2)
    exact = torch.zeros(4096, device="cuda", dtype=torch.float64)
    for step in range(steps):
        gradient = torch.full((4096,), 0.01, device="cuda")
        if noise:
            gradient = torch.randn(4096, device="cuda", generator=generator) * 0.01
        if step == 0:
            gradient.fill_(1.0)
        weight.decoupled_grad = gradient.bfloat16()
        exact = beta2 * exact + (1 - beta2) * weight.decoupled_grad.double() ** 2
        optimizer.step()
    found = optimizer.state[weight]["exp_avg_sq"].double()
    return float(((found - exact) / exact).square().mean().sqrt())


def optimizer_step_ms(variant: str) -> tuple[float, float]:
    """Milliseconds of a step for the shapes of 4B (median of 5), and peak GiB."""
    torch.cuda.reset_peak_memory_stats()
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device="cuda")) for shape in SHAPES]
    for parameter in parameters:
        parameter.decoupled_grad = torch.ones_like(parameter)
    optimizer = adam(parameters, variant, 1e-5, 0.99)
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[2] * 1e3, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    rows = []
    for variant in VARIANTS:
        used = "used" in variant
        for beta2 in BETAS2:
            for noise in (False, True):
                error = second_moment_error(variant, beta2, noise)
                gradients = "1.0, then noise of 0.01" if noise else "1.0, then 0.01"
                settings = {"variant": variant, "adam_beta2": beta2, "gradients": gradients}
                rows.append(row("second_moment_error", error, "", 0.05 if used else None, "lower", **settings))
        if variant != "float32 moments":  # 85 GB
            milliseconds, gib = optimizer_step_ms(variant)
            rows.append(row("optimizer_step_ms", milliseconds, "ms", None, "lower", f"{gib:.1f} GiB", variant=variant))
            torch.cuda.empty_cache()
    write_results("moments", rows)


if __name__ == "__main__":
    main()
