"""The products of mixtures of experts: one launch for all experts, whose rows of x are sorted by expert.

The rows of expert e end before ``offs[e]``, numbers that are on the device and that no launch waits for: there are as
many programs as there could be tiles, and each finds its expert by counting the tiles of those before. Rows from
``offs[-1]`` on are those of one more expert, which has no weight; what is made of them is zero.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.dropout import dropout_scale, dropped_levels, keep_mask
from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import cdiv, next_power_of_2, padded_rank
from fastlora.kernels.lora_matmul import _adapters, _products
from fastlora.kernels.operands import check_operands
from fastlora.kernels.precision import dot_precision, wide_dot
from fastlora.kernels.tiles import Tile, tile


# fmt: off
@triton.jit
def _rows_of_experts(offs_ptr, M, E, BLOCK_E: tl.constexpr):
    """The first row of every expert and where its rows end, of E experts and the one without a weight."""
    # fmt: on
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offs_ptr + e, mask=e < E, other=0)
    starts = tl.load(offs_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
    ends = tl.where(e < E, tl.minimum(tl.maximum(ends, 0), M), tl.where(e == E, M, 0))
    starts = tl.where(e <= E, tl.minimum(tl.maximum(starts, 0), ends), 0)
    return starts, ends


# fmt: off
@triton.jit
def _expert_of_tile(offs_ptr, number, M, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of a tile of rows, its first row, and where the expert's rows end; beyond the last tile an expert
    that is not there."""
    # fmt: on
    e = tl.arange(0, BLOCK_E)
    starts, ends = _rows_of_experts(offs_ptr, M, E, BLOCK_E)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    behind = tl.cumsum(tiles, 0)
    expert = tl.sum(((behind <= number) & (e <= E)).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, starts + (number - behind + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, ends, 0), 0)


