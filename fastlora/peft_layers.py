"""What a patched layer of PEFT computes, and when it runs PEFT's own forward instead.

A patched layer decides at every call what it is: adapters may have been merged, disabled, switched or hooked since.
"""

from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastlora.autograd import transform_without_rule
from fastlora.base_layers import base_kind, is_hooked
from fastlora.calls import ATTRIBUTE, calls_of
from fastlora.compat import attribute, forward_ad, functorch_is_active
from fastlora.fourbit import is_4bit
from fastlora.functional import Adapter, adapted_forward, add_adapter_output, fused_forward

DISABLED, MERGED = "its adapters are disabled", "its adapters are merged"
MIXED_BATCH = "it was called with more than x, such as the adapter_names of a mixed batch"
ASKED_FOR = (DISABLED, MERGED, MIXED_BATCH)  # the user chose these: no warning


def why_peft(layer: LoraLayer) -> str | None:
    """Why this layer runs PEFT's own forward now, or None if it runs fastlora's."""
    modules = layer.__dict__["_modules"]
    base = modules["base_layer"]
    if layer.disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    if not layer.cast_input_dtype_enabled:
        return "input dtype casting is disabled"
    if (reason := _base_reason(base)) is not None:
        return reason
    for name in layer.active_adapters:
        if name in modules["lora_A"]._modules and (reason := _adapter_reason(layer, name)) is not None:
            return reason
    return None


def _base_reason(base: nn.Module) -> str | None:
    reason = sharding(base)
    if is_hooked(base):
        if reason is not None:
            return "its base layer is sharded by itself, through hooks that only run when it is called"
        return "its base layer has hooks, which only run when it is called"
    weight = base.__dict__["_parameters"].get("weight")
    if reason is None and weight is not None and weight.requires_grad and is_4bit(weight):
        return "its base weight requires grad and is in 4 bits"
    return reason and f"its base weight is {reason}"


def _adapter_reason(layer: LoraLayer, name: str) -> str | None:
    """Why this adapter needs PEFT's own forward."""
    modules = layer.__dict__["_modules"]
    if name in layer.lora_variant:
        if not is_dora(layer.lora_variant[name]):
            return f"adapter {name!r} is not LoRA or DoRA ({type(layer.lora_variant[name]).__name__})"
        if (reason := _dora_reason(layer, name)) is not None:
            return reason
    for part in ("lora_A", "lora_B"):
        module = modules[part]._modules[name]
        if type(module) is not nn.Linear:
            return f"{part} of adapter {name!r} is a {type(module).__name__}, not a plain nn.Linear"
        if (reason := part_reason(part, module, name)) is not None:
            return reason
    dropout = modules["lora_dropout"]._modules[name]
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p >= 1.0):
        return f"dropout of adapter {name!r} is {dropout}"
    if is_hooked(dropout):
        return f"dropout of adapter {name!r} has hooks, which only run when it is called"
    return None


def part_reason(part: str, module: nn.Module, name: str) -> str | None:
    """Why the weight of this part of an adapter cannot be read instead of calling the part."""
    if is_hooked(module):
        return f"{part} of adapter {name!r} has hooks, which only run when it is called"
    reason = sharding(module)
    if reason is not None:
        return f"{part} of adapter {name!r} is {reason}"
    if module._parameters.get("weight") is None:
        return f"{part} of adapter {name!r} has a weight that is not a parameter"
    return None


_VARIANTS: Any = import_module("peft.tuners.lora.variants")
_DORA: Any = import_module("peft.tuners.lora.dora")


def is_dora(variant: Any) -> bool:
    """Whether PEFT computes an adapter with this entry of ``lora_variant`` as DoRA of a linear layer."""
    return type(variant) is _VARIANTS.DoraLinearVariant


def _dora_reason(layer: LoraLayer, name: str) -> str | None:
    """Why this adapter, which is of DoRA, needs PEFT's own forward."""
    modules = layer.__dict__["_modules"]
    magnitude, base = modules["lora_magnitude_vector"]._modules.get(name), modules["base_layer"]
    if type(magnitude) is not _DORA.DoraLinearLayer:
        return f"the magnitude of adapter {name!r} is a {type(magnitude).__name__}"
    if (reason := part_reason("the magnitude", magnitude, name)) is not None:
        return reason
    if base_kind(base) == "opaque":
        return f"adapter {name!r} is of DoRA, which needs the weight of its base layer, a {type(base).__name__}"
    lora_B = modules["lora_B"]._modules[name]
    if magnitude.weight.device != lora_B.weight.device:
        return f"the magnitude of adapter {name!r} is not on the device of its lora_B"
    if lora_B.bias is not None:
        return f"adapter {name!r} is of DoRA with lora_bias"
    first = next(each for each in layer.active_adapters if each in modules["lora_A"]._modules)
    return None if name == first else f"adapter {name!r} is of DoRA and not the first of several"


def _magnitude(layer: LoraLayer, name: str) -> Tensor:
    return layer.__dict__["_modules"]["lora_magnitude_vector"]._modules[name]._parameters["weight"]


SHARDED = "sharded now, and fused when it is gathered for a call"


def sharding(module: nn.Module, name: str = "weight") -> str | None:
    """Why the values of this weight of the module are not in a parameter of it."""
    if name in module.__dict__:
        return "in a flat parameter of FSDP1"
    weight = module._parameters.get(name)
    if type(weight).__name__ == "DTensor":
        return SHARDED
    if weight is None:
        return None
    if hasattr(weight, "ds_id"):
        return "sharded by ZeRO-3"
    return "on the meta device (offloaded or sharded): fused once its numbers are here" if weight.is_meta else None


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
        if not is_dora(layer.lora_variant[name]) or _dora_reason(layer, name) is not None:
            return None
        magnitude = _magnitude(layer, name)
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
    return base, kind, Adapter(a, b, layer.scaling[name], p, lora_B._parameters["bias"], magnitude)


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
    reason = MIXED_BATCH if args or kwargs else why_peft(layer) or _why_not_this_x(layer, x) or transform_without_rule()
    base = layer.__dict__["_modules"]["base_layer"]
    if not torch.compiler.is_compiling():
        calls = calls_of(layer)
        if reason is not None:
            calls.falls_back(reason, reason in ASKED_FOR)
        else:
            calls.ran(base_kind(base))
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
    magnitude = _magnitude(layer, name) if name in layer.lora_variant else None
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
        OUR_LAYERS[_theirs] = globals()[f"Fast{_name}"] = _ours(
            _theirs
        )  # by name, so that a patched model can be pickled
