"""What a module of transformers' experts computes, and its computation with adapters as one function.

That is what transformers' ``ExpertsInterface`` says of them: their class is decorated with its layout of weights and
its gate, and every implementation registered there gives the same result. Llama 4's are not of it: they are given the
rows of every expert one after another, each token times its score, which is zero for an expert that it did not choose.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.autograd import transform_without_rule
from fastlora.base_layers import is_hooked, sharding
from fastlora.compat import constant_while_tracing
from fastlora.dependencies import MODULE_ATTRIBUTES, are_same, class_attributes, dependencies, look_at, numbers_in
from fastlora.experts import Gate, Projection, Routing, fused_experts
from fastlora.fourbit import packed_weight
from fastlora.functional import autocast_dtype, new_seed
from fastlora.products import Weight
from fastlora.proof import activation_of
from fastlora.require import FLOATS

# Registered implementations of transformers that compute the same; those that follow autocast are the first two.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "sonicmoe")


class ExpertAdapter(NamedTuple):
    """Of one stack of weights: ``s · drop(x, p) a[e]ᵀ b[e]ᵀ``, a [E, r, K] and b [E, N, r]."""

    a: Tensor
    b: Tensor
    s: float
    p: float = 0.0


class Layout(NamedTuple):
    """How experts keep their weights, and what they are called with: ``(x, chosen, weights)``, or the ``own_rows`` of
    every expert."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool = False
    own_rows: bool = False


LLAMA_4 = Layout(has_gate=True, has_bias=False, is_transposed=True, own_rows=True)


def find_layout(experts: Any) -> Layout | None:
    """None of experts that fastlora does not compute."""
    cls = type(experts)
    if _is_of_interface(cls) and hasattr(experts, "has_gate"):  # transformers 5.0 says nothing of the layout
        return Layout(experts.has_gate, experts.has_bias, experts.is_transposed, experts.has_post_expert_norm)
    return LLAMA_4 if (cls.__module__, cls.__name__) == _LLAMA_4 else None


_LLAMA_4 = ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")


def layout_of(experts: Any) -> Layout:
    """Of experts for which `why_not_computed` has no reason."""
    layout = find_layout(experts)
    assert layout is not None
    return layout


def is_turned_in_peft(experts: Any) -> bool:
    """Whether PEFT takes the rows of these weights for outputs though they are inputs, so that its A is on the side of
    the outputs: it knows of transposed weights by an attribute of the interface."""
    layout = find_layout(experts)
    return layout is not None and layout.is_transposed and not getattr(experts, "is_transposed", False)


def why_not_computed(experts: Any) -> str | None:
    """Why this is not a module of experts that fastlora computes."""
    if find_layout(experts) is None:
        return f"a {type(experts).__name__} is adapted, not experts that transformers' ExpertsInterface computes"
    if _runs_hooks(experts):
        return "the experts have hooks, which only run when they are called"
    if isinstance(getattr(experts, "act_fn", None), nn.Module) and is_hooked(experts.act_fn):
        return "the activation of its experts has hooks, which only run when it is called"
    if experts.num_experts < 2 or getattr(experts, "_is_expert_parallel", False):
        return "there is one expert, or experts are spread over processes"
    if _implementation(experts) not in IMPLEMENTATIONS:
        return f"its experts are computed by another implementation, {_implementation(experts)!r}"
    for name in weight_names(experts):
        if (reason := _weight_reason(experts, name)) is not None:
            return f"{name} of its experts {reason}"
    return None


def _weight_reason(experts: Any, name: str) -> str | None:
    """Why this weight cannot be multiplied."""
    E, bias = experts.num_experts, experts._parameters.get(f"{name}_bias")
    if layout_of(experts).has_bias and (bias is None or bias.requires_grad):
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
    return getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"


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
        and hasattr(cls, "_apply_gate")
    )


def weight_names(experts: Any) -> tuple[str, str]:
    return "gate_up_proj" if layout_of(experts).has_gate else "up_proj", "down_proj"


