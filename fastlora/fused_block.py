"""An MLP block that is computed as one: what its proof depends on, and what it computes now.

Its class is exchanged for one derived from it, whose forward is `forward_as_one`: an instance with a forward of its own
would need a graph of its own from torch.compile, one for each layer of a model. Whenever its layers cannot be computed
as one (adapters merged or disabled, hooks on a layer), or something that the proof depends on has changed
(`Fusion.block_now`), it runs its own forward.
"""

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.autograd import transform_without_rule
from fastlora.base_layers import is_hooked
from fastlora.calls import ATTRIBUTE, calls_of
from fastlora.compat import constant_while_tracing, exchanged, functorch_is_active
from fastlora.dependencies import (
    FUSION,
    MODULE_ATTRIBUTES,
    OURS,
    are_same,
    class_attributes,
    dependencies,
    is_adapted,
    look_at,
    names_in,
    numbers_in,
    snapshot,
    watched_modules,
)
from fastlora.functional import autocast_dtype, mlp_forward, stands_alone
from fastlora.proof import OWN_CLASS, Block, own_class, prove

HOOKED = "one of its layers has hooks, which only run when it is called"
ONE_BY_ONE = "one of its layers trains its weight, or is of DoRA with a bias or dropout: they are fused one by one"
PROOFS = 4  # of a block that changes at every call, before it is left to its own forward


class Fusion:
    """What is known of one fused block, and what that knowledge depends on."""

    def __init__(self) -> None:
        self.block: Block | str = ""  # or why it is no MLP any more
        self.seen: list[Any] = []  # the `dependencies` that the block was proven with
        self.watched: list[tuple[nn.Module, list[str], list[str]]] = []  # `watched_modules` of the block
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
            mentioned = names_in(own_class(each).forward)
            own = {k: value for k, value in each.__dict__.items() if k not in MODULE_ATTRIBUTES and k not in OURS}
            own |= {k: getattr(each, k) for k in class_attributes(each)}
            plain = [k for k, value in own.items() if isinstance(value, bool | int | float | str) or callable(value)]
            if each._buffers or any(k in mentioned and k not in plain for k in own):
                return "it depends on what a graph is not guarded on", ()
            path, forward = (tuple(name.split(".")), ("forward",)) if name else ((), ())
            guarded.append((path, (*plain, *forward, "training"), numbers_in(own)))
        return block, tuple(guarded)


def forward_as_one(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The block's forward: one autograd Function if every layer returns its ``operands(x)``, otherwise its own."""
    y = None
    if not args and not kwargs:
        fusion = module.__dict__.get(FUSION)  # none in a block that was unfused, but whose forward someone kept
        if fusion is not None and fusion.watched[0][0] is not module:
            fusion = _new_fusion(module)
        if fusion is not None and torch.compiler.is_compiling():
            y = _as_one_compiled(module, fusion, x)
        elif fusion is not None and type(x) is Tensor:
            y = _as_one(module, fusion, x)
    return own_class(module).forward(module, x, *args, **kwargs) if y is None else y


forward_as_one.__name__ = "forward"  # by which a bound method is pickled


def _new_fusion(module: nn.Module) -> Fusion | None:
    """That of a shallow copy of a block, which is proven when it is called; a graph cannot make one."""
    if torch.compiler.is_compiling():
        return None
    fusion = module.__dict__[FUSION] = Fusion()
    fusion.watched = watched_modules(module)
    return fusion


def _as_one_compiled(module: nn.Module, fusion: Fusion, x: Tensor) -> Tensor | None:
    """The block as one function inside a graph. What it computes is determined once, while tracing; the attributes that
    this depends on are read here, so that the graph is guarded on them."""
    block, guarded = fusion.block_while_tracing()
    for path, names, numbers in guarded:
        child = module
        for step in path:
            child = getattr(child, step)
        look_at(child, names, numbers)
    look_at(own_class(module), ("forward",), ())
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
    return module.__dict__.get(FUSION)


def compute_as_one(module: nn.Module, fusion: Fusion, block: Block) -> str | None:
    """Compute this block as one from now on, or say why its class cannot be derived from."""
    if (reason := _why_not_derived(own_class(module))) is not None:
        return reason
    try:
        module.__class__ = exchanged(type(module), _fused) or type(module)
    except TypeError as error:  # of a metaclass that is not ours
        return f"no class can be derived from its own: {error}"
    module.__dict__[FUSION] = fusion
    fusion.accept(module, block)
    return None


def _why_not_derived(cls: Any) -> str | None:
    """Why an instance of this class would not do with a derived one what it does now."""
    if {"type", "__class__"} & set(names_in(cls.forward)):
        return "its forward asks for its class"
    for name in ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__"):
        if getattr(cls, name, None) is not getattr(nn.Module, name, None):
            return f"its class is copied in a way of its own ({name})"
    return None


def unfuse(module: nn.Module) -> bool:
    """Give this block its own forward back, if it is fused."""
    if module.__dict__.pop(FUSION, None) is None:
        return False
    module.__class__ = exchanged(type(module), _own) or type(module)
    module.__dict__.pop(ATTRIBUTE, None)
    return True


def _own(cls: type) -> type | None:
    return vars(cls).get(OWN_CLASS)


class _Derived:
    """Keeps a class that registers or refuses its subclasses from being told of one."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _fused(theirs: type) -> type | None:
    """The subclass whose forward is `forward_as_one`, and which prints and is pickled as the class itself. None if this
    is one already."""
    if OWN_CLASS in vars(theirs):
        return None
    made = _CLASSES.get(theirs, lambda: None)()
    if made is None:
        members = {
            "__module__": theirs.__module__,
            "__qualname__": theirs.__qualname__,
            "__doc__": theirs.__doc__,
            OWN_CLASS: theirs,
            "forward": forward_as_one,
            "__reduce_ex__": _reduce,
        }
        made = type(theirs.__name__, (_Derived, theirs), members)
        _CLASSES[theirs] = weakref.ref(made)
    return made


_CLASSES: Any = weakref.WeakKeyDictionary()  # of each class the derived one, while there is an instance


def _reduce(module: nn.Module, protocol: Any) -> tuple:
    """As any object is pickled, but for its class, which cannot be found by its name."""
    _, _, *rest = cast(tuple, object.__reduce_ex__(module, max(2, protocol)))
    return _unpickled, (own_class(module),), *rest


def _unpickled(theirs: type) -> Any:
    cls: Any = _fused(theirs)
    return cls.__new__(cls)


def mlp_layers(module: nn.Module, is_layer: Callable[[Any], bool]) -> dict[str, Any]:
    """The children of this module for which ``is_layer`` holds, if they are two or three with the shapes of an MLP and
    nothing else in the module has parameters; otherwise none."""
    layers = {name: child for name, child in module.named_children() if is_layer(child)}
    if len(layers) not in (2, 3):
        return {}
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    if any(id(p) not in owned for p in module.parameters()) or not any(orders(list(layers.values()))):
        return {}
    return layers


def orders(layers: list[Any]) -> list[list[Any]]:
    """Every order of the layers in which the last (down) maps the outputs of the others back to their input width."""
    found = []
    for down in layers:
        first = [layer for layer in layers if layer is not down]
        if leads_to(first, down):
            found.append([*first, down])
    return found


def leads_to(first: list[Any], down: Any) -> bool:
    """Whether down takes what the first layers give, gate and up side by side if they are one, and gives x's width."""
    widths = {(layer.in_features, layer.out_features) for layer in first}
    K, H = down.out_features, down.in_features
    return widths == {(K, H)} or (len(first) == 1 and widths == {(K, 2 * H)})
