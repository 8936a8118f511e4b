"""Launch a kernel with what follows from the layouts of its operands computed once for each layout.

Grids, splits, strides and checks depend on the layouts alone, and so does what Triton derives from every argument at
every launch (its dtype, whether it is 1 or a multiple of 16). Derived anew, they take the host longer than many layers
take the GPU.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.compat import DirectLaunch, direct_launch, launcher_of


class Layout(NamedTuple):
    """What a launch depends on of a tensor, besides its address."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int  # of its address from a multiple of 16


def layouts(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The layout of each tensor, None for None."""
    found: list[Layout | None] = []
    for t in tensors:  # every launch passes here: no function call for a tensor
        fields = None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)
        found.append(None if fields is None else tuple.__new__(Layout, fields))
    return tuple(found)


cached_by_layout = lru_cache(maxsize=4096)  # for functions of layouts: those that make a Launch, or check operands


class Launch:
    """A kernel, its grid and its arguments except the tensors, which have the same layouts in every call.

    ``descriptors`` are the fields, but for the tensor, of arguments that the kernel takes as tensor descriptors.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **fixed: Any) -> None:
        self.kernel, self.grid, self.fixed = kernel, (*grid, 1, 1)[:3], fixed
        self.descriptors: dict[str, dict[str, Any]] = {}
        self.compiled: Any = None
        self.direct: DirectLaunch | None = None

    def __call__(self, **tensors: Any) -> None:
        """Launch with these tensors, given in the same order in every call."""
        if self.compiled is None:
            compiled = self.kernel[self.grid](**self._described(tensors), **self.fixed)
            if compiled is not None:  # None: interpreted, or compiled for a device that is not there
                self._prepare(compiled, tensors)
            return
        hook = knobs.runtime.launch_enter_hook
        profiled = getattr(hook, "calls", hook)
        if self.direct is None or profiled:
            found = self.fixed | self._described(tensors)
            values = [found.get(name) for name in self.kernel.arg_names]
            if self.launcher is None or profiled:
                self.compiled[self.grid](*values)
            else:
                call, before = self.launcher
                call(*self.grid, self.stream(self.device), *before, *values)
            return
        arguments = self.arguments.copy()
        for name, place in self.addresses:
            arguments[place] = tensors[name].data_ptr()
        for name, places in self.tuples:
            for tensor, place in zip(tensors[name], places, strict=True):
                if place is not None:
                    arguments[place] = tensor.data_ptr()
        for name, tensor_map in self.maps:
            arguments[tensor_map.place] = tensor_map.of(tensors[name])
        try:
            self.direct.call(*self.grid, self.stream(self.device), *self.direct.before, arguments)
        except TypeError:  # it takes something else than in the versions of Triton that were read
            self.direct = None
            self(**tensors)

    def _described(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The tensors, but descriptors of those that the kernel takes as such."""
        if not self.descriptors:
            return tensors
        found = tensors.copy()
        for name, fields in self.descriptors.items():
            found[name] = _descriptor(fields, tensors[name])
        return found

    def _prepare(self, compiled: Any, tensors: dict[str, Any]) -> None:
        """Keep what the next launch needs: the arguments that Triton passes on, and where tensors stand among them.

        Threads may do so at once. What they keep is the same, and ``compiled`` is set when all of it is there.
        """
        self.device, self.stream = driver.active.get_current_device(), driver.active.get_current_stream
        self.launcher, direct = launcher_of(compiled), direct_launch(compiled)
        if direct is not None:
            arguments: list[Any] = []
            values, how = self.fixed | self._described(tensors), iter(direct.encoders)
            places = {name: _place(kind, values.get(name), how, arguments) for name, kind in direct.signature.items()}
            found = [(name, places[name]) for name in tensors]
            self.addresses = [(name, place) for name, place in found if isinstance(place, int)]
            self.tuples = [(name, place) for name, place in found if isinstance(place, tuple) and {*place} != {None}]
            self.maps = [(name, place) for name, place in found if isinstance(place, _TensorMap)]
            self.arguments = arguments
            self.direct = direct if len(arguments) == direct.length else None  # else not as Triton packs them
        self.compiled = compiled


def _place(kind: Any, value: Any, how: Iterator[Any], arguments: list[Any]) -> Any:
    """Append an argument of this type; returns where the address of a tensor goes, of a tuple's where each goes."""
    if isinstance(kind, tuple):
        return tuple(_place(*each, how, arguments) for each in zip(kind, value, strict=True))
    if kind == "constexpr":
        return None
    place = len(arguments)
    if kind.startswith("tensordesc"):
        encode = next(how)
        arguments += encode(value)
        return _TensorMap(place, encode, value)
    address = kind.startswith("*")
    arguments.append(None if address else value)  # no tensor of the first call is kept
    return place if address else None


def _descriptor(fields: dict[str, Any], tensor: Tensor) -> TensorDescriptor:
    """Of fields that were checked once, for another tensor of the layout."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__ = {**fields, "base": tensor}
    return descriptor


class _TensorMap:
    """A tensor descriptor among the arguments, which the driver encodes for each address once."""

    def __init__(self, place: int, encode: Callable[[Any], list[Any]], descriptor: TensorDescriptor) -> None:
        self.place, self.encode, self.fields = place, encode, vars(descriptor) | {"base": None}
        self.maps: dict[int, Any] = {}

    def of(self, tensor: Tensor) -> Any:
        address = tensor.data_ptr()
        found = self.maps.get(address)
        if found is None:
            if len(self.maps) >= 4096:  # weights have an address each, and activations come back to few
                self.maps.clear()
            found = self.maps[address] = self.encode(_descriptor(self.fields, tensor))[0]
        return found
