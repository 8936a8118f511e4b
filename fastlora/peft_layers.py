"""What a patched layer of PEFT computes, and when it runs PEFT's own forward instead.

A patched layer decides at every call what it is: adapters may have been merged, disabled, switched or hooked since.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastlora.autograd import transform_without_rule
from fastlora.base_layers import base_kind, is_hooked
from fastlora.calls import ATTRIBUTE, calls_of
from fastlora.compat import attribute, forward_ad, functorch_is_active
from fastlora.functional import Adapter, adapted_forward, add_adapter_output, fused_forward, mixed_forward
from fastlora.peft_reasons import MORE_THAN_X, count_call, dora_reason, is_dora, magnitude_of, why_not_mixed, why_peft
from fastlora.row_adapters import RowAdapters

_ACTIVE = attribute(LoraLayer, "_active_adapter", "active_adapters")
_DISABLED = attribute(LoraLayer, "_disable_adapters", "disable_adapters")


def _operands_now(layer: LoraLayer) -> tuple[nn.Module, str, Adapter] | None:
    """The base layer, its `base_kind` and the active adapter, if the adapter is one and the layer runs fused now.

    None if `why_peft` has a reason, and also where several adapters are active or the base layer computes its own
    output. All that `why_peft` looks at is read here without a function call, because every call of a patched layer
    asks this: nothing is remembered, so nothing can be out of date.
    """
    modules = layer.__dict__["_modules"]
    name: Any = getattr(layer, _ACTIVE)
    if type(name) is not str:
        if len(name) != 1:
            return None
        name = name[0]
    base: Any = modules["base_layer"]
    lora_A: Any = modules["lora_A"]._modules.get(name)
    if (
        getattr(layer, _DISABLED)
        or layer.merged_adapters
        or not layer.cast_input_dtype_enabled
        or type(lora_A) is not nn.Linear
    ):
        return None
    magnitude = None
    if name in layer.lora_variant:
        if not is_dora(layer.lora_variant[name]) or dora_reason(layer, name) is not None:
            return None
        magnitude = magnitude_of(layer, name)
    lora_B: Any = modules["lora_B"]._modules[name]
    dropout: Any = modules["lora_dropout"]._modules[name]
    p = 0.0
    if type(dropout) is nn.Dropout:
        p = dropout.p if dropout.training else 0.0
        if dropout.p >= 1.0:
            return None
    elif type(dropout) is not nn.Identity:
        return None
    for module in (base, lora_A, lora_B, dropout):  # `is_hooked`
        d = module.__dict__
        if (
            d["_forward_hooks"]
            or d["_forward_pre_hooks"]
            or d["_backward_hooks"]
            or d["_backward_pre_hooks"]
            or "_hf_hook" in d
            or "forward" in d
            or "weight" in d  # `sharding`
        ):
            return None
    weight: Any = base._parameters.get("weight")
    a: Any = lora_A._parameters.get("weight")
    b: Any = lora_B._parameters.get("weight")
    for t in (weight, a, b):  # `sharding`, and what `base_kind` calls a wrapper
        if t is None or t.is_meta or hasattr(type(t), "__tensor_flatten__") or hasattr(t, "ds_id"):
            return None
    if type(lora_B) is not nn.Linear:
        return None
    kind = "dense" if type(base).forward is nn.Linear.forward else base_kind(base)
    if kind == "opaque" or (kind == "4bit" and weight.requires_grad):
        return None
    # `Adapter(...)` is one function call more
    return base, kind, tuple.__new__(Adapter, (a, b, layer.scaling[name], p, lora_B._parameters["bias"], magnitude))


def _forward(layer: LoraLayer, x: Tensor, *args, **kwargs) -> Tensor:
    """The adapted layer through fastlora if it can be now, through PEFT otherwise."""
    if type(x) is Tensor and not (args or kwargs or torch.compiler.is_dynamo_compiling() or functorch_is_active()):
        operands = _operands_now(layer)
        if operands is not None and forward_ad._current_level < 0:
            base, kind, adapter = operands
            dtype = base._parameters["weight"].dtype  # type: ignore[union-attr]
            takes_x = x.is_floating_point() if kind == "4bit" else x.dtype == dtype and dtype.is_floating_point
            if takes_x and (adapter.magnitude is None or x.dim() > 1):
                d = layer.__dict__
                calls = d.get(ATTRIBUTE) or calls_of(layer)
                calls.fused += 1
                siblings = None if d["_forward_pre_hooks"] else d.get(SIBLINGS)
                return fused_forward(base, kind, x, adapter, siblings, layer, True)
    return _forward_checked(layer, x, *args, **kwargs)


def _forward_checked(layer: LoraLayer, x: Tensor, *args, **kwargs) -> Tensor:
    """`_forward` for every call that is not the plain one: it finds the reason to run PEFT's forward, if there is one,
    and takes any number of adapters, any base layer and any tracer."""
    if not args and kwargs.keys() == {"adapter_names"} and kwargs["adapter_names"] is not None:
        return mixed_batch(layer, x, RowAdapters(kwargs["adapter_names"]))
    reason = MORE_THAN_X if args or kwargs else why_peft(layer) or _why_not_this_x(layer, x) or transform_without_rule()
    base = layer.__dict__["_modules"]["base_layer"]
    count_call(layer, reason, base)
    if reason is not None:
        return type(layer).theirs.forward(layer, x, *args, **kwargs)  # type: ignore[attr-defined]
    adapters = _adapters(layer)
    if not adapters:
        return base(x)
    d = layer.__dict__
    siblings = None if d["_forward_pre_hooks"] else d.get(SIBLINGS)
    y = adapted_forward(base, x, adapters[0], siblings, layer)
    for a, b, scaling, p, bias, _ in adapters[1:]:  # each with a dropout mask of its own
        y = add_adapter_output(y, x, a, b, scaling, p)
        if bias is not None:
            y = y + (scaling * bias).to(y.dtype)
    return y


def mixed_batch(layer: LoraLayer, x: Tensor, rows: RowAdapters) -> Tensor:
    """What PEFT's layer gives for these ``adapter_names``: through fastlora if it can be, and then it trains too."""
    reason: str | None = why_not_mixed(layer, rows)
    if reason is None:
        reason = _why_not_this_x(layer, x) or transform_without_rule()
    if reason is None and (x.dim() < 2 or len(x) != len(rows.names)):
        reason = f"x {list(x.shape)} is not a batch of {len(rows.names)}"
    base = layer.__dict__["_modules"]["base_layer"]
    count_call(layer, reason, base)
    if reason is not None:
        return type(layer).theirs.forward(layer, x, adapter_names=rows.names)  # type: ignore[attr-defined]
    adapters = {name: _adapter(layer, name) for name in rows.unique if name in layer.lora_A}
    if not adapters:
        return base(x)
    if base_kind(base) == "opaque":
        return _add_by_rows(base(x), x, adapters, rows)
    r = max(each.a.shape[0] for each in adapters.values())
    a = torch.stack([_padded(each.a, 0, r) for each in adapters.values()])
    b = torch.stack([_padded(each.b, 1, r) for each in adapters.values()])
    of_entries = rows.rows({name: float(each.scaling) for name, each in adapters.items()}, a.device)
    return mixed_forward(base, base_kind(base), x, a, b, of_entries, next(iter(adapters.values())).p)