class KnownGate:
    """What comes between the layers of these experts, determined again when what it depends on has changed."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.seen: list[Any] = []
        self.gate: Gate | str = ""  # or why there is none

    def __reduce__(self) -> Any:  # a copy determines it anew
        return KnownGate, (self.experts,)

    def now(self) -> Gate | str:
        """The gate, or why fastlora cannot compute it."""
        experts, act = self.experts, getattr(self.experts, "act_fn", None)
        gates = (experts.__dict__.get("_apply_gate"), getattr(type(experts), "_apply_gate", None))
        depends_on = [*gates, layout_of(experts).has_gate, act]
        depends_on += [*dependencies(act), act.training] if isinstance(act, nn.Module) else []
        if not self.seen or not are_same(depends_on, self.seen):
            self.seen, self.gate = depends_on, _gate(experts)
        return self.gate

    @constant_while_tracing
    def while_tracing(self) -> tuple[Gate | str, tuple[str, ...], tuple]:
        """The gate, and the attributes of the activation that a graph has to be guarded on; the values of numbers."""
        gate, act = self.now(), getattr(self.experts, "act_fn", None)
        if isinstance(gate, Gate) and gate.function is not None:
            return "its gate is a function of its own, which a graph has no gradient of", (), ()
        own = {key: value for key, value in getattr(act, "__dict__", {}).items() if key not in MODULE_ATTRIBUTES}
        if isinstance(act, nn.Module):
            own |= {key: getattr(act, key) for key in class_attributes(act)}
        if getattr(act, "_buffers", None) or not all(map(_is_guarded, own.values())):
            return "its activation depends on what a graph is not guarded on", (), ()
        return gate, (*own, "forward"), numbers_in(own)


def _is_guarded(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or callable(value)


def gate_of(known: KnownGate | None, experts: Any) -> Gate | str:
    """The gate of these experts now, or why fastlora cannot compute it."""
    if not torch.compiler.is_compiling():
        assert known is not None
        return known.now()
    if known is None or known.experts is not experts:
        return "the experts were replaced since they were last called: call them once before compiling"
    gate, guarded, numbers = known.while_tracing()
    looked_at = look_at(getattr(experts, "act_fn", None), guarded, numbers)
    return gate if getattr(experts, "_apply_gate", looked_at) is not None else ""


def _gate(experts: Any) -> Gate | str:
    """A known activation and transformers' default way to gate, or the experts' own function, which is called again in
    backward, so that it must not be random or have parameters."""
    for name, module in experts.named_modules():
        if name and name.partition(".")[0] not in ("parametrizations", "post_expert_norm"):
            if any(p.requires_grad for p in module.parameters()):
                return f"its {type(module).__name__} has parameters that train"
            if isinstance(module, nn.RReLU | nn.modules.dropout._DropoutNd) and module.training:
                return f"its {type(module).__name__} is random"
    layout = layout_of(experts)
    has_gate, own_gate = layout.has_gate, not layout.own_rows
    if has_gate and own_gate and not _is_default_gate(experts):
        return Gate(None, True, experts._apply_gate)
    activation = activation_of(experts.act_fn)
    if activation is not None:
        return Gate(activation, has_gate)
    if not own_gate:
        return "its activation is not one of those that fastlora knows"
    return Gate(None, has_gate, experts._apply_gate if has_gate else experts.act_fn)


def _is_default_gate(experts: Any) -> bool:
    """Whether z becomes ``act_fn(gate) * up`` of its two halves."""
    code = getattr(type(experts)._apply_gate, "__code__", None)
    return "_apply_gate" not in experts.__dict__ and code is not None and code.co_qualname == "_default_apply_gate"


def _weight(experts: Any, name: str, dtype: torch.dtype) -> tuple[Weight, torch.Size]:
    """A stack of weights and its shape [E, N, K], or [E, K, N] if they are transposed."""
    state = _quant_state(experts, name)
    if state is not None:
        return packed_weight(experts.parametrizations[name].original, state), torch.Size(state.shape)
    weight = experts._parameters[name].to(dtype)
    return weight, weight.shape


def _projection(experts: Any, name: str, adapter: ExpertAdapter | None, x: Tensor) -> Projection:
    weight, (E, N, K) = _weight(experts, name, x.dtype)
    layout = layout_of(experts)
    transposed = layout.is_transposed
    bias = experts._parameters[f"{name}_bias"] if layout.has_bias else None
    if adapter is None:
        N, K = (K, N) if transposed else (N, K)
        return Projection(weight, x.new_empty(E, 0, K), x.new_empty(E, N, 0), bias, 1.0, transposed)
    a, b, s, p = adapter
    return Projection(weight, a, b, bias, s, transposed, p, new_seed(x, p))


def _weight_dtype(experts: Any) -> torch.dtype:
    name = weight_names(experts)[1]
    state = _quant_state(experts, name)
    return experts._parameters[name].dtype if state is None else state.dtype


def _dtype(experts: Any, x: Tensor) -> torch.dtype:
    """The dtype in which transformers' implementation multiplies."""
    return (autocast_dtype(x) if _follows_autocast(experts) else None) or _weight_dtype(experts)


