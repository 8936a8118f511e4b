"""Adding up partial sums in a fixed order: what makes split reductions deterministic."""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import Launch, cached_by_layout
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

    Where there is one split it is the sum, and in that dtype already. All are new, so that their addresses are aligned.
    """
    sums: list[Tensor] = []
    split: list[Tensor] = []
    out: list[Tensor] = []
    sizes: list[tuple[torch.Size, torch.dtype]] = []
    for i, partial in enumerate(partials):  # every split reduction passes here
        shape = partial.shape
        if shape[0] == 1:
            sums.append(partial[0])
        else:
            sums.append(partial.new_empty(shape[1:], dtype=dtypes[i]))
            split.append(partial)
            out.append(sums[-1])
            sizes.append((shape, dtypes[i]))
    if split:
        _launch(tuple(sizes), split[0].device)(partial_ptrs=tuple(split), out_ptrs=tuple(out))
    return sums


@cached_by_layout
def _launch(sizes: tuple[tuple[torch.Size, torch.dtype], ...], device: torch.device) -> Launch:
    """For partial sums of these shapes, added up to these dtypes."""
    numels, BLOCK = tuple(prod(shape[1:]) for shape, _ in sizes), 512
    splits = tuple(shape[0] for shape, _ in sizes)
    grid = (cdiv(max(numels), BLOCK),)
    return Launch(_sum_splits_kernel, grid, numels=numels, splits=splits, PARTS=len(sizes), BLOCK=BLOCK)
