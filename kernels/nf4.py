"""Decoding bitsandbytes' 4-bit weights, and merging an adapter on the way: ``w = decode(packed) + s * b @ a``.

A byte holds two weights, the even one in its high nibble; ``w = code[nibble] * absmax[flat index // blocksize]``, the
blocks running over the flat tensor, so they may cross rows. Nested statistics are themselves decoded,
``absmax = code2[absmax_u8] * absmax2[block // blocksize2] + offset``, in the same launch. All of it is fp32, rounded
once.

Source of the format: bitsandbytes' ``quantize_4bit``; of NF4: QLoRA, arXiv:2305.14314.
"""

import functools
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import cdiv, padded_rank
from fastlora.kernels.operands import Packed, check_4bit, check_operands
from fastlora.kernels.precision import round_to_tf32, wide_dot
from fastlora.kernels.tiles import ByTile, Tile

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
CODES = {"nf4": _NF4, "fp4": (*_FP4, *(-v or 0.0 for v in _FP4))}


@functools.cache
def code_book(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of a nibble: ``fp32[16]``."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


@functools.cache
def code_pairs(quant_type: str, device: torch.device) -> Tensor:
    """The two values of a byte, the even weight's (of the high nibble) in the low half: ``int64[256]``."""
    code = torch.tensor(CODES[quant_type], dtype=torch.float32)
    return torch.cartesian_prod(code, code).view(torch.int64).flatten().to(device)


@triton.jit
def load_scales(
    block, mask, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, NESTED: tl.constexpr, BLOCKSIZE2: tl.constexpr
):
    """The scale of each block, in fp32."""
    if NESTED:
        quantised = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale2 = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=mask, other=0.0)
        scale = tl.load(code2_ptr + quantised) * scale2 + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    return scale


