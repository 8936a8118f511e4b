"""Find the MLP blocks of a model and compute each as one: no model source is read or patched, a proof decides.

A block is a module whose only layers with parameters are two or three adapted ones of the right shapes. It is fused if
its own forward is shown to be ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))`` for one of the known activations:
see `prove`. Gate and up may be one layer that gives both side by side, and there may be dropout before and after down.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from fastlora.base_layers import base_kind, is_hooked
from fastlora.calls import calls_of
from fastlora.fused_block import HOOKED, Fusion, compute_as_one, fusion_of, leads_to, mlp_layers, orders, unfuse
from fastlora.proof import prove


def fuse_mlps(model: nn.Module, is_layer: Callable[[Any], bool], strict: bool = False) -> tuple[list[str], dict]:
    """Fuse every MLP block of adapted layers, which have a method ``operands``: see `fastlora.fused_block`.

    Returns the names of the blocks that are fused and, for everything else that looks like an MLP, the reason why not.
    """
    fused: list[str] = []
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        layers = mlp_layers(module, is_layer)
        if not layers:
            whole = mlp_layers(module, _is_linear)
            adapted = [child for child, layer in whole.items() if is_layer(layer)]
            if adapted and widens(whole.values()):
                kept[name] = (
                    f"only {' and '.join(adapted)} of its layers {', '.join(whole)} can be computed by fastlora"
                )
            continue
        reason = _fuse(module, layers, strict)
        if reason is None and any(map(is_hooked, layers.values())):
            reason = HOOKED
        if reason is None:
            fused.append(name)
        elif widens(layers.values()):
            kept[name] = reason
    return fused, kept | _scattered_mlps(model, is_layer, {*fused, *kept})


def _fuse(module: nn.Module, layers: dict[str, Any], strict: bool) -> str | None:
    """Fuse this block, or say why not."""
    fusion = fusion_of(module)
    if fusion is None and "forward" in module.__dict__:
        return "its forward was already wrapped on the instance: patch before that"
    if any(base_kind(layer.base_layer) == "opaque" for layer in layers.values()):
        unfuse(module)
        return "one of its layers has a base that computes itself"
    block = prove(module, layers)
    reason = block if isinstance(block, str) else compute_as_one(module, fusion or Fusion(), block)
    if reason is None:
        calls_of(module).strict = strict
    else:
        unfuse(module)
    return reason


def _is_linear(module: Any) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", 0), int)


def unfuse_mlps(model: nn.Module) -> list[str]:
    """Give fused blocks their own forward back. Returns their names."""
    return [name for name, module in list(model.named_modules()) if unfuse(module)]


def widens(layers: Any) -> bool:
    """Whether these layers are wider inside than outside, as those of an MLP and not of an attention."""
    return any(down.in_features > down.out_features for *_, down in orders(list(layers)))


def _scattered_mlps(model: nn.Module, is_layer: Callable[[Any], bool], known: set[str]) -> dict[str, str]:
    """MLPs that are not a module of their own: adapted layers in a row whose widths are those of an MLP. Returns the
    reason why they are not fused, by the name of the innermost module that contains them all."""
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if is_layer(layer) and name.rpartition(".")[0] not in known
    ]
    found: dict[str, str] = {}
    start = 0
    while start < len(layers):
        size = next((n for n in (3, 2) if _is_scattered_mlp([layer for _, layer in layers[start : start + n]], n)), 0)
        if size:
            names = [name.split(".") for name, _ in layers[start : start + size]]
            shared = next(i for i, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1)
            inside = ", ".join(".".join(parts[shared:]) for parts in names)
            one = layers[start][1].out_features == 2 * layers[start + 1][1].in_features
            found[".".join(names[0][:shared])] = (
                f"one layer makes both halves of what its MLP multiplies ({inside})"
                if one
                else f"its MLP ({inside}) is not a module of its own"
            )
        start += size or 1
    return found


def _is_scattered_mlp(layers: list[Any], n: int) -> bool:
    if len(layers) < n:
        return False
    *first, down = layers
    return down.in_features > down.out_features and leads_to(first, down)
