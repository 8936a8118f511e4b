"""``torch.ops.fastlora.*``: the products of adapted layers and groups of them, with one implementation per device.

Dispatch is PyTorch's own. The composition of torch ops below serves every device and dtype for which no kernel is
registered. `fastlora.reference` says what each op computes; this file says how. Without dropout no composition makes a
temporary of the size of x or y; with it, the mask is one.

The ops themselves have no gradients: `fastlora.autograd` gives them to whole layers.

Adapters may have another dtype than x: they are converted (they are small), x never is. xa and dxa have the
adapters' dtype.
"""

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import checks, extension, flops, kernel_ops
from fastlora.reference import activate, dropout_mask, dropout_scale

_library = torch.library.Library("fastlora", "DEF")


def _op(schema: str, fake: Callable) -> Callable:
    """Define an op whose implementation on every device, unless overridden, is the decorated composition.

    `checks` has a function of its name, which both the fake and the composition call first.
    """
    name = schema.partition("(")[0]
    check = getattr(checks, name)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fastlora::{name}", _checked(check, fake), lib=_library)
    flops.register(name)

    def register(composition: Callable) -> Callable:
        composition = _checked(check, composition)
        _library.impl(name, composition, "CompositeExplicitAutograd")
        kernel_ops.register_gpus(_library, name, composition)
        # `autograd` differentiates. PyTorch's own answer, a warning in backward, costs 2 µs a call to prepare.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        op = overload(name)
        for device in ("cpu", "cuda", "xpu"):
            _library.impl(name, partial(_without_autocast, op, device), f"Autocast{device.upper()}")
        if schema.endswith("-> ()"):
            # PyTorch would write to a copy and look for it among the results: without any, below its stack.
            for key in ("Negative", "Conjugate"):
                _library.impl(name, partial(_refuse_lazy, name), key)
        return composition

    return register


def overload(name: str) -> Any:
    """``torch.ops.fastlora.<name>.default``: skips choosing the overload, at every call."""
    return getattr(torch.ops.fastlora, name).default


def _checked(check: Callable, compute: Callable) -> Callable:
    @wraps(compute)
    def run(*args, **kwargs):
        check(*args, **kwargs)
        return compute(*args, **kwargs)

    return run


def _without_autocast(op: Callable, device: str, *args):
    """The caller decided every dtype; autocast must not change the products inside."""
    with torch.autocast(device, enabled=False):
        return op(*args)


def _refuse_lazy(name: str, *args):
    raise RuntimeError(f"fastlora: {name}: operands must be resolved, got a view that negates or conjugates when read")


def _drop(x: Tensor, p: float, seed: Tensor | None, inplace: bool = False) -> Tensor:
    """x with dropped elements zeroed, without the 1/(1-p), which callers fold into their scaling."""
    if p == 0.0:
        return x
    assert seed is not None
    keep = dropout_mask(x.shape[0], x.shape[1], p, seed)
    if x.element_size() == 2:
        bits = x.view(torch.int16)
        return (bits.bitwise_and_(keep) if inplace else bits.bitwise_and(keep)).view(x.dtype)
    return torch.mul(x, keep.neg_(), out=x if inplace else None)


def _scaled_mm(x: Tensor, a: Tensor, s: float) -> Tensor:
    """``s * x @ a``, rounded once."""
    if s == 1.0:
        return torch.mm(x, a)
    # A power of two is exact (but for fp16's subnormals), and a plain product is faster than one with alpha.
    if math.frexp(s)[0] == 0.5 and x.dtype != torch.float16:
        return torch.mm(x, a).mul_(s)
    return torch.addmm(x.new_empty(()), x, a, beta=0, alpha=s)


