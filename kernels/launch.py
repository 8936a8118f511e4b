"""Launch a kernel with what follows from the layouts of its operands computed once for each layout.

Grids, splits, strides and checks depend on the layouts alone, and so does what Triton derives from every argument at
every launch (its dtype, whether it is 1 or a multiple of 16). Derived anew, they take the host longer than many layers
take the GPU.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from fastlora.compat import launch_of


class Layout(NamedTuple):
    """What a launch depends on of a tensor, besides its address."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int  # of its address from a multiple of 16


def layouts(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The layout of each tensor, None for None."""
    found: list[Layout | None] = []
    for t in tensors:  # every launch passes here: no function call for a tensor
        fields = None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)
        found.append(None if fields is None else tuple.__new__(Layout, fields))
    return tuple(found)


cached_by_layout = lru_cache(maxsize=4096)  # for functions of layouts: those that make a Launch, or check operands


class Launch:
    """A kernel, its grid and its arguments except the tensors, which have the same layouts in every call."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], **fixed: Any) -> None:
        self.kernel, self.grid, self.fixed = kernel, (*grid, 1, 1)[:3], fixed
        self.compiled: Any = None

    def __call__(self, **tensors: Any) -> None:
        if self.compiled is None:
            compiled = self.kernel[self.grid](**tensors, **self.fixed)
            if compiled is not None:  # None: interpreted, or compiled for a device that is not there
                self.arguments = [self.fixed.get(name) for name in self.kernel.arg_names]
                self.positions = [self.kernel.arg_names.index(name) for name in tensors]
                self.device, self.launch = driver.active.get_current_device(), launch_of(compiled)
                self.compiled = compiled  # last: other threads may be here
            return
        arguments = self.arguments.copy()
        for position, tensor in zip(self.positions, tensors.values(), strict=True):
            arguments[position] = tensor
        hook = knobs.runtime.launch_enter_hook  # a profiler's
        if self.launch is None or getattr(hook, "calls", hook):
            self.compiled[self.grid](*arguments)
        else:
            run, function, metadata = self.launch
            stream = driver.active.get_current_stream(self.device)
            run(*self.grid, stream, function, metadata, None, None, None, *arguments)
