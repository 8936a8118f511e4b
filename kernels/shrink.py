"""``xa = s * dropout(x, p) @ a.T``: x goes down to the rank, in one read of x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.dropout import dropout_scale, dropped_levels, keep_mask
from fastlora.kernels.precision import dot_precision, wide_dot
from fastlora.kernels.reduce import sum_splits
from fastlora.kernels.tiles import multiprocessors, padded_rank, tile


# fmt: off
@triton.jit
def _shrink_kernel(
    x_ptr, stride_xm, stride_xk,
    a_ptr, stride_ar, stride_ak,
    out_ptr, stride_os, stride_om, stride_or,  # one [M, r] for each split of K
    seed_ptr, dropped,
    s, M, K, r, SPLIT_K,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # fmt: on
    pid_r, pid_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = split * SPLIT_K, min(K, (split + 1) * SPLIT_K)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = start + tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m < M, offs_r < r
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    a_ptrs = a_ptr + offs_r[None, :].to(tl.int64) * stride_ar + offs_k[:, None].to(tl.int64) * stride_ak
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(start, stop, BLOCK_K):
        mask_k = k + tl.arange(0, BLOCK_K) < stop
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)
        if HAS_DROPOUT:
            x = tl.where(keep_mask(seed, offs_m, k, dropped, BLOCK_M, BLOCK_K), x, 0.0)
        acc = wide_dot(x, a, acc, x_ptr.dtype.element_ty, PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak

    out_ptrs = out_ptr + split.to(tl.int64) * stride_os + offs_m[:, None].to(tl.int64) * stride_om
    out_ptrs += offs_r[None, :] * stride_or
    tl.store(out_ptrs, (acc * s).to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


def shrink(x: Tensor, a: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``(s * dropout(x, p) @ a.T).to(a.dtype)``: [M, K], [r, K] -> [M, r], summed in fp32."""
    (M, K), r = x.shape, a.shape[0]
    R = padded_rank(r)
    BLOCK_R = min(R, 128)
    t = tile("shrink" if x.element_size() == 2 else "shrink fp32", R)
    blocks = triton.cdiv(M, t.BLOCK_M) * triton.cdiv(r, BLOCK_R)
    if K == 0 or blocks == 0:
        return a.new_zeros(M, r)
    # A split has at least four steps of the loop; two programs a multiprocessor hide the latency of each other's loads.
    wanted = max(1, min(2 * multiprocessors(x.device) // blocks, K // (4 * t.BLOCK_K)))
    SPLIT_K = triton.cdiv(triton.cdiv(K, wanted), t.BLOCK_K) * t.BLOCK_K
    splits = triton.cdiv(K, SPLIT_K)
    out = a.new_empty(splits, M, r, dtype=a.dtype if splits == 1 else torch.float32)
    grid = (triton.cdiv(r, BLOCK_R), triton.cdiv(M, t.BLOCK_M), splits)
    _shrink_kernel[grid](
        x, *x.stride(), a, *a.stride(), out, *out.stride(), seed, dropped_levels(p),
        s * dropout_scale(p), M, K, r, SPLIT_K,
        HAS_DROPOUT=p != 0.0, PRECISION=dot_precision(x), BLOCK_R=BLOCK_R, **t.kwargs(),
    )  # fmt: skip
    return sum_splits(out, a.dtype)
