"""How a product of tiles is computed where its operands are fp32, or of different dtypes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles


def dot_precision(x: Tensor) -> str:
    """``"ieee"`` unless the user allowed TF32 for fp32 products (``torch.set_float32_matmul_precision``)."""
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact or not tiles.has_tf32() else "tf32"


@triton.jit
def wide_dot(x, w, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + x @ w`` beside activations of DTYPE, without rounding an operand to it that is wider.

    PEFT computes fp32 adapters of a half-precision base in fp32. On a tensor core they are the sum of a high and a low
    bf16 part, 16 bits, and lose the product of two low parts. bf16 beside fp16 too, and not a scaled low part in fp16:
    gradients of adapters leave fp16's range of exponents, and an fp16 tile is exact in two bf16 parts.
    """
    if tl.float32 == DTYPE:
        acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision=PRECISION)
    elif x.dtype == DTYPE and w.dtype == DTYPE:
        acc = tl.dot(x, w, acc)
    else:
        x_high, w_high = x.to(tl.bfloat16), w.to(tl.bfloat16)
        acc = tl.dot(x_high, w_high, acc)
        if x.dtype != tl.bfloat16:
            acc = tl.dot(_low_part(x, x_high), w_high, acc)
        if w.dtype != tl.bfloat16:
            acc = tl.dot(x_high, _low_part(w, w_high), acc)
    return acc


@triton.jit
def round_to_tf32(x):
    """To the nearest number that a tensor core takes as TF32: it cuts off the last 13 bits, which shrinks every one."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN, whose bits may all be set


@triton.jit
def _low_part(x, high):
    return (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