# fmt: off
@triton.jit
def _shrink_experts_kernel(
    x_ptr, stride_xm, stride_xk,
    a_ptr, stride_ae, stride_ar, stride_ak,
    out_ptr,                                   # [M, r]
    offs_ptr, seed_ptr, dropped, s,
    M, K, r, E,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
):
    # fmt: on
    pid_r, pid_m = tl.program_id(0) % RANK_BLOCKS, tl.program_id(0) // RANK_BLOCKS
    expert, first, end = _expert_of_tile(offs_ptr, pid_m, M, E, BLOCK_M, BLOCK_E)
    if expert > E:
        return
    length = tl.where(expert < E, K, 0)
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < end, offs_r < r
    x_tile = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + tl.arange(0, BLOCK_K)[None, :].to(tl.int64) * stride_xk
    a_tile = a_ptr + expert.to(tl.int64) * stride_ae + offs_r[None, :].to(tl.int64) * stride_ar
    a_tile += tl.arange(0, BLOCK_K)[:, None].to(tl.int64) * stride_ak
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, length, BLOCK_K):
        mask_k = k + tl.arange(0, BLOCK_K) < K
        x = tl.load(x_tile, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(a_tile, mask=mask_r[None, :] & mask_k[:, None], other=0.0)
        if HAS_DROPOUT:
            x = tl.where(keep_mask(tl.load(seed_ptr), offs_m, k, dropped, BLOCK_M, BLOCK_K), x, 0.0)
        acc = wide_dot(x, a, acc, x_ptr.dtype.element_ty, PRECISION)
        x_tile += tl.cast(BLOCK_K, tl.int64) * stride_xk
        a_tile += tl.cast(BLOCK_K, tl.int64) * stride_ak
    out_tile = out_ptr + offs_m[:, None].to(tl.int64) * r + offs_r[None, :]
    tl.store(out_tile, (acc * s).to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


def shrink_experts(
    x: Tensor, a: Tensor, offs: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """``s * dropout(x, p)[rows of e] @ a[e].T``: [M, K], [E, r, K] -> [M, r] in a's dtype."""
    (M, K), (E, r, _) = x.shape, a.shape
    of_x, of_a, of_offs, of_seed = layouts(x, a, offs, seed)
    check_operands(of_x, p, of_seed, a=(of_a, (E, r, K)), offs=(of_offs, (E,)))
    out = a.new_empty(M, r)
    if M == 0 or r == 0:
        return out
    BLOCK_R = min(padded_rank(r), 128)
    t = tile("shrink" if x.element_size() == 2 else "shrink fp32", BLOCK_R)
    launch = _launch_shrink(of_x, of_a, float(s), p, BLOCK_R, dot_precision(x), t)
    launch(x_ptr=x, a_ptr=a, out_ptr=out, offs_ptr=offs.contiguous(), seed_ptr=seed)
    return out


@cached_by_layout
def _launch_shrink(x: Layout, a: Layout, s: float, p: float, BLOCK_R: int, PRECISION: str, t: Tile) -> Launch:
    (M, K), (E, r, _) = x.shape, a.shape
    rank_blocks = cdiv(r, BLOCK_R)
    return Launch(
        _shrink_experts_kernel, (most_tiles(M, E, t.BLOCK_M) * rank_blocks,),
        stride_xm=x.stride[0], stride_xk=x.stride[1], stride_ae=a.stride[0], stride_ar=a.stride[1],
        stride_ak=a.stride[2], dropped=dropped_levels(p), s=s * dropout_scale(p), M=M, K=K, r=r, E=E,
        HAS_DROPOUT=p != 0.0, PRECISION=PRECISION, BLOCK_E=next_power_of_2(E + 1), BLOCK_R=BLOCK_R,
        RANK_BLOCKS=rank_blocks, **t.kwargs(),
    )  # fmt: skip


def most_tiles(M: int, E: int, BLOCK_M: int) -> int:
    """The most tiles of rows that M rows of E experts can make: the last tile of each expert need not be full."""
    return M // BLOCK_M + min(E + 1, M)


# fmt: off
@triton.jit
def _lora_matmul_experts_kernel(
    x_ptr, stride_xm, stride_xk,
    w_ptr, stride_we, stride_wn, stride_wk,
    y_ptr, xa_ptr,                             # [M, N], [M, r]
    b_ptr, stride_be, stride_bn, stride_br,
    bias_ptr,                                  # [E, N]
    offs_ptr, seed_ptr, dropped, scale,
    M, N, K, r, E,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # fmt: on
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    expert, first, end = _expert_of_tile(offs_ptr, pid_m, M, E, BLOCK_M, BLOCK_E)
    if expert > E:
        return
    of_expert = tl.minimum(expert, E - 1).to(tl.int64)
    has_weight = expert < E
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = bias_ptr
    if HAS_BIAS:
        bias += of_expert * N
    acc = _adapters(
        (xa_ptr,), ((r, 1),), (b_ptr + of_expert * stride_be,), ((stride_bn, stride_br),),
        (tl.where(has_weight, r, 0),), (seed_ptr,), (dropped,), (scale,), bias, offs_m, pid_n * BLOCK_N, end, N,
        1, y_ptr.dtype.element_ty, HAS_BIAS, (HAS_DROPOUT,), PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    acc = _products(
        acc, (x_ptr,), ((stride_xm, stride_xk),), (w_ptr + of_expert * stride_we,), ((stride_wn, stride_wk),),
        (tl.where(has_weight, K, 0),), offs_m, offs_n, end, N, 1, PRECISION, BLOCK_K,
    )  # fmt: skip
    acc = tl.where(has_weight, acc, 0.0)  # no bias either
    y_tile = y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < end)[:, None] & (offs_n < N)[None, :])


def lora_matmul_experts(
    x: Tensor,
    w: Tensor,
    xa: Tensor,
    b: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``x[rows of e] @ w[e].T + bias[e] + dropout(xa @ b[e].T, p)``: [M, K], [E, N, K], [M, r], [E, N, r] -> [M, N]."""
    (M, K), (E, N, _), r = x.shape, w.shape, xa.shape[1]
    of_x, of_w, of_xa, of_b, of_offs, of_bias, of_seed = layouts(x, w, xa, b, offs, bias, seed)
    check_operands(
        of_x, p, of_seed, w=(of_w, (E, N, K)), xa=(of_xa, (M, r)), b=(of_b, (E, N, r)), offs=(of_offs, (E,)),
        bias=(of_bias, (E, N)),
    )  # fmt: skip
    y = x.new_empty(M, N)
    if M == 0 or N == 0:
        return y
    if E == 0:
        return y.zero_()
    t = tile("lora_matmul" if x.element_size() == 2 else "lora_matmul fp32", cdiv(M, E), E * N, K)  # as many tiles
    launch = _launch_matmul(of_x, of_w, of_xa, of_b, bias is not None, p, dot_precision(x), t)
    launch(
        x_ptr=x, w_ptr=w, y_ptr=y, xa_ptr=xa.contiguous(), b_ptr=b, offs_ptr=offs.contiguous(), seed_ptr=seed,
        bias_ptr=None if bias is None else bias.contiguous(),
    )  # fmt: skip
    return y


@cached_by_layout
def _launch_matmul(
    x: Layout, w: Layout, xa: Layout, b: Layout, has_bias: bool, p: float, PRECISION: str, t: Tile
) -> Launch:
    (M, K), (E, N, _), r = x.shape, w.shape, b.shape[2]
    wide = xa.dtype != x.dtype or b.dtype != x.dtype  # two tiles of each wait in registers
    sizes = {name: size for name, size in t.kwargs().items() if name != "GROUP_M"}
    return Launch(
        _lora_matmul_experts_kernel, (most_tiles(M, E, t.BLOCK_M) * cdiv(N, t.BLOCK_N),),
        stride_xm=x.stride[0], stride_xk=x.stride[1], stride_we=w.stride[0], stride_wn=w.stride[1],
        stride_wk=w.stride[2], stride_be=b.stride[0], stride_bn=b.stride[1], stride_br=b.stride[2],
        dropped=dropped_levels(p), scale=dropout_scale(p), M=M, N=N, K=K, r=r, E=E,
        HAS_BIAS=has_bias, HAS_DROPOUT=p != 0.0, PRECISION=PRECISION, BLOCK_E=next_power_of_2(E + 1),
        BLOCK_R=min(padded_rank(r), 16 if wide else 32), **sizes,
    )  # fmt: skip


# fmt: off
@triton.jit
def _lora_grad_experts_kernel(
    g_ptr, stride_gm, stride_gk,               # [M, K]: x, or dy
    z_ptr,                                     # [M, r]: dxa, or xa
    out_ptr,                                   # [E, r, K]
    offs_ptr, seed_ptr, dropped, scale,
    M, K, r, E,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):
    # fmt: on
    pid_r, slab = tl.program_id(0) % RANK_BLOCKS, tl.program_id(0) // RANK_BLOCKS
    expert = tl.program_id(1)
    end = tl.minimum(tl.maximum(tl.load(offs_ptr + expert), 0), M)
    start = tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
    start = tl.minimum(tl.maximum(start, 0), end)
    offs_k = slab * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < r
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for m in range(start, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m, rows = offs_m < end, offs_m[:, None].to(tl.int64)
        g_tile = g_ptr + rows * stride_gm + offs_k[None, :].to(tl.int64) * stride_gk
        g = tl.load(g_tile, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        z = tl.load(z_ptr + rows * r + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if HAS_DROPOUT:
            g = tl.where(keep_mask(seed, offs_m, slab * BLOCK_N, dropped, BLOCK_M, BLOCK_N), g, 0.0)
        acc = wide_dot(g.T, z, acc, g_ptr.dtype.element_ty, PRECISION)
    out_tile = out_ptr + (expert.to(tl.int64) * r + offs_r[None, :]) * K + offs_k[:, None]
    tl.store(out_tile, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_r[None, :])


def lora_grad_experts(dxa: Tensor, x: Tensor, offs: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``dxa[rows of e].T @ dropout(x, p)[rows of e]``: [M, r], [M, K] -> [E, r, K] in dxa's dtype.

    A program owns columns of one expert's part and walks down its rows."""
    (M, K), r, E = x.shape, dxa.shape[1], offs.shape[0]
    of_x, of_dxa, of_offs, of_seed = layouts(x, dxa, offs, seed)
    check_operands(of_x, p, of_seed, dxa=(of_dxa, (M, r)), offs=(of_offs, (E,)))
    out = dxa.new_empty(E, r, K)
    if out.numel() == 0:
        return out
    R = min(padded_rank(r), 128)
    t = tile("lora_grad" if x.element_size() == 2 else "lora_grad fp32", R)
    launch = _launch_grad(of_x, of_dxa, E, p, R, dot_precision(x), t)
    launch(g_ptr=x, z_ptr=dxa.contiguous(), out_ptr=out, offs_ptr=offs.contiguous(), seed_ptr=seed)
    return out


@cached_by_layout
def _launch_grad(x: Layout, dxa: Layout, E: int, p: float, R: int, PRECISION: str, t: Tile) -> Launch:
    (M, K), r = x.shape, dxa.shape[1]
    rank_blocks = cdiv(r, R)
    return Launch(
        _lora_grad_experts_kernel, (rank_blocks * cdiv(K, t.BLOCK_N), E),
        stride_gm=x.stride[0], stride_gk=x.stride[1], dropped=dropped_levels(p), scale=dropout_scale(p),
        M=M, K=K, r=r, E=E, HAS_DROPOUT=p != 0.0, PRECISION=PRECISION, BLOCK_R=R, RANK_BLOCKS=rank_blocks,
        **t.kwargs(),
    )  # fmt: skip


# fmt: off
@triton.jit
def _combine_experts_kernel(
    rows_ptr, stride_rm, stride_rn,
    index_ptr, weights_ptr, out_ptr,           # [T, k], [T, k], [T, N]
    M, N, k,
    HAS_WEIGHTS: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    blocks = tl.cdiv(N, BLOCK_K)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_K], tl.float32)
    for j in range(k):
        row = tl.load(index_ptr + token * k + j)
        # Without `&` of a number and a block, which Triton 3.9's interpreter takes for an integer
        inside = offs_n < tl.where((row >= 0) & (row < M), N, 0)
        part = tl.load(rows_ptr + row * stride_rm + offs_n.to(tl.int64) * stride_rn, mask=inside, other=0.0)
        if HAS_WEIGHTS:
            acc += tl.load(weights_ptr + token * k + j).to(tl.float32) * part.to(tl.float32)
        else:
            acc += part.to(tl.float32)
    tl.store(out_ptr + token * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=offs_n < N)


def combine_experts(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """``(weights[..., None] * rows[index]).sum(1)``: [M, N], [T, k], [T, k] -> [T, N], summed in fp32."""
    N, (T, k) = rows.shape[1], index.shape
    of_rows, of_index, of_weights = layouts(rows, index, weights)
    check_operands(of_rows, index=(of_index, (T, k)), weights=(of_weights, (T, k)))
    out = rows.new_empty(T, N)
    if out.numel() == 0:
        return out
    launch = _launch_combine(of_rows, T, k, weights is not None, tile("swiglu", N))
    weights = None if weights is None else weights.contiguous()
    launch(rows_ptr=rows, index_ptr=index.contiguous(), weights_ptr=weights, out_ptr=out)
    return out


@cached_by_layout
def _launch_combine(rows: Layout, T: int, k: int, has_weights: bool, t: Tile) -> Launch:
    (M, N), block = rows.shape, t.BLOCK_K
    return Launch(
        _combine_experts_kernel, (T * cdiv(N, block),), stride_rm=rows.stride[0], stride_rn=rows.stride[1],
        M=M, N=N, k=k, HAS_WEIGHTS=has_weights, BLOCK_K=block, num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
