"""Mixtures of experts whose weights PEFT adapts by ``target_parameters``, computed as one function.

PEFT wraps the module of the experts in one ``ParamWrapper`` for each adapted parameter, one around the other. Its
forward adds ``s b a`` to the whole stack of weights, at every call and for every expert, and backward makes a gradient
of that size. Here the outermost wrapper computes the experts itself, each on the rows of its tokens.

What the experts compute is what transformers' ``ExpertsInterface`` says of them: their class is decorated with its
layout of weights and its gate, and every implementation registered there gives the same result.
"""

from importlib import import_module
from math import prod
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastlora.autograd import transform_without_rule
from fastlora.base_layers import is_hooked
from fastlora.calls import calls_of
from fastlora.compat import constant_while_tracing
from fastlora.experts import Gate, Projection, Routing, fused_experts
from fastlora.fourbit import packed_weight
from fastlora.functional import autocast_dtype
from fastlora.fuse import are_same, dependencies
from fastlora.peft_reasons import ASKED_FOR, DISABLED, MERGED, part_reason, sharding
from fastlora.products import Weight
from fastlora.proof import activation_of
from fastlora.require import FLOATS

WRAPPER: Any = getattr(import_module("peft.tuners.lora.layer"), "ParamWrapper", None)
GATE = "_fastlora_gate"  # where a wrapper keeps its `KnownGate`
INSIDE = "the wrapper around it runs PEFT's forward"

# Registered implementations of transformers that compute the same; those that follow autocast are the first two.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "sonicmoe")


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
    if (reason := _experts_reason(experts)) is not None:
        return reason
    adapted = [wrapper.parameter_name for wrapper in wrappers]
    if any(name not in _layers(experts) for name in adapted):
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
        if type(module) is not nn.Linear:
            return f"{part} of adapter {name!r} is a {type(module).__name__}, not a plain nn.Linear"
        if module.bias is not None:
            return f"{part} of adapter {name!r} has a bias"
        if (reason := part_reason(part, module, name)) is not None:
            return reason
    return None


def _experts_reason(experts: Any) -> str | None:
    """Why this is not a module of experts that fastlora computes."""
    if not _is_of_interface(type(experts)):
        return f"a {type(experts).__name__} is adapted, not experts that transformers' ExpertsInterface computes"
    if _runs_hooks(experts):
        return "the experts have hooks, which only run when they are called"
    if isinstance(getattr(experts, "act_fn", None), nn.Module) and is_hooked(experts.act_fn):
        return "the activation of its experts has hooks, which only run when it is called"
    if experts.num_experts < 2 or getattr(experts, "_is_expert_parallel", False):
        return "there is one expert, or experts are spread over processes"
    if _implementation(experts) not in IMPLEMENTATIONS:
        return f"its experts are computed by another implementation, {_implementation(experts)!r}"
    for name in _layers(experts):
        if (reason := _weight_reason(experts, name)) is not None:
            return f"{name} of its experts {reason}"
    return None


def _weight_reason(experts: Any, name: str) -> str | None:
    """Why this weight cannot be multiplied."""
    E, bias = experts.num_experts, experts._parameters.get(f"{name}_bias")
    if experts.has_bias and (bias is None or bias.requires_grad):
        return "has a bias that is no parameter, or trains"
    if (state := _quant_state(experts, name)) is not None:
        whole_blocks = len(state.shape) == 3 and state.shape[0] == E and prod(state.shape[1:]) % state.blocksize == 0
        fits = whole_blocks and state.quant_type in ("nf4", "fp4")
        return None if fits else f"is {state.quant_type} {list(state.shape)} in blocks of {state.blocksize}"
    weight = experts._parameters.get(name)
    if (reason := sharding(experts, name)) is not None:
        return f"is {reason}"
    if weight is None:
        return "is not a plain parameter"
    if weight.requires_grad:
        return "trains"
    if weight.dtype == torch.float64 and not _follows_autocast(experts):
        return "is torch.float64, which the implementation of its experts does not take"
    fits = weight.dim() == 3 and len(weight) == E and weight.dtype in FLOATS
    return None if fits else f"is {weight.dtype} {list(weight.shape)}"


def _implementation(experts: Any) -> str:
    return getattr(experts.config, "_experts_implementation", None) or "eager"


def _parametrizations(experts: Any, name: str) -> list[Any]:
    """What `torch.nn.utils.parametrize` makes of this parameter."""
    if "parametrizations" not in experts._modules or name not in experts.parametrizations:
        return []
    return list(experts.parametrizations[name])


def _quant_state(experts: Any, name: str) -> Any:
    """bitsandbytes' description of this weight if it is in 4 bits (`replace_parameter_4bit`)."""
    steps = _parametrizations(experts, name)
    return steps[-1].quant_state if steps and type(steps[-1]).__name__ == "Bnb4bitParametrization" else None


