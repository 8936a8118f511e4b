"""A mixture of experts as one autograd Function: ``weight_e · down_e(gate(first_e(x)))``, summed over the experts e
of a token.

Each expert multiplies the rows of the tokens that chose it, with its own weight and adapter: no sum ``w + s b a`` and
no gradient of the size of the weights is ever made, and an expert that no token chose costs nothing. x is saved for
backward, and the outputs of the first layers, as in `fastlora.mlp`; rows sorted by expert, h and the outputs of the
experts are computed again or not needed: the gradient of a routing weight is the dot product of h and dh, the gradient
of h before that weight.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

import fastlora.ops_experts  # noqa: F401  # defines the ops
from fastlora.autograd import (
    deferred_product,
    guarded,
    is_eager,
    needs_guard,
    saved_tensor_hooks_active,
    without_autocast,
    zero_storage_output,
)
from fastlora.compat import apply_of, keeps_graph
from fastlora.fourbit import WEIGHT_TENSORS
from fastlora.mlp import swiglu, swiglu_backward_
from fastlora.ops import overload
from fastlora.products import Weight, fields_of, weight_of
from fastlora.reference import halves

shrink_experts = overload("shrink_experts")
lora_matmul_experts = overload("lora_matmul_experts")
lora_matmul_experts_4bit = overload("lora_matmul_experts_4bit")
lora_grad_experts = overload("lora_grad_experts")
combine_experts = overload("combine_experts")


class Routing(NamedTuple):
    """Which rows go to which expert: row i is of token ``token[i]``, the rows of expert e end before ``offs[e]``, and
    ``rows[t]`` are those of token t."""

    token: Tensor  # int64 [S]
    rows: Tensor  # int64 [T, k]
    offs: Tensor  # int32 [E]

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Routing":
        """For the experts that tokens have chosen, ``[T, k]``. Numbers from ``experts`` on stand for no expert."""
        sorted_, order = chosen.reshape(-1).sort(stable=True)
        offs = torch.searchsorted(sorted_, torch.arange(experts, device=chosen.device), right=True, out_int32=True)
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order), device=order.device)
        return cls(order // chosen.shape[1], rows.view(chosen.shape), offs)


class Projection(NamedTuple):
    """One linear layer of every expert and its adapter: ``x w[e]ᵀ + bias[e] + s · drop(x) a[e]ᵀ b[e]ᵀ``. The weight is
    kept as ``w[e]``, or as its transpose if ``transposed``; in 4 bits as one matrix, with the rows of one expert below
    those of another.
    """

    weight: Weight  # [E, N, K]
    a: Tensor  # [E, r, K]
    b: Tensor  # [E, N, r], in whatever memory PEFT keeps it: copied for each product rather than for backward
    bias: Tensor | None  # [E, N]
    s: float
    transposed: bool = False
    p: float = 0.0
    seed: Tensor | None = None

    def shrink(self, x: Tensor, offs: Tensor) -> Tensor:
        return shrink_experts(x, self.a, offs, self.s, self.p, self.seed)

    def forward(self, x: Tensor, xa: Tensor, offs: Tensor) -> Tensor:
        return _product(x, self.weight, xa, self.b.contiguous(), offs, self.bias, 0.0, None, self.transposed)

    def input_grad(self, dy: Tensor, dxa: Tensor, offs: Tensor) -> Tensor:
        """``dy w[e] + D ∘ (dxa a[e])``"""
        a = self.a.transpose(1, 2)
        return _product(dy, self.weight, dxa, a, offs, None, self.p, self.seed, not self.transposed)

    def dxa(self, dy: Tensor, offs: Tensor) -> Tensor:
        """``s · dy b[e]``"""
        return shrink_experts(dy, self.b.contiguous().transpose(1, 2), offs, self.s)

    def grad_a(self, dxa: Tensor, x: Tensor, offs: Tensor) -> Tensor:
        return lora_grad_experts(dxa, x, offs, self.p, self.seed)

    def grad_b(self, xa: Tensor, dy: Tensor, offs: Tensor) -> Tensor:
        return lora_grad_experts(xa, dy, offs).transpose(1, 2)

    def flat(self) -> tuple[tuple, tuple]:
        """The layer as SLOTS tensors or Nones, which autograd has to see, and its numbers."""
        weight, numbers = fields_of(self.weight)
        tensors = (self.a, self.b, self.bias, self.seed, *weight)
        return tensors + (None,) * (SLOTS - len(tensors)), (self.s, self.transposed, self.p, numbers)


SLOTS = 4 + WEIGHT_TENSORS


def unflat(tensors: Any, numbers: tuple) -> Projection:
    """The inverse of `Projection.flat`."""
    (a, b, bias, seed, *weight), (s, transposed, p, of_weight) = tensors, numbers
    return Projection(weight_of(weight, of_weight), a, b, bias, s, transposed, p, seed)


def _product(x: Tensor, weight: Weight, xa: Tensor, b: Tensor, *rest: Any) -> Tensor:
    offs, bias, p, seed, transposed = rest
    if isinstance(weight, Tensor):
        return lora_matmul_experts(x, weight.transpose(1, 2) if transposed else weight, xa, b, offs, bias, p, seed)
    return lora_matmul_experts_4bit(x, *weight, xa, b, *rest)


class Gate(NamedTuple):
    """What comes between the layers: ``act(z)``; ``act(gate) * up`` of the two halves of z; or any ``function`` of z,
    which is called again for its gradient."""

    activation: str | None
    gated: bool = True
    function: Callable[[Tensor], Tensor] | None = None

    def forward(self, z: Tensor) -> Tensor:
        if self.function is not None:
            return self.function(z)
        return swiglu(*self._parts(z), self.activation)

    def backward(self, z: Tensor, dh: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """dz and h, in the memory of z and dh for a known gate. ``h`` is given where it has been computed."""
        if self.function is None:
            swiglu_backward_(dh, *self._parts(z), self.activation)
            return z, dh
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            again = self.function(z)
            (dz,) = torch.autograd.grad(again, z, dh)
        return dz, again.detach() if h is None else h

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        return halves(z, True) if self.gated else (z, None)


@without_autocast
def fused_experts(
    x: Tensor, weights: Tensor, routing: Routing, first: Projection, down: Projection, gate: Gate
) -> Tensor:
    """``combine_experts(down(gate(first(x[token]))), rows, weights)``: [T, K] -> [T, K]. ``weights`` [T, k] are those
    of a token's experts."""
    with torch.no_grad():
        rows = x.index_select(0, routing.token)
        xa = first.shrink(rows, routing.offs)
        z = first.forward(rows, xa, routing.offs)
        h = gate.forward(z)
        ha = down.shrink(h, routing.offs)
    if not torch.is_grad_enabled():
        return _last_product(down, h, ha, weights, routing)
    eager, deferred = is_eager(), saved_tensor_hooks_active()
    apply = _apply_fused_experts if eager else FusedExperts.apply
    tensors, numbers = zip(*(layer.flat() for layer in (first, down)), strict=True)
    y = apply(x, weights, gate, numbers, None if deferred else h, *sum(tensors, ()), *routing, xa, z, ha)
    if not deferred:
        return y
    return deferred_product(y, partial(_last_product, down, h, ha, weights.detach(), routing), eager)


