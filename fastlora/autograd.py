"""The autograd Functions of one adapted layer. They save x in the dtype that the layer computes in, the adapter, xa and
the seed of dropout (DoRA its output too); never a mask or a decoded weight.

`fused_linear` computes a layer whose base weight fastlora multiplies itself, `add_adapter` adds an adapter to the
output of any base layer; `fastlora.mlp.fused_mlp` computes an MLP. Each computes xa, which is small, without autograd,
and runs the layer's product in a Function that saves every tensor its backward needs.

Under saved-tensor hooks, as checkpointing sets them, the product is deferred: the Function saves its tensors and
returns an output without memory, and a second Function, `DeferredProduct`, computes it. A checkpointed block is
recomputed only until its last tensor has been saved, so the last base product of a block is not computed a second time.

``a, b, s, p, seed`` are as in `fastlora.reference`; x has two dimensions or more, and is multiplied as a matrix. The
products with a base weight are those of `fastlora.products`. Gradients can be differentiated once. ``eager`` says that
neither torch.compile nor torch.func traces the call (`is_eager`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastlora.compat import (
    any_autocast_is_enabled,
    apply_of,
    forward_ad,
    functorch_is_active,
    functorch_transforms,
    set_grad_enabled,
    top_saved_tensors_hooks,
    unsafe_view,
)
from fastlora.dora import column_scale, keep_output, kept_output, through_scale
from fastlora.ops import overload
from fastlora.products import (
    DxTerm,
    Weight,
    fields_of,
    input_gradient,
    is_merged,
    like_rows_of,
    product,
    weight_gradient,
    weight_of,
)
from fastlora.recompute import MAKERS, recipe_of
from fastlora.siblings import SharedInput

shrink = overload("shrink")
lora_matmul = overload("lora_matmul")
lora_grad = overload("lora_grad")


def is_eager() -> bool:
    """Whether neither torch.compile or torch.export nor a transform of torch.func traces what is called here."""
    return not torch.compiler.is_compiling() and not functorch_is_active()


def transform_without_rule() -> str | None:
    """The transform in force here that fastlora's layers have no rule for, None if there is none."""
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0:
        return "forward-mode AD, for which fastlora has no rule"
    if functorch_is_active() and "Vmap" in functorch_transforms():
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


def needs_guard(dy: Tensor | None) -> bool:
    """Whether a backward has to go through `guarded`: it is called with gradients on, or under autocast."""
    if torch.is_grad_enabled():
        return True
    return dy is not None and any_autocast_is_enabled() and torch.is_autocast_enabled(dy.device.type)


def guarded(ctx: Any, backward: Callable, dy: Tensor | None, *others: Any) -> Any:
    """``backward(ctx, dy, *others)``, once differentiable and with autocast off: forward has decided every dtype.

    The gradients depend on what was saved, so to differentiate them is an error whether or not dy requires grad, which
    is what ``once_differentiable`` looks at: it is shown a tensor that does, except by transforms of torch.func, under
    which it cannot mark gradients.
    """
    return _guarded(ctx, backward, dy, others, torch.zeros((), requires_grad=not functorch_is_active()))


@once_differentiable
def _guarded(ctx: Any, backward: Callable, dy: Tensor | None, others: tuple, _: Tensor) -> Any:
    if dy is None:
        return backward(ctx, dy, *others)
    with torch.autocast(dy.device.type, enabled=False):
        return backward(ctx, dy, *others)


def saved_tensor_hooks_active() -> bool:
    """Whether saved tensors go through hooks here: checkpointing, or saving them elsewhere."""
    return not torch.compiler.is_compiling() and top_saved_tensors_hooks(True) is not None


class DeferredProduct(Function):
    """``compute()``; the gradient of its output is that of ``output``, whose Function saved what backward needs."""

    @staticmethod
    def forward(output, compute):
        return compute()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


_apply_deferred_product = apply_of(DeferredProduct)


def deferred_product(output: Tensor, compute: Callable[[], Tensor], eager: bool) -> Tensor:
    """Compute the product whose Function returned ``output``, a `zero_storage_output`."""
    return (_apply_deferred_product if eager else DeferredProduct.apply)(output, compute)


def zero_storage_output(x: Tensor, N: int) -> Tensor:
    """``[..., N]`` that takes the memory of one element."""
    return x.new_empty(()).expand(*x.shape[:-1], N)


