"""The MLP of a transformer block as one autograd Function: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``.

One layer may give gate and up side by side, as in Phi-3 and GLM, and h may go through the model's own dropout, as T5's
does: its mask is drawn as ``F.dropout`` draws it, and kept as a byte an element.

The input of down, h, is not saved for backward. Backward recomputes it in the same pass over gate and up that computes
their gradients, in place.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastlora.autograd import (
    adapter_grads,
    deferred_product,
    guarded,
    is_eager,
    needs_guard,
    saved_tensor_hooks_active,
    shrink,
    without_autocast,
    zero_storage_output,
)
from fastlora.compat import apply_of, keeps_graph
from fastlora.dora import column_scale, keep_output, kept_output, through_scale
from fastlora.fourbit import WEIGHT_TENSORS
from fastlora.ops import overload
from fastlora.products import (
    DxTerm,
    Weight,
    fields_of,
    input_gradient,
    is_merged,
    like_rows_of,
    product,
    weight_of,
)
from fastlora.reference import halves

shrink_group = overload("shrink_group")
swiglu = overload("swiglu")
swiglu_backward_ = overload("swiglu_backward_")
lora_grad_a = overload("lora_grad_a")


class Projection(NamedTuple):
    """One adapted layer: ``x wᵀ + bias + s · drop(x) aᵀ bᵀ``, its columns times ``m / norms`` if it is of DoRA, which
    then has no dropout and no bias."""

    weight: Weight
    a: Tensor
    b: Tensor
    bias: Tensor | None
    s: float
    p: float
    seed: Tensor | None
    m: Tensor | None = None
    norms: Tensor | None = None

    @property
    def merged(self) -> bool:
        return is_merged(self.weight, self.p, self.m)

    def forward(self, x: Tensor, xa: Tensor | None) -> Tensor:
        scale = None if self.m is None or self.norms is None else column_scale(self.m, self.norms)
        return product(x, self.weight, self.a, self.b, self.bias, None if self.merged else xa, self.s, self.p, scale)

    def through_scale(self, dy: Tensor, y: Tensor | None, need: "Need") -> tuple[Tensor, Tensor | None]:
        """What backward goes on with in the place of dy, and dm."""
        return (dy, None) if self.m is None else through_scale(dy, y, self.m, self.norms, need.m)  # type: ignore[arg-type]

    def dx_term(self, dy: Tensor, dxa: Tensor | None) -> DxTerm:
        return DxTerm(dy, self.weight, self.a, self.b, None if self.merged else dxa, self.s, self.p, self.seed)

    def flat(self) -> tuple[tuple, tuple]:
        """The layer as SLOTS tensors or Nones, which autograd has to see, and its numbers."""
        weight, numbers = fields_of(self.weight)
        tensors = (self.a, self.b, self.bias, self.m, self.seed, self.norms, *weight)
        return tensors + (None,) * (SLOTS - len(tensors)), (self.s, self.p, numbers)


SLOTS = 6 + WEIGHT_TENSORS  # a, b, bias, m, seed, norms and the tensors of a 4-bit weight


def unflat(tensors: tuple, numbers: tuple) -> Projection:
    """The inverse of `Projection.flat`."""
    a, b, bias, m, seed, norms, *weight = tensors
    s, p, numbers_of_weight = numbers
    return Projection(weight_of(weight, numbers_of_weight), a, b, bias, s, p, seed, m, norms)


def shrink_all(rows: Tensor, layers: list[Projection]) -> list[Tensor]:
    """xa of several layers, in one read of rows."""
    if not layers:
        return []
    a, s, p, seeds = zip(*((layer.a, layer.s, layer.p, layer.seed) for layer in layers), strict=True)
    return shrink_group(rows, list(a), list(s), list(p), list(seeds))


@without_autocast
def fused_mlp(
    x: Tensor,
    first: list[Projection],
    down: Projection,
    activation: str,
    gate_first: bool | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``down(dropout(swiglu(*(layer(x) for layer in first), activation), dropout_p))``: ``first`` is gate and up, or up
    alone, or one layer that gives both side by side (`fastlora.reference.halves`).

    Saves x, the outputs of the first layers and dropout's mask. ``activation`` as in `fastlora.reference.activate`.
    """
    with torch.no_grad():
        rows = x.flatten(0, -2)
        computed = iter(shrink_all(rows, [layer for layer in first if not layer.merged]))
        xas = [None if layer.merged else next(computed) for layer in first]
        zs = [layer.forward(rows, xa) for layer, xa in zip(first, xas, strict=True)]
        h = like_rows_of(x.shape, swiglu(*gate_and_up(zs, gate_first), activation))
        mask = None
        if dropout_p > 0.0:
            h, mask = torch.native_dropout(h, dropout_p, True)
        xa = shrink(h.flatten(0, -2), down.a, down.s, down.p, down.seed)  # merged or not, backward needs it
    if not torch.is_grad_enabled():
        return down.forward(h, xa)
    tensors, numbers = zip(*(layer.flat() for layer in (*first, down)), strict=True)
    eager, deferred = is_eager(), saved_tensor_hooks_active() and down.m is None
    apply = _apply_fused_mlp if eager else FusedMLP.apply
    kept = (*sum(tensors, ()), mask, *zs, *xas, xa)
    y = apply(x, activation, gate_first, dropout_p, numbers, None if deferred else h, *kept)
    return deferred_product(y, partial(down.forward, h, xa), eager) if deferred else y


