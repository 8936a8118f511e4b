"""Gradients of the adapter: ``dxa = s * dy @ b``, ``da = dxa.T @ dropout(x, p)``, ``db = dy.T @ xa``.

One pass over dy gives dxa, a sum over its columns, and db, a sum over its rows: a program owns a slab of columns and a
range of rows, keeps its part of db in registers while it walks down, and writes the slab's part of dxa as it passes.
Parts are added up in a fixed order, without atomics, so the same inputs give the same bits. da is the same walk over x.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.dropout import dropout_scale, dropped_levels, keep_mask
from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import adds_slabs, cdiv, cut, padded_rank, parts_for
from fastlora.kernels.operands import check_operands
from fastlora.kernels.precision import dot_precision, wide_dot
from fastlora.kernels.reduce import counters, last_to_arrive, store_sum, sum_of_parts, sum_splits
from fastlora.kernels.shrink import shrink
from fastlora.kernels.tiles import ByTile, Tile, multiprocessors


# fmt: off
@triton.jit
def _lora_grad_kernel(
    g_ptr, stride_gm, stride_gn,               # [M, N]: dy, or x
    z_ptr, stride_zm, stride_zr,               # [M, r]: xa, or dxa
    dz_ptr, stride_dn, stride_dr,              # [N, r]: scale * dropout(g, p).T @ z
    b_ptr, stride_bn, stride_br,               # [N, r]
    gb_ptr,                                    # [M, r]: s * g @ b
    dz_parts, gb_parts, counter_ptr,           # of splits of M, fp32 [splits, N, r]; of slabs of N [slabs, M, r]
    seed_ptr, dropped, scale,
    s, M, N, r, splits, slabs, SPLIT_M,
    SPLIT: tl.constexpr, SLABS: tl.constexpr, ADD_SLABS: tl.constexpr,
    HAS_B: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # fmt: on
    pid_r, slab, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = split * SPLIT_M, min(M, (split + 1) * SPLIT_M)
    offs_n = slab * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < r
    rows = (start + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    g_ptrs = g_ptr + rows * stride_gm + offs_n[None, :].to(tl.int64) * stride_gn
    z_ptrs = z_ptr + rows * stride_zm + offs_r[None, :].to(tl.int64) * stride_zr
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    if HAS_B:
        b_ptrs = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        gb_start = tl.cast(start, tl.int64) * r
        gb_offs = tl.arange(0, BLOCK_M)[:, None] * r + offs_r[None, :]
        gb_ptrs = (gb_parts + slab.to(tl.int64) * M * r if SLABS else gb_ptr) + gb_start + gb_offs

    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop
        g = tl.load(g_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        z = tl.load(z_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if HAS_B:
            gb = wide_dot(g, b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), g_ptr.dtype.element_ty, PRECISION)
            tl.store(gb_ptrs, (gb * s).to(gb_ptrs.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
            gb_ptrs += tl.cast(BLOCK_M, tl.int64) * r
        if HAS_DROPOUT:
            g = tl.where(keep_mask(seed, offs_m, slab * BLOCK_N, dropped, BLOCK_M, BLOCK_N), g, 0.0)
        acc = wide_dot(g.T, z, acc, g_ptr.dtype.element_ty, PRECISION)
        g_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_gm
        z_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_zm

    first = slab.to(tl.int64) * BLOCK_N * stride_dn + pid_r.to(tl.int64) * BLOCK_R * stride_dr
    offs = tl.arange(0, BLOCK_N)[:, None] * stride_dn + tl.arange(0, BLOCK_R)[None, :] * stride_dr  # in few registers
    mask = mask_n[:, None] & mask_r[None, :]
    step, number = tl.cast(N, tl.int64) * r, slab * tl.num_programs(0) + pid_r
    store_sum(acc * scale, dz_ptr, dz_parts, first, offs, mask, split, splits, step, counter_ptr, number, SPLIT)
    if ADD_SLABS:  # of the rows that this program walked down
        counter_ptr += slabs * tl.num_programs(0)
        if last_to_arrive(counter_ptr + split * tl.num_programs(0) + pid_r, slabs):
            for m in range(start, stop, BLOCK_M):
                mask_gb = (m + tl.arange(0, BLOCK_M) < stop)[:, None] & mask_r[None, :]
                total = sum_of_parts(gb_parts + gb_start + gb_offs, tl.cast(M, tl.int64) * r, slabs, mask_gb)
                tl.store(gb_ptr + gb_start + gb_offs, total.to(gb_ptr.dtype.element_ty), mask=mask_gb)
                gb_start += tl.cast(BLOCK_M, tl.int64) * r


def lora_grad(
    dy: Tensor,
    x: Tensor | None,
    b: Tensor | None,
    xa: Tensor | None,
    s: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    one_pass: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``s * dy @ b`` [M, r] and ``dxa.T @ dropout(x, p)`` [r, K] in b's dtype, ``dy.T @ xa`` [N, r] in xa's.

    Without b there is no dxa, without b or x no da, without xa no db: they come back empty. One of b and xa is given.
    ``one_pass`` reads dy once for dxa and db, at the price of partial sums of dxa: worth it at small ranks.
    """
    like = xa if b is None else b
    assert like is not None
    r = like.shape[1]
    over_dy, over_x = _calls(*layouts(dy, x, b, xa, seed), r, float(s), p, one_pass, dot_precision(dy))
    dxa = da = db = None
    if b is not None and (not one_pass or xa is None):
        dxa = shrink(dy, b.t(), s)
    if over_dy is not None and xa is not None:
        db, beside = _walk_down(over_dy, dy, xa, b if one_pass else None)
        dxa = beside if dxa is None else dxa
    if over_x is not None and x is not None and dxa is not None:
        da = _walk_down(over_x, x, dxa, seed=seed, transposed=True)[0].t()
    return (
        like.new_empty(0, r) if dxa is None else dxa,
        like.new_empty(0) if da is None else da,
        like.new_empty(0) if db is None else db,
    )


