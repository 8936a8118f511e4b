"""The autograd Functions: one per shape of work. They save x, the adapters, xa; never a mask, a cast or decoded copy.

Every Function takes x of any rank and computes on its 2-D view. ``a, b, s, p, seed`` are as in `fastlora.reference`.
Gradients are once-differentiable.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastlora import ops as _ops  # noqa: F401  (defines torch.ops.fastlora)
from fastlora.fourbit import Weight4bit

shrink = torch.ops.fastlora.shrink.default
lora_matmul = torch.ops.fastlora.lora_matmul.default
lora_grad = torch.ops.fastlora.lora_grad.default


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` without autocast: x, the first argument, has the dtype to compute in.

    Eager calls skip its binding of default arguments, which costs 25 µs a call.
    """
    device = args[0].device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return apply(function, *args)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _like_rows_of(x_shape: torch.Size, y: Tensor) -> Tensor:
    return y if len(x_shape) == 2 else y.view(*x_shape[:-1], y.shape[-1])


def _save(ctx: Any, x: Tensor, a: Tensor, b: Tensor, xa: Tensor | None, seed: Tensor | None, *weight: Any) -> None:
    """Save what the needed gradients use: x for da, xa (or x and a) for db, a and the weight for dx, b for dxa."""
    need_dx, need_da, need_db = ctx.needs_input_grad[:3]
    recompute_xa = need_db and xa is None
    ctx.save_for_backward(
        x if need_da or recompute_xa else None,
        a if need_dx or recompute_xa else None,
        b if need_dx or need_da else None,
        xa if need_db else None,
        seed,
        *(weight if need_dx else [None] * len(weight)),
    )
    ctx.x_shape, ctx.a_dtype, ctx.b_dtype = x.shape, a.dtype, b.dtype
    ctx.set_materialize_grads(False)


def _adapter_grads(ctx: Any, dy: Tensor, x: Tensor | None, a: Tensor | None, b: Tensor | None, xa: Any, seed: Any):
    """dxa, da, db for 2-D dy, obeying needs_input_grad; those not needed come back as None."""
    _, need_da, need_db = ctx.needs_input_grad[:3]
    x = None if x is None else _rows(x)
    if need_db and xa is None:
        xa = shrink(x, a, ctx.s, ctx.p, seed)
    if b is None and xa is None:
        return None, None, None
    dxa, da, db = lora_grad(dy, x if need_da else None, b, xa, ctx.s, ctx.p, seed)
    return dxa, da.to(ctx.a_dtype) if need_da else None, db.to(ctx.b_dtype) if need_db else None


def _bias_grad(ctx: Any, dy: Tensor, index: int) -> Tensor | None:
    return dy.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[index] else None


class LoRALinear(Function):
    """``y = x wᵀ + bias + s · drop(x) aᵀ bᵀ`` on a dense, frozen w. Also returns xa, which is not differentiable."""

    @staticmethod
    def forward(x, a, b, bias, w, s, p, seed):
        rows = _rows(x)
        xa = shrink(rows, a, s, p, seed)
        y = lora_matmul(rows, w, xa, b, bias)
        return _like_rows_of(x.shape, y), xa

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, b, bias, w, ctx.s, ctx.p, seed = inputs
        xa = output[1]
        ctx.mark_non_differentiable(xa)
        _save(ctx, x, a, b, xa, seed, w)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 8
        x, a, b, xa, seed, w = ctx.saved_tensors
        dy = _rows(dy)
        dxa, da, db = _adapter_grads(ctx, dy, x, a, b, xa, seed)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _like_rows_of(ctx.x_shape, lora_matmul(dy, w.t(), dxa, a.t(), None, ctx.p, seed))
        return dx, da, db, _bias_grad(ctx, dy, 3), None, None, None, None


class LoRALinear4bit(Function):
    """`LoRALinear` on a 4-bit weight, given as the fields of a `Weight4bit`. Returns y, and xa or None.

    Without dropout the adapter is merged while the weight is decoded: forward and dx are then one plain product each,
    and xa is needed only for db, in backward. 4-bit weights do not lie on the grid of the compute dtype, so the one
    rounding after the merge dithers and small updates survive; on a dense bf16 weight they would not.
    """

    @staticmethod
    def forward(x, a, b, bias, s, p, seed, *fields):
        rows, weight = _rows(x), Weight4bit(*fields)
        if p == 0.0:
            xa = None
            w = weight.decode_merged(x.dtype, a, b, s)
            y = torch.mm(rows, w.t()) if bias is None else torch.addmm(bias.to(x.dtype), rows, w.t())
        else:
            xa = shrink(rows, a, s, p, seed)
            y = lora_matmul(rows, weight.decode(x.dtype), xa, b, bias)
        return _like_rows_of(x.shape, y), xa

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, b, bias, ctx.s, ctx.p, seed, *fields = inputs
        xa = output[1]
        if xa is not None:
            ctx.mark_non_differentiable(xa)
        tensors, ctx.numbers = fields[:5], fields[5:]
        _save(ctx, x, a, b, xa, seed, *tensors)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 17
        x, a, b, xa, seed, *tensors = ctx.saved_tensors
        dy = _rows(dy)
        need_dxa = ctx.p > 0.0 or ctx.needs_input_grad[1]  # dx is of the merged weight
        dxa, da, db = _adapter_grads(ctx, dy, x, a, b if need_dxa else None, xa, seed)
        dx = None
        if ctx.needs_input_grad[0]:
            weight = Weight4bit(*tensors, *ctx.numbers)
            if ctx.p == 0.0:
                dx = dy @ weight.decode_merged(dy.dtype, a, b, ctx.s)
            else:
                dx = lora_matmul(dy, weight.decode(dy.dtype).t(), dxa, a.t(), None, ctx.p, seed)
            dx = _like_rows_of(ctx.x_shape, dx)
        return dx, da, db, _bias_grad(ctx, dy, 3), *(None,) * 13


class AddLoRA(Function):
    """``y + s · drop(x) aᵀ bᵀ`` for the output y of a base layer that computes itself (the `opaque` plan)."""

    @staticmethod
    def forward(x, a, b, y, s, p, seed):
        xa = shrink(_rows(x), a, s, p, seed)
        # Out of place: whether a foreign layer saved its output for its own backward cannot be known.
        out = torch.addmm(_rows(y), xa.to(y.dtype), b.to(y.dtype).t())
        return out.view(y.shape), xa

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, b, _, ctx.s, ctx.p, seed = inputs
        xa = output[1]
        ctx.mark_non_differentiable(xa)
        _save(ctx, x, a, b, xa, seed)
        ctx.x_dtype = x.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 7
        x, a, b, xa, seed = ctx.saved_tensors
        rows = _rows(dy).to(ctx.x_dtype)
        dxa, da, db = _adapter_grads(ctx, rows, x, a, b, xa, seed)
        dx = None
        if ctx.needs_input_grad[0]:
            no_base = rows.new_empty(a.shape[1], 0)  # only dropout(dxa @ a) is left of the product
            dx = _like_rows_of(ctx.x_shape, lora_matmul(rows[:, :0], no_base, dxa, a.t(), None, ctx.p, seed))
        return dx, da, db, dy if ctx.needs_input_grad[3] else None, None, None, None
