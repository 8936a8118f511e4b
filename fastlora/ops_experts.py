"""The ops of mixtures of experts: the products of `fastlora.ops` with one weight and one adapter for each expert.

The rows of x are sorted by expert: those of expert e end before row ``offs[e]``, as for ``F.grouped_mm``. An expert
without rows costs nothing. Rows from ``offs[-1]`` on belong to no expert; what is made of them is zero.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import _drop, _op
from fastlora.reference import dropout_scale


def rows_of_experts(offs: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they are."""
    first = 0
    for expert, end in enumerate(offs.tolist()):
        if not first <= end <= rows:
            raise RuntimeError(
                f"fastlora: offs must not decrease or exceed {rows} rows, got {end} after {first} for expert {expert}"
            )
        if end > first:
            yield expert, slice(first, end)
        first = end


@_op(
    "shrink_experts(Tensor x, Tensor a, Tensor offs, float s, float p=0.0, Tensor? seed=None) -> Tensor",
    fake=lambda x, a, *_, **__: a.new_empty(x.shape[0], a.shape[1]),
)
def shrink_experts(x: Tensor, a: Tensor, offs: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s * dropout(x, p)[rows of e] @ a[e].T``: [S, K], [E, r, K] -> [S, r] in a's dtype."""
    x = _drop(x, p, seed)
    xa = a.new_zeros(x.shape[0], a.shape[1])
    for expert, rows in rows_of_experts(offs, x.shape[0]):
        xa[rows] = torch.ops.fastlora.shrink(x[rows], a[expert], s * dropout_scale(p))
    return xa


@_op(
    "lora_matmul_experts(Tensor x, Tensor w, Tensor xa, Tensor b, Tensor offs, Tensor? bias=None, float p=0.0, "
    "Tensor? seed=None) -> Tensor",
    fake=lambda x, w, *_, **__: x.new_empty(x.shape[0], w.shape[1]),
)
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
    """``x[rows of e] @ w[e].T + bias[e] + dropout(xa @ b.T, p)[rows of e]``: [S, K], [E, N, K], [S, r], [E, N, r]
    -> [S, N] in x's dtype. dx is the same call with w and b transposed."""
    y = x.new_zeros(x.shape[0], w.shape[1])
    for expert, rows in rows_of_experts(offs, x.shape[0]):
        bias_of = None if bias is None else bias[expert]
        if p == 0.0:
            y[rows] = torch.ops.fastlora.lora_matmul(x[rows], w[expert], xa[rows], b[expert], bias_of)
        else:
            y[rows] = torch.mm((xa[rows] * dropout_scale(p)).to(x.dtype), b[expert].to(x.dtype).t())
    if p == 0.0:
        return y
    y = _drop(y, p, seed, inplace=True)
    for expert, rows in rows_of_experts(offs, x.shape[0]):
        y[rows].addmm_(x[rows], w[expert].t())
        if bias is not None:
            y[rows] += bias[expert]
    return y


@_op(
    "lora_matmul_experts_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, "
    "int blocksize, int blocksize2, str quant_type, int N, int K, Tensor xa, Tensor b, Tensor offs, Tensor? bias, "
    "float p, Tensor? seed, bool transposed) -> Tensor",
    fake=lambda x, *args: x.new_empty(x.shape[0], args[11].shape[1]),
)
def lora_matmul_experts_4bit(x: Tensor, *args: Any) -> Tensor:
    """`lora_matmul_experts` with a 4-bit stack of weights, ``w[E * N, K]`` in memory: each expert's [N, K], or its
    transpose if ``transposed``. The CPU kernel decodes the weights of experts that have rows, a panel at a time."""
    (*weight, N, K), (xa, b, offs, *rest, transposed) = args[:10], args[10:]
    w = torch.ops.fastlora.decode_4bit(*weight, N, K, x.dtype, None, None, 1.0).view(b.shape[0], -1, K)
    return torch.ops.fastlora.lora_matmul_experts(x, w.transpose(1, 2) if transposed else w, xa, b, offs, *rest)


@_op(
    "lora_grad_experts(Tensor dxa, Tensor x, Tensor offs, float p=0.0, Tensor? seed=None) -> Tensor",
    fake=lambda dxa, x, offs, *_, **__: dxa.new_empty(offs.shape[0], dxa.shape[1], x.shape[1]),
)
def lora_grad_experts(dxa: Tensor, x: Tensor, offs: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``dxa[rows of e].T @ dropout(x, p)[rows of e]``: [S, r], [S, K] -> [E, r, K] in dxa's dtype, which is da; with xa
    and dy for dxa and x it is the transpose of db."""
    product, x = dxa if p == 0.0 else dxa * dropout_scale(p), _drop(x, p, seed)
    da = dxa.new_zeros(offs.shape[0], dxa.shape[1], x.shape[1])
    for expert, rows in rows_of_experts(offs, x.shape[0]):
        da[expert] = torch.mm(product[rows].to(x.dtype).t(), x[rows])
    return da


@_op(
    "combine_experts(Tensor rows, Tensor index, Tensor? weights=None) -> Tensor",
    fake=lambda rows, index, *_, **__: rows.new_empty(index.shape[0], rows.shape[1]),
)
def combine_experts(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """``(weights[..., None] * rows[index]).sum(1)``: [S, N], [T, k], [T, k] -> [T, N] in the dtype of rows, the sum in
    fp32 (fp64 for fp64) and rounded once: what the experts of each token made of it. dx is the sum without weights."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    chosen = rows.index_select(0, index.reshape(-1)).view(*index.shape, rows.shape[1])
    if weights is not None:
        chosen = chosen.to(wide) * weights[..., None].to(wide)
    return chosen.sum(1, dtype=wide).to(rows.dtype)
