"""Adding up partial sums in a fixed order: what makes split reductions deterministic.

A split reduction ends within its own launch. Every program counts its arrival beside the others of its tile; the last
one reads all their parts back and adds them up, the first split first, whichever came last. So the same inputs give the
same bits, and the host launches once. Where there is much to add, many programs do it, in a launch of their own
(`sum_splits`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import current_target
from triton.runtime import driver
from triton.runtime.jit import constexpr_function

from fastlora.kernels.launch import Launch, cached_by_layout
from fastlora.kernels.limits import cdiv, next_power_of_2


@constexpr_function
def _waiting_for_stores() -> str | None:
    """The instruction by which a wave waits for its stores, of AMD's: their barrier does not, NVIDIA's does."""
    target = current_target()
    if target is None or target.backend != "hip":
        return None
    if target.arch.startswith(("gfx10", "gfx11")):
        return "s_waitcnt_vscnt null, 0x0"
    return "s_wait_storecnt 0x0" if target.arch.startswith("gfx12") else "s_waitcnt vmcnt(0)"


@triton.jit
def last_to_arrive(counter_ptr, programs):
    """Whether all other ``programs`` have been here, so that what they wrote can be read. Leaves the counter at 0."""
    wait: tl.constexpr = _waiting_for_stores()
    if wait is not None:
        tl.inline_asm_elementwise(
            wait + "\nv_mov_b32 $0, $1", "=v,v,~{memory}", [programs], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()  # all threads of this program have written
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_of_parts(ptrs, stride, parts, mask):
    """The sum of tiles that lie ``stride`` elements apart, the first one first; read from L2, where others wrote it."""
    total = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    for _ in range(1, parts):
        ptrs += stride
        total += tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    return total


# fmt: off
@triton.jit
def store_sum(
    part, out_ptr, parts_ptr, start, offs, mask,
    split, splits, step, counter_ptr, tile, SPLIT: tl.constexpr,
):
    """Store a tile, from element ``start`` on: the sum, or one of its ``splits`` parts, ``step`` elements apart, which
    the last of them to arrive adds up. The counters are one for each tile."""
    # fmt: on
    out_ptrs = out_ptr + start + offs
    if SPLIT:
        part_ptrs = parts_ptr + start + offs
        tl.store(part_ptrs + split.to(tl.int64) * step, part, mask=mask)
        if last_to_arrive(counter_ptr + tile, splits):
            part = sum_of_parts(part_ptrs, step, splits, mask)
            tl.store(out_ptrs, part.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptrs, part.to(out_ptr.dtype.element_ty), mask=mask)


_counters: dict[tuple[int, Any], Tensor] = {}  # by device and stream


def counters(like: Tensor, n: int) -> Tensor:
    """At least ``n`` zeros, ``int32``, to count arrivals in the launch that follows, which leaves zeros behind.

    Launches on a stream follow one another, so they share theirs. One that is captured in a CUDA graph has its own, set
    to zero by the graph: it may be replayed on any stream.
    """
    if like.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return like.new_zeros(n, dtype=torch.int32)
        index = like.get_device()
        key = index, driver.active.get_current_stream(index)
    elif like.is_cpu:  # interpreted, or on a stand-in for a driver
        key = -1, None
    else:
        return like.new_zeros(n, dtype=torch.int32)
    found = _counters.get(key)
    if found is None or found.shape[0] < n:
        found = _counters[key] = like.new_zeros(max(4096, next_power_of_2(n)), dtype=torch.int32)
    return found


# fmt: off
@triton.jit
def _sum_splits_kernel(
    partial_ptr, out_ptr, numel, splits, BLOCK: tl.constexpr,
):
    # fmt: on
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    total = sum_of_parts(partial_ptr + offs, numel, splits, mask)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """``partial.sum(0).to(dtype)``, contiguous fp32 ``[splits, ...]``, first split first: in a launch of its own, where
    there is more to add up than the last programs of a launch should."""
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    _launch(partial.shape[0], out.numel(), dtype, partial.device)(partial_ptr=partial, out_ptr=out)
    return out


@cached_by_layout
def _launch(splits: int, numel: int, dtype: torch.dtype, device: torch.device) -> Launch:
    BLOCK = 512
    return Launch(_sum_splits_kernel, (cdiv(numel, BLOCK),), numel=numel, splits=splits, BLOCK=BLOCK)
