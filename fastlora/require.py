"""What is asked of one operand of an op, or of two: `fastlora.checks` says which ops ask what.

A condition that does not hold is a RuntimeError that says what was expected and what came. Conditions on sizes that
torch.compile keeps symbolic are for torch to decide.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora.compat import share_storage

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DECODED = FLOATS[:3]  # what a 4-bit weight can be decoded to


def decoded(op: str, name: str, dtype: torch.dtype) -> None:
    that(dtype in DECODED, lambda: f"{op}: {name} must be float32, bfloat16 or float16, got {dtype}")


def four_bit(
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
    that(quant_type in ("nf4", "fp4"), lambda: f"{op}: quant_type must be nf4 or fp4, got {quant_type}")
    that(N >= 0 and K >= 0 and N * K <= 1 << 62, lambda: f"{op}: a weight [{N}, {K}] cannot be")
    _block(op, "blocksize", blocksize)
    elements(op, packed, -(-N * K // 2), (torch.uint8,), packed=packed)
    given = [each is not None for each in (code2, absmax2, offset)]
    message = "code2, absmax2 and offset are those of nested statistics: all must be given, or none"
    that(all(given) or not any(given), lambda: f"{op}: {message}")
    nested = code2 is not None
    elements(op, packed, -(-N * K // blocksize), (torch.uint8,) if nested else FLOATS, absmax=absmax)
    if nested:
        _block(op, "blocksize2", blocksize2)
        elements(op, packed, 256, FLOATS, exact=True, code2=code2)
        elements(op, packed, -(-absmax.numel() // blocksize2), FLOATS, absmax2=absmax2)
        elements(op, packed, 1, FLOATS, exact=True, offset=offset)
    that((a is None) == (b is None), lambda: f"{op}: a and b must both be given, or none")
    if a is not None and b is not None:
        matrix(op, packed, (None, K), a=a)
        matrix(op, packed, (N, a.shape[0]), b=b)
    scaling(op, s)


def _block(op: str, name: str, size: int) -> None:
    fits = 32 <= size <= 4096 and size & (size - 1) == 0
    that(fits, lambda: f"{op}: {name} must be a power of two from 32 to 4096, got {size}")


def that(fits: Any, message: Callable[[], str]) -> None:
    if fits is not True:  # a symbolic size is for torch to decide
        torch._check(fits, lambda: f"fastlora: {message()}")


def _floating(op: str, name: str, t: Tensor, like: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    fits = t.dtype in dtypes and t.device == like.device and t.layout == torch.strided

    def message():
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{op}: {name} must be {names} on {like.device}, got {t.dtype} on {t.device}"

    that(fits, message)


def matrix(
    op: str, like: Tensor, shape: tuple = (None, None), dtype: torch.dtype | None = None, **named: Tensor
) -> None:
    """A floating-point matrix of this shape, None for any size, on like's device."""
    _array(op, like, shape, dtype, **named)


def stack(op: str, like: Tensor, shape: tuple, dtype: torch.dtype | None = None, **named: Tensor) -> None:
    """The same for a matrix of each expert."""
    _array(op, like, shape, dtype, **named)


def _array(op: str, like: Tensor, shape: tuple, dtype: torch.dtype | None, **named: Tensor) -> None:
    ((name, t),) = named.items()
    if t is None:
        raise TypeError(f"fastlora: {op}: {name} must be a tensor, got None")

    def message():
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        return f"{op}: {name} must be [{wanted}], got {list(t.shape)}"

    that(t.dim() == len(shape), message)
    for is_, size in zip(t.shape, shape, strict=True):
        if size is not None:
            that(is_ == size, message)
    _floating(op, name, t, like, FLOATS if dtype is None or dtype not in FLOATS else (dtype,))


def vectors(op: str, like: Tensor, length: int, **named: Tensor | None) -> None:
    """Floating-point vectors of this length on like's device, or None."""
    for name, t in named.items():
        if t is not None:
            message = partial(_expected_vector, op, name, length, t)
            that(t.dim() == 1, message)
            that(t.shape[0] == length, message)
            _floating(op, name, t, like, FLOATS)


def _expected_vector(op: str, name: str, length: int, t: Tensor) -> str:
    return f"{op}: {name} must be [{length}], got {list(t.shape)}"


def elements(
    op: str, like: Tensor, least: int, dtypes: Sequence[torch.dtype], exact: bool = False, **named: Any
) -> None:
    ((name, t),) = named.items()
    if t is None:
        raise TypeError(f"fastlora: {op}: {name} must be a tensor, got None")
    fits = t.numel() == least if exact else t.numel() >= least
    that(fits, lambda: f"{op}: {name} must have {'' if exact else 'at least '}{least} elements, got {list(t.shape)}")
    _floating(op, name, t, like, dtypes)


def scaling(op: str, s: float) -> None:
    that(math.isfinite(s), lambda: f"{op}: s must be finite, got {s}")


def dropout(op: str, like: Tensor, p: float, seed: Tensor | None) -> None:
    if p == 0.0:
        return
    that(0.0 < p < 1.0, lambda: f"{op}: p must be in [0, 1), got {p}")
    that(seed is not None, lambda: f"{op}: dropout needs a seed")
    elements(op, like, 1, (torch.int64,), exact=True, seed=seed)


def lengths(op: str, expected: int, **lists: Sequence) -> None:
    for name, values in lists.items():
        fits = len(values) == expected
        that(fits, lambda: f"{op}: {name} must have {expected} entries, got {len(values)}")  # noqa: B023


def is_writable(t: Tensor) -> bool:
    """Whether no two elements of a matrix share memory."""
    (rows, cols), (step, across) = t.shape, t.stride()
    if rows * cols <= 1:
        return True
    by_rows = (cols == 1 or across > 0) and (rows == 1 or step > (cols - 1) * across)
    by_columns = (rows == 1 or step > 0) and (cols == 1 or across > (rows - 1) * step)
    return bool(by_rows or by_columns)


def are_apart(t: Tensor, u: Tensor) -> bool:
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


def ends(op: str, like: Tensor, experts: Any, offs: Tensor) -> None:
    """Where the rows of each expert end; of how many experts, None for any number."""
    if offs is None:
        raise TypeError(f"fastlora: {op}: offs must be a tensor, got None")

    def message():
        number, got = "experts" if experts is None else experts, f"{offs.dtype} {list(offs.shape)} on {offs.device}"
        return f"{op}: offs must be int32 [{number}] on {like.device}, got {got}"

    that(offs.dim() == 1 and offs.dtype == torch.int32 and offs.device == like.device, message)
    if experts is not None:
        that(offs.shape[0] == experts, message)
