"""Where x of a layer is the output of an activation, the layer keeps no x: it computes x again from the activation's
input, which autograd keeps anyway.

``fc2(gelu(fc1(h)))``: gelu keeps its input for its own backward, so fc2 need not keep gelu's output as well. Which ops
made x is read from its graph at every call: it does not matter in which modules they are, or who wrote them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fastlora.compat import kept_by


class Recipe(NamedTuple):
    """``function(*tensors)`` is x, to the bit; the tensors are in memory until backward anyway."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def recipe_of(x: Tensor) -> Recipe | None:
    """How to compute x again; None if the op that made it keeps other things, or x has been written to since."""
    if x._version != 0:
        return None
    node, dtype = x.grad_fn, x.dtype
    if type(node).__name__ != CONVERTED:
        return _recipe(node, x)
    return _then(lambda h: h.to(dtype), _recipe(node.next_functions[0][0], x))  # type: ignore[union-attr]


def _recipe(node: Any, x: Tensor) -> Recipe | None:
    find = RECOMPUTED.get(type(node).__name__)
    return None if find is None else find(node, x)


def _kept(node: Any, name: str, x: Tensor) -> Tensor | None:
    """What the node keeps under this name. What is not of x's size, such as the weight of a norm, does not count."""
    t = kept_by(node, name)
    return t if t is not None and t.shape == x.shape and t.device == x.device else None


def _of_kept(function: Callable[..., Tensor], *kept: Tensor | None) -> Recipe | None:
    """``function(*kept)``; None if one of them is not kept."""
    return None if any(t is None for t in kept) else Recipe(function, kept)  # type: ignore[arg-type]


def _then(function: Callable[..., Tensor], first: Recipe | None, *kept: Tensor | None) -> Recipe | None:
    """``function(first, *kept)``; None if one of them is None."""
    if first is None:
        return None
    n = len(first.tensors)
    return _of_kept(lambda *tensors: function(first.function(*tensors[:n]), *tensors[n:]), *first.tensors, *kept)


def _gelu(node: Any, x: Tensor) -> Recipe | None:
    return _of_kept(partial(gelu, approximate=node._saved_approximate), _kept(node, "self", x))


def _silu(node: Any, x: Tensor) -> Recipe | None:
    return _of_kept(silu, _kept(node, "self", x))


def _product(node: Any, x: Tensor) -> Recipe | None:
    """``act(gate) * up``, an activation written as a product, or dropout on a CPU, which keeps its mask alone."""
    first, other = _kept(node, "self", x), _kept(node, "other", x)
    if first is None and other is None:
        return None
    if first is None:
        return _then(torch.mul, _recipe(node.next_functions[0][0], x), other)
    if other is None:
        return _then(torch.mul, _recipe(node.next_functions[1][0], x), first)
    return Recipe(torch.mul, (first, other))


def _dropout(node: Any, x: Tensor) -> Recipe | None:
    p = node._saved_p
    if p >= 1.0:
        return None
    rest, mask = _recipe(node.next_functions[0][0], x), _kept(node, "result1", x)
    return _then(lambda h, mask: h * mask * (1 / (1 - p)), rest, mask)


CONVERTED = "ToCopyBackward0"  # to the dtype that the layer computes in

# By the type of the autograd node that made x. Not here: relu, tanh and sigmoid, which keep their output, x itself.
RECOMPUTED: dict[str, Callable[[Any, Tensor], Recipe | None]] = {
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MulBackward0": _product,
    "NativeDropoutBackward0": _dropout,
}
MAKERS = frozenset({*RECOMPUTED, CONVERTED})
