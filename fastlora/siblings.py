"""Layers that are fed one x: q, k and v of an attention, gate and up of an MLP.

They stay separate modules, called one after another by a model that knows nothing of this. Layers given one `Siblings`
recognise that they are called with the same tensor, not changed in between, and then

- what their adapters make of x comes from one read of x: the first call makes it for all that followed it last time;
- the gradient of x is one product over all of them, made in the backward of the layer that was called first. The others
  hand it their part (`SharedInput.parts`). A token from each layer's output to the next one's input, with neither data
  nor gradient, makes autograd run the first layer's backward last.

A wrong guess costs one small product and changes no result. Nothing is shared between threads, or while compiling.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

shrink_group = torch.ops.fastlora.shrink_group.default


class Siblings:
    """Layers that may be fed one x. Copied or pickled with its layers, it still is one; what it learned is not kept."""

    def __init__(self) -> None:
        self.followers: dict[int, list[weakref.ref]] = {}  # of each first layer, by id: who came after it last time

    def __reduce__(self):
        return Siblings, ()

    def share(self, layer: Any, x: Tensor) -> "SharedInput | None":
        """The state of x's way through these layers, new if ``layer`` is the first; None if x cannot be recognised."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.is_inference():
            return None
        shared = getattr(_thread, "shared", None)
        if shared is not None and shared.is_of(self, x) and id(layer) not in shared.members:
            shared.members.add(id(layer))
            shared.followers.append(weakref.ref(layer))
            return shared
        shared = _thread.shared = SharedInput(self, layer, x)
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


_thread = threading.local()  # .shared: the last x, which is all that a next call can be a sibling's call with


class SharedInput:
    """One x on its way through siblings. It does not hold x, and lets go of everything when x dies or backward comes.

    Layers must not save x itself: their graph, which the token holds, would keep x alive, and x this.
    """

    __slots__ = (
        "__weakref__", "adapters", "cast", "expected", "followers", "made", "may_hold_graph", "members", "parts",
        "siblings", "token", "version", "x",
    )  # fmt: skip

    def __init__(self, siblings: Siblings, layer: Any, x: Tensor) -> None:
        self.siblings = weakref.ref(siblings)
        self.x: Callable[[], Tensor | None] = weakref.ref(x, _release(weakref.ref(self)))
        self.version = x._version
        self.may_hold_graph = not x.is_leaf  # a leaf is held by its own graph, and so would never die
        self.members = {id(layer)}
        self.expected = siblings.followers.get(id(layer), ())
        self.followers = siblings.followers[id(layer)] = []
        self.cast: Tensor | None = None  # x in the dtype to compute in
        self.token: Tensor | None = None  # that the last layer's node gave out
        self.made: dict[int, tuple[Tensor, int, float, Tensor]] = {}  # by id(a): a, its version, s and xa
        self.adapters: list[tuple[Tensor, float]] = []  # a, s of layers that will want xa in backward
        self.parts: dict[tuple[int, str], Any] = {}  # (graph task, kind) -> what layers hand each other in its backward

    def is_of(self, siblings: Siblings, x: Tensor) -> bool:
        return self.x() is x and self.version == x._version and self.siblings() is siblings

    def release(self) -> None:
        self.x = _nothing
        self.cast = self.token = None
        self.made = {}

    def converted(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x.to(dtype)``, once for all layers."""
        if x.dtype == dtype:
            return x
        if self.cast is None or self.cast.dtype != dtype or self.cast.requires_grad != x.requires_grad:
            cast = x.to(dtype)
            if cast.requires_grad and not self.may_hold_graph:
                return cast
            self.cast = cast
        return self.cast

    def shrink(self, rows: Tensor, a: Tensor, s: float) -> Tensor:
        """``s * rows @ a.T``: the first layer makes those of the layers that are expected, too."""
        made = self.made.pop(id(a), None)
        if made is not None and made[0] is a and made[1] == a._version and made[2] == s:
            return made[3]
        adapters = {id(a): (a, s)}
        for ref in self.expected:
            layer = ref()
            other = None if layer is None else layer.adapter_without_dropout()
            if other is not None and other[0].device == a.device and other[0].shape[1:] == a.shape[1:]:
                adapters[id(other[0])] = other
        self.expected = ()
        first, *others = shrink_many(rows, list(adapters.values()))
        for (a, s), xa in zip(list(adapters.values())[1:], others, strict=True):
            self.made[id(a)] = a, a._version, s, xa
        return first

    def wanted(self, a: Tensor, s: float) -> int:
        """Note that this adapter's xa will be wanted in backward. Returns what to ask for it by."""
        self.adapters.append((a, s))
        return len(self.adapters) - 1

    def shrink_in_backward(self, index: int, rows: Tensor) -> Tensor:
        """xa of ``adapters[index]``: the first layer whose backward runs makes those of all of them."""
        task = torch._C._current_graph_task_id(), "xa"
        if index not in self.parts.get(task, ()):
            self.parts[task] = dict(enumerate(shrink_many(rows, self.adapters)))
        return self.parts[task].pop(index)

    def hand_over(self, part: Any) -> None:
        """Leave a part of x's gradient to the layer that was called first."""
        self.parts.setdefault((torch._C._current_graph_task_id(), "dx"), []).append(part)

    def take_over(self) -> list:
        """The parts of the other layers, in the order of their calls."""
        return self.parts.pop((torch._C._current_graph_task_id(), "dx"), [])[::-1]


def shrink_many(rows: Tensor, adapters: list[tuple[Tensor, float]]) -> list[Tensor]:
    """``[s * rows @ a.T for a, s in adapters]`` in one read of rows."""
    nothing: list[None] = [None] * len(adapters)
    return shrink_group(rows, [a for a, _ in adapters], [s for _, s in adapters], [0.0] * len(adapters), nothing)


def _release(shared: weakref.ref):
    def release(_: weakref.ref) -> None:
        alive = shared()
        if alive is not None:
            alive.release()

    return release


def _nothing() -> None:
    return None
