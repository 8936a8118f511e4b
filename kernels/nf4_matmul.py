"""``y = x @ (decode(packed) + s * b @ a).T + bias`` for few tokens: a 4-bit weight decoded where it is multiplied.

With up to some dozens of tokens the time is that of reading the weight, so it is read once, as 4 bits, never written.
It is the left operand of the product, y comes out transposed in registers: Hopper's tensor core takes only its left
operand from registers, and the weight has the rows that the instruction wants. K is split so that every multiprocessor
has work; each split adds the adapter's part of its own range of K, (sum of xa_k) b = sum of (xa_k b), so that no split
waits for another. Splits are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.nf4 import code_book, load_scales
from fastlora.kernels.precision import dot_precision, wide_dot
from fastlora.kernels.reduce import sum_splits
from fastlora.kernels.tiles import multiprocessors, padded_rank, tile


# fmt: off
@triton.jit
def _nf4_matmul_kernel(
    x_ptr, stride_xm, stride_xk,
    packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, code_ptr,
    a_ptr, stride_ar, stride_ak,
    b_ptr, stride_bn, stride_br,
    bias_ptr, s,
    out_ptr, stride_os, stride_om,  # one [M, N] for each split of K
    M, N, K, r, SPLIT_K,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr,
    HAS_ADAPTER: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # fmt: on
    GROUP: tl.constexpr = 32  # weights that a thread loads at once, in four words, with one scale
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    pid_n, split = tl.program_id(0), tl.program_id(1)
    start, stop = split * SPLIT_K, min(K, (split + 1) * SPLIT_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_k, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_n, mask_m, mask_r = offs_n < N, offs_m < M, offs_r < r
    x_ptrs = x_ptr + offs_m[None, :].to(tl.int64) * stride_xm + (start + offs_k)[:, None].to(tl.int64) * stride_xk
    shifts = (tl.arange(0, 8) ^ 1) * 4  # the even weight of a byte is its high nibble

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if HAS_ADAPTER:
        a_ptrs = a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + (start + offs_k)[None, :].to(tl.int64) * stride_ak
        xa = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for k in range(start, stop, BLOCK_K):
        mask_k = k + offs_k < stop
        x = tl.load(x_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        group = offs_n[:, None] * (K // GROUP) + (k // GROUP + tl.arange(0, GROUPS))[None, :]
        mask = mask_n[:, None] & (k // GROUP + tl.arange(0, GROUPS) < stop // GROUP)[None, :]
        word_ptrs = packed_ptr.to(tl.pointer_type(tl.int32)) + (group * 4)[:, :, None] + tl.arange(0, 4)
        words = tl.load(word_ptrs, mask=mask[:, :, None], other=0)
        scale = load_scales(
            group // (BLOCKSIZE // GROUP), mask, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, NESTED, BLOCKSIZE2
        )
        nibbles = (words[:, :, :, None] >> shifts) & 15
        # Not tl.gather: it comes in a layout of its own, and every weight would go through shared memory by itself.
        w = tl.reshape(tl.load(code_ptr + nibbles) * scale[:, :, None, None], BLOCK_N, BLOCK_K)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION)
        if HAS_ADAPTER:
            a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            xa = wide_dot(a, x, xa, x_ptr.dtype.element_ty, PRECISION)
            a_ptrs += BLOCK_K * stride_ak
        x_ptrs += BLOCK_K * stride_xk

    if HAS_ADAPTER:
        b_ptrs = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        acc = wide_dot(b, (xa * s).to(a_ptr.dtype.element_ty), acc, x_ptr.dtype.element_ty, PRECISION)
    if HAS_BIAS and split == 0:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + split.to(tl.int64) * stride_os + offs_m[None, :].to(tl.int64) * stride_om + offs_n[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


MAX_TOKENS, MAX_RANK = 64, 128  # what the accumulators of one program hold


def has_kernel(M: int, packed: Tensor, K: int, blocksize: int, r: int = 0) -> bool:
    """Whether `nf4_matmul` takes this: rows of whole groups of 32 weights, few tokens, no huge rank."""
    aligned = K % 32 == 0 and blocksize % 32 == 0 and packed.data_ptr() % 4 == 0
    return aligned and 0 < M <= MAX_TOKENS and r <= MAX_RANK


def nf4_matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    blocksize2: int,
    quant_type: str,
    N: int,
    K: int,
    a: Tensor | None,
    b: Tensor | None,
    s: float,
    bias: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """``x @ (decode + s * b @ a).T + bias``: [M, K] -> [M, N] in x's dtype, for sizes that `has_kernel` takes."""
    M, r = x.shape[0], 0 if a is None else a.shape[0]
    assert has_kernel(M, packed, K, blocksize, r)
    t = tile("nf4_matmul" if x.element_size() == 2 else "nf4_matmul fp32", max(M, padded_rank(r)))
    blocks = triton.cdiv(N, t.BLOCK_N)
    if splits is None:  # a split has at least four steps of the loop
        splits = max(1, min(4 * multiprocessors(x.device) // blocks, K // (4 * t.BLOCK_K)))
    SPLIT_K = triton.cdiv(triton.cdiv(K, splits), t.BLOCK_K) * t.BLOCK_K
    splits = triton.cdiv(K, SPLIT_K)
    out = x.new_empty(splits, M, N, dtype=x.dtype if splits == 1 else torch.float32)
    _nf4_matmul_kernel[(blocks, splits)](
        x, *x.stride(), packed, absmax if code2 is not None else absmax.float(), code2, absmax2, offset,
        code_book(quant_type, packed.device), a, *((0, 0) if a is None else a.stride()),
        b, *((0, 0) if b is None else b.stride()), bias, s, out, *out.stride()[:2], M, N, K, r, SPLIT_K,
        BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, NESTED=code2 is not None,
        HAS_ADAPTER=a is not None, HAS_BIAS=bias is not None, PRECISION=dot_precision(x),
        BLOCK_M=max(16, triton.next_power_of_2(M)), BLOCK_R=padded_rank(r),
        enable_fp_fusion=False,  # decodes to the same bits as nf4.decode_4bit
        **t.kwargs(),
    )  # fmt: skip
    return sum_splits(out, x.dtype)
