"""The products with the base weight of an adapted layer: y in forward, dx in backward.

A weight is a dense tensor or a `Weight4bit`. ``a, b, s, p, seed`` are as in `fastlora.reference`. Nothing here has
gradients of its own: `fastlora.autograd` and `fastlora.mlp` call these functions from their Functions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import kernel_ops
from fastlora.compat import dispatch_modes, top_saved_tensors_hooks, unsafe_view
from fastlora.fourbit import WEIGHT_TENSORS, Weight4bit
from fastlora.ops import overload
from fastlora.ops_4bit import lora_matmul_4bit

lora_matmul = overload("lora_matmul")
lora_matmul_group = overload("lora_matmul_group")
nf4_matmul = overload("nf4_matmul")

Weight = Tensor | Weight4bit


def like_rows_of(x_shape: torch.Size, y: Tensor) -> Tensor:
    """``[M, N]`` with the leading dimensions of x, not as a view: see `unsafe_view`.

    Selective checkpointing may keep y, and would not notice that what is returned here is changed in place.
    """
    if len(x_shape) == 2:
        return y
    if not torch.compiler.is_compiling() and dispatch_modes() > 0 and top_saved_tensors_hooks(True) is not None:
        y = y.clone()
    return unsafe_view(y, (*x_shape[:-1], y.shape[-1]))


def is_merged(weight: Weight, p: float, m: Tensor | None = None) -> bool:
    """Whether the adapter is added to the weight while that is decoded: forward and dx are then one product each.

    4-bit weights do not lie on the grid of the compute dtype, so the one rounding after the merge dithers and small
    updates survive; on a dense bf16 weight they would not. A CPU decodes inside its products: there the adapter's own
    product costs less than merging. Not with DoRA's ``m``: decoding scales no rows.
    """
    return (
        p == 0.0 and m is None and type(weight) is Weight4bit and kernel_ops.decodes_whole_weights(weight.packed.device)
    )


def product(
    x: Tensor, weight: Weight, a: Tensor, b: Tensor, bias: Any, xa: Any, s: float, p: float, scale: Tensor | None = None
) -> Tensor:
    """``x wᵀ + bias + xa bᵀ``, like x but for its last dimension; its columns times ``scale`` if that is given.

    Without xa the adapter is merged (`is_merged`).

    Merged is ``nf4_matmul``, which decodes the weight inside the product for few tokens on a GPU. A CPU
    decodes inside `lora_matmul_4bit` for any number of tokens.
    """
    rows = x.flatten(0, -2)
    if isinstance(weight, Tensor):
        y = lora_matmul(rows, weight, xa, b, bias, 0.0, None, scale)
    elif xa is None:
        y = nf4_matmul(rows, *weight, a, b, s, bias)
    else:
        y = lora_matmul_4bit([rows], [weight], [xa], [b], bias, [0.0], [None], False, scale)
    return like_rows_of(x.shape, y)


class DxTerm(NamedTuple):
    """What one layer adds to the gradient of x."""

    dy: Tensor
    weight: Weight
    a: Tensor
    b: Tensor | None  # given if the adapter is merged into the weight
    dxa: Tensor | None  # None if it is merged
    s: float
    p: float
    seed: Tensor | None

    def input_grad(self) -> Tensor:
        """``dy w + D ∘ (dxa a)``"""
        dy, weight, a, b, dxa, s, p, seed = self
        if dxa is None:
            return torch.mm(dy, weight.decode_merged(dy.dtype, a, b, s))  # type: ignore[union-attr, arg-type]
        if isinstance(weight, Tensor):
            return lora_matmul(dy, weight.t(), dxa, a.t(), None, p, seed)
        return lora_matmul_4bit([dy], [weight], [dxa], [a.t()], None, [p], [seed], True)


def input_gradient(terms: list[DxTerm]) -> Tensor:
    """The sum of the terms: one product of those whose adapters are not merged, to which the others are added."""
    if len(terms) == 1:
        return terms[0].input_grad()
    merged: list[DxTerm] = []
    plain: list[DxTerm] = []
    for term in terms:
        (merged if term.dxa is None else plain).append(term)
    if len(plain) > 1:
        dys, weights, As, _, dxas, _, ps, seeds = zip(*plain, strict=True)
        at: list[Tensor] = []
        wt: list[Tensor] = []
        all_4bit = True
        for w, a in zip(weights, As, strict=True):  # no comprehensions: before Python 3.12 each is a function call
            at.append(a.t())
            if isinstance(w, Tensor):
                all_4bit = False
                wt.append(w.t())
        if all_4bit:
            dx = lora_matmul_4bit(dys, weights, dxas, at, None, ps, seeds, True)
        else:
            if len(wt) < len(weights):
                wt = [(w if isinstance(w, Tensor) else w.decode(dys[0].dtype)).t() for w in weights]
            dx = lora_matmul_group(dys, wt, dxas, at, ps, seeds)
    else:
        dx = (plain or merged).pop(0).input_grad()
    for dy, weight, a, b, _, s, _, _ in merged:
        dx.addmm_(dy, weight.decode_merged(dy.dtype, a, b, s))  # type: ignore[union-attr, arg-type]
    return dx


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """``dyᵀ x``: that of a dense weight that trains. On a CPU by the op that may be faster than torch's product."""
    if dy.device.type != "cpu":
        return torch.mm(dy.t(), x)
    return lora_matmul(dy.t(), x.t(), x.new_empty(dy.shape[1], 0), x.new_empty(x.shape[1], 0))


def fields_of(weight: Weight) -> tuple[tuple, tuple]:
    """The tensors of a weight, which autograd has to see, and its numbers: none of a dense weight."""
    return ((weight,), ()) if isinstance(weight, Tensor) else (weight[:WEIGHT_TENSORS], weight[WEIGHT_TENSORS:])


def weight_of(tensors: Any, numbers: tuple) -> Weight:
    """The inverse of `fields_of`."""
    return Weight4bit(*tensors, *numbers) if numbers else tensors[0]
