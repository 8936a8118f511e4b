"""Why a layer of PEFT's runs its own forward instead of fastlora's: reasons in words, for reports and warnings."""

from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastlora.base_layers import base_kind, is_hooked, sharding
from fastlora.calls import calls_of
from fastlora.fourbit import is_4bit
from fastlora.row_adapters import RowAdapters

DISABLED, MERGED = "its adapters are disabled", "its adapters are merged"
MORE_THAN_X = "it was called with more than x and adapter_names"
ASKED_FOR = (DISABLED, MERGED, MORE_THAN_X)  # the user chose these: no warning


def count_call(layer: LoraLayer, reason: str | None, base: nn.Module | None = None) -> None:
    """Count an eager call: of PEFT's forward for this reason, or of fastlora, which may add to what a base computes."""
    if torch.compiler.is_compiling():
        return
    calls = calls_of(layer)
    if reason is None:
        calls.ran("dense" if base is None else base_kind(base))
    else:
        calls.falls_back(reason, reason in ASKED_FOR)


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
    if (reason := base_reason(base)) is not None:
        return reason
    for name in layer.active_adapters:
        if name in modules["lora_A"]._modules and (reason := adapter_reason(layer, name)) is not None:
            return reason
    return None


def why_not_mixed(layer: LoraLayer, rows: RowAdapters) -> str | None:
    """Why the rows of a batch, each with its own adapter, go through PEFT's forward of this layer."""
    modules = layer.__dict__["_modules"]
    base, dropped = modules["base_layer"], set()
    if layer.disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    if (reason := base_reason(base)) is not None:
        return reason
    weight = base._parameters.get("weight")
    if weight is not None and weight.requires_grad:
        return "its base weight trains"
    for name in rows.unique:
        if name not in modules["lora_A"]._modules:
            continue
        if (reason := adapter_reason(layer, name)) is not None:
            return reason
        if name in layer.lora_variant or modules["lora_B"]._modules[name]._parameters["bias"] is not None:
            return f"adapter {name!r} is of DoRA or has lora_bias, and is one of several in a batch"
        dropout = modules["lora_dropout"]._modules[name]
        dropped.add(dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0)
    several = len(dropped) > 1 and base_kind(base) != "opaque"
    return "the adapters of one batch have several dropouts" if several else None


def base_reason(base: nn.Module) -> str | None:
    reason = sharding(base)
    if is_hooked(base):
        if reason is not None:
            return "its base layer is sharded by itself, through hooks that only run when it is called"
        return "its base layer has hooks, which only run when it is called"
    weight = base.__dict__["_parameters"].get("weight")
    if reason is None and weight is not None and weight.requires_grad and is_4bit(weight):
        return "its base weight requires grad and is in 4 bits"
    return reason and f"its base weight is {reason}"


def adapter_reason(layer: LoraLayer, name: str) -> str | None:
    """Why this adapter needs PEFT's own forward."""
    modules = layer.__dict__["_modules"]
    if name in layer.lora_variant:
        if not is_dora(layer.lora_variant[name]):
            return f"adapter {name!r} is not LoRA or DoRA ({type(layer.lora_variant[name]).__name__})"
        if (reason := dora_reason(layer, name)) is not None:
            return reason
    for part in ("lora_A", "lora_B"):
        if (reason := linear_reason(part, modules[part]._modules[name], name)) is not None:
            return reason
    dropout = modules["lora_dropout"]._modules[name]
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p >= 1.0):
        return f"dropout of adapter {name!r} is {dropout}"
    if is_hooked(dropout):
        return f"dropout of adapter {name!r} has hooks, which only run when it is called"
    return None


def linear_reason(part: str, module: nn.Module, name: str) -> str | None:
    """`part_reason` of a part that has to be a plain linear layer."""
    if type(module) is not nn.Linear:
        return f"{part} of adapter {name!r} is a {type(module).__name__}, not a plain nn.Linear"
    return part_reason(part, module, name)


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


def dora_reason(layer: LoraLayer, name: str) -> str | None:
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


def magnitude_of(layer: LoraLayer, name: str) -> Tensor:
    return layer.__dict__["_modules"]["lora_magnitude_vector"]._modules[name]._parameters["weight"]