def _follows_autocast(experts: Any) -> bool:
    return IMPLEMENTATIONS.index(_implementation(experts)) < 2


def why_not_this_call(experts: Any, x: Any, *args: Any, **kwargs: Any) -> str | None:
    own_rows = layout_of(experts).own_rows
    fits = len(args) == (0 if own_rows else 2) and not kwargs and all(isinstance(t, Tensor) for t in (x, *args))
    if own_rows and not (fits and x.dim() == 2 and len(x) % experts.num_experts == 0):
        return "it was called with something else than x [tokens of every expert, features]"
    if not fits or not all(t.dim() == 2 for t in (x, *args)):
        return "it was called with something else than x [tokens, features], the experts and weights of each token"
    if not own_rows:
        chosen, weights = args
        integers = not chosen.is_floating_point()
        if chosen.shape != weights.shape or len(chosen) != len(x) or not (integers and weights.is_floating_point()):
            given = f"experts {list(chosen.shape)} and weights {list(weights.shape)}"
            return f"it was called with {given} for {len(x)} tokens"
    if _follows_autocast(experts) and autocast_dtype(x) is None and x.dtype != _weight_dtype(experts):
        return f"x is {x.dtype}, the weights of its experts {_weight_dtype(experts)}, and autocast is off"
    return transform_without_rule()


def experts_forward(
    experts: Any, gate: Gate, x: Tensor, adapters: Mapping[str, ExpertAdapter | None], *routing: Tensor
) -> Tensor:
    """What these experts, with adapters by the name of the weight that has one, make of x [T, K]. ``routing`` is
    ``chosen`` and ``weights`` [T, k], the experts of each token and their weights, or nothing for `Layout.own_rows`."""
    wide = x.to(_dtype(experts, x))
    first, down = (_projection(experts, name, adapters.get(name), wide) for name in weight_names(experts))
    E, layout = experts.num_experts, layout_of(experts)
    if layout.own_rows:
        return _of_own_rows(wide, E, first, down, gate).to(x.dtype)
    chosen, weights = routing
    T, k = chosen.shape
    if not layout.has_post_expert_norm:
        return fused_experts(wide, weights, Routing.of(chosen, E), first, down, gate).to(x.dtype)
    # What an expert makes of a token goes through a norm before it is weighted: each choice is a token here.
    one = weights.new_ones(T * k, 1)
    y = fused_experts(wide.repeat_interleave(k, 0), one, Routing.of(chosen.reshape(-1, 1), E), first, down, gate)
    y = experts.post_expert_norm(y) * weights.reshape(-1, 1)
    return y.view(T, k, -1).sum(1).to(x.dtype)


def _of_own_rows(x: Tensor, experts: int, first: Projection, down: Projection, gate: Gate) -> Tensor:
    """What experts make of x, of which the first share of the rows is the first expert's, and so on.

    A row of zeros is one that its expert was not chosen for. With a known gate and no bias its y is zero, and it takes
    no part in any gradient: z = 0, and both halves of dz have a factor 0.
    """
    expert = torch.arange(experts, device=x.device).repeat_interleave(len(x) // experts).unsqueeze(1)
    chosen = x.detach().any(1)
    if torch.compiler.is_compiling():  # a graph knows no number of rows that depends on values
        routing = Routing.of(torch.where(chosen.unsqueeze(1), expert, experts), experts)
        return fused_experts(x, x.new_ones(len(x), 1), routing, first, down, gate)
    rows = chosen.nonzero().squeeze(1)
    routing, one = Routing.of(expert.index_select(0, rows), experts), x.new_ones(len(rows), 1)
    y = fused_experts(x.index_select(0, rows), one, routing, first, down, gate)
    return torch.zeros_like(x).index_copy(0, rows, y)
