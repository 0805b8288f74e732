"""The one place that lets Megatron train without a GPU, so that a laptop runs the code a cluster runs.

Megatron-Core names CUDA in three ways, and each is answered here:
- questions to `torch.cuda` (how many devices, how much memory, streams, events, random state): one CPU "device" answers;
- tensors made or moved with a CUDA device: they are made on the CPU;
- one name of Megatron's own that insists on a GPU.
`apply()` does nothing where a GPU is present. `PATCHED` lists every name that was changed.
"""

import contextlib
import functools
import os
import sys
from types import SimpleNamespace

import torch

PATCHED: list[str] = []

FACTORIES = [
    "arange", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand", "rand_like",
    "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like", "as_tensor",
]  # fmt: skip


class _Stream:
    """A CPU has one queue: waiting for it is always over."""

    def __init__(self, *args, **kwargs):
        self.cuda_stream = 0

    def wait_stream(self, other=None):
        pass

    wait_event = record_event = synchronize = wait_stream

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    wait = record

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _replace(owner, name: str, value) -> None:
    setattr(owner, name, value)
    place = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
    PATCHED.append(f"{place}.{name}")


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(make):
    @functools.wraps(make)
    def made(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


def apply() -> bool:
    """Make Megatron run on this machine's CPU. Returns False, and changes nothing, where there is a GPU."""
    if torch.cuda.is_available():
        return False
    if PATCHED:
        return True
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # where it is installed, Megatron would take its optimizer: GPUs only
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # its start-up costs more than small models gain
    _patch_megatron()  # first: importing Megatron imports torch._dynamo, which lists torch's own functions
    torch.utils._device._device_constructors()  # and so does `with torch.device(…)`, which else would not know them
    cpu = torch.device("cpu")
    nothing = lambda *args, **kwargs: None  # noqa: E731
    zero = lambda *args, **kwargs: 0  # noqa: E731
    answers = {
        "current_device": lambda: cpu,
        "device_count": lambda: 1,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed) and None,
        "memory_stats": lambda *args: _Zeros(),
        "mem_get_info": lambda *args: (0, 0),
        "get_device_capability": lambda *args: (0, 0),
        "get_device_name": lambda *args: "cpu",
        "get_device_properties": lambda *args: SimpleNamespace(
            name="cpu", total_memory=0, multi_processor_count=1, major=0, minor=0
        ),
        "is_current_stream_capturing": lambda: False,
    }
    for name in [
        "set_device",
        "set_stream",
        "synchronize",
        "empty_cache",
        "manual_seed_all",
        "reset_peak_memory_stats",
    ]:
        answers[name] = nothing
    for name in ["memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"]:
        answers[name] = zero
    for name, answer in answers.items():
        _replace(torch.cuda, name, answer)
    _replace(torch.cuda.random, "get_rng_state", answers["get_rng_state"])
    _replace(torch.cuda.random, "set_rng_state", answers["set_rng_state"])
    _replace(torch.cuda.nvtx, "range_push", nothing)
    _replace(torch.cuda.nvtx, "range_pop", nothing)

    for name in FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    tensor_to = torch.Tensor.to
    _replace(torch.Tensor, "to", lambda self, *args, **kwargs: tensor_to(self, *_cpu_args(args), **_cpu_kwargs(kwargs)))
    tensor_type = torch.Tensor.type
    _replace(torch.Tensor, "type", lambda self, *args, **kwargs: _cpu_type(tensor_type(self, *args, **kwargs)))
    return True


class _Zeros(dict):
    def __missing__(self, key):
        return 0


def _cpu_args(args):
    return tuple("cpu" if _is_cuda(a) else a for a in args)


def _cpu_kwargs(kwargs):
    return {key: "cpu" if _is_cuda(value) else value for key, value in kwargs.items()}


def _cpu_type(answer):
    """Megatron compares `tensor.type()` with CUDA's names to find out the precision."""
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as tp_random

    _replace(
        tp_random,
        "_set_cuda_rng_state",
        lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
    )
