"""``torch.ops.fastlora.nf4_matmul``: a linear layer on a 4-bit weight with its adapter merged, whole."""

import torch
from torch import Tensor

from fastlora.ops import _op


@_op(
    "nf4_matmul(Tensor x, Tensor packed, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, int blocksize, "
    "int blocksize2, str quant_type, int N, int K, Tensor? a, Tensor? b, float s, Tensor? bias=None) -> Tensor",
    fake=lambda x, packed, absmax, code2, absmax2, offset, blocksize, blocksize2, quant_type, N, *_, **__: x.new_empty(
        x.shape[0], N
    ),
)
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
) -> Tensor:
    """``x @ (decode + s * b @ a).T + bias``: [M, K] -> [M, N] in x's dtype, for NF4 and FP4, without dropout.

    A GPU decodes inside the product for few tokens, and into a merged weight for many.
    """
    weight = packed, absmax, code2, absmax2, offset, blocksize, blocksize2, quant_type, N, K
    w = torch.ops.fastlora.decode_4bit(*weight, x.dtype, a, b, s)
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())
