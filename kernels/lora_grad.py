"""Gradients of the adapter: ``dxa = s * dy @ b``, ``da = dxa.T @ dropout(x, p)``, ``db = dy.T @ xa``.

One pass over dy gives dxa, a sum over its columns, and db, a sum over its rows: a program owns a slab of columns and a
range of rows, keeps its part of db in registers while it walks down, and writes the slab's part of dxa as it passes.
Parts are added up in a fixed order, without atomics, so the same inputs give the same bits. da is the same walk over x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.dropout import dropout_scale, dropped_levels, keep_mask
from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import cdiv, cut, padded_rank, parts_for
from fastlora.kernels.operands import check_operands
from fastlora.kernels.precision import dot_precision, wide_dot
from fastlora.kernels.reduce import sum_splits
from fastlora.kernels.shrink import shrink
from fastlora.kernels.tiles import Tile, multiprocessors, tile


# fmt: off
@triton.jit
def _lora_grad_kernel(
    g_ptr, stride_gm, stride_gn,               # [M, N]: dy, or x
    z_ptr, stride_zm, stride_zr,               # [M, r]: xa, or dxa
    dz_ptr, stride_ds, stride_dn, stride_dr,   # [splits of M, N, r]: scale * dropout(g, p).T @ z
    b_ptr, stride_bn, stride_br,               # [N, r]
    gb_ptr, stride_gs, stride_gbm, stride_gbr, # [slabs of N, M, r]: s * g @ b
    seed_ptr, dropped, scale,
    s, M, N, r, SPLIT_M,
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
        gb_ptrs = gb_ptr + slab.to(tl.int64) * stride_gs + rows * stride_gbm + offs_r[None, :] * stride_gbr

    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop
        g = tl.load(g_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        z = tl.load(z_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if HAS_B:
            gb = wide_dot(g, b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), g_ptr.dtype.element_ty, PRECISION)
            tl.store(gb_ptrs, (gb * s).to(gb_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
            gb_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_gbm
        if HAS_DROPOUT:
            g = tl.where(keep_mask(seed, offs_m, slab * BLOCK_N, dropped, BLOCK_M, BLOCK_N), g, 0.0)
        acc = wide_dot(g.T, z, acc, g_ptr.dtype.element_ty, PRECISION)
        g_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_gm
        z_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_zm

    dz_ptrs = dz_ptr + split.to(tl.int64) * stride_ds + offs_n[:, None].to(tl.int64) * stride_dn
    dz_ptrs += offs_r[None, :].to(tl.int64) * stride_dr
    tl.store(dz_ptrs, (acc * scale).to(dz_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_r[None, :])


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
    (M, N), r, (of_dy, of_x, of_b, of_xa, of_seed) = dy.shape, like.shape[1], layouts(dy, x, b, xa, seed)
    x_shape = (M, M if x is None else x.shape[1])
    check_operands(of_dy, p, of_seed, x=(of_x, x_shape), b=(of_b, (N, r)), xa=(of_xa, (M, r)))
    dxa = da = db = None
    if one_pass and b is not None and xa is not None:
        db, dxa = _walk_down(dy, xa, b, s)
    else:
        if b is not None:
            dxa = shrink(dy, b.t(), s)
        if xa is not None:
            db, _ = _walk_down(dy, xa)
    if dxa is not None and x is not None:
        da = _walk_down(x, dxa, p=p, seed=seed, transposed=True)[0].t()
    return (
        like.new_empty(0, r) if dxa is None else dxa,
        like.new_empty(0) if da is None else da,
        like.new_empty(0) if db is None else db,
    )


def lora_grad_a(dxa: Tensor, x: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``dxa.T @ dropout(x, p)``: [M, r], [M, K] -> [r, K] in dxa's dtype."""
    of_x, of_dxa, of_seed = layouts(x, dxa, seed)
    check_operands(of_x, p, of_seed, dxa=(of_dxa, (x.shape[0], dxa.shape[1])))
    return _walk_down(x, dxa, p=p, seed=seed, transposed=True)[0].t()


def _walk_down(
    g: Tensor,
    z: Tensor,
    b: Tensor | None = None,
    s: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``dropout(g, p).T @ z`` [N, r] in z's dtype (in transposed memory if asked) and ``s * g @ b`` in b's dtype."""
    (M, N), r = g.shape, z.shape[1]
    if M == 0 or N == 0 or r == 0:
        dz = z.new_zeros(r, N).t() if transposed else z.new_zeros(N, r)
        return dz, None if b is None else b.new_zeros(M, r)
    R = min(padded_rank(r), 128)
    t = tile("lora_grad" if g.element_size() == 2 else "lora_grad fp32", R)
    splits, slabs, launch = _launch(*layouts(g, z, b, seed), float(s), p, transposed, R, dot_precision(g), t)
    shape = (splits, r, N) if transposed else (splits, N, r)
    dz = z.new_empty(shape, dtype=z.dtype if splits == 1 else torch.float32)
    gb = None if b is None else b.new_empty(slabs, M, r, dtype=b.dtype if slabs == 1 else torch.float32)
    launch(g_ptr=g, z_ptr=z, dz_ptr=dz, b_ptr=b, gb_ptr=gb, seed_ptr=seed)
    if b is None or gb is None:
        dz = sum_splits((dz,), (z.dtype,))[0]
    else:
        dz, gb = sum_splits((dz, gb), (z.dtype, b.dtype))
    return dz.t() if transposed else dz, gb


@cached_by_layout
def _launch(
    g: Layout,
    z: Layout,
    b: Layout | None,
    seed: Layout | None,
    s: float,
    p: float,
    transposed: bool,
    R: int,
    PRECISION: str,
    t: Tile,
) -> tuple[int, int, Launch]:
    """Into how many ranges of rows and slabs of columns g is cut, and the launch."""
    (M, N), r = g.shape, z.shape[1]
    slabs, r_blocks = cdiv(N, t.BLOCK_N), cdiv(r, R)
    # A range of rows has at least four steps of the loop; two programs a multiprocessor hide each other's latency.
    SPLIT_M, splits = cut(M, t.BLOCK_M, parts_for(2 * multiprocessors(g.device), slabs * r_blocks, M, t.BLOCK_M))
    stride_dn, stride_dr = (1, N) if transposed else (r, 1)
    stride_bn, stride_br = (0, 0) if b is None else b.stride
    return splits, slabs, Launch(
        _lora_grad_kernel, (r_blocks, slabs, splits),
        stride_gm=g.stride[0], stride_gn=g.stride[1], stride_zm=z.stride[0], stride_zr=z.stride[1],
        stride_ds=N * r, stride_dn=stride_dn, stride_dr=stride_dr, stride_bn=stride_bn, stride_br=stride_br,
        stride_gs=M * r, stride_gbm=r, stride_gbr=1, dropped=dropped_levels(p), scale=dropout_scale(p), s=s,
        M=M, N=N, r=r, SPLIT_M=SPLIT_M, HAS_B=b is not None, HAS_DROPOUT=p != 0.0,
        PRECISION=PRECISION, BLOCK_R=R, **t.kwargs(),
    )  # fmt: skip
