"""What the forward of a module depends on besides its arguments, and whether that has changed since the last look.

A fused block is proven once and runs by that proof until something that its forward could notice changes: its class,
its attributes, buffers, children, hooks. A graph of torch.compile has to be guarded on the same things.
"""

import operator
from typing import Any

from torch import Tensor, nn

from fastlora.base_layers import is_hooked
from fastlora.calls import ATTRIBUTE
from fastlora.proof import own_class

FUSION = "_fastlora_fusion"  # of a block
OURS = (FUSION, ATTRIBUTE)
MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
_HOOKED = object()


def dependencies(module: nn.Module) -> list[Any]:
    """What the forward of a block depends on besides its adapted layers' outputs: objects to be compared by identity.

    Its and its activation's class, attributes, buffers, children and hooks; and one level of an object (a config) or a
    container that its forward mentions by name. ``training`` is left out: both modes are proven.
    """
    found: list[Any] = []
    todo = [module]
    for each in todo:
        forward = own_class(each).forward
        found.append(forward)
        if each is not module and is_hooked(each):
            found.append(_HOOKED)
        mentioned = names_in(forward)
        for key, value in each.__dict__.items():
            if key == "training" or key in OURS:
                continue
            found.append(value)
            if key in mentioned and key not in MODULE_ATTRIBUTES:
                found.extend(_inside(value))
        found += [getattr(own_class(each), key) for key in class_attributes(each)]
        for child in each._modules.values():
            found.append(child)
            if child is not None and not is_adapted(child):
                todo.append(child)
        for buffer in each._buffers.values():
            found += (buffer, None if buffer is None else buffer._version)
    return found


def class_attributes(module: nn.Module) -> list[str]:
    """What its forward mentions that its class has and the module itself has not."""
    cls, d = own_class(module), module.__dict__
    own = (d, d["_modules"], d["_parameters"], d["_buffers"])
    return [
        name
        for name in names_in(cls.forward)
        if hasattr(cls, name) and not hasattr(nn.Module, name) and not any(name in each for each in own)
    ]


def watched_modules(module: nn.Module) -> list[tuple[nn.Module, list[str], list[str]]]:
    """A block and its modules that are not adapted layers, each with the attributes whose contents it depends on, and
    those of its class."""
    found: list[tuple[nn.Module, list[str], list[str]]] = []
    todo = [module]
    for each in todo:
        mentioned = names_in(own_class(each).forward)
        contents = [key for key in each.__dict__ if key in mentioned and key not in MODULE_ATTRIBUTES]
        found.append((each, contents, class_attributes(each)))
        todo += [child for child in each._modules.values() if child is not None and not is_adapted(child)]
    return found


def snapshot(watched: list[tuple[nn.Module, list[str], list[str]]]) -> list[Any]:
    """Objects, of which at least one differs if any of the `dependencies` has changed. Takes a third of the time."""
    found: list[Any] = []
    for each, keys, of_class in watched:
        d, cls = each.__dict__, own_class(each)
        found.append(cls.forward)
        for key in of_class:
            found.append(getattr(cls, key, None))
        found += d.values()
        found += d["_modules"].values()
        if each is not watched[0][0]:
            found += (*d["_forward_hooks"].values(), *d["_forward_pre_hooks"].values())
            found += (*d["_backward_hooks"].values(), *d["_backward_pre_hooks"].values())
        for key in keys:
            if key in d:
                found += _inside(d[key])
        for buffer in d["_buffers"].values():
            found += (buffer, None if buffer is None else buffer._version)
    return found


def names_in(forward: Any) -> tuple[str, ...]:
    """The attributes that a function mentions."""
    return getattr(getattr(forward, "__wrapped__", forward), "__code__", names_in.__code__).co_names


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    return () if callable(value) or isinstance(value, Tensor) else getattr(value, "__dict__", {}).values()


def are_same(now: list[Any], before: list[Any]) -> bool:
    """Whether the objects are the same ones; of integers, such as versions of buffers, whether they are equal."""
    if len(now) != len(before):
        return False
    if all(map(operator.is_, now, before)):
        return True
    pairs = ((a, b) for a, b in zip(now, before, strict=True) if a is not b)
    return all(type(a) is int and type(b) is int and a == b for a, b in pairs)


def numbers_in(attributes: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """Those that are floats. One becomes an input of a graph once it has changed, so that `look_at` compares it."""
    return tuple((name, value) for name, value in attributes.items() if type(value) is float)


def look_at(module: Any, names: tuple[str, ...], numbers: tuple[tuple[str, float], ...]) -> int:
    """Use these attributes in a graph, which is guarded on them by that: on what is only read it is not."""
    used = 0
    for name in names:
        used += 1 if getattr(module, name, None) is not None else 0
    for name, number in numbers:
        used += 1 if getattr(module, name) == number else 0
    return used


def is_adapted(module: Any) -> bool:
    """Whether this is a layer that fastlora computes."""
    return hasattr(type(module), "operands")
