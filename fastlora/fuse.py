"""Find the MLP blocks of a model and compute each as one: no model source is read or patched, a probe decides.

A block is a module whose only layers with parameters are two or three adapted ones of the right shapes. It is fused if
its own forward, on a random input, is ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))`` for one of the known
activations. The module keeps its class, parameters and children; only this instance's forward is replaced. Whenever
its layers cannot be computed as one (adapters merged or disabled, hooks on a layer), it runs its own forward.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.functional import mlp_forward
from fastlora.reference import activate

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


class Block(NamedTuple):
    """The names of an MLP's layers, (gate, up, down) or (up, down), and its activation."""

    layers: tuple[str, ...]
    activation: str


def fuse_mlps(model: nn.Module, is_layer: Callable[[Any], bool]) -> tuple[dict[str, Block], dict[str, str]]:
    """Fuse every MLP block of adapted layers, which have a method ``operands``: see `forward_as_one`.

    Returns the blocks fused by name, and for those that look like one but are not the reason why.
    """
    fused, kept = {}, {}
    for name, module in model.named_modules():
        orders = list(orders_of(module, is_layer))
        if not orders:
            continue
        block = _block_of(module)
        if block is None and "forward" in module.__dict__:
            kept[name] = "its forward was already wrapped on the instance: patch before that"
            continue
        probed = block or probe(module, orders)
        if isinstance(probed, str):
            kept[name] = probed
            continue
        block = probed
        module.__dict__["forward"] = partial(forward_as_one, module, block)
        fused[name] = block
    return fused, kept


def block_of(module: nn.Module, is_layer: Callable[[Any], bool]) -> Block | str:
    """The MLP that this module's adapted layers make up, as its forward shows, or why they make up none."""
    orders = list(orders_of(module, is_layer))
    return probe(module, orders) if orders else "it has not two or three linear layers in the shape of an MLP"


def unfuse_mlps(model: nn.Module) -> list[str]:
    """Give fused blocks their own forward back. Returns their names."""
    names = [name for name, module in model.named_modules() if _block_of(module) is not None]
    for name in names:
        del model.get_submodule(name).__dict__["forward"]
    return names


def forward_as_one(module: nn.Module, block: Block, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The block's forward, by one autograd Function if every layer's ``operands(x)``, its base layer and adapter, can
    be had now."""
    y = None if args or kwargs or type(x) is not Tensor else _as_one(module, block, x)
    return type(module).forward(module, x, *args, **kwargs) if y is None else y


def _as_one(module: nn.Module, block: Block, x: Tensor) -> Tensor | None:
    operands = [module._modules[name].operands(x) for name in block.layers]  # type: ignore[union-attr, operator]
    return mlp_forward(x, operands, block.activation)


def _block_of(module: nn.Module) -> Block | None:
    forward = module.__dict__.get("forward")
    if isinstance(forward, partial) and forward.func is forward_as_one and forward.args[0] is module:
        return forward.args[1]
    return None


def orders_of(module: nn.Module, is_layer: Callable[[Any], bool]) -> Iterator[tuple[str, ...]]:
    """The ways in which the layers of this module could be (gate, up, down) or (up, down), none if in no way."""
    layers = {name: child for name, child in module.named_children() if is_layer(child)}
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    if len(layers) not in (2, 3) or any(id(p) not in owned for p in module.parameters()):
        return
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    for *first, down in permutations(layers):
        if {shapes[name] for name in first} == {(shapes[down][1], shapes[down][0])}:
            yield *first, down


def probe(module: nn.Module, orders: list[tuple[str, ...]]) -> Block | str:
    """What this module's forward computes, as shown by a random input, or why that is not known."""
    modes = {child: child.training for child in module.modules()}
    device = next(module.parameters()).device
    reason = ""
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            module.eval()
            for first in {module._modules[order[0]].in_features: order[0] for order in orders}.values():  # type: ignore[union-attr]
                try:
                    return _probe(module, orders, _input(module._modules[first], device))
                except Exception as error:  # of a forward that is not ours
                    reason = reason or f"a probe of its forward failed: {error}"
    finally:
        for child, training in modes.items():
            child.training = training
    return reason


def _probe(module: nn.Module, orders: list[tuple[str, ...]], x: Tensor) -> Block | str:
    own = type(module).forward(module, x)
    layers = [module._modules[name] for name in orders[0]]
    others = [child for child in module.children() if child not in layers]
    for other in (module, *others):  # the adapters' dropout stays off: only that of the block itself would show
        other.training = True
    if not torch.equal(type(module).forward(module, x), own):
        return "its forward is another one in training"
    for order in orders:
        if module._modules[order[0]].in_features != x.shape[-1]:  # type: ignore[union-attr]
            continue
        for activation in _activations(others, x.dtype):
            block = Block(order, activation)
            ours = _as_one(module, block, x)
            if ours is None:
                return "its layers cannot be computed as one"
            if (ours - own).norm() <= max(1e-5, 4 * torch.finfo(x.dtype).eps) * own.norm():
                return block
    return f"its forward is not that of an MLP with one of the activations {', '.join(ACTIVATIONS)}"


def _input(layer: Any, device: torch.device) -> Tensor:
    """A random input that drives the activation well out of where it is linear."""
    base = layer.base_layer
    dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
    dtype = getattr(base, "compute_dtype", None) or dtype
    x = torch.randn(1, 8, layer.in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    z = layer(x).float()
    return x * (3 / z.square().mean().sqrt()).to(dtype)


def _activations(children: list[nn.Module], dtype: torch.dtype) -> tuple[str, ...]:
    """Those that the block can have: that of its activation module, if it has one.

    The two gelus differ by less than a half-precision probe shows.
    """
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    for child in children:
        for activation in ACTIVATIONS:
            out = child(z.clone())
            if isinstance(out, Tensor) and torch.allclose(out, activate(z, activation), rtol=1e-9, atol=1e-9):
                return (activation,)
    return ACTIVATIONS if dtype.itemsize > 2 else ("silu",)
