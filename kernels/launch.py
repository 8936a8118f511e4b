"""Launching a kernel again: what follows from the layout of its operands is worked out once.

Grids, splits, strides and checks, and what Triton asks of every argument at every launch (its dtype, whether it is 1 or
a multiple of 16), are the same for tensors of the same layout. Without this a launch takes the host longer than many
layers take the GPU.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """All that a launch depends on of a tensor, but its address."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int  # of its address from a multiple of 16


def layout(t: Tensor) -> Layout:
    return Layout(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)


def layouts(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Of each, None for None."""
    return tuple([None if t is None else layout(t) for t in tensors])  # a list is faster than a generator


prepared = lru_cache(maxsize=4096)  # for functions of layouts: those that make a Launch, or check operands


class Launch:
    """A kernel, its grid and every argument but its tensors, which are of one layout in all calls."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], **fixed: Any) -> None:
        self.kernel, self.grid, self.fixed = kernel, (*grid, 1, 1)[:3], fixed
        self.compiled: Any = None

    def __call__(self, **tensors: Any) -> None:
        if self.compiled is None:
            compiled = self.kernel[self.grid](**tensors, **self.fixed)
            if compiled is not None:  # None: interpreted, or compiled for a device that is not there
                self.arguments = [self.fixed.get(name) for name in self.kernel.arg_names]
                self.places = [self.kernel.arg_names.index(name) for name in tensors]
                self.compiled = compiled  # last: other threads may be here
            return
        arguments = self.arguments.copy()
        for place, tensor in zip(self.places, tensors.values(), strict=True):
            arguments[place] = tensor
        self.compiled[self.grid](*arguments)
