"""The autograd Functions: one per shape of work. They save x, the adapters, xa; never a mask, a cast or decoded copy.

`lora_linear` and `add_lora` are what to call, and `fastlora.mlp.mlp`. Each prepares what is small (xa) and leaves its
last base product to a Function that saves everything backward needs *before* that product. Where saved tensors are
packed, as by checkpointing, that is two Functions: one saves and hands out an empty handle, and `Run` computes. A
checkpointed block is computed again only until its last tensor has been saved, so its last base product is never
computed twice.

``a, b, s, p, seed`` are as in `fastlora.reference`; x has any rank, and its 2-D view is what is computed on. A weight
is a dense tensor or a `Weight4bit`. Gradients are once-differentiable.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastlora import kernel_ops
from fastlora.fourbit import Weight4bit
from fastlora.ops_4bit import lora_matmul_4bit
from fastlora.siblings import SharedInput

shrink = torch.ops.fastlora.shrink.default
lora_matmul = torch.ops.fastlora.lora_matmul.default
lora_matmul_group = torch.ops.fastlora.lora_matmul_group.default
lora_grad = torch.ops.fastlora.lora_grad.default
nf4_matmul = torch.ops.fastlora.nf4_matmul.default
_unsafe_view = torch.ops.aten._unsafe_view.default

Weight = Tensor | Weight4bit


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``; eager calls skip its binding of default arguments, which costs 25 µs a call."""
    if not torch.is_grad_enabled():  # asked first: Dynamo's apply passes a context there that forward does not take
        return function.forward(*args)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def transform_without_rule() -> str | None:
    """The transform in force here that fastlora's layers have no rule for, None if there is none."""
    if torch.compiler.is_compiling():
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD, for which fastlora has no rule"
    if torch._C._are_functorch_transforms_active():
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters  # which imports Triton

        transforms = {level.key().name for level in retrieve_all_functorch_interpreters()}
        if "Vmap" in transforms:
            return "torch.func.vmap, for which fastlora has no rule"
    return None


def without_autocast(compute: Callable) -> Callable:
    """``compute`` with autocast off: its first argument, x, has the dtype to compute in."""

    def run(x: Tensor, *args: Any) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return compute(x, *args)
        with torch.autocast(device, enabled=False):
            return compute(x, *args)

    return run


def backward_without_autocast(backward: Callable) -> Callable:
    """A once-differentiable backward with autocast off, whether or not it is called under it: dtypes are decided."""

    def run(ctx: Any, dy: Tensor | None, *others: Any) -> Any:
        device = "cpu" if dy is None else dy.device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, dy, *others)
        with torch.autocast(device, enabled=False):
            return backward(ctx, dy, *others)

    return once_differentiable(run)


def is_packed() -> bool:
    """Whether saved tensors go through hooks here: checkpointing, or saving them elsewhere."""
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Run(Function):
    """``compute()``, whose gradient is that of ``handle``: everything backward needs was saved with the handle."""

    @staticmethod
    def forward(handle, compute):
        return compute()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def new_handle(x: Tensor, N: int) -> Tensor:
    """``[..., N]`` without memory."""
    return x.new_empty(()).expand(*x.shape[:-1], N)


