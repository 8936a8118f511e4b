"""Adding up partial sums in a fixed order: what makes split reductions deterministic."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import Launch, Layout, layout, prepared
from fastlora.kernels.tiles import cdiv


@triton.jit
def _sum_splits_kernel(partial_ptr, out_ptr, numel, splits, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + offs, mask=mask, other=0.0)
        partial_ptr += numel
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """``partial.sum(0).to(dtype)`` for contiguous fp32 ``[splits, ...]``, first split first."""
    if partial.shape[0] == 1 and partial.dtype == dtype:
        return partial[0]
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    if out.numel():
        _launch(layout(partial), dtype)(partial_ptr=partial, out_ptr=out)
    return out


@prepared
def _launch(partial: Layout, dtype: torch.dtype) -> Launch:
    splits, numel, BLOCK = partial.shape[0], prod(partial.shape[1:]), 1024
    return Launch(_sum_splits_kernel, (cdiv(numel, BLOCK),), numel=numel, splits=splits, BLOCK=BLOCK)
