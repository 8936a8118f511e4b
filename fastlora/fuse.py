"""Find the MLP blocks of a model and compute each as one: no model source is read or patched, a proof decides.

A block is a module whose only layers with parameters are two or three adapted ones of the right shapes. It is fused if
its own forward is shown to be ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))`` for one of the known activations:
see `prove`. Gate and up may be one layer that gives both side by side, and there may be dropout before and after down.
The module keeps its class, parameters and children; only this instance's forward is replaced. Whenever its layers
cannot be computed as one (adapters merged or disabled, hooks on a layer), or something that the proof depends on has
changed (`Fusion.block_now`), it runs its own forward.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.autograd import transform_without_rule
from fastlora.base_layers import base_kind, is_hooked
from fastlora.calls import ATTRIBUTE, calls_of
from fastlora.compat import constant_while_tracing, functorch_is_active
from fastlora.functional import autocast_dtype, mlp_forward, stands_alone
from fastlora.proof import Block, prove

HOOKED = "one of its layers has hooks, which only run when it is called"
ONE_BY_ONE = "one of its layers trains its weight, or is of DoRA with a bias or dropout: they are fused one by one"
PROOFS = 4  # of a block that changes at every call, before it is left to its own forward


def fuse_mlps(model: nn.Module, is_layer: Callable[[Any], bool], strict: bool = False) -> tuple[list[str], dict]:
    """Fuse every MLP block of adapted layers, which have a method ``operands``: see `forward_as_one`.

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
    if isinstance(block, str):
        unfuse(module)
        return block
    fusion = fusion or Fusion()
    fusion.accept(module, block)
    module.__dict__["forward"] = partial(forward_as_one, module, fusion)
    calls_of(module).strict = strict
    return None


def _is_linear(module: Any) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", 0), int)


def unfuse_mlps(model: nn.Module) -> list[str]:
    """Give fused blocks their own forward back. Returns their names."""
    return [name for name, module in list(model.named_modules()) if unfuse(module)]


def unfuse(module: nn.Module) -> bool:
    """Give this block its own forward back, if it is fused."""
    if fusion_of(module) is None:
        return False
    del module.__dict__["forward"]
    module.__dict__.pop(ATTRIBUTE, None)
    return True


class Fusion:
    """What is known of one fused block, and what that knowledge depends on."""

    def __init__(self) -> None:
        self.block: Block | str = ""  # or why it is no MLP any more
        self.seen: list[Any] = []  # the `dependencies` that the block was proven with
        self.watched: list[tuple[nn.Module, list[str]]] = []  # `watched_modules` of the block
        self.last: list[Any] = []  # the `snapshot` of them when `dependencies` was last compared
        self.changes = 0  # in successive calls

    def accept(self, module: nn.Module, block: Block | str) -> None:
        self.block, self.seen, self.watched = block, dependencies(module), watched_modules(module)
        self.last = snapshot(self.watched)

    def is_known(self, module: nn.Module) -> bool:
        """Whether nothing has changed that the last proof depends on."""
        now = snapshot(self.watched)
        if are_same(now, self.last):
            self.changes = 0
            return True
        depends_on = dependencies(module)  # of which a snapshot has more: the mode of the module, for one
        known = are_same(depends_on, self.seen)
        if known:
            self.watched = watched_modules(module)
            self.last = snapshot(self.watched)
        self.changes = 0 if known else self.changes + 1
        return known

    def block_now(self, module: nn.Module) -> Block | str:
        """The block, proven again if it has changed, or why it has to run its own forward."""
        if not self.is_known(module) and self.changes <= PROOFS:
            layers = mlp_layers(module, is_adapted)
            changed = "it was changed, and is not two or three adapted layers any more"
            self.accept(module, prove(module, layers) if layers else changed)
        return self.block if self.changes <= PROOFS else "its attributes change from call to call"

    @constant_while_tracing
    def block_while_tracing(self) -> tuple[Block | str, tuple]:
        """The block, and for each of its submodules the path and the attributes that a graph can be guarded on. A block
        that depends on anything else, such as the values of a buffer, is not computed as one in a graph.

        It takes no argument, since PyTorch 2.11 passes no module to a function whose result is constant in a graph.
        """
        module = self.watched[0][0]
        block = self.block_now(module)
        if isinstance(block, str):
            return block, ()
        guarded = []
        for name, each in module.named_modules():
            if name.partition(".")[0] in block.layers:
                continue
            mentioned = _names_in(type(each).forward)
            own = {k: value for k, value in each.__dict__.items() if k not in MODULE_ATTRIBUTES and k != ATTRIBUTE}
            plain = [k for k, value in own.items() if isinstance(value, bool | int | float | str) or callable(value)]
            if each._buffers or any(k in mentioned and k not in plain for k in own):
                return "it depends on what a graph is not guarded on", ()
            guarded.append((tuple(name.split(".")) if name else (), (*plain, "forward", "training")))
        return block, tuple(guarded)