def rows_of(t: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``"""
    if t.dim() == 2:
        return t
    K = t.shape[-1]
    return t.reshape(-1 if K > 0 else t.shape[:-1].numel(), K)


def like_rows_of(x_shape: torch.Size, y: Tensor) -> Tensor:
    """``[M, N]`` with the leading dimensions of x.

    Not by `view`: an output of a custom Function that is a view refuses every in-place op on it.
    """
    return y if len(x_shape) == 2 else _unsafe_view(y, (*x_shape[:-1], y.shape[-1]))


def is_merged(weight: Weight, p: float) -> bool:
    """Whether the adapter is added to the weight while that is decoded: forward and dx are then one product each.

    4-bit weights do not lie on the grid of the compute dtype, so the one rounding after the merge dithers and small
    updates survive; on a dense bf16 weight they would not. A CPU decodes inside its products: there the adapter's own
    product costs less than merging.
    """
    return p == 0.0 and not isinstance(weight, Tensor) and kernel_ops.decodes_whole_weights(weight.packed.device)


def product(x: Tensor, weight: Weight, a: Tensor, b: Tensor, bias: Any, xa: Any, s: float, p: float) -> Tensor:
    """``x wᵀ + bias + xa bᵀ``, like x but for N; xa is not used if the adapter `is_merged`: that is
    ``nf4_matmul``, whose plan for few tokens on a GPU multiplies the 4-bit weight without decoding it to memory. On a
    CPU `lora_matmul_4bit` does so for any number."""
    rows = rows_of(x)
    if isinstance(weight, Tensor):
        y = lora_matmul(rows, weight, xa, b, bias)
    elif is_merged(weight, p):
        y = nf4_matmul(rows, *weight, a, b, s, bias)
    else:
        y = lora_matmul_4bit([rows], [weight], [xa], [b], bias, [0.0], [None], False)
    return like_rows_of(x.shape, y)


class Part(NamedTuple):
    """One layer's part of the gradient of x."""

    dy: Tensor
    weight: Weight
    a: Tensor
    b: Tensor | None  # given if the adapter is merged
    dxa: Tensor | None  # given if not
    s: float
    p: float
    seed: Tensor | None

    def alone(self) -> Tensor:
        """``dy w + D ∘ (dxa a)``"""
        dy, weight, a, b, dxa, s, p, seed = self
        if is_merged(weight, p):
            return torch.mm(dy, weight.decode_merged(dy.dtype, a, b, s))  # type: ignore[union-attr, arg-type]
        if isinstance(weight, Tensor):
            return lora_matmul(dy, weight.t(), dxa, a.t(), None, p, seed)
        return lora_matmul_4bit([dy], [weight], [dxa], [a.t()], None, [p], [seed], True)  # type: ignore[list-item]


def input_gradient(parts: list[Part]) -> Tensor:
    """The sum of the parts: one product, or such as accumulate into one tensor."""
    if len(parts) == 1:
        return parts[0].alone()
    merged = [part for part in parts if is_merged(part.weight, part.p)]
    plain = [part for part in parts if not is_merged(part.weight, part.p)]
    dx = _sum_of_plain(plain) if len(plain) > 1 else (plain or merged).pop(0).alone()
    for dy, weight, a, b, _, s, _, _ in merged:
        dx.addmm_(dy, weight.decode_merged(dy.dtype, a, b, s))  # type: ignore[union-attr, arg-type]
    return dx


def _sum_of_plain(parts: list[Part]) -> Tensor:
    """`input_gradient` of parts whose adapters are not merged."""
    dys, weights, As, _, dxas, _, ps, seeds = zip(*parts, strict=True)
    at = [a.t() for a in As]
    if not any(isinstance(w, Tensor) for w in weights):
        return lora_matmul_4bit(dys, weights, dxas, at, None, ps, seeds, True)
    ws = [(w if isinstance(w, Tensor) else w.decode(dys[0].dtype)).t() for w in weights]
    return lora_matmul_group(dys, ws, dxas, at, ps, seeds)


def fields_of(weight: Weight) -> tuple:
    return (weight,) if isinstance(weight, Tensor) else weight


def weight_of(fields: Any) -> Weight:
    return fields[0] if len(fields) == 1 else Weight4bit(*fields)


TENSORS = 5  # of the fields of a Weight4bit


class Static(NamedTuple):
    """What of a call is no tensor."""

    s: float
    p: float
    numbers: tuple  # of a 4-bit weight
    shared: SharedInput | None
    place: int  # in shared.adapters, if xa is made in backward
    chained: bool  # to the other layers of x, by tokens
    run: bool  # compute, or put out a handle


def lora_linear(
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    s: float,
    p: float,
    seed: Tensor | None,
    shared: SharedInput | None = None,
) -> Tensor:
    """``x wᵀ + bias + s · drop(x) aᵀ bᵀ`` on a frozen weight; ``shared`` if x is that of siblings. Not for autocast."""
    merged = is_merged(weight, p)
    if not torch.is_grad_enabled():
        xa = None if merged else _shrink(x, a, s, p, seed, shared)
        return product(x, weight, a, b, bias, xa, s, p)
    xa, place = None, -1
    if not merged:
        torch._C._set_grad_enabled(False)  # torch.no_grad() takes six times as long, and this is every layer's way
        try:
            xa = _shrink(x, a, s, p, seed, shared)
        finally:
            torch._C._set_grad_enabled(True)
    elif shared is not None:
        place = shared.wanted(a, s)
    chain = shared if shared is not None and shared.may_hold_graph else None
    token = None if chain is None else chain.token
    packed = is_packed()
    fields = fields_of(weight)
    static = Static(s, p, fields[TENSORS:], shared, place, chain is not None, not packed)
    y = apply(LoRALinear, x, a, b, bias, xa, token, seed, static, *fields[:TENSORS])
    if chain is not None:
        y, chain.token = y
    return apply(Run, y, partial(product, x, weight, a, b, bias, xa, s, p)) if packed else y


def _shrink(x: Tensor, a: Tensor, s: float, p: float, seed: Tensor | None, shared: SharedInput | None) -> Tensor:
    rows = rows_of(x)
    return shrink(rows, a, s, p, seed) if shared is None or p != 0.0 else shared.shrink(rows, a, s)


class LoRALinear(Function):
    """`lora_linear`, given xa. Its outputs are y (a handle, unless ``run``) and, if ``chained``, a token."""

    @staticmethod
    def forward(x, a, b, bias, xa, token, seed, static, *weight):
        if static.run:
            y = product(x, weight_of(weight + static.numbers), a, b, bias, xa, static.s, static.p)
        else:
            y = new_handle(x, b.shape[0])
        return (y, x.new_empty(0)) if static.chained else y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, b, bias, xa, token, seed, static, *weight = inputs
        need_dx, need_da, need_db = ctx.needs_input_grad[:3]
        need_xa = need_db and xa is None
        kept = x.detach() if static.chained else x  # see SharedInput
        ctx.save_for_backward(
            kept if need_da or need_xa else None,
            a if need_dx or need_xa else None,
            b if need_dx or need_da else None,
            xa if need_db else None,
            seed,
            *(weight if need_dx else ()),
        )
        ctx.static, ctx.first = static, token is None
        ctx.merged = is_merged(weight_of((*weight, *static.numbers)), static.p)
        ctx.x_shape, ctx.dtypes = x.shape, (a.dtype, b.dtype, None if bias is None else bias.dtype)
        ctx.unused = len(inputs) - 4
        ctx.set_materialize_grads(False)

    @staticmethod
    @backward_without_autocast
    def backward(ctx, dy, _=None):
        need_dx, need_da, need_db, need_dbias = ctx.needs_input_grad[:4]
        s, p, numbers, shared, place, chained, _ = ctx.static
        if chained:
            shared.release()
        dx = da = db = dbias = part = None
        if dy is not None:
            dy = rows_of(dy)
            x, a, b, xa, seed, *weight = ctx.saved_tensors
            if need_db and xa is None:
                xa = shrink(rows_of(x), a, s) if shared is None else shared.shrink_in_backward(place, rows_of(x))
            need_dxa = need_da or (need_dx and not ctx.merged)  # dx is of the merged weight
            dxa, da, db = adapter_grads(dy, x if need_da else None, b if need_dxa else None, xa, s, p, seed)
            a_dtype, b_dtype, bias_dtype = ctx.dtypes
            da, db = da.to(a_dtype) if need_da else None, db.to(b_dtype) if need_db else None
            dbias = dy.sum(0, dtype=bias_dtype) if need_dbias else None
            if need_dx:
                part = Part(dy, weight_of((*weight, *numbers)), a, b, dxa, s, p, seed)
        if need_dx and not ctx.first:
            if part is not None:
                shared.hand_over(part)
        elif need_dx:
            parts = [] if part is None else [part]
            if chained:
                parts += shared.take_over()
            if parts:
                dx = like_rows_of(ctx.x_shape, input_gradient(parts))
        return (dx, da, db, dbias, *(None,) * ctx.unused)


def adapter_grads(dy: Tensor, x: Tensor | None, b: Tensor | None, xa: Tensor | None, s: float, p: float, seed: Any):
    """dxa, da, db for 2-D dy; without x no da, without b no dxa and no da, without xa no db."""
    if b is None and xa is None:
        return None, None, None
    return lora_grad(dy, None if x is None else rows_of(x), b, xa, s, p, seed)


@without_autocast
def add_lora(
    x: Tensor, a: Tensor, b: Tensor, y: Tensor, s: float, p: float, seed: Tensor | None, in_place: bool = False
) -> Tensor:
    """``y + s · drop(x) aᵀ bᵀ`` for the output y of a base layer that computes itself (the `opaque` plan)."""
    with torch.no_grad():
        xa = shrink(rows_of(x), a, s, p, seed)
    return apply(AddLoRA, x, a, b, y, xa, s, p, seed, in_place)


class AddLoRA(Function):
    """`add_lora`, given xa."""

    @staticmethod
    def forward(x, a, b, y, xa, s, p, seed, in_place):
        rows, xa, b = rows_of(y), xa.to(y.dtype), b.to(y.dtype).t()
        if in_place:
            rows.addmm_(xa, b)
            return y
        return like_rows_of(y.shape, torch.addmm(rows, xa, b))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, b, y, xa, ctx.s, ctx.p, seed, in_place = inputs
        if in_place:
            ctx.mark_dirty(y)
        need_dx, need_da, need_db = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            x if need_da else None,
            a if need_dx else None,
            b if need_dx or need_da else None,
            xa if need_db else None,
            seed,
        )
        ctx.x_shape, ctx.x_dtype, ctx.a_dtype, ctx.b_dtype = x.shape, x.dtype, a.dtype, b.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    @backward_without_autocast
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 9
        need_dx, need_da, need_db, need_dy = ctx.needs_input_grad[:4]
        x, a, b, xa, seed = ctx.saved_tensors
        rows = rows_of(dy).to(ctx.x_dtype)
        dxa, da, db = adapter_grads(rows, x, b, xa, ctx.s, ctx.p, seed)
        da, db = da.to(ctx.a_dtype) if need_da else None, db.to(ctx.b_dtype) if need_db else None
        dx = None
        if need_dx:
            no_base = rows.new_empty(a.shape[1], 0)  # only dropout(dxa @ a) is left of the product
            dx = like_rows_of(ctx.x_shape, lora_matmul(rows[:, :0], no_base, dxa, a.t(), None, ctx.p, seed))
        return dx, da, db, dy if need_dy else None, *(None,) * 5
