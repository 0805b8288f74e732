"""The one place that lets Megatron train without a GPU, so that a laptop runs the code a cluster runs.

Megatron-Core names CUDA in three ways, and each is answered here:
- questions to `torch.cuda` (how many devices, which stream, random state): one CPU "device" answers;
- tensors made or moved with a CUDA device: they are made on the CPU;
- one name of Megatron's own that insists on a GPU.
`apply()` does nothing where a GPU is present. `PATCHED` lists every name that was changed.
"""

import functools
import sys
from types import SimpleNamespace

import torch

PATCHED: list[str] = []

FACTORIES = ("empty", "full", "ones", "tensor", "zeros")  # that Megatron calls with a CUDA device


def _replace(owner, name: str, value) -> None:
    setattr(owner, name, value)
    place = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
    PATCHED.append(f"{place}.{name}")


def _on_cpu(call):
    """`call` with the CPU in place of each CUDA device among its arguments."""

    def here(value):
        return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value

    @functools.wraps(call)
    def called(*args, **kwargs):
        return call(*map(here, args), **{key: here(value) for key, value in kwargs.items()})

    return called


def apply() -> bool:
    """Make Megatron run on this machine's CPU. Returns False, and changes nothing, where there is a GPU."""
    if torch.cuda.is_available():
        return False
    if PATCHED:
        return True
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # where it is installed, Megatron would take its optimizer: GPUs only
    # First: it lists torch's own functions, and so does `with torch.device(…)`, which else would not know them.
    from torch import _dynamo  # noqa: F401

    torch.utils._device._device_constructors()
    # Megatron's jit_fuser compiles functions as they are imported: the compiler's start-up costs more than small models gain.
    _replace(torch, "compile", lambda model=None, **_: model or (lambda function: function))
    from megatron.core.tensor_parallel import random as tp_random

    nothing = lambda *args, **kwargs: None  # noqa: E731
    get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # noqa: E731
    set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # noqa: E731
    _replace(tp_random, "_set_cuda_rng_state", set_rng_state)
    for owner in (torch.cuda, torch.cuda.random):
        _replace(owner, "get_rng_state", get_rng_state)
        _replace(owner, "set_rng_state", set_rng_state)
    for name, answer in {
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        "current_stream": lambda *args: SimpleNamespace(wait_stream=nothing, synchronize=nothing),
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed) and None,
        "manual_seed_all": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
    }.items():
        _replace(torch.cuda, name, answer)
    for name in FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    _replace(torch.Tensor, "to", _on_cpu(torch.Tensor.to))
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    tensor_type = torch.Tensor.type

    def type_as_on_a_gpu(self, *args, **kwargs):
        """Megatron compares `tensor.type()` with CUDA's names to find out the precision."""
        answer = tensor_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    _replace(torch.Tensor, "type", type_as_on_a_gpu)
    return True
