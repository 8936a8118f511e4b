"""``xa = s * dropout(x, p) @ a.T``: x goes down to the rank, for one or several adapters in one read of x."""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.dropout import dropout_scale, dropped_levels, keep_mask
from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import cdiv, cut, parts_for, ranks_at_once
from fastlora.kernels.operands import check_operands
from fastlora.kernels.precision import dot_precision, wide_dot
from fastlora.kernels.reduce import counters, last_to_arrive, sum_of_parts
from fastlora.kernels.tiles import ByTile, Tile, multiprocessors


# fmt: off
@triton.jit
def _shrink_kernel(
    x_ptr, stride_xm, stride_xk,
    a_ptrs, a_strides, ranks, out_ptrs,      # one of each for every adapter, out [M, r]
    partial_ptr, partial_starts, counter_ptr,  # [splits of K, M, r] of every adapter, and where it begins
    seed_ptrs, dropped, s,
    M, K, splits, SPLIT_K,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):
    # fmt: on
    pid_r, pid_m, split = tl.program_id(0) % RANK_BLOCKS, tl.program_id(0) // RANK_BLOCKS, tl.program_id(1)
    start, stop = split * SPLIT_K, min(K, (split + 1) * SPLIT_K)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm
    x_ptrs += (start + tl.arange(0, BLOCK_K))[None, :].to(tl.int64) * stride_xk

    sums = ()  # type: tuple
    for _ in tl.static_range(PARTS):
        sums += (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)
    for k in range(start, stop, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < stop
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * stride_xk
        added = ()  # type: tuple
        for i in tl.static_range(PARTS):
            a_tile = a_ptrs[i] + offs_r[None, :].to(tl.int64) * a_strides[i][0]
            a_tile += offs_k[:, None].to(tl.int64) * a_strides[i][1]
            a = tl.load(a_tile, mask=(offs_r < ranks[i])[None, :] & mask_k[:, None], other=0.0)
            kept = x
            if HAS_DROPOUT[i]:
                keep = keep_mask(tl.load(seed_ptrs[i]), offs_m, k, dropped[i], BLOCK_M, BLOCK_K)
                kept = tl.where(keep, x, 0.0)
            added += (wide_dot(kept, a, sums[i], x_ptr.dtype.element_ty, PRECISION),)
        sums = added

    for i in tl.static_range(PARTS):
        offs = offs_m[:, None].to(tl.int64) * ranks[i] + offs_r[None, :]
        mask = mask_m[:, None] & (offs_r < ranks[i])[None, :]
        if SPLIT:
            part = partial_ptr + partial_starts[i] + split.to(tl.int64) * M * ranks[i]
            tl.store(part + offs, sums[i] * s[i], mask=mask)
        else:
            tl.store(out_ptrs[i] + offs, (sums[i] * s[i]).to(out_ptrs[i].dtype.element_ty), mask=mask)
    if SPLIT:  # noqa: SIM102 (of `and` Triton compiles both sides)
        if last_to_arrive(counter_ptr + tl.program_id(0), splits):
            for i in tl.static_range(PARTS):
                offs = offs_m[:, None].to(tl.int64) * ranks[i] + offs_r[None, :]
                mask = mask_m[:, None] & (offs_r < ranks[i])[None, :]
                step = tl.cast(M, tl.int64) * ranks[i]
                total = sum_of_parts(partial_ptr + partial_starts[i] + offs, step, splits, mask)
                tl.store(out_ptrs[i] + offs, total.to(out_ptrs[i].dtype.element_ty), mask=mask)


def shrink(x: Tensor, a: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``(s * dropout(x, p) @ a.T).to(a.dtype)``: [M, K], [r, K] -> [M, r], summed in fp32."""
    return shrink_group(x, (a,), (s,), (p,), (seed,))[0]


def shrink_group(
    x: Tensor, a: Sequence[Tensor], s: Sequence[float], p: Sequence[float], seed: Sequence[Tensor | None]
) -> list[Tensor]:
    """``[shrink(x, a_i, s_i, p_i, seed_i) for ...]`` in one read of x; ranks, dtypes and masks may differ."""
    a, seed = tuple(a), tuple(seed)
    call = _call(len(a), layouts(x, *a, *seed), tuple(s), tuple(p), dot_precision(x))
    launch, partial_sums, blocks = call()
    M, out = x.shape[0], []
    for each in a:  # no comprehensions: before Python 3.12 each is a function call
        out.append(each.new_empty(M, each.shape[0]) if launch is not None else each.new_zeros(M, each.shape[0]))
    if launch is not None:
        parts = x.new_empty(partial_sums, dtype=torch.float32) if partial_sums else None
        arrivals = counters(x, blocks) if partial_sums else None
        sums = {"out_ptrs": tuple(out), "partial_ptr": parts, "counter_ptr": arrivals}
        launch(x_ptr=x, a_ptrs=a, seed_ptrs=seed, **sums)
    return out


@cached_by_layout
def _call(
    n: int, found: tuple[Layout, ...], s: tuple[float, ...], p: tuple[float, ...], PRECISION: str
) -> ByTile[tuple[Launch | None, int, int]]:
    x, a, seed, rank = found[0], found[1 : n + 1], found[n + 1 :], 0
    for a_i, p_i, seed_i in zip(a, p, seed, strict=True):
        check_operands(x, p_i, seed_i, a=(a_i, (a_i.shape[0], x.shape[1])))
        rank = max(rank, a_i.shape[0])
    BLOCK_R = ranks_at_once(rank, n)
    rows = "shrink" if x.dtype.itemsize == 2 else "shrink fp32"
    return ByTile(partial(_launch, x, a, tuple(map(float, s)), p, PRECISION, BLOCK_R), rows, BLOCK_R * n)


def _launch(
    x: Layout,
    a: tuple[Layout, ...],
    s: tuple[float, ...],
    p: tuple[float, ...],
    PRECISION: str,
    BLOCK_R: int,
    t: Tile,
) -> tuple[Launch | None, int, int]:
    """The launch, None where there is nothing to sum up; how many partial sums it keeps; how many tiles there are."""
    M, K = x.shape
    ranks = tuple(each.shape[0] for each in a)
    if K == 0 or M == 0 or not any(ranks):
        return None, 0, 0
    rank_blocks = cdiv(max(ranks), BLOCK_R)
    blocks = cdiv(M, t.BLOCK_M) * rank_blocks  # on one axis: the others end at 65535
    # Two programs a multiprocessor hide the latency of each other's loads.
    SPLIT_K, splits = cut(K, t.BLOCK_K, parts_for(2 * multiprocessors(x.device), blocks, K, t.BLOCK_K))
    partial_starts = tuple(splits * M * sum(ranks[:i]) for i in range(len(ranks)))
    launch = Launch(
        _shrink_kernel, (blocks, splits), stride_xm=x.stride[0], stride_xk=x.stride[1],
        a_strides=tuple(each.stride for each in a), ranks=ranks, partial_starts=partial_starts, splits=splits,
        SPLIT=splits > 1, dropped=tuple(map(dropped_levels, p)),
        s=tuple(s_i * dropout_scale(p_i) for s_i, p_i in zip(s, p, strict=True)), M=M, K=K, SPLIT_K=SPLIT_K,
        PARTS=len(a), HAS_DROPOUT=tuple(each != 0.0 for each in p),
        PRECISION=PRECISION, BLOCK_R=BLOCK_R, RANK_BLOCKS=rank_blocks, **t.kwargs(),
    )  # fmt: skip
    return launch, splits * M * sum(ranks) if splits > 1 else 0, blocks
