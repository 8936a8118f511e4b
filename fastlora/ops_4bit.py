"""``torch.ops.fastlora.lora_matmul_4bit`` and ``nf4_matmul``: products with 4-bit weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.fourbit import WEIGHT_TENSORS, Weight4bit
from fastlora.ops import _op, overload


def lora_matmul_4bit(
    x: Sequence[Tensor],
    weights: Sequence[Weight4bit],
    xa: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Tensor | None,
    p: Sequence[float],
    seed: Sequence[Tensor | None],
    transposed: bool,
    scale: Tensor | None = None,
) -> Tensor:
    """``sum(lora_matmul(x_i, w_i, xa_i, b_i, None, p_i, seed_i) for ...) + bias`` for 4-bit w_i, their transposes if
    ``transposed``: y of a layer, or dx of several layers of one x. Its columns times ``scale`` if that is given."""
    return _lora_matmul_4bit(x, *lists_of(weights), xa, b, bias, p, seed, transposed, scale)


def lists_of(weights: Sequence[Weight4bit]) -> tuple[list[Tensor | None], list[int], list[str]]:
    """``weights``, ``sizes`` and ``quant_types`` of the op."""
    tensors: list[Any] = [t for w in weights for t in w[:WEIGHT_TENSORS]]
    sizes = [n for w in weights for n in (w.blocksize, w.blocksize2, w.N, w.K)]
    return tensors, sizes, [w.quant_type for w in weights]


@_op(
    "lora_matmul_4bit(Tensor[] x, Tensor?[] weights, int[] sizes, str[] quant_types, Tensor[] xa, Tensor[] b, "
    "Tensor? bias, float[] p, Tensor?[] seed, bool transposed, Tensor? scale=None) -> Tensor",
    fake=lambda x, weights, sizes, quant_types, xa, b, *_: x[0].new_empty(x[0].shape[0], b[0].shape[0]),
)
def _by_decoding(
    x: list[Tensor],
    weights: list[Tensor | None],
    sizes: list[int],
    quant_types: list[str],
    xa: list[Tensor],
    b: list[Tensor],
    bias: Tensor | None,
    p: list[float],
    seed: list[Tensor | None],
    transposed: bool,
    scale: Tensor | None = None,
) -> Tensor:
    """`lora_matmul_4bit` on whole decoded weights. The CPU kernel instead decodes one panel at a time, in cache."""
    ws = []
    for i, quant_type in enumerate(quant_types):
        blocksize, blocksize2, N, K = sizes[4 * i : 4 * i + 4]
        fields = (
            *weights[WEIGHT_TENSORS * i : WEIGHT_TENSORS * i + WEIGHT_TENSORS],
            blocksize,
            blocksize2,
            quant_type,
            N,
            K,
        )
        w = torch.ops.fastlora.decode_4bit(*fields, x[0].dtype, None, None, 1.0)
        ws.append(w.t() if transposed else w)
    if len(ws) == 1:
        return torch.ops.fastlora.lora_matmul(x[0], ws[0], xa[0], b[0], bias, p[0], seed[0], scale)
    y = torch.ops.fastlora.lora_matmul_group(x, ws, xa, b, p, seed)
    y = y if bias is None else y.add_(bias)
    return y if scale is None else y.mul_(scale)


_lora_matmul_4bit = overload("lora_matmul_4bit")


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

    A GPU decodes inside the product for few tokens, and into a merged weight for many. A CPU adds the adapter's
    product instead of merging it.
    """
    weight = Weight4bit(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, quant_type, N, K)
    if x.device.type == "cpu":
        if a is None or b is None:
            a, b = x.new_empty(0, K), x.new_empty(N, 0)
        xa = torch.ops.fastlora.shrink(x, a, s)
        return lora_matmul_4bit([x], [weight], [xa], [b], bias, [0.0], [None], False)
    w = torch.ops.fastlora.decode_4bit(*weight, x.dtype, a, b, s)
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())
