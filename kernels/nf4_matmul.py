"""``y = x @ (decode(packed) + s * b @ a).T + bias`` for few tokens: a 4-bit weight decoded where it is multiplied.

With up to some dozens of tokens the time is that of reading the weight, so it is read once, as 4 bits, never written.
It is the left operand of the product, y comes out transposed in registers: Hopper's tensor core takes only its left
operand from registers, and the weight has the rows that the instruction wants. What is multiplied is the code, rounded
once to x's dtype; a block's scale multiplies the product of the block, in fp32.

K is split so that every multiprocessor has work; each split adds the adapter's part of its own range of K,
(sum of xa_k) b = sum of (xa_k b), so that no split waits for another. Splits are added up in a fixed order (reduce.py).
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import PROGRAMS_4BIT, cdiv, cut, padded_rank, parts_for, takes_fused
from fastlora.kernels.nf4 import CODES, code_book, load_scales
from fastlora.kernels.nf4_lookup import LOOKUP_CONSTRAINTS, lookup_asm
from fastlora.kernels.operands import Packed, check_4bit, check_operands
from fastlora.kernels.precision import dot_precision, wide_dot
from fastlora.kernels.reduce import counters, store_sum
from fastlora.kernels.tiles import ByTile, Tile, multiprocessors


@triton.jit
def _codes(words, like, code_ptr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """The codes of int32[N, 8] words as [N, 64] in the dtype of ``like``, the eight first weights of the words before
    the eight second.

    In this order of K a thread of the tensor core's left operand needs whole words: nothing moves between threads.
    """
    if ASM is not None:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [words], dtype=(like.dtype,) * 8, is_pure=True, pack=2
        )
        even, odd = tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7))
        values = tl.reshape(tl.join(even, odd), words.shape[0], 8, 8)
    else:
        shifts = (tl.arange(0, 8) ^ 1) * 4  # the even weight of a byte is its high nibble
        values = tl.load(code_ptr + ((words[:, :, None] >> shifts) & 15)).to(like.dtype)
    return tl.reshape(tl.permute(values, 0, 2, 1), words.shape[0], 64)


# fmt: off
@triton.jit
def _nf4_matmul_kernel(
    x_ptr, stride_xm, stride_xk,
    packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, code_ptr,
    a_ptr, stride_ar, stride_ak,
    b_ptr, stride_bn, stride_br,
    bias_ptr, s,
    out_ptr, partial_ptr, counter_ptr,  # [M, N], and of splits of K fp32 [splits, M, N]
    M, N, K, r, splits, SPLIT_K,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
    HAS_ADAPTER: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # fmt: on
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid_n, split = tl.program_id(0), tl.program_id(1)
    start, stop = split * SPLIT_K, min(K, (split + 1) * SPLIT_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_k, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_n, mask_m, mask_r = offs_n < N, offs_m < M, offs_r < r
    x_ptrs = x_ptr + offs_m[None, :].to(tl.int64) * stride_xm + (start + offs_k)[:, None].to(tl.int64) * stride_xk
    row = offs_n * (K // BLOCK_K)
    word_ptrs = packed_ptr.to(tl.pointer_type(tl.int32)) + (row + start // BLOCK_K)[:, None] * 8 + tl.arange(0, 8)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if HAS_ADAPTER:
        a_ptrs = a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + (start + offs_k)[None, :].to(tl.int64) * stride_ak
        xa = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    step = row.to(tl.uint32) + start // BLOCK_K
    for _ in range(start, stop, BLOCK_K):
        x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0)
        words = tl.load(word_ptrs, mask=mask_n[:, None], other=0)
        block = step // (BLOCKSIZE // BLOCK_K)
        scale = load_scales(block, mask_n, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, NESTED, BLOCKSIZE2)
        w = _codes(words, x, code_ptr, ASM, CONSTRAINTS)
        reordered = tl.reshape(tl.permute(tl.reshape(x, 8, 8, BLOCK_M), 1, 0, 2), BLOCK_K, BLOCK_M)
        acc += tl.dot(w, reordered, input_precision=PRECISION) * scale[:, None]
        if HAS_ADAPTER:
            a = tl.load(a_ptrs, mask=mask_r[:, None], other=0.0)
            xa = wide_dot(a, x, xa, dtype, PRECISION)
            a_ptrs += tl.cast(BLOCK_K, tl.int64) * stride_ak
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * stride_xk
        word_ptrs += 8
        step += 1

    if HAS_ADAPTER:
        b_ptrs = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        acc = wide_dot(b, (xa * s).to(a_ptr.dtype.element_ty), acc, dtype, PRECISION)
    if HAS_BIAS and split == 0:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    offs = offs_m[None, :] * N + offs_n[:, None]  # 32 bits hold it, of few tokens: in half the registers
    mask, step = mask_n[:, None] & mask_m[None, :], tl.cast(M, tl.int64) * N
    store_sum(acc, out_ptr, partial_ptr, 0, offs, mask, split, splits, step, counter_ptr, pid_n, SPLIT)


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
    """``x @ (decode + s * b @ a).T + bias``: [M, K] -> [M, N] in x's dtype, for sizes that `takes_fused` takes and
    bytes that can be read as whole words."""
    absmax = absmax if code2 is not None else absmax.float()
    asm, M = tiles.has_ptx() and x.element_size() == 2, x.shape[0]
    found = layouts(packed, absmax, code2, absmax2, offset, x, a, b, bias)
    call = _call(found, (blocksize, blocksize2, quant_type, N, K), float(s), splits, asm, dot_precision(x))
    out = x.new_empty(M, N)
    if N == 0:
        return out
    launch, parts, blocks = call()
    partial_sums = None if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    launch(
        packed_ptr=packed, absmax_ptr=absmax, code2_ptr=code2, absmax2_ptr=absmax2, offset_ptr=offset,
        code_ptr=None if asm else code_book(quant_type, x.device), x_ptr=x, a_ptr=a, b_ptr=b,
        bias_ptr=None if bias is None else bias.contiguous(), out_ptr=out, partial_ptr=partial_sums,
        counter_ptr=None if parts == 1 else counters(x, blocks),
    )  # fmt: skip
    return out


@cached_by_layout
def _call(
    found: tuple[Any, ...], how: tuple[Any, ...], s: float, splits: int | None, asm: bool, PRECISION: str
) -> ByTile[tuple[Launch, int, int]]:
    *of_weight, x, a, b, bias = found
    weight = Packed(*of_weight, *how)
    check_4bit(weight)
    N, K, M, r = weight.N, weight.K, x.shape[0], 0 if a is None else a.shape[0]
    check_operands(weight.packed, x=(x, (M, K)), a=(a, (r, K)), b=(b, (N, r)), bias=(bias, (N,)))
    assert takes_fused(M, K, r, weight.blocksize) and weight.packed.offset % 4 == 0
    rows = "nf4_matmul" if x.dtype.itemsize == 2 else "nf4_matmul fp32"
    return ByTile(partial(_launch, weight, x, a, b, bias, s, splits, asm, PRECISION), rows, max(M, padded_rank(r)))


def _launch(
    weight: Packed,
    x: Layout,
    a: Layout | None,
    b: Layout | None,
    bias: Layout | None,
    s: float,
    splits: int | None,
    asm: bool,
    PRECISION: str,
    t: Tile,
) -> tuple[Launch, int, int]:
    """The launch, into how many parts K is split, and how many tiles there are."""
    N, K, M, r = weight.N, weight.K, x.shape[0], 0 if a is None else a.shape[0]
    blocks = cdiv(N, t.BLOCK_N)
    if splits is None:
        splits = parts_for(PROGRAMS_4BIT * multiprocessors(x.device), max(1, blocks), K, t.BLOCK_K)
    SPLIT_K, splits = cut(K, t.BLOCK_K, splits)
    (stride_ar, stride_ak), (stride_bn, stride_br) = ((0, 0) if each is None else each.stride for each in (a, b))
    launch = Launch(
        _nf4_matmul_kernel, (blocks, splits), stride_xm=x.stride[0], stride_xk=x.stride[1],
        stride_ar=stride_ar, stride_ak=stride_ak, stride_bn=stride_bn, stride_br=stride_br, s=s,
        M=M, N=N, K=K, r=r, splits=splits, SPLIT_K=SPLIT_K, SPLIT=splits > 1,
        BLOCKSIZE=weight.blocksize, BLOCKSIZE2=weight.blocksize2, NESTED=weight.code2 is not None,
        ASM=lookup_asm(CODES[weight.quant_type], x.dtype) if asm else None, CONSTRAINTS=LOOKUP_CONSTRAINTS,
        HAS_ADAPTER=a is not None, HAS_BIAS=bias is not None, PRECISION=PRECISION,
        BLOCK_M=padded_rank(M), BLOCK_R=padded_rank(r), **t.kwargs(),
    )  # fmt: skip
    return launch, splits, blocks