def _runs_hooks(experts: Any) -> bool:
    """Whether calling the experts runs more than their forward; bitsandbytes' hooks only keep decoded weights."""
    if not is_hooked(experts):
        return False
    d = experts.__dict__
    own = [*d["_forward_hooks"].values(), *d["_forward_pre_hooks"].values()]
    others = d["_backward_hooks"] or d["_backward_pre_hooks"] or "_hf_hook" in d or "forward" in d
    return bool(others) or any(hook.__module__ != "bitsandbytes.nn.parametrize" for hook in own)


def _is_of_interface(cls: Any) -> bool:
    code = getattr(cls.forward, "__code__", None)
    return (
        code is not None
        and code.co_qualname.startswith("use_experts_implementation.")
        and code.co_filename.endswith("moe.py")
        and "_apply_gate" in dir(cls)
    )


def _layers(experts: Any) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


class KnownGate:
    """What comes between the layers of these experts, determined again when what it depends on has changed."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.seen: list[Any] = []
        self.gate: Gate | None = None

    def __reduce__(self) -> Any:  # a copy determines it anew
        return KnownGate, (self.experts,)

    @constant_while_tracing
    def now(self) -> Gate:
        experts, act = self.experts, getattr(self.experts, "act_fn", None)
        depends_on = [experts.__dict__.get("_apply_gate"), type(experts)._apply_gate, experts.has_gate, act]
        depends_on += dependencies(act) if isinstance(act, nn.Module) else []
        if self.gate is None or not are_same(depends_on, self.seen):
            self.seen, self.gate = depends_on, _gate(experts)
        return self.gate


def _gate(experts: Any) -> Gate:
    """A known activation and transformers' default way to gate, or the experts' own function."""
    if experts.has_gate and not _is_default_gate(experts):
        return Gate(None, True, experts._apply_gate)
    activation = activation_of(experts.act_fn)
    if activation is None:
        return Gate(None, experts.has_gate, experts._apply_gate if experts.has_gate else experts.act_fn)
    return Gate(activation, experts.has_gate)


def _is_default_gate(experts: Any) -> bool:
    """Whether z becomes ``act_fn(gate) * up`` of its two halves."""
    code = getattr(type(experts)._apply_gate, "__code__", None)
    return "_apply_gate" not in experts.__dict__ and code is not None and code.co_qualname == "_default_apply_gate"


def known_gate(layer: Any, experts: Any) -> KnownGate:
    """That of the experts in this wrapper."""
    known = layer.__dict__.get(GATE)
    if known is None or known.experts is not experts:
        known = layer.__dict__[GATE] = KnownGate(experts)
    return known


def _weight(experts: Any, name: str, dtype: torch.dtype) -> tuple[Weight, torch.Size]:
    """A stack of weights and its shape [E, N, K], or [E, K, N] if they are transposed."""
    state = _quant_state(experts, name)
    if state is not None:
        return packed_weight(experts.parametrizations[name].original, state), torch.Size(state.shape)
    weight = experts._parameters[name].to(dtype)
    return weight, weight.shape


def _projection(experts: Any, name: str, wrapper: Any, dtype: torch.dtype) -> Projection:
    weight, (E, N, K) = _weight(experts, name, dtype)
    transposed = experts.is_transposed
    bias = experts._parameters[f"{name}_bias"] if experts.has_bias else None
    names = [] if wrapper is None else [each for each in wrapper.active_adapters if each in wrapper.lora_A]
    if not names:
        N, K = (K, N) if transposed else (N, K)
        like = weight if isinstance(weight, Tensor) else weight.absmax
        a, b = (like.new_empty(shape, dtype=dtype) for shape in ((E, 0, K), (E, N, 0)))
        return Projection(weight, a, b, bias, 1.0, transposed)
    adapters = [_factors(wrapper, each, E, transposed) for each in names]
    s = wrapper.scaling[names[0]]
    if len(adapters) == 1 and not isinstance(s, Tensor):
        return Projection(weight, *adapters[0], bias, s, transposed)
    a = torch.cat([each for each, _ in adapters], 1)
    b = torch.cat([each * wrapper.scaling[n] for n, (_, each) in zip(names, adapters, strict=True)], 2)
    return Projection(weight, a, b, bias, 1.0, transposed)


def _factors(wrapper: Any, name: str, experts: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """a [E, r, K] and b [E, N, r] of an adapter: PEFT keeps them as [E · r, K] and [N, r · E]."""
    a, b = wrapper.lora_A._modules[name].weight, wrapper.lora_B._modules[name].weight
    a = a.view(experts, -1, a.shape[1])
    b = b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    if not transposed and not getattr(wrapper, "_did_swap_in_out_features", False):
        return b.transpose(1, 2), a.transpose(1, 2)  # PEFT before 0.19 takes every stack of weights as transposed
    return a, b


def _weight_dtype(experts: Any) -> torch.dtype:
    name = _layers(experts)[1]
    state = _quant_state(experts, name)
    return experts._parameters[name].dtype if state is None else state.dtype


def _dtype(experts: Any, x: Tensor) -> torch.dtype:
    """The dtype in which transformers' implementation multiplies."""
    return (autocast_dtype(x) if _follows_autocast(experts) else None) or _weight_dtype(experts)