# fmt: off
@triton.jit
def _decode_4bit_kernel(
    packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, pairs_ptr,
    a_ptr, stride_ar, stride_ak,
    b_ptr, stride_bn, stride_br,
    s, w_ptr, N, K, r, numel,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr,
    MERGE: tl.constexpr, LARGE_RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # fmt: on
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    pid_k, pid_n = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)

    mask_n, mask_k = (offs_n < N)[:, None], (offs_k < K)[None, :]

    if MERGE:
        a_ptrs = a_ptr + offs_k[None, :].to(tl.int64) * stride_ak
        b_ptrs = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn
        offs_r = tl.arange(0, BLOCK_R)
        a, b = _rank_chunk(a_ptrs, stride_ar, b_ptrs, stride_br, offs_r, r, mask_k, mask_n)
        delta = _add_product(b, a, tl.zeros([BLOCK_N, BLOCK_K], tl.float32), dtype, PRECISION)
        if LARGE_RANK:
            for start in tl.range(BLOCK_R, r, BLOCK_R, num_stages=2):
                a, b = _rank_chunk(a_ptrs, stride_ar, b_ptrs, stride_br, start + offs_r, r, mask_k, mask_n)
                delta = _add_product(b, a, delta, dtype, PRECISION)

    if WORDS:  # a thread loads WORDS words of 8 weights, all of one block, with one scale
        GROUP: tl.constexpr = 8 * WORDS
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        offs_g = pid_k * GROUPS + tl.arange(0, GROUPS)
        group = offs_n[:, None] * (K // GROUP) + offs_g[None, :]
        mask = mask_n & (offs_g < K // GROUP)[None, :]
        if not MERGE:
            mask &= group < numel // GROUP
        word_ptrs = packed_ptr.to(tl.pointer_type(tl.uint32)) + (group * WORDS)[:, :, None] + tl.arange(0, WORDS)
        words = tl.load(word_ptrs, mask=mask[:, :, None], other=0)
        block = group.to(tl.uint32) // (BLOCKSIZE // GROUP)  # unsigned division is a shift
        scale = load_scales(block, mask, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, NESTED, BLOCKSIZE2)
        bytes = (words[:, :, :, None] >> (tl.arange(0, 4) * 8)) & 255
        bytes = tl.reshape(bytes.to(tl.int32), BLOCK_N * BLOCK_K // 2)
        pairs = tl.gather(tl.load(pairs_ptr + tl.arange(0, 256)), bytes, 0)
        values = tl.join(pairs.to(tl.int32), (pairs >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        w = tl.reshape(tl.reshape(values, BLOCK_N, GROUPS, GROUP) * scale[:, :, None], BLOCK_N, BLOCK_K)
    else:  # rows that are no whole words: one weight at a time
        flat = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        byte = tl.load(packed_ptr + flat // 2, mask=mask_n & mask_k, other=0).to(tl.int32)
        scale = load_scales(
            flat // BLOCKSIZE, mask_n & mask_k, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, NESTED, BLOCKSIZE2
        )
        code_ptr = pairs_ptr.to(tl.pointer_type(tl.float32))
        w = tl.load(code_ptr + 2 * byte + (flat % 2).to(tl.int32)) * scale

    if MERGE:
        w = tl.fma(delta, s, w)
    else:
        mask_n &= offs_n.to(tl.int64)[:, None] * K + offs_k[None, :] < numel
    w_ptrs = w_ptr + pid_n.to(tl.int64) * BLOCK_N * K + (tl.arange(0, BLOCK_N)[:, None] * K + offs_k[None, :])
    tl.store(w_ptrs, w.to(dtype), mask=mask_n & mask_k)


@triton.jit
def _rank_chunk(a_ptrs, stride_ar, b_ptrs, stride_br, offs_r, r, mask_k, mask_n):
    """The rows offs_r of a and columns offs_r of b."""
    mask_r = offs_r < r
    a = tl.load(a_ptrs + offs_r[:, None].to(tl.int64) * stride_ar, mask=mask_r[:, None] & mask_k, other=0.0)
    b = tl.load(b_ptrs + offs_r[None, :].to(tl.int64) * stride_br, mask=mask_r[None, :] & mask_n, other=0.0)
    return a, b


@triton.jit
def _add_product(b, a, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + b @ a``, exact enough to be rounded to DTYPE: TF32 has three bits more than bf16, none more than fp16."""
    if tl.float16 == DTYPE:
        acc = wide_dot(b, a, acc, DTYPE, PRECISION)
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        acc = tl.dot(b, a, acc)
    else:
        b, a = b.to(tl.float32), a.to(tl.float32)
        if PRECISION == "tf32":
            b, a = round_to_tf32(b), round_to_tf32(a)
        acc = tl.dot(b, a, acc, input_precision=PRECISION)
    return acc


def decode_4bit(
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
    dtype: torch.dtype,
    a: Tensor | None,
    b: Tensor | None,
    s: float,
) -> Tensor:
    """Decode to ``dtype[N, K]``; with an adapter a [r, K], b [N, r] ``decode + s * b @ a``, rounded once."""
    absmax = absmax if code2 is not None else absmax.float()
    found, s = layouts(packed, absmax, code2, absmax2, offset, a, b), float(s)
    call = _call(found, (blocksize, blocksize2, quant_type, N, K), dtype, s, tiles.has_tf32())
    w = packed.new_empty(N, K, dtype=dtype)
    if call is not None:
        call()(
            packed_ptr=packed, absmax_ptr=absmax, code2_ptr=code2, absmax2_ptr=absmax2, offset_ptr=offset,
            pairs_ptr=code_pairs(quant_type, packed.device), a_ptr=a, b_ptr=b, w_ptr=w,
        )  # fmt: skip
    return w


@cached_by_layout
def _call(
    found: tuple[Any, ...], how: tuple[Any, ...], dtype: torch.dtype, s: float, tf32: bool
) -> ByTile[Launch] | None:
    """None where there is nothing to decode."""
    *of_weight, a, b = found
    weight = Packed(*of_weight, *how)
    check_4bit(weight)
    N, K, r = weight.N, weight.K, 0 if a is None or b is None else a.shape[0]
    if r:
        check_operands(weight.packed, a=(a, (r, K)), b=(b, (N, r)))
    if N * K == 0:
        return None
    row = K if r else N * K  # alone, the flat tensor can be cut anywhere
    WORDS = 4 if row % 32 == 0 and weight.blocksize % 32 == 0 else 1 if row % 8 == 0 else 0
    if weight.packed.offset % 4:
        WORDS = 0
    rows = "decode_4bit narrow" if WORDS < 4 else "decode_4bit merged" if r else "decode_4bit"
    PRECISION = "tf32" if dtype == torch.bfloat16 and tf32 else "ieee"
    return ByTile(partial(_launch, weight, a, b, r, s, WORDS, PRECISION), rows, 0)


def _launch(
    weight: Packed, a: Layout | None, b: Layout | None, r: int, s: float, WORDS: int, PRECISION: str, t: Tile
) -> Launch:
    N, K, numel = weight.N, weight.K, weight.N * weight.K
    if not r and WORDS:
        K = t.BLOCK_K * cdiv(numel, t.BLOCK_K * t.BLOCK_N << 15)  # at most 2^15 tiles of rows
        N = cdiv(numel, K)
    (stride_ar, stride_ak), (stride_bn, stride_br) = ((0, 0) if each is None else each.stride for each in (a, b))
    BLOCK_R = min(padded_rank(r), 32 if PRECISION == "tf32" else 16)
    return Launch(
        _decode_4bit_kernel, (cdiv(K, t.BLOCK_K), cdiv(N, t.BLOCK_N)),
        stride_ar=stride_ar, stride_ak=stride_ak, stride_bn=stride_bn, stride_br=stride_br, s=s, N=N, K=K, r=r,
        numel=numel, BLOCKSIZE=weight.blocksize, BLOCKSIZE2=weight.blocksize2, NESTED=weight.code2 is not None,
        WORDS=WORDS, MERGE=r > 0, LARGE_RANK=r > BLOCK_R, PRECISION=PRECISION, BLOCK_R=BLOCK_R,
        enable_fp_fusion=False,  # a fused code2 * absmax2 + offset is not bitsandbytes' rounding
        **t.kwargs(),
    )  # fmt: skip