def lora_grad_a(dxa: Tensor, x: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``dxa.T @ dropout(x, p)``: [M, r], [M, K] -> [r, K] in dxa's dtype."""
    walk = _call_of_da(*layouts(dxa, x, seed), p, dot_precision(x))
    return _walk_down(walk, x, dxa, seed=seed, transposed=True)[0].t()


# The launch, None where there is nothing to sum up; into how many ranges of rows and slabs of columns g is cut; whether
# the parts of ``g @ b`` that the slabs have are added up in the launch; and how many counters that takes.
Walk = tuple[Launch | None, int, int, bool, int]


def _walk_down(
    walk: ByTile[Walk],
    g: Tensor,
    z: Tensor,
    b: Tensor | None = None,
    seed: Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``dropout(g, p).T @ z`` [N, r] in z's dtype (in transposed memory if asked) and ``s * g @ b`` in b's dtype."""
    (M, N), r = g.shape, z.shape[1]
    launch, splits, slabs, add_slabs, counted = walk()
    if launch is None:
        dz = z.new_zeros(r, N).t() if transposed else z.new_zeros(N, r)
        return dz, None if b is None else b.new_zeros(M, r)
    dz = z.new_empty((r, N) if transposed else (N, r))
    dz_parts = gb_parts = gb = None
    if splits > 1:
        dz_parts = z.new_empty(splits, N, r, dtype=torch.float32)
    if b is not None and slabs > 1:
        gb_parts = b.new_empty(slabs, M, r, dtype=torch.float32)
    if b is not None and (slabs == 1 or add_slabs):
        gb = b.new_empty(M, r)
    arrivals = counters(g, counted) if counted else None
    sums = {"dz_parts": dz_parts, "gb_parts": gb_parts, "counter_ptr": arrivals}
    launch(g_ptr=g, z_ptr=z, dz_ptr=dz, b_ptr=b, gb_ptr=gb, seed_ptr=seed, **sums)
    if b is not None and gb is None:
        assert gb_parts is not None
        gb = sum_splits(gb_parts, b.dtype)
    return dz.t() if transposed else dz, gb


@cached_by_layout
def _calls(
    dy: Layout,
    x: Layout | None,
    b: Layout | None,
    xa: Layout | None,
    seed: Layout | None,
    r: int,
    s: float,
    p: float,
    one_pass: bool,
    PRECISION: str,
) -> tuple[ByTile[Walk] | None, ByTile[Walk] | None]:
    """The walk over dy, for db and in one pass dxa, and the walk over x, for da; None where there is none."""
    M, N = dy.shape
    x_shape = (M, M if x is None else x.shape[1])
    check_operands(dy, p, seed, x=(x, x_shape), b=(b, (N, r)), xa=(xa, (M, r)))
    first = second = None
    if xa is not None:
        first = _walk(dy, xa, b if one_pass else None, s, 0.0, False, PRECISION)
    if b is not None and x is not None:
        dxa = Layout(torch.Size((M, r)), (r, 1), b.dtype, dy.device, 0)
        second = _walk(x, dxa, None, 1.0, p, True, PRECISION)
    return first, second


@cached_by_layout
def _call_of_da(dxa: Layout, x: Layout, seed: Layout | None, p: float, PRECISION: str) -> ByTile[Walk]:
    check_operands(x, p, seed, dxa=(dxa, (x.shape[0], dxa.shape[1])))
    return _walk(x, dxa, None, 1.0, p, True, PRECISION)


def _walk(g: Layout, z: Layout, b: Layout | None, s: float, p: float, transposed: bool, PRECISION: str) -> ByTile[Walk]:
    R = min(padded_rank(z.shape[1]), 128)
    rows = "lora_grad" if g.dtype.itemsize == 2 else "lora_grad fp32"
    return ByTile(partial(_launch, g, z, b, s, p, transposed, R, PRECISION), rows, R)


def _launch(
    g: Layout,
    z: Layout,
    b: Layout | None,
    s: float,
    p: float,
    transposed: bool,
    R: int,
    PRECISION: str,
    t: Tile,
) -> Walk:
    (M, N), r = g.shape, z.shape[1]
    if M == 0 or N == 0 or r == 0:
        return None, 1, 1, False, 0
    slabs, r_blocks = cdiv(N, t.BLOCK_N), cdiv(r, R)
    # A range of rows has at least four steps of the loop; two programs a multiprocessor hide each other's latency.
    SPLIT_M, splits = cut(M, t.BLOCK_M, parts_for(2 * multiprocessors(g.device), slabs * r_blocks, M, t.BLOCK_M))
    add_slabs = b is not None and slabs > 1 and adds_slabs(slabs, SPLIT_M, R)
    stride_dn, stride_dr = (1, N) if transposed else (r, 1)
    stride_bn, stride_br = (0, 0) if b is None else b.stride
    if b is not None:
        t = t._replace(maxnreg=0)  # which is for the walk that does not hold b too
    launch = Launch(
        _lora_grad_kernel, (r_blocks, slabs, splits),
        stride_gm=g.stride[0], stride_gn=g.stride[1], stride_zm=z.stride[0], stride_zr=z.stride[1],
        stride_dn=stride_dn, stride_dr=stride_dr, stride_bn=stride_bn, stride_br=stride_br,
        dropped=dropped_levels(p), scale=dropout_scale(p), s=s, M=M, N=N, r=r, splits=splits, slabs=slabs,
        SPLIT_M=SPLIT_M, SPLIT=splits > 1, SLABS=slabs > 1, ADD_SLABS=add_slabs, HAS_B=b is not None,
        HAS_DROPOUT=p != 0.0, PRECISION=PRECISION, BLOCK_R=R, **t.kwargs(),
    )  # fmt: skip
    return launch, splits, slabs, add_slabs, r_blocks * (slabs + splits) if splits > 1 or add_slabs else 0