def fused_linear(
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    s: float,
    p: float,
    seed: Tensor | None,
    shared: SharedInput | None = None,
    eager: bool = False,
    m: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """``x wᵀ + bias + s · drop(x) aᵀ bᵀ``, outside autocast; ``shared`` if siblings get x too.

    With DoRA's ``m`` and ``norms`` (`fastlora.dora`) its columns are multiplied by ``m / norms``. There is no dropout
    and no bias then.
    """
    dense = isinstance(weight, Tensor)
    merged = not dense and is_merged(weight, p, m)
    with_grad = torch.is_grad_enabled()
    xa, xa_index = None, -1
    if not merged:
        if with_grad:
            set_grad_enabled(False)
        try:
            rows = x if x.dim() == 2 else x.flatten(0, -2)
            xa = shrink(rows, a, s, p, seed) if shared is None or p != 0.0 else shared.shrink(rows, a, s)
        finally:
            if with_grad:
                set_grad_enabled(True)
    elif shared is not None and with_grad:
        xa_index = shared.wants_xa(a, s)
    if not with_grad:
        if dense and m is None:  # `product`, without what was done above
            y = lora_matmul(rows, weight, xa, b, bias)
            return y if x.dim() == 2 else unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        scale = None if m is None or norms is None else column_scale(m, norms)
        return product(x, weight, a, b, bias, xa, s, p, scale)
    chained = shared is not None and shared.joins_dx
    token = shared.token if chained else None  # type: ignore[union-attr]
    hooked = top_saved_tensors_hooks(True) is not None if eager else saved_tensor_hooks_active()
    deferred = hooked and m is None  # y is saved for the gradient of m
    again = None  # how to compute x again; asked of layers that make x narrower, as the last of an MLP does
    if b.shape[0] < a.shape[1] and token is None and eager and not hooked and type(x.grad_fn).__name__ in MAKERS:
        again = recipe_of(x)
    tensors, numbers = ((weight,), ()) if dense else fields_of(weight)
    apply = _apply_fused_linear if eager else FusedLinear.apply
    how = s, p, shared, xa_index, deferred, again, numbers  # one argument: autograd looks at each
    y = apply(x, a, b, bias, m, xa, token, seed, norms, how, *tensors)
    if chained:
        y, shared.token = y  # type: ignore[union-attr]
    return deferred_product(y, partial(product, x, weight, a, b, bias, xa, s, p), eager) if deferred else y


class FusedLinear(Function):
    """`fused_linear`, given xa. Returns y, without memory if it is ``deferred``, and a token if it joins in one dx.

    The token goes from each layer of x to the next one, and makes autograd run the first layer's backward last. That
    backward computes dx, in one product with the terms that the other layers left in ``shared``.
    """

    @staticmethod
    def forward(x, a, b, bias, m, xa, token, seed, norms, how, *weight):
        s, p, shared, _, deferred, _, numbers = how
        if deferred:
            y = zero_storage_output(x, b.shape[0])
        elif numbers or norms is not None:
            scale = None if norms is None else column_scale(m, norms)
            y = product(x, weight_of(weight, numbers), a, b, bias, xa, s, p, scale)
        else:  # `product`, without the call
            if x.dim() == 2:
                y = lora_matmul(x, weight[0], xa, b, bias)
            else:
                y = lora_matmul(x.flatten(0, -2), weight[0], xa, b, bias)
                y = unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        return y if shared is None or not shared.joins_dx else (y, x.new_empty(0))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, b, bias, m, xa, token, seed, norms, how, *weight = inputs
        ctx.s, ctx.p, shared, ctx.xa_index, _, again, ctx.numbers = how
        need_dx, need_da, need_db, _, need_dm, *_ = ctx.needs_input_grad
        ctx.need_dw = ctx.needs_input_grad[len(inputs) - len(weight)]
        ctx.chained = shared is not None and shared.joins_dx
        ctx.merged = xa is None
        need_xa = need_db and ctx.merged
        need_x = need_da or need_xa or need_dm or ctx.need_dw
        ctx.dora = norms is not None
        of_dora: tuple = ()
        if ctx.dora:
            of_dora = m, norms, keep_output(ctx, output[0] if ctx.chained else output) if need_dm else None
        ctx.again, for_x = again if need_x and again is not None else (None, ())
        saved_x = x.detach() if ctx.chained else x  # the graph must not hold x itself: see SharedInput
        ctx.save_for_backward(
            saved_x if need_x and ctx.again is None else None,
            a if need_dx or need_xa else None,
            b if need_dx or need_da or need_dm else None,
            xa if need_db or need_dm else None,
            seed,
            *for_x,
            *(weight if need_dx or need_dm else ()),
            *of_dora,
        )
        ctx.kept_for_x = len(for_x)
        ctx.shared, ctx.first = shared, token is None
        ctx.x_shape, ctx.dtypes = x.shape, (a.dtype, b.dtype, None if bias is None else bias.dtype)
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, _=None):
        if torch.is_grad_enabled() or (dy is not None and any_autocast_is_enabled() and needs_guard(dy)):
            return guarded(ctx, FusedLinear.backward, dy)
        need_dx, need_da, need_db, need_dbias, need_dm, *_ = ctx.needs_input_grad
        shared, chained = ctx.shared, ctx.chained
        if chained and shared.token is not None:
            shared.release()
        da = db = dbias = dm = dw = term = dx = None
        if dy is not None:
            x, a, b, xa, seed, *weight = ctx.saved_tensors
            s, p = ctx.s, ctx.p
            if ctx.again is not None:
                x, weight = ctx.again(*weight[: ctx.kept_for_x]), weight[ctx.kept_for_x :]
            if dy.dim() != 2:
                dy, x = dy.flatten(0, -2), None if x is None else x.flatten(0, -2)
            if ctx.dora:
                *weight, m, norms, y = weight
                if need_dm:
                    y = kept_output(ctx, y)
                    if y is None:
                        y = product(x, weight_of(weight, ctx.numbers), a, b, None, xa, s, 0.0, column_scale(m, norms))
                    y = y.flatten(0, -2)
                dy, dm = through_scale(dy, y, m, norms, need_dm)
            if need_db and xa is None:
                xa = shrink(x, a, s) if shared is None else shared.shrink_in_backward(ctx.xa_index, x)
            a_dtype, b_dtype, bias_dtype = ctx.dtypes
            dxa = None
            if need_db or need_da or (need_dx and not ctx.merged):
                b_of_dxa = b if need_da or not ctx.merged else None  # dx of a merged weight takes no dxa
                dxa, da, db = lora_grad(dy, x if need_da else None, b_of_dxa, xa, s, p, seed)
                da = None if not need_da else da if da.dtype == a_dtype else da.to(a_dtype)
                db = None if not need_db else db if db.dtype == b_dtype else db.to(b_dtype)
            if need_dbias:
                dbias = dy.sum(0, dtype=bias_dtype)
            if ctx.need_dw:
                dw = weight_gradient(dy, x)
            if need_dx:
                weight = weight_of(weight, ctx.numbers) if ctx.numbers else weight[0]
                term = DxTerm(dy, weight, a, b, None if ctx.merged else dxa, s, p, seed)
        if need_dx and not ctx.first:
            if term is not None:
                shared.defer_dx(term)
        elif need_dx:
            if not chained:
                dx = None if term is None else term.input_grad()
            elif terms := ([] if term is None else [term]) + shared.collect_dx():
                dx = input_gradient(terms)
            if dx is not None and len(ctx.x_shape) != 2:
                dx = unsafe_view(dx, ctx.x_shape)
        if dw is not None:
            return (dx, da, db, dbias, dm, *(None,) * (ctx.inputs - 6), dw)
        return (dx, da, db, dbias, dm, *(None,) * (ctx.inputs - 5))