def _last_product(down: Projection, h: Tensor, ha: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    return combine_experts(down.forward(h, ha, routing.offs), routing.rows, weights)


BEFORE, AFTER = 5, 6  # arguments of `FusedExperts` before and after those of its two layers


class FusedExperts(Function):
    """`fused_experts`, given everything but its last product. Without h that is deferred."""

    @staticmethod
    def forward(x, weights, gate, numbers, h, *tensors):
        down = unflat(tensors[SLOTS : 2 * SLOTS], numbers[1])
        if h is None:
            return zero_storage_output(x, down.b.shape[1])
        *routing, _, _, ha = tensors[2 * SLOTS :]
        return _last_product(down, h, ha, weights, Routing(*routing))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weights, ctx.gate, ctx.numbers, _, *tensors = inputs
        ctx.save_for_backward(x, weights, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        if needs_guard(dy):
            return guarded(ctx, FusedExperts.backward, dy)
        if dy is None:
            return (None,) * (BEFORE + 2 * SLOTS + AFTER)
        x, weights, *tensors = ctx.saved_tensors
        first, down = unflat(tensors[:SLOTS], ctx.numbers[0]), unflat(tensors[SLOTS : 2 * SLOTS], ctx.numbers[1])
        token, rows, offs, xa, z, ha = tensors[2 * SLOTS :]
        need_dx, need_dweights, *_ = ctx.needs_input_grad
        need_a1, need_b1, *_ = ctx.needs_input_grad[BEFORE:]
        need_a2, need_b2, *_ = ctx.needs_input_grad[BEFORE + SLOTS :]
        need_dz = need_dx or need_a1 or need_b1
        h: Any = None
        dx = dweights = da1 = db1 = da2 = db2 = None

        # dy, dha and dh are gradients of the rows before their routing weights; what is made of them is times those.
        weight = torch.empty_like(weights.reshape(-1)).index_copy_(0, rows.flatten(), weights.reshape(-1)).unsqueeze(1)
        dy = dy.index_select(0, token)
        dha = down.dxa(dy, offs)
        if need_b2:
            db2 = down.grad_b(ha * weight.to(ha.dtype), dy, offs)
        if need_dz or need_dweights:
            dh = down.input_grad(dy, dha, offs)
        if need_dweights or (need_a2 and not need_dz):
            h = ctx.gate.forward(z)
        if need_dweights:
            of_rows = _dot(h, dh)
            if down.bias is not None:
                of_rows += shrink_experts(dy, down.bias.unsqueeze(1), offs, 1.0).squeeze(1)
            dweights = of_rows.index_select(0, rows.flatten()).view(rows.shape).to(weights.dtype)
        del dy
        if need_dz:
            if torch.compiler.is_compiling() or keeps_graph():
                z = z.clone()  # read once more by another backward
            dz, h = ctx.gate.backward(z, dh.mul_(weight), h)
        if need_a2:
            da2 = down.grad_a(dha * weight.to(dha.dtype), h, offs)
        del h
        if need_dz:
            dxa: Any = first.dxa(dz, offs) if need_a1 or need_dx else None
            if need_b1:
                db1 = first.grad_b(xa, dz, offs)
            if need_a1:
                da1 = first.grad_a(dxa, x.index_select(0, token), offs)
            if need_dx:
                dx = combine_experts(first.input_grad(dz, dxa, offs), rows)
        rest = (None,) * (SLOTS - 2)
        return dx, dweights, *(None,) * (BEFORE - 2), da1, db1, *rest, da2, db2, *rest, *(None,) * AFTER


_apply_fused_experts = apply_of(FusedExperts)


def _dot(t: Tensor, u: Tensor) -> Tensor:
    """The sum of t · u over each row, in fp32 or wider."""
    wide = torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vecdot(t.to(wide), u.to(wide))
