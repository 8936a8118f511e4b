"""The backward of a DoRA layer's scaling of its columns: ``dz = scale * dy`` and ``dscale = (dy * y).sum(0) / scale``.

One pass over dy and y: a program owns a slab of columns and a range of rows. Parts of sums are added up in a fixed
order (reduce.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import cdiv, cut, parts_for
from fastlora.kernels.operands import check_operands
from fastlora.kernels.reduce import counters, store_sum
from fastlora.kernels.tiles import Tile, multiprocessors, tile


# fmt: off
@triton.jit
def _dora_grad_kernel(
    dy_ptr, stride_dm, stride_dn,
    y_ptr, stride_ym, stride_yn,
    scale_ptr, dz_ptr,  # [N], [M, N]
    dscale_ptr, partial_ptr, counter_ptr,  # [N], and of splits of M [splits, N]
    M, N, splits, SPLIT_M,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    split = tl.program_id(1)
    stop = min(M, (split + 1) * SPLIT_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=1.0).to(tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for m in range(split * SPLIT_M, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask = (rows < stop)[:, None] & mask_n[None, :]
        rows, columns = rows[:, None].to(tl.int64), offs_n[None, :].to(tl.int64)
        dy = tl.load(dy_ptr + rows * stride_dm + columns * stride_dn, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + rows * stride_ym + columns * stride_yn, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(dy * y, axis=0)
        tl.store(dz_ptr + rows * N + columns, (dy * scale[None, :]).to(dz_ptr.dtype.element_ty), mask=mask)
    store_sum(
        total / scale, dscale_ptr, partial_ptr, 0, offs_n, mask_n,
        split, splits, N, counter_ptr, tl.program_id(0), SPLIT,
    )  # fmt: skip


def dora_grad(dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``scale * dy`` [M, N] in dy's dtype, and ``(dy * y / scale).sum(0)`` [N] in fp32."""
    M, N = dy.shape
    of_dy, of_y, of_scale = layouts(dy, y, scale)
    check_operands(of_dy, y=(of_y, (M, N)), scale=(of_scale, (N,)))
    dz = dy.new_empty(M, N)
    if M == 0 or N == 0:
        return dz, dy.new_zeros(N, dtype=torch.float32)
    t = tile("dora_grad", N)
    splits, launch = _launch(of_dy, of_y, of_scale, t)
    dscale = dy.new_empty(N, dtype=torch.float32)
    partial = None if splits == 1 else dscale.new_empty(splits, N)
    arrivals = None if splits == 1 else counters(dy, cdiv(N, t.BLOCK_N))
    sums = {"dscale_ptr": dscale, "partial_ptr": partial, "counter_ptr": arrivals}
    launch(dy_ptr=dy, y_ptr=y, scale_ptr=scale.contiguous(), dz_ptr=dz, **sums)
    return dz, dscale


@cached_by_layout
def _launch(dy: Layout, y: Layout, scale: Layout, t: Tile) -> tuple[int, Launch]:
    """Into how many ranges of rows dy is cut, and the launch."""
    (M, N), slabs = dy.shape, cdiv(dy.shape[1], t.BLOCK_N)
    SPLIT_M, splits = cut(M, t.BLOCK_M, parts_for(4 * multiprocessors(dy.device), slabs, M, t.BLOCK_M))
    return splits, Launch(
        _dora_grad_kernel, (slabs, splits),
        stride_dm=dy.stride[0], stride_dn=dy.stride[1], stride_ym=y.stride[0], stride_yn=y.stride[1],
        M=M, N=N, splits=splits, SPLIT_M=SPLIT_M, SPLIT=splits > 1, **t.kwargs(),
    )  # fmt: skip
