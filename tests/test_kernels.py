"""The kernels compile for the GPUs that people have, at the shapes of 4B: Triton's interpreter takes what its compiler does
not.

What they compute is tested with the layers (test_megatron_model.py).
"""

import os
import subprocess
import sys

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llava_sft.gpu_stack import Missing
from llava_sft.model import flash4, fused_layers
from llava_sft.model.attention import packed_seq_params

# Compute capability → bytes of shared memory that a program may have (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"): A100, RTX 3090, RTX 4090 and L40S, H100, RTX 5090.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    int: "i32",
    float: "fp32",
}


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 86 else pytest.mark.long) for c in SHARED_MEMORY]
)
def test_every_kernel_compiles_for_the_gpu_and_has_room(capability):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels, shared = map(int, run.stdout.split()[-2:])
    assert kernels >= 16 and shared <= SHARED_MEMORY[capability]


def test_a_remembered_kernel_is_launched_as_triton_would():
    """Triton's own launches beside ours, up to the driver, for tensors and numbers that it compiles different kernels for."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "launches"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    launches, remembered, kernels = map(int, run.stdout.split()[-3:])
    assert launches - remembered >= kernels >= 8 and remembered >= 20


def test_attention_of_gpus_without_cudnns_is_called_as_pytorch_defines_it(monkeypatch):
    """Shapes alone, on tensors without values; test_gpu.py has the values."""
    monkeypatch.setattr(fused_layers, "has_cudnn_attention", lambda: False)
    query, key = (torch.empty(24, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    segments = packed_seq_params([16, 8], torch.device("meta"))
    out, statistics = fused_layers.attend(query, key, key, segments, True)
    grads = fused_layers.attend_backward(out.flatten(1), (query, key, key), out, statistics, segments, True)
    assert [out.shape, *(grad.shape for grad in grads)] == [query.shape, query.shape, key.shape, key.shape]


def test_flash_attention_4_gives_way_with_one_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(fused_layers, "has_cudnn_attention", lambda: False)
    monkeypatch.setattr(flash4, "flash4_version", lambda: None)
    monkeypatch.setattr(flash4, "flash4_trouble", lambda: Missing("flash-attn-4 is not installed", ""))
    monkeypatch.setattr(flash4, "_interface", flash4._interface.__wrapped__)
    query, segments = torch.empty(24, 32, 128, dtype=torch.bfloat16, device="meta"), packed_seq_params([24], "meta")
    flash4.choose("auto")
    assert not flash4.wanted(causal=True)
    try:
        flash4.choose("flash4")
        for _ in range(2):
            fused_layers.attend(query, query, query, segments, True)
        assert caplog.messages == [
            "FlashAttention-4 is not used in the language model, cuDNN's attention is: "
            "ImportError: flash-attn-4 is not installed"
        ]
        assert flash4.wanted(causal=False) and not flash4.wanted(causal=True)
    finally:
        flash4.choose("cudnn")


def test_flash_attention_4_is_taken_again_after_a_call_that_had_no_memory(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(flash4, "attend", full)
    query, segments = torch.empty(24, 32, 128, dtype=torch.bfloat16, device="meta"), packed_seq_params([24], "meta")
    try:
        flash4.choose("flash4")
        with pytest.raises(torch.OutOfMemoryError):
            fused_layers.attend(query, query, query, segments, True)
        assert flash4.wanted(causal=True)
    finally:
        flash4.choose("cudnn")


@pytest.mark.parametrize(("capability", "taken"), [((8, 0), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_auto_takes_flash_attention_4_on_hopper_alone(monkeypatch, capability, taken):
    monkeypatch.setattr(flash4, "flash4_version", lambda: "4.0.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    try:
        flash4.choose("auto")
        assert flash4.wanted(causal=True) == flash4.wanted(causal=False) == taken
    finally:
        flash4.choose("cudnn")


def compile_only(kernel, *args, grid, warmup, num_warps=4, **named):
    """In the place of a launch."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    constant = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or given[p.name] is None}
    kinds = {name: TYPES.get(getattr(value, "dtype", type(value))) for name, value in given.items()}
    signature = {name: "constexpr" if name in constant else kinds[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): constant[name] for name in constant})
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled.append(triton.compile(source, target=target, options={"num_warps": num_warps}))


compiled = []


