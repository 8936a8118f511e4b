"""What every op of ``torch.ops.fastlora`` asks of its operands: a function per op, in the op's signature.

`fastlora.ops` calls it for the compositions and the fakes. kernels/cpu/checks.h asks the same of what its kernels read,
and `fastlora.kernels.operands` of what a GPU's read.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora.compat import share_storage
from fastlora.kernels.limits import ACTIVATIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DECODED = FLOATS[:3]  # what a 4-bit weight can be decoded to


def shrink(x: Tensor, a: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None) -> None:
    _matrix("shrink", x, x=x)
    _adapter_of("shrink", x, a, s, p, seed)


def shrink_group(x: Tensor, a: Sequence[Tensor], s: Sequence[float], p: Sequence[float], seed: Sequence) -> None:
    _matrix("shrink_group", x, x=x)
    _lengths("shrink_group", len(a), s=s, p=p, seed=seed)
    for each in zip(a, s, p, seed, strict=True):
        _adapter_of("shrink_group", x, *each)


def _adapter_of(op: str, x: Tensor, a: Tensor, s: float, p: float, seed: Tensor | None) -> None:
    _matrix(op, x, (None, x.shape[1]), a=a)
    _scaling(op, s)
    _dropout(op, x, p, seed)


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
    _matrix(op, x, x=x)
    _part(op, x, x, w, xa, b, p, seed)
    _vectors(op, x, w.shape[0], bias=bias, scale=scale)


def lora_matmul_group(
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    xa: Sequence[Tensor],
    b: Sequence[Tensor],
    p: Sequence[float],
    seed: Sequence,
) -> None:
    op = "lora_matmul_group"
    _require(len(x) > 0, lambda: f"{op}: a group must have at least one x")
    _lengths(op, len(x), w=w, xa=xa, b=b, p=p, seed=seed)
    _matrix(op, x[0], x=x[0])
    for i, part in enumerate(zip(x, w, xa, b, p, seed, strict=True)):
        _part(op, x[0], *part)
        if i > 0:
            _matrix(op, x[0], (x[0].shape[0], None), x=x[i])
            _matrix(op, x[0], (w[0].shape[0], None), w=w[i])


def _part(op: str, like: Tensor, x: Tensor, w: Tensor, xa: Tensor, b: Tensor, p: float, seed: Tensor | None) -> None:
    _matrix(op, like, dtype=like.dtype, x=x)
    _matrix(op, like, (None, x.shape[1]), dtype=like.dtype, w=w)
    _matrix(op, like, (x.shape[0], None), xa=xa)
    _matrix(op, like, (w.shape[0], xa.shape[1]), b=b)
    _dropout(op, like, p, seed)


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
    _matrix(op, dy, dy=dy)
    _require(b is not None or xa is not None, lambda: f"{op}: needs b or xa")
    if x is not None:
        _matrix(op, dy, (dy.shape[0], None), dtype=dy.dtype, x=x)
    if b is not None:
        _matrix(op, dy, (dy.shape[1], None), b=b)
    if xa is not None:
        _matrix(op, dy, (dy.shape[0], None if b is None else b.shape[1]), xa=xa)
    _scaling(op, s)
    _dropout(op, dy, p, seed)


def lora_grad_a(dxa: Tensor, x: Tensor, p: float = 0.0, seed: Tensor | None = None) -> None:
    _matrix("lora_grad_a", x, x=x)
    _matrix("lora_grad_a", x, (x.shape[0], None), dxa=dxa)
    _dropout("lora_grad_a", x, p, seed)


def dora_grad(dy: Tensor, y: Tensor, scale: Tensor) -> None:
    _matrix("dora_grad", dy, dy=dy)
    _matrix("dora_grad", dy, tuple(dy.shape), dtype=dy.dtype, y=y)
    if scale is None:
        raise TypeError("fastlora: dora_grad: scale must be a tensor, got None")
    _vectors("dora_grad", dy, dy.shape[1], scale=scale)


def swiglu(gate: Tensor, up: Tensor | None, activation: str) -> None:
    _gated("swiglu", gate, activation, up=up)


def swiglu_backward_(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> None:
    op = "swiglu_backward_"
    _gated(op, gate, activation, up=up, dh=dh)
    named = [(name, t) for name, t in (("dh", dh), ("gate", gate), ("up", up)) if t is not None]
    for i, (name, t) in enumerate(named):
        _require(_is_writable(t), lambda: f"{op}: elements of {name} of strides {t.stride()} share memory")  # noqa: B023
        for other, u in named[:i]:
            _require(_are_apart(t, u), lambda: f"{op}: {other} and {name} share memory, and it works in place")  # noqa: B023


def _gated(op: str, gate: Tensor, activation: str, **like_gate: Tensor | None) -> None:
    _matrix(op, gate, gate=gate)
    for name, t in like_gate.items():
        if t is not None:
            _matrix(op, gate, tuple(gate.shape), dtype=gate.dtype, **{name: t})
    known = ", ".join(ACTIVATIONS)
    _require(activation in ACTIVATIONS, lambda: f"{op}: activation must be one of {known}, got {activation}")


def decode_4bit(*args: Any) -> None:
    *weight, dtype, a, b, s = args
    _weight_4bit("decode_4bit", *weight, a, b, s)  # type: ignore[call-arg]
    _decoded("decode_4bit", "dtype", dtype)


def nf4_matmul(x: Tensor, *args: Any) -> None:
    op, (weight, (a, b, s, *rest)) = "nf4_matmul", (args[:10], args[10:])
    _weight_4bit(op, *weight, a, b, s)  # type: ignore[call-arg]
    packed, N, K = weight[0], weight[8], weight[9]
    _matrix(op, packed, (None, K), x=x)
    _decoded(op, "the dtype of x", x.dtype)
    _vectors(op, packed, N, bias=rest[0] if rest else None)


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
    _require(count > 0, lambda: f"{op}: x must have at least one entry")
    _lengths(op, count, quant_types=quant_types, xa=xa, b=b, p=p, seed=seed)
    _lengths(op, 5 * count, weights=weights)
    _lengths(op, 4 * count, sizes=sizes)
    _matrix(op, x[0], x=x[0])
    _decoded(op, "the dtype of x", x[0].dtype)
    M, outputs = x[0].shape[0], sizes[3 if transposed else 2]
    for i in range(count):
        blocksize, blocksize2, N, K = sizes[4 * i : 4 * i + 4]
        fields: Any = weights[5 * i : 5 * i + 5]
        _weight_4bit(op, *fields, blocksize, blocksize2, quant_types[i], N, K, None, None, 1.0)  # type: ignore[call-arg]
        _require((K if transposed else N) == outputs, lambda: f"{op}: the weights must have the same outputs")
        _matrix(op, x[0], (M, N if transposed else K), dtype=x[0].dtype, x=x[i])
        _matrix(op, x[0], (M, None), xa=xa[i])
        _matrix(op, x[0], (outputs, xa[i].shape[1]), b=b[i])
        _dropout(op, x[0], p[i], seed[i])
    _vectors(op, x[0], outputs, bias=bias, scale=scale)


def _decoded(op: str, name: str, dtype: torch.dtype) -> None:
    _require(dtype in DECODED, lambda: f"{op}: {name} must be float32, bfloat16 or float16, got {dtype}")


def _weight_4bit(
    op: str,
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
) -> None:
    _require(quant_type in ("nf4", "fp4"), lambda: f"{op}: quant_type must be nf4 or fp4, got {quant_type}")
    _require(N >= 0 and K >= 0 and N * K <= 1 << 62, lambda: f"{op}: a weight [{N}, {K}] cannot be")
    _block(op, "blocksize", blocksize)
    _elements(op, packed, -(-N * K // 2), (torch.uint8,), packed=packed)
    given = [each is not None for each in (code2, absmax2, offset)]
    message = "code2, absmax2 and offset are those of nested statistics: all must be given, or none"
    _require(all(given) or not any(given), lambda: f"{op}: {message}")
    nested = code2 is not None
    _elements(op, packed, -(-N * K // blocksize), (torch.uint8,) if nested else FLOATS, absmax=absmax)
    if nested:
        _block(op, "blocksize2", blocksize2)
        _elements(op, packed, 256, FLOATS, exact=True, code2=code2)
        _elements(op, packed, -(-absmax.numel() // blocksize2), FLOATS, absmax2=absmax2)
        _elements(op, packed, 1, FLOATS, exact=True, offset=offset)
    _require((a is None) == (b is None), lambda: f"{op}: a and b must both be given, or none")
    if a is not None and b is not None:
        _matrix(op, packed, (None, K), a=a)
        _matrix(op, packed, (N, a.shape[0]), b=b)
    _scaling(op, s)


def _block(op: str, name: str, size: int) -> None:
    fits = 32 <= size <= 4096 and size & (size - 1) == 0
    _require(fits, lambda: f"{op}: {name} must be a power of two from 32 to 4096, got {size}")


def _require(fits: Any, message: Callable[[], str]) -> None:
    if fits is not True:  # a symbolic size is for torch to decide
        torch._check(fits, lambda: f"fastlora: {message()}")


def _floating(op: str, name: str, t: Tensor, like: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    fits = t.dtype in dtypes and t.device == like.device and t.layout == torch.strided

    def message():
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{op}: {name} must be {names} on {like.device}, got {t.dtype} on {t.device}"

    _require(fits, message)


def _matrix(
    op: str, like: Tensor, shape: tuple = (None, None), dtype: torch.dtype | None = None, **named: Tensor
) -> None:
    """A floating-point matrix of this shape, None for any size, on like's device."""
    ((name, t),) = named.items()
    if t is None:
        raise TypeError(f"fastlora: {op}: {name} must be a tensor, got None")

    def message():
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        return f"{op}: {name} must be [{wanted}], got {list(t.shape)}"

    _require(t.dim() == 2, message)
    for is_, size in zip(t.shape, shape, strict=True):
        if size is not None:
            _require(is_ == size, message)
    _floating(op, name, t, like, FLOATS if dtype is None or dtype not in FLOATS else (dtype,))


