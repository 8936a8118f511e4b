"""Adding up partial sums in a fixed order: what makes split reductions deterministic."""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import cdiv


# fmt: off
@triton.jit
def _sum_splits_kernel(
    partial_ptrs, out_ptrs, numels, splits,  # one of each for every sum
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(PARTS):
        mask = offs < numels[i]
        ptrs = partial_ptrs[i] + offs
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(splits[i]):
            total += tl.load(ptrs, mask=mask, other=0.0)
            ptrs += numels[i]
        tl.store(out_ptrs[i] + offs, total.to(out_ptrs[i].dtype.element_ty), mask=mask)


def sum_splits(partials: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """``partial.sum(0).to(dtype)`` for each, contiguous fp32 ``[splits, ...]``, first split first, in one launch.

    Where there is one split it is the sum, and in that dtype already.
    """
    sums: list[Tensor] = []
    split: list[Tensor] = []
    out: list[Tensor] = []
    for partial, dtype in zip(partials, dtypes, strict=True):
        if partial.shape[0] == 1:
            sums.append(partial[0])
        else:
            sums.append(partial.new_empty(partial.shape[1:], dtype=dtype))
            split.append(partial)
            out.append(sums[-1])
    if split:
        _launch(layouts(*split), layouts(*out))(partial_ptrs=tuple(split), out_ptrs=tuple(out))
    return sums


@cached_by_layout
def _launch(partials: tuple[Layout, ...], out: tuple[Layout, ...]) -> Launch:
    numels, BLOCK = tuple(prod(each.shape) for each in out), 512
    splits = tuple(each.shape[0] for each in partials)
    grid = (cdiv(max(numels), BLOCK),)
    return Launch(_sum_splits_kernel, grid, numels=numels, splits=splits, PARTS=len(out), BLOCK=BLOCK)
