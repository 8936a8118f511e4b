"""Mixtures of experts whose weights PEFT adapts by ``target_parameters``, computed as one function.

PEFT wraps the module of the experts in one ``ParamWrapper`` for each adapted parameter, one around the other. Its
forward adds ``s b a`` to the whole stack of weights, at every call and for every expert, and backward makes a gradient
of that size. Here the outermost wrapper computes the experts itself, each on the rows of its tokens.
"""

from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from fastlora.base_experts import (
    ExpertAdapter,
    KnownGate,
    experts_forward,
    gate_of,
    layout_of,
    weight_names,
    why_not_computed,
    why_not_this_call,
)
from fastlora.base_layers import is_hooked
from fastlora.experts import Gate
from fastlora.peft_reasons import DISABLED, MERGED, count_call, linear_reason

WRAPPER: Any = getattr(import_module("peft.tuners.lora.layer"), "ParamWrapper", ())  # (): nothing is one
GATE = "_fastlora_gate"  # where a wrapper keeps its `KnownGate`
INSIDE = "the wrapper around it runs PEFT's forward"


def wrappers_of(outermost: Any) -> tuple[list[Any], Any]:
    """The wrappers of one module of experts, the outermost first, and that module."""
    wrappers: list[Any] = []
    module = outermost
    while isinstance(module, WRAPPER):
        wrappers.append(module)
        module = module.base_layer
    return wrappers, module


def why_not_fused(outermost: Any) -> str | None:
    """Why these experts run PEFT's own forward now, or None if they run fastlora's."""
    wrappers, experts = wrappers_of(outermost)
    if any(wrapper.disable_adapters for wrapper in wrappers):
        return DISABLED
    if any(wrapper.merged_adapters for wrapper in wrappers):
        return MERGED
    if (reason := why_not_computed(experts)) is not None:
        return reason
    adapted = [wrapper.parameter_name for wrapper in wrappers]
    if any(name not in weight_names(experts) for name in adapted):
        return f"it adapts {' and '.join(adapted)} of {type(experts).__name__}, of which not all are weights of experts"
    for wrapper in wrappers:
        if wrapper is not outermost and is_hooked(wrapper):
            return "a wrapper inside has hooks, which only run when it is called"
        for name in wrapper.active_adapters:
            if name in wrapper.lora_A and (reason := _adapter_reason(wrapper, name)) is not None:
                return reason
    return None


def _adapter_reason(wrapper: Any, name: str) -> str | None:
    for part in ("lora_A", "lora_B"):
        module = getattr(wrapper, part)._modules[name]
        if (reason := linear_reason(part, module, name)) is not None:
            return reason
        if module.bias is not None:
            return f"{part} of adapter {name!r} has a bias"
    return None


def known_gate(layer: Any, experts: Any) -> KnownGate | None:
    """That of the experts in this wrapper. A graph cannot make one."""
    known = layer.__dict__.get(GATE)
    if not torch.compiler.is_compiling() and (known is None or known.experts is not experts):
        known = layer.__dict__[GATE] = KnownGate(experts)
    return known


def _adapter(wrapper: Any, experts: Any) -> ExpertAdapter | None:
    """The active adapters of one weight, as one of the summed rank; None if there is none."""
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if not names:
        return None
    factors = [_factors(wrapper, name, experts) for name in names]
    s = wrapper.scaling[names[0]]
    if len(factors) == 1 and not isinstance(s, Tensor):
        return ExpertAdapter(*factors[0], s)
    a = torch.cat([each for each, _ in factors], 1)
    b = torch.cat([each * wrapper.scaling[name] for name, (_, each) in zip(names, factors, strict=True)], 2)
    return ExpertAdapter(a, b, 1.0)


def _factors(wrapper: Any, name: str, experts: Any) -> tuple[Tensor, Tensor]:
    """a [E, r, K] and b [E, N, r] of an adapter: PEFT keeps them as [E · r, K] and [N, r · E]."""
    a, b = wrapper.lora_A._modules[name].weight, wrapper.lora_B._modules[name].weight
    E = experts.num_experts
    a = a.view(E, -1, a.shape[1])
    b = b.view(b.shape[0], -1, E).permute(2, 0, 1)
    # PEFT before 0.19 takes every stack of weights as transposed
    if layout_of(experts).is_transposed == getattr(wrapper, "_did_swap_in_out_features", False):
        return b.transpose(1, 2), a.transpose(1, 2)
    return a, b


def _is_wrapped_now(experts: Any) -> bool:
    """Whether a wrapper around has added its adapter to a weight, and calls the experts."""
    if "parametrizations" not in experts._modules:
        return False
    return any(type(each[-1]).__name__.startswith("_Lora") for each in experts.parametrizations.values())


def _remove_what_peft_left(experts: Any) -> None:
    """PEFT 0.21 adds an adapter to a weight in 4 bits for one call, and does not find what it added afterwards: the
    next call would add it once more."""
    for steps in getattr(experts, "parametrizations", {}).values():
        while len(steps) > 1 and type(steps[-1]).__name__.startswith("_Lora"):
            del steps[-1]


def _forward(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    wrappers, experts = wrappers_of(layer)
    reason = INSIDE if _is_wrapped_now(experts) else why_not_fused(layer)
    gate: Gate | str = reason or why_not_this_call(experts, x, *args, **kwargs) or ""
    if not gate:
        gate = gate_of(known_gate(layer, experts), experts)
    reason = gate if isinstance(gate, str) else None
    if reason is not INSIDE:
        count_call(layer, reason)
    if isinstance(gate, str):
        y = type(layer).theirs.forward(layer, x, *args, **kwargs)
        if reason is not INSIDE:
            _remove_what_peft_left(experts)
        return y
    adapters = {wrapper.parameter_name: _adapter(wrapper, experts) for wrapper in wrappers}
    return experts_forward(experts, gate, x, adapters, *args)


def _ours(theirs: type) -> type:
    methods = {
        "__module__": __name__,
        "__doc__": "`peft.tuners.lora.layer.ParamWrapper` of experts computed by fastlora.",
        "theirs": theirs,
        "forward": _forward,
    }
    return type(theirs.__name__, (theirs,), methods)  # PEFT finds wrappers by the name of their class


OUR_EXPERTS: dict[type, type] = {}
if WRAPPER:
    OUR_EXPERTS[WRAPPER] = ParamWrapper = _ours(WRAPPER)


def outermost_of(layers: dict[str, LoraLayer]) -> dict[int, Any]:
    """For each ParamWrapper by its id, the outermost one around it."""
    found: dict[int, Any] = {}
    for layer in layers.values():  # in the order of named_modules: those around come first
        if isinstance(layer, WRAPPER):
            outermost = found.setdefault(id(layer), layer)
            if isinstance(layer.base_layer, WRAPPER):
                found[id(layer.base_layer)] = outermost
    return found