def _vectors(op: str, like: Tensor, length: int, **named: Tensor | None) -> None:
    """Floating-point vectors of this length on like's device, or None."""
    for name, t in named.items():
        if t is not None:
            message = partial(_expected_vector, op, name, length, t)
            _require(t.dim() == 1, message)
            _require(t.shape[0] == length, message)
            _floating(op, name, t, like, FLOATS)


def _expected_vector(op: str, name: str, length: int, t: Tensor) -> str:
    return f"{op}: {name} must be [{length}], got {list(t.shape)}"


def _elements(
    op: str, like: Tensor, least: int, dtypes: Sequence[torch.dtype], exact: bool = False, **named: Any
) -> None:
    ((name, t),) = named.items()
    if t is None:
        raise TypeError(f"fastlora: {op}: {name} must be a tensor, got None")
    fits = t.numel() == least if exact else t.numel() >= least
    _require(
        fits, lambda: f"{op}: {name} must have {'' if exact else 'at least '}{least} elements, got {list(t.shape)}"
    )
    _floating(op, name, t, like, dtypes)


def _scaling(op: str, s: float) -> None:
    _require(math.isfinite(s), lambda: f"{op}: s must be finite, got {s}")


def _dropout(op: str, like: Tensor, p: float, seed: Tensor | None) -> None:
    if p == 0.0:
        return
    _require(0.0 < p < 1.0, lambda: f"{op}: p must be in [0, 1), got {p}")
    _require(seed is not None, lambda: f"{op}: dropout needs a seed")
    _elements(op, like, 1, (torch.int64,), exact=True, seed=seed)


