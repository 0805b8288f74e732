"""Launches of Triton kernels without what every one of them repeats.

By Triton a launch takes the host 65 to 99 µs (on two busy cores, up to the driver): it looks at each argument, puts a key together as text, and looks up the kernel
that was compiled for it. A chunk has 500 launches in bf16, 800 in FP8, and its GPU waits for them where it is short. Here
the compiled kernel is remembered by what Triton's own key depends on: 16 to 24 µs.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import triton
from torch import Tensor


class Remembered:
    """A kernel that is launched as any other, `kernel[grid](...)`: what it is compiled for is given by name or in its
    place, everything else in its place. The interpreter's is launched as it is."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel, self.compiled = kernel, dict[tuple, Any]()
        self.traits = [_traits_of(each) for each in getattr(kernel, "params", ())]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        traits = (
            (value.dtype, value.data_ptr() % 16 == 0)
            if isinstance(value, Tensor)
            else value
            if value is None
            else of(value)
            for of, value in zip(self.traits, args, strict=False)
        )
        key = args[0].device, *traits, *named.values()
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[grid](*args, **named)
            if isinstance(compiled, triton.compiler.CompiledKernel):
                self.compiled[key] = compiled
            return
        constants = (named[name] for name in self.kernel.arg_names[len(args) :])
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _traits_of(parameter: Any) -> Callable[[Any], Hashable]:
    """What a kernel is compiled for, of a value of this parameter: all of a constant's; of a number whether it is 1 or a
    multiple of 16, unless it is not to be specialized for, and whether it has 32 bits."""
    if parameter.is_constexpr:
        return lambda value: value
    if parameter.do_not_specialize:
        return lambda value: -(1 << 31) <= value < 1 << 31
    return lambda value: (value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31)
