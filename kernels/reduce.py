"""Adding up partial sums in a fixed order: what makes split reductions deterministic."""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import Launch, Layout, layouts, prepared
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
    split = tuple(partial for partial in partials if partial.shape[0] > 1)
    if not split:
        return [partial[0] for partial in partials]
    sums = [
        partial.new_empty(partial.shape[1:], dtype=dtype) if partial.shape[0] > 1 else partial[0]
        for partial, dtype in zip(partials, dtypes, strict=True)
    ]
    out = tuple(total for partial, total in zip(partials, sums, strict=True) if partial.shape[0] > 1)
    _launch(layouts(*split), layouts(*out))(partial_ptrs=split, out_ptrs=out)
    return sums


@prepared
def _launch(partials: tuple[Layout, ...], out: tuple[Layout, ...]) -> Launch:
    numels, BLOCK = tuple(prod(each.shape) for each in out), 512
    splits = tuple(each.shape[0] for each in partials)
    grid = (cdiv(max(numels), BLOCK),)
    return Launch(_sum_splits_kernel, grid, numels=numels, splits=splits, PARTS=len(out), BLOCK=BLOCK)