def gate_and_up(zs: list[Tensor], gate_first: bool | None) -> tuple[Tensor, Tensor | None]:
    """The two factors of h, of which the first is activated; None if there is one only."""
    if gate_first is not None:
        return halves(zs[0], gate_first)
    return zs[0], zs[1] if len(zs) == 2 else None


def drop_(h: Tensor, mask: Tensor | None, p: float) -> None:
    """Dropout with this mask, in place; its gradient too."""
    if mask is not None:
        h.mul_(mask.view(h.shape)).mul_(1 / (1 - p))


BEFORE = 6  # arguments of `FusedMLP` before those of its layers


class FusedMLP(Function):
    """`fused_mlp`, given everything but its last product. Without h that is deferred (`DeferredProduct`)."""

    @staticmethod
    def forward(x, activation, gate_first, dropout_p, numbers, h, *tensors):
        down = unflat(tensors[SLOTS * (len(numbers) - 1) : SLOTS * len(numbers)], numbers[-1])
        return zero_storage_output(x, down.b.shape[0]) if h is None else down.forward(h, tensors[-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.activation, ctx.gate_first, ctx.dropout_p, ctx.numbers, _, *tensors = inputs
        ctx.x_shape = x.shape
        n = len(ctx.numbers)
        need_dm = ctx.needs_input_grad[BEFORE + (n - 1) * SLOTS + 3]
        ctx.save_for_backward(x, *tensors, keep_output(ctx, output) if need_dm else None)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        if needs_guard(dy):
            return guarded(ctx, FusedMLP.backward, dy)
        n = len(ctx.numbers)
        after = 2 * n  # other arguments
        if dy is None:
            return (None,) * (BEFORE + n * SLOTS + after)
        x, *tensors, y = ctx.saved_tensors
        dy, rows = dy.flatten(0, -2), x.flatten(0, -2)
        starts = range(0, n * SLOTS, SLOTS)
        *first, down = (unflat(tensors[i : i + SLOTS], num) for i, num in zip(starts, ctx.numbers, strict=True))
        need_dx = ctx.needs_input_grad[0]
        *needs, need = (Need(*ctx.needs_input_grad[BEFORE + i : BEFORE + i + 4]) for i in starts)
        mask, zs, (*xas, xa) = tensors[n * SLOTS], tensors[n * SLOTS + 1 : -n], tensors[-n:]
        h: Any = None
        if need.m and (y := kept_output(ctx, y)) is None:
            h = swiglu(*gate_and_up(zs, ctx.gate_first), ctx.activation)
            drop_(h, mask, ctx.dropout_p)
            y = down.forward(h, xa)
        dy, dm = down.through_scale(dy, None if y is None else y.flatten(0, -2), need)

        need_dh = need_dx or any(map(any, needs))
        need_dxa = need.a or (need_dh and not down.merged)
        dxa, _, db = adapter_grads(dy, None, down.b if need_dxa else None, xa if need.b else None, down.s, 0.0, None)
        da, outputs = None, zs
        if need_dh:
            h = down.dx_term(dy, dxa).input_grad()  # dh, until `swiglu_backward_` overwrites it
            if torch.compiler.is_compiling() or keeps_graph() or any(layer.m is not None for layer in first):
                zs = [z.clone() for z in zs]  # read once more: by another backward, or for the gradient of m
            drop_(h, mask, ctx.dropout_p)
            swiglu_backward_(h, *gate_and_up(zs, ctx.gate_first), ctx.activation)
        elif need.a:
            h = swiglu(*gate_and_up(zs, ctx.gate_first), ctx.activation)
        if need.a:
            drop_(h, mask, ctx.dropout_p)
            da = lora_grad_a(dxa, h, down.p, down.seed)
        of_down = gradients_of(down, need, dy, da, db, dm)

        grads: list[Tensor | None] = []
        terms: list[DxTerm] = []
        computed = iter(
            shrink_all(rows, [layer for layer, need in zip(first, needs, strict=True) if layer.merged and need.b])
        )
        for layer, need, dz, z, xa in zip(first, needs, zs, outputs, xas, strict=True):
            dz, dm = layer.through_scale(dz, z, need)
            if layer.merged and need.b:
                xa = next(computed)
            need_dxa = need.a or (need_dx and not layer.merged)
            dxa, da, db = adapter_grads(
                dz,
                rows if need.a else None,
                layer.b if need_dxa else None,
                xa if need.b else None,
                layer.s,
                layer.p,
                layer.seed,
            )
            grads += gradients_of(layer, need, dz, da, db, dm)
            terms.append(layer.dx_term(dz, dxa))
        dx = like_rows_of(ctx.x_shape, input_gradient(terms)) if need_dx else None
        return dx, *(None,) * (BEFORE - 1), *grads, *of_down, *(None,) * after


_apply_fused_mlp = apply_of(FusedMLP)


class Need(NamedTuple):
    """Which gradients of a `Projection` are asked for."""

    a: bool
    b: bool
    bias: bool
    m: bool


def gradients_of(layer: Projection, need: Need, dy: Tensor, da: Any, db: Any, dm: Any) -> tuple:
    """In the order of `Projection.flat`."""
    dbias = dy.sum(0, dtype=layer.bias.dtype) if need.bias and layer.bias is not None else None
    grads = da.to(layer.a.dtype) if need.a else None, db.to(layer.b.dtype) if need.b else None, dbias, dm
    return grads + (None,) * (SLOTS - len(grads))
