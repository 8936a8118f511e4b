"""A layer whose x is the output of an activation keeps nothing for x: it is computed again from what autograd keeps.

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
    node = x.grad_fn
    if type(node).__name__ != CONVERTED:
        return _recipe(node, x)
    rest, dtype = _recipe(node.next_functions[0][0], x), x.dtype  # type: ignore[union-attr]
    return None if rest is None else Recipe(lambda *tensors: rest.function(*tensors).to(dtype), rest.tensors)


def _recipe(node: Any, x: Tensor) -> Recipe | None:
    find = RECOMPUTED.get(type(node).__name__)
    return None if find is None else find(node, x)


def _kept(node: Any, name: str, x: Tensor) -> Tensor | None:
    """What the node keeps under this name. What is not of x's size, such as the weight of a norm, does not count."""
    t = kept_by(node, name)
    return t if t is not None and t.shape == x.shape and t.device == x.device else None


def _gelu(node: Any, x: Tensor) -> Recipe | None:
    z = _kept(node, "self", x)
    return None if z is None else Recipe(partial(gelu, approximate=node._saved_approximate), (z,))


def _silu(node: Any, x: Tensor) -> Recipe | None:
    z = _kept(node, "self", x)
    return None if z is None else Recipe(silu, (z,))


def _product(node: Any, x: Tensor) -> Recipe | None:
    """``act(gate) * up``, an activation written as a product, or dropout on a CPU, which keeps its mask alone."""
    factors = [_kept(node, name, x) for name in ("self", "other")]
    if None not in factors:
        return Recipe(torch.mul, tuple(factors))  # type: ignore[arg-type]
    missing = factors.index(None)
    factor, rest = factors[1 - missing], _recipe(node.next_functions[missing][0], x)
    if factor is None or rest is None:
        return None
    return Recipe(lambda factor, *tensors: rest.function(*tensors) * factor, (factor, *rest.tensors))


def _dropout(node: Any, x: Tensor) -> Recipe | None:
    mask, rest = _kept(node, "result1", x), _recipe(node.next_functions[0][0], x)
    if mask is None or rest is None or node._saved_p >= 1:
        return None
    scale = 1 / (1 - node._saved_p)
    return Recipe(lambda mask, *tensors: rest.function(*tensors) * mask * scale, (mask, *rest.tensors))


CONVERTED = "ToCopyBackward0"  # to the dtype that the layer computes in

# By the type of the autograd node that made x. Not here: relu, tanh and sigmoid, which keep their output, x itself.
RECOMPUTED: dict[str, Callable[[Any, Tensor], Recipe | None]] = {
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MulBackward0": _product,
    "NativeDropoutBackward0": _dropout,
}
MAKERS = frozenset({*RECOMPUTED, CONVERTED})