@_op(
    "shrink(Tensor x, Tensor a, float s, float p=0.0, Tensor? seed=None) -> Tensor",
    fake=lambda x, a, s, p=0.0, seed=None: a.new_empty(x.shape[0], a.shape[0]),
)
def shrink(x: Tensor, a: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s * dropout(x, p) @ a.T``: [M, K], [r, K] -> [M, r] in a's dtype."""
    at = a.to(x.dtype).t()
    xa = _scaled_mm(x, at, s) if p == 0.0 else _scaled_mm(_drop(x, p, seed), at, s * dropout_scale(p))
    return xa.to(a.dtype)


@_op(
    "shrink_group(Tensor x, Tensor[] a, float[] s, float[] p, Tensor?[] seed) -> Tensor[]",
    fake=lambda x, a, s, p, seed: [each.new_empty(x.shape[0], each.shape[0]) for each in a],
)
def shrink_group(x: Tensor, a: list[Tensor], s: list[float], p: list[float], seed: list[Tensor | None]) -> list[Tensor]:
    """``[shrink(x, a_i, s_i, p_i, seed_i) for ...]``: what several adapters make of one x."""
    return [shrink(x, *adapter) for adapter in zip(a, s, p, seed, strict=True)]


@_op(
    "lora_matmul(Tensor x, Tensor w, Tensor xa, Tensor b, Tensor? bias=None, float p=0.0, Tensor? seed=None, "
    "Tensor? scale=None) -> Tensor",
    fake=lambda x, w, *_, **__: x.new_empty(x.shape[0], w.shape[0]),
)
def lora_matmul(
    x: Tensor,
    w: Tensor,
    xa: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``x @ w.T + bias + dropout(xa @ b.T, p)``: [M, K], [N, K], [M, r], [N, r] -> [M, N] in x's dtype, its columns
    times ``scale`` [N] if that is given.

    The adapter's product comes first and the base product accumulates into it: one rounding of the sum, so small
    updates survive, and no temporary. dx is the same call with w, b transposed: ``lora_matmul(dy, w.T, dxa, a.T)``.
    """
    if p == 0.0 and bias is not None:
        y = torch.addmm(bias.to(x.dtype), xa.to(x.dtype), b.to(x.dtype).t())
    else:
        y = _expand(xa, b, x.dtype, p, seed)
        if bias is not None:
            y += bias
    y.addmm_(x, w.t())
    return y if scale is None else y.mul_(scale)


def _expand(xa: Tensor, b: Tensor, dtype: torch.dtype, p: float, seed: Tensor | None) -> Tensor:
    """``dropout(xa @ b.T, p)``"""
    xa, b = xa.to(dtype), b.to(dtype).t()
    return torch.mm(xa, b) if p == 0.0 else _drop(torch.mm(xa * dropout_scale(p), b), p, seed, inplace=True)


@_op(
    "lora_matmul_group(Tensor[] x, Tensor[] w, Tensor[] xa, Tensor[] b, float[] p, Tensor?[] seed) -> Tensor",
    fake=lambda x, w, xa, b, p, seed: x[0].new_empty(x[0].shape[0], w[0].shape[0]),
)
def lora_matmul_group(
    x: list[Tensor], w: list[Tensor], xa: list[Tensor], b: list[Tensor], p: list[float], seed: list[Tensor | None]
) -> Tensor:
    """``sum(lora_matmul(x_i, w_i, xa_i, b_i, None, p_i, seed_i) for ...)``: dx of several layers of one x.

    The adapters' products come first and every base product accumulates into their sum.
    """
    dtype = x[0].dtype
    if any(p):
        y = _expand(xa[0], b[0], dtype, p[0], seed[0])
        for i in range(1, len(xa)):
            y += _expand(xa[i], b[i], dtype, p[i], seed[i])
    else:
        y = torch.mm(torch.cat([t.to(dtype) for t in xa], 1), torch.cat([t.to(dtype) for t in b], 1).t())
    for x_i, w_i in zip(x, w, strict=True):
        y.addmm_(x_i, w_i.t())
    return y


def _lora_grad_fake(dy, x, b, xa, s, p=0.0, seed=None):
    like = xa if b is None else b
    r = like.shape[1]
    dxa = like.new_empty(0 if b is None else dy.shape[0], r)
    da = like.new_empty(0) if x is None or b is None else b.new_empty(r, x.shape[1])
    db = like.new_empty(0) if xa is None else xa.new_empty(dy.shape[1], r)
    return dxa, da, db


@_op(
    "lora_grad(Tensor dy, Tensor? x, Tensor? b, Tensor? xa, float s, float p=0.0, Tensor? seed=None) "
    "-> (Tensor dxa, Tensor da, Tensor db)",
    fake=_lora_grad_fake,
)
def lora_grad(
    dy: Tensor,
    x: Tensor | None,
    b: Tensor | None,
    xa: Tensor | None,
    s: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dxa = s * dy @ b`` [M, r], ``da = dxa.T @ dropout(x, p)`` [r, K], ``db = dy.T @ xa`` [N, r].

    dxa and da come in b's dtype, db in xa's. Without b there is no dxa and no da, without x no da, without xa no db:
    they come back empty. One of b and xa is given.
    """
    like = b if b is not None else xa
    assert like is not None
    dxa, da, db = like.new_empty(0, like.shape[1]), like.new_empty(0), like.new_empty(0)
    if xa is not None:
        db = torch.mm(dy.t(), xa.to(dy.dtype)).to(xa.dtype)
    if b is not None:
        product = _scaled_mm(dy, b.to(dy.dtype), s)
        dxa = product.to(b.dtype)
        if x is not None:
            if p != 0.0:
                product = product * dropout_scale(p)
            da = torch.mm(product.t(), _drop(x, p, seed)).to(b.dtype)
    return dxa, da, db


@_op(
    "lora_grad_a(Tensor dxa, Tensor x, float p=0.0, Tensor? seed=None) -> Tensor",
    fake=lambda dxa, x, p=0.0, seed=None: dxa.new_empty(dxa.shape[1], x.shape[1]),
)
def lora_grad_a(dxa: Tensor, x: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``da = dxa.T @ dropout(x, p)``: [M, r], [M, K] -> [r, K] in dxa's dtype: what lora_grad gives when it has x."""
    product = dxa if p == 0.0 else dxa * dropout_scale(p)
    return torch.mm(product.to(x.dtype).t(), _drop(x, p, seed)).to(dxa.dtype)


@_op(
    "dora_grad(Tensor dy, Tensor y, Tensor scale) -> (Tensor dz, Tensor dscale)",
    fake=lambda dy, y, scale: (dy.new_empty(dy.shape), dy.new_empty(dy.shape[1], dtype=_wide(dy.dtype))),
)
def dora_grad(dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``y = scale * z``: ``dz = scale * dy`` [M, N] in dy's dtype and ``dscale = (dy * z).sum(0)`` [N]
    in fp32 (fp64 for fp64), with ``z = y / scale``. No scale is zero."""
    wide = _wide(dy.dtype)
    dscale = torch.sum(dy.to(wide) * y, 0, dtype=wide) / scale.to(wide)
    return (dy * scale).to(dy.dtype).contiguous(), dscale


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _quick_gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(1.702 * x)
    return dy * (sigmoid * (1 + 1.702 * x * (1 - sigmoid)))


_ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
    "quick_gelu": (partial(activate, activation="quick_gelu"), _quick_gelu_backward),
    "relu": (F.relu, partial(torch.ops.aten.threshold_backward, threshold=0)),
    "relu2": (partial(activate, activation="relu2"), lambda dy, x: dy * (2 * F.relu(x))),
}


@_op(
    "swiglu(Tensor gate, Tensor? up, str activation) -> Tensor",
    fake=lambda gate, up, activation: gate.new_empty(gate.shape),
)
def swiglu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """``act(gate) * up``, or ``act(gate)`` without up: [M, K]. ``activation``: `kernels.limits.ACTIVATIONS`."""
    value = _ACTIVATIONS[activation][0](gate).contiguous()
    return value if up is None else value.mul_(up)


@_op(
    "swiglu_backward_(Tensor(a!) dh, Tensor(b!) gate, Tensor(c!)? up, str activation) -> ()",
    fake=lambda dh, gate, up, activation: None,
)
def swiglu_backward_(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> None:
    """In place: ``gate`` becomes its gradient, ``up`` becomes its own, and ``dh`` becomes ``h = swiglu(gate, up)``."""
    act, act_backward = _ACTIVATIONS[activation]
    value = act(gate)
    gate.copy_(act_backward(dh if up is None else dh * up, gate))
    if up is None:
        dh.copy_(value)
    else:
        h = value * up
        torch.mul(dh, value, out=up)
        dh.copy_(h)


def _decode_fake(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, quant_type, N, K, dtype, a, b, s):
    return packed.new_empty(N, K, dtype=dtype)


MERGE_ELEMENTS = 1 << 20  # decode and merge this many weights at a time: the fp32 scratch (4 MB) stays in cache


@_op(
    "decode_4bit(Tensor packed, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, int blocksize, "
    "int blocksize2, str quant_type, int N, int K, ScalarType dtype, Tensor? a, Tensor? b, float s) -> Tensor",
    fake=_decode_fake,
)
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
    """Decode a bitsandbytes weight to ``dtype[N, K]``; with an adapter ``decode + s * b @ a``, rounded once.

    ``packed`` is uint8; ``code2, absmax2, offset, blocksize2`` are the nested statistics' (None, None, None, 0 if
    there are none). The decoding itself is bitsandbytes'.
    """
    if N == 0 or K == 0:
        return packed.new_empty(N, K, dtype=dtype)
    # No more than is needed: of more bytes or blocks than its shape has, bitsandbytes refuses some.
    packed = packed.flatten()[: -(-N * K // 2)].contiguous()
    absmax = absmax.flatten()[: -(-N * K // blocksize)].contiguous()
    if code2 is not None and absmax2 is not None and offset is not None:
        statistics = absmax2.flatten().contiguous().float(), code2.flatten().contiguous().float()
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, *statistics, blocksize2, torch.float32)
        absmax = absmax + offset.flatten().float()
    absmax = absmax.float()
    if a is None or b is None:
        return _dequantize(packed, absmax, blocksize, quant_type, N, K, dtype)

    a, b = a.float(), b.float()
    out = packed.new_empty(N, K, dtype=dtype)
    for rows, bytes_, blocks in _row_slices(N, K, blocksize):
        n = rows.stop - rows.start
        w = _dequantize(packed[bytes_], absmax[blocks], blocksize, quant_type, n, K, torch.float32)
        out[rows] = w.addmm_(b[rows], a, alpha=s)
    return out


def _dequantize(packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, N: int, K: int, dtype: torch.dtype):
    """bitsandbytes' decoding, asked for one whole block a row: its CPU kernel misreads absmax where blocks cross rows,
    and where one is cut short it may decode wrongly."""
    blocks = -(-N * K // blocksize)
    packed = F.pad(packed, (0, blocks * blocksize // 2 - packed.numel()))
    whole = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, blocksize, quant_type, [blocks, blocksize], dtype)
    return whole.view(-1)[: N * K].view(N, K)


def _row_slices(N: int, K: int, blocksize: int):
    """Cut [N, K] into slices of whole rows that are whole blocks too: (rows, packed bytes, absmax blocks)."""
    whole = 2 * blocksize // math.gcd(2 * blocksize, K)  # rows after which bytes and blocks both end
    step = max(whole, MERGE_ELEMENTS // K // whole * whole)
    for start in range(0, N, step):
        stop = min(N, start + step)
        first, last = start * K, stop * K
        yield slice(start, stop), slice(first // 2, (last + 1) // 2), slice(first // blocksize, -(-last // blocksize))


NO_CPU_KERNELS = extension.load()  # why the CPU runs the compositions above, None if it runs kernels/cpu