def _follows_autocast(experts: Any) -> bool:
    return IMPLEMENTATIONS.index(_implementation(experts)) < 2


def _why_not_this_call(experts: Any, x: Any, *args: Any, **kwargs: Any) -> str | None:
    fits = len(args) == 2 and not kwargs and all(isinstance(t, Tensor) for t in (x, *args))
    if not fits or not (x.dim() == args[0].dim() == 2):
        return "it was called with something else than x [tokens, features], the experts and weights of each token"
    chosen, weights = args
    if chosen.shape != weights.shape or len(chosen) != len(x) or chosen.is_floating_point():
        return f"it was called with experts {list(chosen.shape)} and weights {list(weights.shape)} for {len(x)} tokens"
    if _follows_autocast(experts) and autocast_dtype(x) is None and x.dtype != _weight_dtype(experts):
        return f"x is {x.dtype}, the weights of its experts {_weight_dtype(experts)}, and autocast is off"
    return transform_without_rule()


def _is_wrapped_now(experts: Any) -> bool:
    """Whether a wrapper around has added its adapter to a weight, and calls the experts."""
    if "parametrizations" not in experts._modules:
        return False
    return any(type(each[-1]).__name__.startswith("_Lora") for each in experts.parametrizations.values())


def _forward(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    wrappers, experts = wrappers_of(layer)
    reason = INSIDE if _is_wrapped_now(experts) else why_not_fused(layer)
    gate = None
    if reason is None:
        reason = _why_not_this_call(experts, x, *args, **kwargs)
    if reason is None:
        gate = known_gate(layer, experts).now()
        if gate.function is not None and torch.compiler.is_compiling():
            reason = "its gate is a function of its own, which a graph has no gradient of"
    if not torch.compiler.is_compiling():
        calls = calls_of(layer)
        if reason is None:
            calls.fused += 1
        elif reason is not INSIDE:
            calls.falls_back(reason, reason in ASKED_FOR)
    if reason is not None or gate is None:
        return type(layer).theirs.forward(layer, x, *args, **kwargs)
    (chosen, weights), dtype, (first, down) = args, _dtype(experts, x), _layers(experts)
    adapted = {wrapper.parameter_name: wrapper for wrapper in wrappers}
    projections = [_projection(experts, name, adapted.get(name), dtype) for name in (first, down)]
    if experts.has_post_expert_norm:
        return _normed(experts, x, chosen, weights, projections, gate, dtype)
    y = fused_experts(x.to(dtype), weights, Routing.of(chosen, experts.num_experts), *projections, gate)
    return y.to(x.dtype)


def _normed(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor, layers: list, gate: Gate, dtype: Any) -> Tensor:
    """What each expert makes of a token goes through a norm before it is weighted: every choice is a token here."""
    T, k = chosen.shape
    rows, one = x.to(dtype).repeat_interleave(k, 0), weights.new_ones(T * k, 1)
    y = fused_experts(rows, one, Routing.of(chosen.reshape(-1, 1), experts.num_experts), *layers, gate)
    y = experts.post_expert_norm(y) * weights.reshape(-1, 1)
    return y.view(T, k, -1).sum(1).to(x.dtype)


def _ours(theirs: type) -> type:
    methods = {
        "__module__": __name__,
        "__doc__": "`peft.tuners.lora.layer.ParamWrapper` of experts computed by fastlora.",
        "theirs": theirs,
        "forward": _forward,
    }
    return type(theirs.__name__, (theirs,), methods)  # PEFT finds wrappers by the name of their class


OUR_EXPERTS: dict[type, type] = {}
if WRAPPER is not None:
    OUR_EXPERTS[WRAPPER] = ParamWrapper = _ours(WRAPPER)


def outermost_of(layers: dict[str, LoraLayer]) -> dict[int, Any]:
    """For each ParamWrapper by its id, the outermost one around it."""
    found: dict[int, Any] = {}
    for layer in layers.values():  # in the order of named_modules: those around come first
        if WRAPPER is not None and isinstance(layer, WRAPPER):
            outermost = found.setdefault(id(layer), layer)
            if isinstance(layer.base_layer, WRAPPER):
                found[id(layer.base_layer)] = outermost
    return found
