"""``y = x @ w.T + bias + dropout(xa @ b.T, p)``: the adapted layer, and its dx by transposed strides of w and b.

The adapter's product opens the accumulator, as the first K-iterations of one fp32 sum that the base product continues:
dropout's mask then falls on accumulator registers, y is rounded once, and small updates survive that rounding. Any rank
is taken in chunks, padded in registers; xa and b keep their own dtype in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import tiles
from fastlora.kernels.dropout import dropout_scale, dropped_levels, keep_mask
from fastlora.kernels.precision import dot_precision
from fastlora.kernels.tiles import multiprocessors, padded_rank, tile


@triton.jit
def _tile_position(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Walk down GROUP_M tiles before stepping right, so that programs running together share rows of x and w in L2."""
    group = pid // (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    in_group = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + in_group % height, in_group // height


# fmt: off
@triton.jit
def _adapter(
    xa_ptr, stride_xam, stride_xar,
    b_ptr, stride_bn, stride_br,
    bias_ptr, seed_ptr, dropped, scale,
    pid_m, pid_n, M, N, r,
    DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """``dropout(xa @ b.T, p) + bias`` of one tile, in fp32: where its accumulator starts."""
    # fmt: on
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    xa_ptrs = xa_ptr + offs_m[:, None].to(tl.int64) * stride_xam + offs_r[None, :].to(tl.int64) * stride_xar
    b_ptrs = b_ptr + offs_n[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, r, BLOCK_R, num_stages=2):
        mask_r = start + offs_r < r
        xa = tl.load(xa_ptrs, mask=(offs_m < M)[:, None] & mask_r[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(offs_n < N)[None, :] & mask_r[:, None], other=0.0)
        acc = tl.dot(xa.to(DTYPE), b.to(DTYPE), acc, input_precision=PRECISION)
        xa_ptrs += BLOCK_R * stride_xar
        b_ptrs += BLOCK_R * stride_br
    if HAS_DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), offs_m, pid_n * BLOCK_N, dropped, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * scale, 0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return acc


# fmt: off
@triton.jit
def _lora_matmul_kernel(
    x_ptr, stride_xm, stride_xk,
    w_ptr, stride_wn, stride_wk,
    xa_ptr, stride_xam, stride_xar,
    b_ptr, stride_bn, stride_br,
    y_ptr, stride_ym,
    bias_ptr, seed_ptr, dropped, scale,
    M, N, K, r,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):
    # fmt: on
    pid_m, pid_n = _tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    acc = _adapter(
        xa_ptr, stride_xam, stride_xar, b_ptr, stride_bn, stride_br, bias_ptr, seed_ptr, dropped, scale,
        pid_m, pid_n, M, N, r,
        x_ptr.dtype.element_ty, HAS_BIAS, HAS_DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


# fmt: off
@triton.jit
def _lora_matmul_tma_kernel(
    x_desc, w_desc, y_desc,
    xa_ptr, stride_xam, stride_xar,
    b_ptr, stride_bn, stride_br,
    bias_ptr, seed_ptr, dropped, scale,
    M, N, K, r, programs,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, W_TRANSPOSED: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):
    """The same sum where the hardware copies tiles itself: one program a multiprocessor walks over its tiles."""
    # fmt: on
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=FLATTEN):
        pid_m, pid_n = _tile_position(pid, tiles_m, tiles_n, GROUP_M)
        acc = _adapter(
            xa_ptr, stride_xam, stride_xar, b_ptr, stride_bn, stride_br, bias_ptr, seed_ptr, dropped, scale,
            pid_m, pid_n, M, N, r,
            x_desc.dtype, HAS_BIAS, HAS_DROPOUT, "ieee", BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([pid_m * BLOCK_M, k])
            w = w_desc.load([k, pid_n * BLOCK_N]) if W_TRANSPOSED else w_desc.load([pid_n * BLOCK_N, k]).T
            acc = tl.dot(x, w, acc)
        y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc.to(y_desc.dtype))


def lora_matmul(
    x: Tensor, w: Tensor, xa: Tensor, b: Tensor, bias: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """``x @ w.T + bias + dropout(xa @ b.T, p)``: [M, K], [N, K], [M, r], [N, r] -> [M, N] in x's dtype."""
    (M, K), N = x.shape, w.shape[0]
    y = x.new_empty(M, N)
    if M == 0 or N == 0:
        return y
    # [M, N]: what every program needs besides the base product's operands
    adapter = (xa, *xa.stride(), b, *b.stride())
    dropout = (seed, dropped_levels(p), dropout_scale(p))
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_DROPOUT": p != 0.0,
        "BLOCK_R": min(padded_rank(b.shape[1]), 32),
    }
    if tiles.has_tma() and _fits_tma(x, w, y):
        _launch_tma(x, w, y, adapter, bias, dropout, b.shape[1], flags)
        return y
    t = tile("lora_matmul" if x.element_size() == 2 else "lora_matmul fp32", M)
    grid = (triton.cdiv(M, t.BLOCK_M) * triton.cdiv(N, t.BLOCK_N),)
    _lora_matmul_kernel[grid](
        x, *x.stride(), w, *w.stride(), *adapter, y, y.stride(0), bias, *dropout, M, N, K, b.shape[1],
        PRECISION=dot_precision(x), **flags, **t.kwargs(),
    )  # fmt: skip
    return y


def lora_matmul_base_last(
    x: Tensor, w: Tensor, xa: Tensor, b: Tensor, bias: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """The same with the base product by the vendor's GEMM, which accumulates into the adapter's."""
    return lora_matmul(x[:, :0], w[:, :0], xa, b, bias, p, seed).addmm_(x, w.t())


def _launch_tma(x, w, y, adapter, bias, dropout, r, flags) -> None:
    (M, K), N = x.shape, w.shape[0]
    t = tile("lora_matmul tma dropout" if flags["HAS_DROPOUT"] else "lora_matmul tma", M)
    transposed = w.stride(1) != 1
    w, w_block = (w.t(), [t.BLOCK_K, t.BLOCK_N]) if transposed else (w, [t.BLOCK_N, t.BLOCK_K])
    descriptors = (
        TensorDescriptor(x, [M, K], [x.stride(0), 1], [t.BLOCK_M, t.BLOCK_K]),
        TensorDescriptor(w, list(w.shape), [w.stride(0), 1], w_block),
        TensorDescriptor(y, [M, N], [N, 1], [t.BLOCK_M, t.BLOCK_N]),
    )
    programs = min(multiprocessors(x.device), triton.cdiv(M, t.BLOCK_M) * triton.cdiv(N, t.BLOCK_N))
    _lora_matmul_tma_kernel[(programs,)](
        *descriptors, *adapter, bias, *dropout, M, N, K, r, programs,
        W_TRANSPOSED=transposed, FLATTEN=False, **flags, **t.kwargs(),
    )  # fmt: skip


def _fits_tma(x: Tensor, w: Tensor, y: Tensor) -> bool:
    """Whether x, w (or w.T) and y are 16-bit matrices of unit column stride with rows of whole 16 bytes."""

    def fits(t: Tensor) -> bool:
        return t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.stride(0) > 0 and t.data_ptr() % 16 == 0

    return x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] > 0 and all(map(fits, (x, y))) and (
        fits(w) or fits(w.t())
    )