def _add_by_rows(y: Tensor, x: Tensor, adapters: dict[str, Adapter], rows: RowAdapters) -> Tensor:
    """What a base layer made of x, and to each entry of the batch its adapter's output added."""
    for name, (a, b, scaling, p, *_) in adapters.items():
        entries = torch.tensor([i for i, each in enumerate(rows.names) if each == name], device=x.device)
        added = add_adapter_output(y[entries], x[entries], a, b, scaling, p)
        y = y.index_copy(0, entries, added)
    return y


def _padded(t: Tensor, dim: int, r: int) -> Tensor:
    """With zeros up to rank r in this dimension."""
    missing = r - t.shape[dim]
    return t if missing == 0 else F.pad(t, (0, missing) if dim == 1 else (0, 0, 0, missing))


def _why_not_this_x(layer: LoraLayer, x: Any) -> str | None:
    """Why fastlora's ops do not take this x on this base; PEFT's forward then takes it or raises its own error."""
    if type(x) is not Tensor and not torch.compiler.is_compiling():  # torch.export traces with tensors of its own
        return f"x is a {type(x).__name__}, not a plain tensor"
    if not x.is_floating_point():
        return f"x is {x.dtype}"
    if x.dim() == 1 and any(name in layer.lora_variant for name in layer.active_adapters):
        return "x is a vector, of which PEFT's DoRA makes a matrix"
    base = layer.__dict__["_modules"]["base_layer"]
    if base_kind(base) not in ("dense", "transposed") or torch.is_autocast_enabled(x.device.type):
        return None
    dtype = base._parameters["weight"].dtype
    return None if x.dtype == dtype else f"x is {x.dtype}, its base weight {dtype}, and autocast is off"


