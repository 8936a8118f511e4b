"""Several adapters in one batch: every entry of the batch has an adapter of its own, and the base weight is read once.

xa and the gradients of the factors are products of the rows that an adapter has, as those of experts are. In the base
product the adapters count as one, whose rank is the sum of theirs: a row of xa is zero outside its adapter's columns.

    xa  = s ∘ (drop(x) a[e]ᵀ)       y  = x wᵀ + bias + wide(xa) [b_0 | b_1 | ...]ᵀ
    dxa = s ∘ (dy b[e])             dx = dy w + D ∘ (wide(dxa) [a_0; a_1; ...])
    da[e] = dxaᵀ drop(x)            db[e] = dyᵀ xa, of the rows of e
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastlora.autograd import (
    deferred_product,
    guarded,
    is_eager,
    needs_guard,
    saved_tensor_hooks_active,
    without_autocast,
    zero_storage_output,
)
from fastlora.compat import apply_of
from fastlora.ops import overload
from fastlora.ops_experts import rows_of_experts  # noqa: F401  # defines the ops
from fastlora.products import DxTerm, Weight, fields_of, like_rows_of, product, weight_of

shrink_experts = overload("shrink_experts")
lora_grad_experts = overload("lora_grad_experts")


class Rows(NamedTuple):
    """Which of A adapters an entry of a batch of B has. Neighbours with the same adapter are a run."""

    adapter: Tensor  # int64 [runs], A for none
    ends: Tensor  # int32 [runs], of its entries
    one_hot: Tensor  # [B, A], of an entry without an adapter zero
    s: Tensor  # [B], the scaling of its adapter

    def offs(self, M: int) -> Tensor:
        """Where the rows of each run end, if M rows are those of the batch."""
        return self.ends * (M // len(self.s)) if len(self.s) else self.ends

    def scaled(self, xa: Tensor) -> Tensor:
        """``s ∘ xa``, in place."""
        if xa.numel() > 0:
            by_entry = xa.view(len(self.s), -1).mul_(self.s.unsqueeze(1))
            if not self.are_adapters:  # what an entry without an adapter has here need not be finite
                by_entry.masked_fill_(~self.one_hot.any(1, keepdim=True), 0.0)
        return xa

    def wide(self, xa: Tensor) -> Tensor:
        """``[M, A · r]``: xa [M, r] in the columns of each row's adapter."""
        (B, A), (M, r) = self.one_hot.shape, xa.shape
        by_adapter = self.one_hot.view(B, 1, A, 1).to(xa.dtype) * xa.view(B, M // max(B, 1), 1, r)
        return by_adapter.view(M, A * r)

    def of_runs(self, stack: Tensor) -> Tensor:
        """For each run the entry of its adapter in the stack."""
        return stack if self.are_adapters else stack.index_select(0, self.adapter.clamp_max(len(stack) - 1))

    @property
    def are_adapters(self) -> bool:
        """Whether the runs are the adapters: each has one, in their order, which is that in which they occur."""
        return len(self.adapter) == self.one_hot.shape[1]

    def sum_of_runs(self, grads: Tensor) -> Tensor:
        """The gradients of each adapter, from those of runs."""
        if self.are_adapters:
            return grads
        A = self.one_hot.shape[1]
        return grads.new_zeros(A + 1, *grads.shape[1:]).index_add_(0, self.adapter, grads)[:A]


@without_autocast
def mixed_linear(
    x: Tensor, weight: Weight, a: Tensor, b: Tensor, bias: Tensor | None, rows: Rows, p: float, seed: Tensor | None
) -> Tensor:
    """``x[i] wᵀ + bias + s · drop(x[i]) a[e]ᵀ b[e]ᵀ`` for every entry i and its adapter e: x [B, ..., K], a [A, r, K],
    b [A, N, r] -> [B, ..., N]."""
    with torch.no_grad():
        of_x = x.flatten(0, -2)
        xa = rows.scaled(shrink_experts(of_x, rows.of_runs(a), rows.offs(len(of_x)), 1.0, p, seed))
    if not torch.is_grad_enabled():
        return _product(x, weight, b, bias, rows, xa, p)
    eager, deferred = is_eager(), saved_tensor_hooks_active()
    tensors, numbers = fields_of(weight)
    apply = _apply_mixed_linear if eager else MixedLinear.apply
    y = apply(x, a, b, bias, xa, p, seed, deferred, numbers, *rows, *tensors)
    return deferred_product(y, partial(_product, x, weight, b, bias, rows, xa, p), eager) if deferred else y


def _product(x: Tensor, weight: Weight, b: Tensor, bias: Tensor | None, rows: Rows, xa: Tensor, p: float) -> Tensor:
    side_by_side = b.transpose(0, 1).reshape(b.shape[1], -1)
    return product(x, weight, x, side_by_side, bias, rows.wide(xa), 1.0, p)


class MixedLinear(Function):
    """`mixed_linear`, given xa; without memory if it is ``deferred``."""

    @staticmethod
    def forward(x, a, b, bias, xa, p, seed, deferred, numbers, *tensors):
        if deferred:
            return zero_storage_output(x, b.shape[1])
        weight = weight_of(tensors[len(Rows._fields) :], numbers)
        return _product(x, weight, b, bias, Rows(*tensors[: len(Rows._fields)]), xa, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, b, bias, xa, ctx.p, seed, _, ctx.numbers, *tensors = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, a, b, xa, seed, *tensors)
        ctx.x_shape, ctx.bias_dtype, ctx.inputs = x.shape, None if bias is None else bias.dtype, len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        if needs_guard(dy):
            return guarded(ctx, MixedLinear.backward, dy)
        dx = da = db = dbias = None
        if dy is not None:
            need_dx, need_da, need_db, need_dbias, *_ = ctx.needs_input_grad
            x, a, b, xa, seed, *tensors = ctx.saved_tensors
            rows, p = Rows(*tensors[: len(Rows._fields)]), ctx.p
            dy = dy.flatten(0, -2)
            offs = rows.offs(len(dy))
            if need_dbias:
                dbias = dy.sum(0, dtype=ctx.bias_dtype)
            if need_db:
                # Turned here in one copy: what autograd would give each adapter is copied one by one otherwise.
                db = rows.sum_of_runs(lora_grad_experts(xa, dy, offs)).transpose(1, 2).contiguous()
            if need_dx or need_da:
                dxa = rows.scaled(shrink_experts(dy, rows.of_runs(b).transpose(1, 2), offs, 1.0))
                if need_da:
                    da = rows.sum_of_runs(lora_grad_experts(dxa, x.flatten(0, -2), offs, p, seed))
                if need_dx:
                    weight = weight_of(tensors[len(Rows._fields) :], ctx.numbers)
                    term = DxTerm(dy, weight, a.flatten(0, 1), b, rows.wide(dxa), 1.0, p, seed)
                    dx = like_rows_of(ctx.x_shape, term.input_grad())
        return dx, da, db, dbias, *(None,) * (ctx.inputs - 4)


_apply_mixed_linear = apply_of(MixedLinear)