_apply_fused_linear = apply_of(FusedLinear)


def adapter_grads(dy: Tensor, x: Tensor | None, b: Tensor | None, xa: Tensor | None, s: float, p: float, seed: Any):
    """dxa, da, db for 2-D dy and x; without x no da, without b no dxa and no da, without xa no db."""
    if b is None and xa is None:
        return None, None, None
    return lora_grad(dy, x, b, xa, s, p, seed)


@without_autocast
def add_adapter(
    x: Tensor, a: Tensor, b: Tensor, y: Tensor, s: float, p: float, seed: Tensor | None, in_place: bool = False
) -> Tensor:
    """``y + s · drop(x) aᵀ bᵀ`` for the output y of a base layer that computes itself (the `opaque` plan)."""
    with torch.no_grad():
        xa = shrink(x.flatten(0, -2), a, s, p, seed)
    if not torch.is_grad_enabled():
        return AddAdapter.forward(x, a, b, y, xa, s, p, seed, in_place)
    return (_apply_add_adapter if is_eager() else AddAdapter.apply)(x, a, b, y, xa, s, p, seed, in_place)


class AddAdapter(Function):
    """`add_adapter`, given xa."""

    @staticmethod
    def forward(x, a, b, y, xa, s, p, seed, in_place):
        rows, xa, b = y.flatten(0, -2), xa.to(y.dtype), b.to(y.dtype).t()
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
    def backward(ctx, dy):
        if needs_guard(dy):
            return guarded(ctx, AddAdapter.backward, dy)
        if dy is None:
            return (None,) * 9
        need_dx, need_da, need_db, need_dy = ctx.needs_input_grad[:4]
        x, a, b, xa, seed = ctx.saved_tensors
        rows = dy.flatten(0, -2).to(ctx.x_dtype)
        dxa, da, db = adapter_grads(rows, None if x is None else x.flatten(0, -2), b, xa, ctx.s, ctx.p, seed)
        da, db = da.to(ctx.a_dtype) if need_da else None, db.to(ctx.b_dtype) if need_db else None
        dx = None
        if need_dx:
            no_base = rows.new_empty(a.shape[1], 0)  # only dropout(dxa @ a) is left of the product
            dx = like_rows_of(ctx.x_shape, lora_matmul(rows[:, :0], no_base, dxa, a.t(), None, ctx.p, seed))
        return dx, da, db, dy if need_dy else None, *(None,) * 5


_apply_add_adapter = apply_of(AddAdapter)