def _adapters(layer: LoraLayer) -> list[Adapter]:
    """The active adapters, as one where they can be."""
    lora_A = layer.__dict__["_modules"]["lora_A"]._modules
    adapters = [_adapter(layer, name) for name in layer.active_adapters if name in lora_A]
    if len(adapters) > 1 and all(adapter.p == 0.0 and adapter.magnitude is None for adapter in adapters):
        return [_stack(adapters)]
    return adapters


def _adapter(layer: LoraLayer, name: str) -> Adapter:
    """One adapter. The rank is that of the weights: hotswapping may have padded them."""
    modules = layer.__dict__["_modules"]
    a, b = modules["lora_A"]._modules[name]._parameters, modules["lora_B"]._modules[name]._parameters
    dropout = modules["lora_dropout"]._modules[name]
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    magnitude = magnitude_of(layer, name) if name in layer.lora_variant else None
    return Adapter(a["weight"], b["weight"], layer.scaling[name], p, b["bias"], magnitude)


def _stack(adapters: list[Adapter]) -> Adapter:
    """Several adapters without dropout are one of the summed rank: stack the a's and the s·b's."""
    a = torch.cat([adapter.a for adapter in adapters])
    b = torch.cat([adapter.b * adapter.scaling for adapter in adapters], dim=1)
    biases = [adapter.scaling * adapter.bias for adapter in adapters if adapter.bias is not None]
    return Adapter(a, b, 1.0, 0.0, torch.stack(biases).sum(0) if biases else None)


# Where a patched layer keeps its `Siblings`. A layer with pre-hooks does not use them: it may be sharded by itself, and
# its weights are then gathered for its own forward and backward only.
SIBLINGS = "_fastlora_siblings"


def _operands(layer: LoraLayer, x: Tensor) -> tuple[nn.Module, Adapter] | None:
    """The base layer and the adapter, for a block that computes several layers as one; None if this layer has to run by
    itself now."""
    if is_hooked(layer):
        return None
    operands = _operands_now(layer)
    if operands is not None:
        return operands[0], operands[2]
    if why_peft(layer) is not None:
        return None
    adapters = _adapters(layer)
    return (layer.__dict__["_modules"]["base_layer"], adapters[0]) if len(adapters) == 1 else None


def _ours(theirs: type) -> type:
    """A subclass of a layer of PEFT's that is computed by fastlora and prints as PEFT's."""
    methods = {
        "__module__": __name__,
        "__doc__": f"`peft.tuners.lora.{theirs.__name__}` computed by fastlora.",
        "theirs": theirs,
        "forward": _forward,
        "operands": _operands,
        "operands_now": _operands_now,
        "_get_name": lambda self: theirs.__name__,
    }
    return type(f"Fast{theirs.__name__}", (theirs,), methods)


FastLinear = _ours(PeftLinear)
OUR_LAYERS: dict[type, type] = {PeftLinear: FastLinear}

# Of bases that compute their own output, but for the first: the adapter is added to it. Each is there if PEFT's module
# defines it, which most do only where the package that quantises is installed.
QUANTISED = {
    "Linear4bit": "bnb",
    "Linear8bitLt": "bnb",
    "TorchaoLoraLinear": "torchao",
    "GPTQLoraLinear": "gptq",
    "AwqLoraLinear": "awq",
    "HqqLoraLinear": "hqq",
    "EetqLoraLinear": "eetq",
    "AqlmLoraLinear": "aqlm",
}
for _name, _module in QUANTISED.items():
    try:
        _theirs = getattr(import_module(f"peft.tuners.lora.{_module}"), _name, None)
    except ImportError:
        _theirs = None
    if _theirs is not None:
        # By name, so that a patched model can be pickled
        OUR_LAYERS[_theirs] = globals()[f"Fast{_name}"] = _ours(_theirs)