def launch_all() -> None:
    from llava_sft.megatron import adam
    from llava_sft.model import activations, casts, kernels, rotary

    triton.JITFunction.run = compile_only

    def ones(*shape, dtype=torch.bfloat16):
        return torch.ones(shape, dtype=dtype)

    sums = kernels.PartialSums(20_000, torch.device("cpu"))
    amax = casts.places(torch.device("cpu"))
    for width, bias in ((2560, None), (1024, ones(1024))):
        x, weight = ones(2, width), ones(width)
        for branch, largest in ((None, None), (x, None), (x, amax)):
            _, _, mean, scale = kernels.norm(x, weight, bias, 1e-6, branch, amax=largest)
        for again, largest in ((False, None), (True, None), (False, amax)):
            kernels.norm_backward(x, x, weight, bias, mean, scale, x, sums, again=again, amax=largest)
    for largest in (None, amax):
        kernels.norm_backward(x, x, weight, bias, mean, scale, x, sums, biases=True, amax=largest)
    for heads, groups, head_dim, weights in ((32, 8, 128, (ones(128), ones(128))), (16, 16, 64, None)):
        qkv, angle = ones(2, (heads + 2 * groups) * head_dim), ones(2, 1, head_dim, dtype=torch.float32)
        grads = rotary.rope(qkv, groups, angle, angle, weights, 1e-6)
        for largest in (None, amax):
            rotary.rope_backward(grads, qkv, angle, angle, sums, weights, 1e-6, largest)
    gate_and_up = ones(2, 2 * 9728)
    for again, largest in ((False, None), (True, None), (False, amax)):
        activated = activations.swiglu(gate_and_up, amax=largest)
        activations.swiglu_backward(activated, gate_and_up, again, largest)
        activations.gelu_backward(activations.gelu(ones(2, 4096)), ones(2, 4096), sums, again)
    if int(sys.argv[1]) >= 90:  # what else has FP8 products is not supported
        for kind in casts.LARGEST:
            casts.cast(ones(32, 2560), amax, kind)
    sums.totals([20_000], torch.bfloat16)
    kernels.scale_(ones(10), ones(1, dtype=torch.float32))
    remainder = ones(10, dtype=torch.int16)
    for gradient in (ones(10), ones(10, dtype=torch.float32)):
        tensors = [(gradient, ones(10), ones(10), ones(10), remainder)]
        adam.adam_step(tensors, [7], 1e-5, 0.9, 0.99, 1e-8, 1, 0.0, True)
    print(len(compiled), max(kernel.metadata.shared for kernel in compiled))


def driver_of_no_gpu(launched: list, compiled: set):
    """Notes in `launched` what each launch gives to a driver, and in `compiled` the kernels."""

    class Launcher:
        def __init__(self, source, metadata):
            pass

        def __call__(self, *args):
            hooks = slice(6, 9)  # of profilers, and what they are told
            given = [*args[: hooks.start], *args[hooks.stop :]]
            launched.append([arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in given])

    class Utils:
        def get_device_properties(self, device):
            return {"max_shared_mem": SHARED_MEMORY[90]}

        def load_binary(self, name, binary, shared, device):
            compiled.add(binary)
            return 1, hash(binary), 32, 0, 1024

        def unload_module(self, module):
            pass

    class Driver:
        utils, launcher_cls = Utils(), Launcher

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 7

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    return Driver()


def launch_beside_triton() -> None:
    """Prints how many launches there were, how many of a kernel that was remembered, and how many kernels were compiled."""
    from triton.runtime import driver

    from llava_sft.model import activations, casts, kernels
    from llava_sft.model.launches import Remembered

    launch, launched, remembered, compiled = Remembered._launch, [], [], set()
    driver.set_active(driver_of_no_gpu(launched, compiled))

    def both(self, grid, *args, **named):
        known = len(self.compiled)
        launch(self, grid, *args, **named)
        remembered.append(len(self.compiled) == known)
        self.kernel[grid](*args, **named)
        assert launched[-1] == launched[-2], (self.kernel, launched[-2:])

    Remembered._launch = both
    amax = casts.places(torch.device("cpu"))
    for tokens in (1, 5, 16, 37, 48):
        for shift in (0, 1, 8):  # in memory, of values: the first and last are aligned
            x = torch.ones(tokens * 64 + shift, dtype=torch.bfloat16)[shift:].view(tokens, 64)
            for kind in (x, x.float()):
                weight, sums = kind[0], kernels.PartialSums(1024, x.device)
                _, normed, _, scale = kernels.norm(kind, weight, None, 1e-6, kind if tokens > 5 else None)
                kernels.norm_backward(normed, kind, weight, None, None, scale, kind, sums)
                activations.swiglu_backward(activations.swiglu(kind), kind)
            casts.cast(x, amax, torch.float8_e4m3fn)
    print(len(remembered), sum(remembered), len(compiled))


if __name__ == "__main__":
    launch_beside_triton() if sys.argv[1] == "launches" else launch_all()
