"""A parallel adapter: a bottleneck with an activation beside a frozen linear layer, in one product with it.

    xa = x aᵀ       h = f(xa)            y  = x wᵀ + bias + s · h bᵀ
    dh = s · dy b   dxa = dh ∘ f'(xa)    dx = dy w + dxa a      da = dxaᵀ x      db = s · dyᵀ h

It is a LoRA layer but for f, which is computed on [M, r]: forward and dx take the same products, and backward keeps x
and xa, not h or the output of the base layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastlora.autograd import adapter_grads, guarded, is_eager, needs_guard, shrink, without_autocast
from fastlora.base_layers import base_kind
from fastlora.calls import calls_of
from fastlora.compat import apply_of
from fastlora.functional import autocast_dtype, is_finite_number, product_operands, refuse_transforms
from fastlora.kernels.limits import ACTIVATIONS
from fastlora.mlp import lora_grad_a, swiglu, swiglu_backward_
from fastlora.nn import check_rank_and_start, features_of, new_factors
from fastlora.products import DxTerm, Weight, fields_of, like_rows_of, product, weight_of
from fastlora.reference import activate


@without_autocast
def parallel_linear(
    x: Tensor, weight: Weight, a: Tensor, b: Tensor, bias: Tensor | None, s: float, activation: str
) -> Tensor:
    """``x wᵀ + bias + s · f(x aᵀ) bᵀ``, outside autocast."""
    with torch.no_grad():
        xa = shrink(x.flatten(0, -2), a, 1.0, 0.0, None)
    if not torch.is_grad_enabled():
        return _product(x, weight, a, b, bias, xa, s, activation)
    tensors, numbers = fields_of(weight)
    apply = _apply_parallel_linear if is_eager() else ParallelLinear.apply
    return apply(x, a, b, bias, xa, s, activation, numbers, *tensors)


def _product(x: Tensor, weight: Weight, a: Tensor, b: Tensor, bias: Any, xa: Tensor, s: float, f: str) -> Tensor:
    return product(x, weight, a, b, bias, swiglu(xa, None, f) * s, 1.0, 0.0)


class ParallelLinear(Function):
    """`parallel_linear`, given xa."""

    @staticmethod
    def forward(x, a, b, bias, xa, s, activation, numbers, *tensors):
        return _product(x, weight_of(tensors, numbers), a, b, bias, xa, s, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, b, bias, xa, ctx.s, ctx.activation, ctx.numbers, *tensors = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, a, b, xa, *tensors)
        ctx.x_shape, ctx.inputs = x.shape, len(inputs)
        ctx.dtypes = a.dtype, b.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        if needs_guard(dy):
            return guarded(ctx, ParallelLinear.backward, dy)
        dx = da = db = dbias = None
        if dy is not None:
            need_dx, need_da, need_db, need_dbias, *_ = ctx.needs_input_grad
            (x, a, b, xa, *tensors), (a_dtype, b_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
            dy = dy.flatten(0, -2)
            h = swiglu(xa, None, ctx.activation) * ctx.s if need_db else None
            dxa, _, db = adapter_grads(dy, None, b if need_dx or need_da else None, h, ctx.s, 0.0, None)
            db = db.to(b_dtype) if need_db else None
            if need_dx or need_da:
                dh, dxa = dxa.to(xa.dtype), xa.clone()
                swiglu_backward_(dh, dxa, None, ctx.activation)  # writes into both
                da = lora_grad_a(dxa, x.flatten(0, -2)).to(a_dtype) if need_da else None
            if need_dx:
                term = DxTerm(dy, weight_of(tensors, ctx.numbers), a, b, dxa, 1.0, 0.0, None)
                dx = like_rows_of(ctx.x_shape, term.input_grad())
            if need_dbias:
                dbias = dy.sum(0, dtype=bias_dtype)
        return dx, da, db, dbias, *(None,) * (ctx.inputs - 4)


_apply_parallel_linear = apply_of(ParallelLinear)


class ParallelAdapter(nn.Module):
    """A frozen linear layer and a trainable bottleneck beside it, computed by fastlora.

    Equivalent: ``base_layer(x) + scaling * F.linear(act(F.linear(x, adapter_down)), adapter_up)``

    Parameters ``adapter_down [r, in_features]`` (as LoRA's A) and ``adapter_up [out_features, r]`` (zero); the base
    layer is the submodule ``base_layer``, not copied; its weight is frozen. Takes ``[..., in_features]``, gives
    ``[..., out_features]``. Backward keeps x and ``[M, r]``. Unlike LoRA it cannot be merged.

    Args:
        base_layer: ``nn.Linear``, GPT-2's ``Conv1D`` or bitsandbytes' ``Linear4bit``, which are fused; any other module
            with in_features and out_features computes its own output, to which the adapter is added.
        r: the width of the bottleneck.
        activation: one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2.
        scaling: s.
        adapter_dtype: of what is trained; by default fp32, or fp64 on a base of fp64.

    Raises:
        ValueError, TypeError: a value is out of range, or the base is not a linear layer.

    Source: "Towards a unified view of parameter-efficient transfer learning", arXiv:2110.04366.
    """

    base_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 16,
        activation: str = "relu",
        scaling: float = 4.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        transposed = isinstance(base_layer, nn.Module) and base_kind(base_layer) == "transposed"
        K, N = base_layer.weight.shape if transposed else features_of(base_layer)  # type: ignore[union-attr, misc]
        check_rank_and_start(r, True)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if not is_finite_number(scaling):
            raise ValueError(f"scaling must be a finite number, got {scaling!r}")
        if isinstance(weight := getattr(base_layer, "weight", None), nn.Parameter):
            weight.requires_grad_(False)
        self.base_layer, self.activation, self.scaling = base_layer, activation, float(scaling)
        self.adapter_down, self.adapter_up = new_factors(base_layer, N, K, r, True, adapter_dtype)

    def forward(self, x: Tensor) -> Tensor:
        refuse_transforms()
        kind = base_kind(self.base_layer)
        if not torch.compiler.is_compiling():
            calls_of(self).ran(kind)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], got {list(x.shape)}")
        if kind == "opaque":
            rows = x.to(self.adapter_down.dtype)
            h = activate(F.linear(rows, self.adapter_down), self.activation)
            y = self.base_layer(x)
            return y + (self.scaling * F.linear(h, self.adapter_up)).to(y.dtype)
        if x.dim() == 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        base = self.base_layer._parameters
        if kind != "4bit" and base["weight"].dtype != x.dtype and autocast_dtype(x) is None:
            raise TypeError(f"x is {x.dtype}, the base weight {base['weight'].dtype}, and autocast is off")
        x, weight, result = product_operands(self.base_layer, kind, x)
        bias = base["bias"]
        y = parallel_linear(x, weight, self.adapter_down, self.adapter_up, bias, self.scaling, self.activation)
        return y.to(result)

    @property
    def r(self) -> int:
        return self.adapter_down.shape[0]

    @property
    def in_features(self) -> int:
        return self.adapter_down.shape[1]

    @property
    def out_features(self) -> int:
        return self.adapter_up.shape[0]

    def extra_repr(self) -> str:
        return f"r={self.r}, activation={self.activation}, scaling={self.scaling}"
