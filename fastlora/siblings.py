"""Layers that are given the same x: q, k and v of an attention, gate and up of an MLP.

They stay separate modules, called one after another by a model that does not know of this. Layers that have one
`Siblings` object in common recognise a call with the same tensor, not changed in between, and then

- compute xa of all their adapters in one read of x: the first call does it for the layers that followed it last time;
- compute the gradient of x in one product, in the backward of the layer that was called first. The others leave their
  terms of it in the `SharedInput`. A token, an output of each layer and an input of the next one without data or
  gradient, makes autograd run the first layer's backward last.

A wrong guess costs one small product and changes no result. Nothing is shared between threads, or while compiling.
"""

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from fastlora.compat import GRAPH_TASKS_ARE_KNOWN, current_graph_task
from fastlora.ops import overload

shrink_group = overload("shrink_group")


class Siblings:
    """Layers that may be given one x. A copied or pickled model has Siblings of its own, with nothing learned yet."""

    def __init__(self) -> None:
        self.followers: dict[int, list[weakref.ref]] = {}  # by id of a first layer: the layers that followed it last

    def __reduce__(self):
        return Siblings, ()

    def share(self, layer: Any, x: Tensor) -> "SharedInput | None":
        """What the layers called with this x share, new if ``layer`` is the first of them. For eager calls only.

        None for an inference tensor, whose changes cannot be recognised.
        """
        if x.is_inference():
            return None
        recent = getattr(_thread, "recent", ())
        for shared in recent:
            if (
                shared.x() is x
                and shared.version == x._version
                and shared.siblings() is self
                and id(layer) not in shared.members
            ):
                shared.members.add(id(layer))
                shared.followers.append(weakref.ref(layer))
                return shared
        shared = SharedInput(self, layer, x)
        _thread.recent = (shared, *recent[:1])
        return shared


def siblings_among(layers: dict[str, Any]) -> Iterator[tuple[Any, Siblings]]:
    """The layers, given by their names in a model, that share a parent with another one, and their `Siblings`."""
    families: dict[str, list] = {}
    for name, layer in layers.items():
        families.setdefault(name.rpartition(".")[0], []).append(layer)
    for family in families.values():
        siblings = Siblings()
        if len(family) > 1:
            yield from ((layer, siblings) for layer in family)


# .recent: the last two x, the newer first. Between two layers of one x another layer may be called, as between q_a_proj
# and kv_a_proj of DeepSeek's attention.
_thread = threading.local()
_gone: Any = weakref.ref(Siblings())  # a reference whose object has died


class SharedInput:
    """What the layers called with one x share. It does not hold x, and holds nothing once x died or backward began.

    Layers must not save x itself for backward, but a detached x: the token holds their graph, which would keep x alive.
    """

    __slots__ = (
        "__weakref__", "adapters", "cast", "expected", "followers", "handed", "joins_dx", "members", "siblings",
        "token", "version", "x", "xas",
    )  # fmt: skip

    def __init__(self, siblings: Siblings, layer: Any, x: Tensor) -> None:
        self.siblings = weakref.ref(siblings)
        self.x: Any = weakref.ref(x, partial(_release, weakref.ref(self)))
        self.version = x._version
        # Whether dx is one product. Not for a leaf, which its own graph holds: held by the token it would never die.
        self.joins_dx = not x.is_leaf and GRAPH_TASKS_ARE_KNOWN
        self.members = {id(layer)}
        self.expected = siblings.followers.get(id(layer), ())
        self.followers = siblings.followers[id(layer)] = []
        self.cast: Tensor | None = None  # x in the dtype to compute in
        self.token: Tensor | None = None  # the last layer's
        self.xas: dict[int, tuple[Tensor, int, float, Tensor]] = {}  # computed ahead, by id(a): a, its version, s, xa
        self.adapters: list[tuple[Tensor, float]] = []  # a, s of layers that need xa in backward only
        self.handed: dict[tuple[int, str], Any] = {}  # (graph task, "dx" or "xa") -> what layers leave for each other

    def release(self) -> None:
        """Let go of the graph and of every tensor that only forward needs."""
        self.x = _gone
        self.cast = self.token = None
        self.xas = {}

    def converted(self, x: Tensor, dtype: Any) -> Tensor:
        """``x.to(dtype)``, once for all layers."""
        if x.dtype == dtype:
            return x
        if self.cast is None or self.cast.dtype != dtype or self.cast.requires_grad != x.requires_grad:
            cast = x.to(dtype)
            if cast.requires_grad and not self.joins_dx:
                return cast
            self.cast = cast
        return self.cast

    def shrink(self, rows: Tensor, a: Tensor, s: float) -> Tensor:
        """``s * rows @ a.T``, computed together with those of the layers that are expected to follow."""
        ready = self.xas.pop(id(a), None)
        if ready is not None and ready[0] is a and ready[1] == a._version and ready[2] == s:
            return ready[3]
        adapters, scales, nothing = [a], [s], [None]
        for ref in self.expected:
            layer = ref()
            operands = None if layer is None else layer.operands_now()
            if operands is not None:
                other = operands[2]
                without_dropout = other.p == 0.0 and not isinstance(other.scaling, Tensor)
                if without_dropout and other.a.device == a.device and other.a.shape[1:] == a.shape[1:]:
                    adapters.append(other.a)
                    scales.append(other.scaling)
                    nothing.append(None)
        self.expected = ()
        xas = shrink_group(rows, adapters, scales, [0.0] * len(adapters), nothing)
        for i in range(1, len(xas)):
            other_a = adapters[i]
            self.xas[id(other_a)] = other_a, other_a._version, scales[i], xas[i]
        return xas[0]

    def wants_xa(self, a: Tensor, s: float) -> int:
        """Register an adapter whose xa only backward needs. Returns the index for `shrink_in_backward`."""
        self.adapters.append((a, s))
        return len(self.adapters) - 1

    def shrink_in_backward(self, index: int, rows: Tensor) -> Tensor:
        """xa of ``adapters[index]``, computed with those of all ``adapters`` by the first layer that asks."""
        if not GRAPH_TASKS_ARE_KNOWN:
            a, s = self.adapters[index]
            return shrink_group(rows, [a], [s], [0.0], [None])[0]
        task = current_graph_task(), "xa"
        if index not in self.handed.get(task, ()):
            As, scales = (list(each) for each in zip(*self.adapters, strict=True))
            self.handed[task] = dict(enumerate(shrink_group(rows, As, scales, [0.0] * len(As), [None] * len(As))))
        return self.handed[task].pop(index)

    def defer_dx(self, term: Any) -> None:
        """Leave a term of x's gradient to the layer that was called first."""
        self.handed.setdefault((current_graph_task(), "dx"), []).append(term)

    def collect_dx(self) -> list:
        """The terms that other layers deferred, in the order of their calls."""
        return self.handed.pop((current_graph_task(), "dx"), [])[::-1]


def _release(shared: weakref.ref, _: weakref.ref) -> None:
    alive = shared()
    if alive is not None:
        alive.release()
