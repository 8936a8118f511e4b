"""What every op of ``torch.ops.fastlora`` asks of its operands: a function per op, in the op's signature.

`fastlora.ops` calls it for the compositions and the fakes. kernels/cpu/checks.h asks the same of what its kernels read,
and `fastlora.kernels.operands` of what a GPU's read.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora import require
from fastlora.kernels.limits import ACTIVATIONS


def shrink(x: Tensor, a: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None) -> None:
    require.matrix("shrink", x, x=x)
    _adapter_of("shrink", x, a, s, p, seed)


def shrink_group(x: Tensor, a: Sequence[Tensor], s: Sequence[float], p: Sequence[float], seed: Sequence) -> None:
    require.matrix("shrink_group", x, x=x)
    require.lengths("shrink_group", len(a), s=s, p=p, seed=seed)
    for each in zip(a, s, p, seed, strict=True):
        _adapter_of("shrink_group", x, *each)


def _adapter_of(op: str, x: Tensor, a: Tensor, s: float, p: float, seed: Tensor | None) -> None:
    require.matrix(op, x, (None, x.shape[1]), a=a)
    require.scaling(op, s)
    require.dropout(op, x, p, seed)


def lora_matmul(
    x: Tensor,
    w: Tensor,
    xa: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    op = "lora_matmul"
    require.matrix(op, x, x=x)
    _part(op, x, x, w, xa, b, p, seed)
    require.vectors(op, x, w.shape[0], bias=bias, scale=scale)


def lora_matmul_group(
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    xa: Sequence[Tensor],
    b: Sequence[Tensor],
    p: Sequence[float],
    seed: Sequence,
) -> None:
    op = "lora_matmul_group"
    require.that(len(x) > 0, lambda: f"{op}: a group must have at least one x")
    require.lengths(op, len(x), w=w, xa=xa, b=b, p=p, seed=seed)
    require.matrix(op, x[0], x=x[0])
    for i, part in enumerate(zip(x, w, xa, b, p, seed, strict=True)):
        _part(op, x[0], *part)
        if i > 0:
            require.matrix(op, x[0], (x[0].shape[0], None), x=x[i])
            require.matrix(op, x[0], (w[0].shape[0], None), w=w[i])


def _part(op: str, like: Tensor, x: Tensor, w: Tensor, xa: Tensor, b: Tensor, p: float, seed: Tensor | None) -> None:
    require.matrix(op, like, dtype=like.dtype, x=x)
    require.matrix(op, like, (None, x.shape[1]), dtype=like.dtype, w=w)
    require.matrix(op, like, (x.shape[0], None), xa=xa)
    require.matrix(op, like, (w.shape[0], xa.shape[1]), b=b)
    require.dropout(op, like, p, seed)


def lora_grad(
    dy: Tensor,
    x: Tensor | None,
    b: Tensor | None,
    xa: Tensor | None,
    s: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    op = "lora_grad"
    require.matrix(op, dy, dy=dy)
    require.that(b is not None or xa is not None, lambda: f"{op}: needs b or xa")
    if x is not None:
        require.matrix(op, dy, (dy.shape[0], None), dtype=dy.dtype, x=x)
    if b is not None:
        require.matrix(op, dy, (dy.shape[1], None), b=b)
    if xa is not None:
        require.matrix(op, dy, (dy.shape[0], None if b is None else b.shape[1]), xa=xa)
    require.scaling(op, s)
    require.dropout(op, dy, p, seed)


def lora_grad_a(dxa: Tensor, x: Tensor, p: float = 0.0, seed: Tensor | None = None) -> None:
    require.matrix("lora_grad_a", x, x=x)
    require.matrix("lora_grad_a", x, (x.shape[0], None), dxa=dxa)
    require.dropout("lora_grad_a", x, p, seed)


def shrink_experts(x: Tensor, a: Tensor, offs: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None) -> None:
    op = "shrink_experts"
    require.matrix(op, x, x=x)
    require.stack(op, x, (None, None, x.shape[1]), a=a)
    require.ends(op, x, a.shape[0], offs)
    require.scaling(op, s)
    require.dropout(op, x, p, seed)


def lora_matmul_experts(
    x: Tensor,
    w: Tensor,
    xa: Tensor,
    b: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    op = "lora_matmul_experts"
    require.matrix(op, x, x=x)
    require.stack(op, x, (None, None, x.shape[1]), dtype=x.dtype, w=w)
    require.matrix(op, x, (x.shape[0], None), xa=xa)
    require.stack(op, x, (w.shape[0], w.shape[1], xa.shape[1]), b=b)
    require.ends(op, x, w.shape[0], offs)
    if bias is not None:
        require.matrix(op, x, (w.shape[0], w.shape[1]), bias=bias)
    require.dropout(op, x, p, seed)


def lora_matmul_experts_4bit(x: Tensor, *args: Any) -> None:
    op, (xa, b, offs, bias, p, seed, transposed) = "lora_matmul_experts_4bit", args[10:]
    require.four_bit(op, *args[:10], None, None, 1.0)  # type: ignore[call-arg]
    blocksize, N, K = args[5], args[8], args[9]
    require.matrix(op, x, x=x)
    require.decoded(op, "the dtype of x", x.dtype)
    require.stack(op, x, (None, None, None), b=b)
    E = b.shape[0]
    rows = N // E if E else 0

    def message():
        start = f"{op}: the weight of each of {E} experts must begin with a whole block of {blocksize}"
        return f"{start}, got a weight [{N}, {K}]"

    require.that(rows * E == N and rows * K % blocksize == 0, message)
    outputs, inputs = (K, rows) if transposed else (rows, K)
    require.matrix(op, x, (None, inputs), x=x)
    require.matrix(op, x, (x.shape[0], None), xa=xa)
    require.stack(op, x, (E, outputs, xa.shape[1]), b=b)
    require.ends(op, x, E, offs)
    if bias is not None:
        require.matrix(op, x, (E, outputs), bias=bias)
    require.dropout(op, x, p, seed)


def lora_grad_experts(dxa: Tensor, x: Tensor, offs: Tensor, p: float = 0.0, seed: Tensor | None = None) -> None:
    op = "lora_grad_experts"
    require.matrix(op, x, x=x)
    require.matrix(op, x, (x.shape[0], None), dxa=dxa)
    require.ends(op, x, None, offs)
    require.dropout(op, x, p, seed)


def combine_experts(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> None:
    op = "combine_experts"
    require.matrix(op, rows, rows=rows)
    if index is None:
        raise TypeError(f"fastlora: {op}: index must be a tensor, got None")
    fits = index.dim() == 2 and index.dtype == torch.int64 and index.device == rows.device

    def message():
        got = f"{index.dtype} {list(index.shape)} on {index.device}"
        return f"{op}: index must be int64 [tokens, experts of a token] on {rows.device}, got {got}"

    require.that(fits, message)
    if weights is not None:
        require.matrix(op, rows, tuple(index.shape), weights=weights)


def dora_grad(dy: Tensor, y: Tensor, scale: Tensor) -> None:
    require.matrix("dora_grad", dy, dy=dy)
    require.matrix("dora_grad", dy, tuple(dy.shape), dtype=dy.dtype, y=y)
    if scale is None:
        raise TypeError("fastlora: dora_grad: scale must be a tensor, got None")
    require.vectors("dora_grad", dy, dy.shape[1], scale=scale)


def swiglu(gate: Tensor, up: Tensor | None, activation: str) -> None:
    _gated("swiglu", gate, activation, up=up)


def swiglu_backward_(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> None:
    op = "swiglu_backward_"
    _gated(op, gate, activation, up=up, dh=dh)
    named = [(name, t) for name, t in (("dh", dh), ("gate", gate), ("up", up)) if t is not None]
    for i, (name, t) in enumerate(named):
        require.that(require.is_writable(t), lambda: f"{op}: elements of {name} of strides {t.stride()} share memory")  # noqa: B023
        for other, u in named[:i]:
            message = f"{op}: {other} and {name} share memory, and it works in place"
            require.that(require.are_apart(t, u), partial(str, message))


def _gated(op: str, gate: Tensor, activation: str, **like_gate: Tensor | None) -> None:
    require.matrix(op, gate, gate=gate)
    for name, t in like_gate.items():
        if t is not None:
            require.matrix(op, gate, tuple(gate.shape), dtype=gate.dtype, **{name: t})
    known = ", ".join(ACTIVATIONS)
    require.that(activation in ACTIVATIONS, lambda: f"{op}: activation must be one of {known}, got {activation}")


def decode_4bit(*args: Any) -> None:
    *weight, dtype, a, b, s = args
    require.four_bit("decode_4bit", *weight, a, b, s)  # type: ignore[call-arg]
    require.decoded("decode_4bit", "dtype", dtype)


def nf4_matmul(x: Tensor, *args: Any) -> None:
    op, (weight, (a, b, s, *rest)) = "nf4_matmul", (args[:10], args[10:])
    require.four_bit(op, *weight, a, b, s)  # type: ignore[call-arg]
    packed, N, K = weight[0], weight[8], weight[9]
    require.matrix(op, packed, (None, K), x=x)
    require.decoded(op, "the dtype of x", x.dtype)
    require.vectors(op, packed, N, bias=rest[0] if rest else None)


def lora_matmul_4bit(
    x: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    sizes: Sequence[int],
    quant_types: Sequence[str],
    xa: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Tensor | None,
    p: Sequence[float],
    seed: Sequence,
    transposed: bool,
    scale: Tensor | None = None,
) -> None:
    op, count = "lora_matmul_4bit", len(x)
    require.that(count > 0, lambda: f"{op}: x must have at least one entry")
    require.lengths(op, count, quant_types=quant_types, xa=xa, b=b, p=p, seed=seed)
    require.lengths(op, 5 * count, weights=weights)
    require.lengths(op, 4 * count, sizes=sizes)
    require.matrix(op, x[0], x=x[0])
    require.decoded(op, "the dtype of x", x[0].dtype)
    M, outputs = x[0].shape[0], sizes[3 if transposed else 2]
    for i in range(count):
        blocksize, blocksize2, N, K = sizes[4 * i : 4 * i + 4]
        fields: Any = weights[5 * i : 5 * i + 5]
        require.four_bit(op, *fields, blocksize, blocksize2, quant_types[i], N, K, None, None, 1.0)  # type: ignore[call-arg]
        require.that((K if transposed else N) == outputs, lambda: f"{op}: the weights must have the same outputs")
        require.matrix(op, x[0], (M, N if transposed else K), dtype=x[0].dtype, x=x[i])
        require.matrix(op, x[0], (M, None), xa=xa[i])
        require.matrix(op, x[0], (outputs, xa[i].shape[1]), b=b[i])
        require.dropout(op, x[0], p[i], seed[i])
    require.vectors(op, x[0], outputs, bias=bias, scale=scale)