def _lengths(op: str, expected: int, **lists: Sequence) -> None:
    for name, values in lists.items():
        fits = len(values) == expected
        _require(fits, lambda: f"{op}: {name} must have {expected} entries, got {len(values)}")  # noqa: B023


def _is_writable(t: Tensor) -> bool:
    """Whether no two elements of a matrix share memory."""
    (rows, cols), (step, across) = t.shape, t.stride()
    if rows * cols <= 1:
        return True
    by_rows = (cols == 1 or across > 0) and (rows == 1 or step > (cols - 1) * across)
    by_columns = (rows == 1 or step > 0) and (cols == 1 or across > (rows - 1) * step)
    return bool(by_rows or by_columns)


def _are_apart(t: Tensor, u: Tensor) -> bool:
    """Whether two matrices of one shape share no memory. Interleaved rows of one tensor do not."""
    if t.numel() == 0 or not share_storage(t, u):
        return True
    first, other = t.storage_offset(), u.storage_offset()
    cols, stride = t.shape[1], t.stride()
    span, other_span = (sum((n - 1) * step for n, step in zip(t.shape, m.stride(), strict=True)) for m in (t, u))
    if first + span < other or other + other_span < first:
        return True
    if stride != u.stride() or stride[1] != 1 or stride[0] <= 0:
        return False
    ahead = (other - first) % stride[0]  # of a row of t
    return bool(cols <= ahead <= stride[0] - cols)