def are_same(now: list[Any], before: list[Any]) -> bool:
    """Whether the objects are the same ones; of integers, such as versions of buffers, whether they are equal."""
    if len(now) != len(before):
        return False
    if all(map(operator.is_, now, before)):
        return True
    pairs = ((a, b) for a, b in zip(now, before, strict=True) if a is not b)
    return all(type(a) is int and type(b) is int and a == b for a, b in pairs)


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
        forward = type(each).forward
        found.append(forward)
        if each is not module and is_hooked(each):
            found.append(_HOOKED)
        mentioned = _names_in(forward)
        for key, value in each.__dict__.items():
            if key == "training" or key == ATTRIBUTE:
                continue
            found.append(value)
            if key in mentioned and key not in MODULE_ATTRIBUTES:
                found.extend(_inside(value))
        for child in each._modules.values():
            found.append(child)
            if child is not None and not is_adapted(child):
                todo.append(child)
        for buffer in each._buffers.values():
            found += (buffer, None if buffer is None else buffer._version)
    return found


def watched_modules(module: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """A block and its modules that are not adapted layers, each with the attributes whose contents it depends on."""
    found: list[tuple[nn.Module, list[str]]] = []
    todo = [module]
    for each in todo:
        mentioned = _names_in(type(each).forward)
        found.append((each, [key for key in each.__dict__ if key in mentioned and key not in MODULE_ATTRIBUTES]))
        todo += [child for child in each._modules.values() if child is not None and not is_adapted(child)]
    return found


def snapshot(watched: list[tuple[nn.Module, list[str]]]) -> list[Any]:
    """Objects, of which at least one differs if any of the `dependencies` has changed. Takes a third of the time."""
    found: list[Any] = []
    for each, keys in watched:
        d = each.__dict__
        found.append(type(each).forward)
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


def _names_in(forward: Any) -> tuple[str, ...]:
    """The attributes that a function mentions."""
    return getattr(getattr(forward, "__wrapped__", forward), "__code__", _names_in.__code__).co_names


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    return () if callable(value) or isinstance(value, Tensor) else getattr(value, "__dict__", {}).values()


def forward_as_one(module: nn.Module, fusion: Fusion, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The block's forward: one autograd Function if every layer returns its ``operands(x)``, otherwise its own."""
    y = None
    if not args and not kwargs:
        if torch.compiler.is_compiling():
            y = _as_one_compiled(module, fusion, x)
        elif type(x) is Tensor:
            y = _as_one(module, fusion, x)
    return type(module).forward(module, x, *args, **kwargs) if y is None else y


def _as_one_compiled(module: nn.Module, fusion: Fusion, x: Tensor) -> Tensor | None:
    """The block as one function inside a graph. What it computes is determined once, while tracing; the attributes that
    this depends on are read here, so that the graph is guarded on them."""
    block, guarded = fusion.block_while_tracing()
    attributes = 0
    for path, names in guarded:
        child = module
        for step in path:
            child = getattr(child, step)
        for name in names:  # looked at: a graph is not guarded on what is only read
            attributes += 1 if getattr(child, name, None) else 0
    if isinstance(block, str):
        return None
    if dropout_inside(module, block) > 0.0:
        return None  # the compiler knows this dropout, and fuses it with what is around it
    operands = [module._modules[name].operands(x) for name in block.layers]  # type: ignore[union-attr, operator]
    return block_output(module, block, x, operands)


def dropout_inside(module: nn.Module, block: Block) -> float:
    """The probability with which the input of down is dropped now."""
    dropout: Any = None if block.inside is None else module._modules[block.inside]
    return dropout.p if dropout is not None and dropout.training else 0.0


def block_output(module: nn.Module, block: Block, x: Tensor, operands: list) -> Tensor | None:
    """What the block makes of x, if these operands of its layers can be computed as one."""
    y = mlp_forward(x, operands, block.activation, block.gate_first, dropout_inside(module, block))
    return y if y is None or block.after is None else module._modules[block.after](y)  # type: ignore[misc]


def _as_one(module: nn.Module, fusion: Fusion, x: Tensor) -> Tensor | None:
    """The block as one function; None if it cannot be now, which is counted with the reason."""
    calls = calls_of(module)
    # Even those transforms that layers have a rule for may batch a backward, where nothing works in place.
    if functorch_is_active() or transform_without_rule() is not None:
        calls.falls_back("it was called under forward-mode AD or a transform of torch.func", asked_for=True)
        return None
    block = fusion.block_now(module)
    if isinstance(block, str):
        if any(map(is_adapted, module._modules.values())):
            calls.falls_back(block)
        else:
            unfuse(module)  # its adapters were unloaded: it is a plain module again
        return None
    layers: list[Any] = [module._modules[name] for name in block.layers]
    operands = [layer.operands(x) for layer in layers]
    if any(operand is None for operand in operands):
        if hooked := list(filter(is_hooked, layers)):
            calls.falls_back(HOOKED, asked_for=all(map(_gets_adapter_names, hooked)))
        else:
            calls.own += 1  # the layer whose operands cannot be had says why
        return None
    if any(stands_alone(x, *operand) for operand in operands if operand is not None):
        calls.falls_back(ONE_BY_ONE, asked_for=True)
        return None
    y = block_output(module, block, x, operands)
    if y is None:
        dtype = autocast_dtype(x) or x.dtype
        calls.falls_back(f"not all of its layers compute in {dtype}, or one is of a type that computes itself")
        return None
    for each in (calls, *map(calls_of, layers)):
        each.fused += 1
    return y


def _gets_adapter_names(layer: Any) -> bool:
    """Whether the hooks of this layer are those by which PEFT passes on ``adapter_names``."""
    hooks = layer._forward_pre_hooks.values()
    return all(getattr(getattr(hook, "func", None), "__name__", "").startswith("_adapter_names") for hook in hooks)


def fusion_of(module: nn.Module) -> Fusion | None:
    """What is known of this block if it is fused."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, partial) and forward.func is forward_as_one and forward.args[0] is module:
        return forward.args[1]
    return None


def is_adapted(module: Any) -> bool:
    """Whether this is a layer that fastlora computes."""
    return hasattr(type(module), "operands")


def mlp_layers(module: nn.Module, is_layer: Callable[[Any], bool]) -> dict[str, Any]:
    """The children of this module for which ``is_layer`` holds, if they are two or three with the shapes of an MLP and
    nothing else in the module has parameters; otherwise none."""
    layers = {name: child for name, child in module.named_children() if is_layer(child)}
    if len(layers) not in (2, 3):
        return {}
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    if any(id(p) not in owned for p in module.parameters()) or not any(_orders(list(layers.values()))):
        return {}
    return layers


def _orders(layers: list[Any]) -> list[list[Any]]:
    """Every order of the layers in which the last (down) maps the outputs of the others back to their input width."""
    found = []
    for down in layers:
        first = [layer for layer in layers if layer is not down]
        if _leads_to(first, down):
            found.append([*first, down])
    return found


def _leads_to(first: list[Any], down: Any) -> bool:
    """Whether down takes what the first layers give, gate and up side by side if they are one, and gives x's width."""
    widths = {(layer.in_features, layer.out_features) for layer in first}
    K, H = down.out_features, down.in_features
    return widths == {(K, H)} or (len(first) == 1 and widths == {(K, 2 * H)})


def widens(layers: Any) -> bool:
    """Whether these layers are wider inside than outside, as those of an MLP and not of an attention."""
    return any(down.in_features > down.out_features for *_, down in _orders(list(layers)))


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
    return down.in_features > down.out_features and _leads_to(first, down)
