"""What the base layer of an adapted one is, and the weight that fastlora multiplies in its place."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.fourbit import Weight4bit, weight_4bit


def base_kind(base_layer: nn.Module) -> str:
    """``"dense"``, ``"transposed"``, ``"4bit"`` or ``"opaque"``: how `adapted_forward` treats this base layer.

    The weight of transformers' ``Conv1D`` is ``[K, N]``; its transpose, with no copy, is that of a dense layer.
    A subclass counts as what it inherits its forward from, so a layer that redefines forward is left alone. So is one
    whose weight is not a parameter but computed (``torch.nn.utils.parametrize``), or a wrapper of other tensors, as
    torchao's quantised weights are.
    """
    weight = base_layer._parameters.get("weight")
    if weight is None:
        return "opaque"
    if hasattr(type(weight), "__tensor_flatten__") and type(weight).__name__ != "DTensor":  # that is sharded for now
        return "opaque"
    forward = type(base_layer).forward
    if forward is nn.Linear.forward:
        return "dense"
    code = getattr(forward, "__code__", None)  # torch.compile gets comparisons with forward.__qualname__ wrong
    if code is None:
        return "opaque"
    if code.co_qualname == "Linear4bit.forward" and forward.__module__.startswith("bitsandbytes."):
        return "4bit"
    if code.co_qualname == "FalconLinear.forward" and base_layer._parameters["bias"] is not None:
        return "opaque"  # it adds its bias under autocast in another dtype
    return _OF_TRANSFORMERS.get((forward.__module__, code.co_qualname), "opaque")


_OF_TRANSFORMERS = {  # the kinds of other layers that multiply by a weight
    ("transformers.pytorch_utils", "Conv1D.forward"): "transposed",
    ("transformers.models.falcon.modeling_falcon", "FalconLinear.forward"): "dense",
}


def is_hooked(module: Any) -> bool:
    """Whether calling this module runs more than its class's forward: hooks, or a forward set on the instance."""
    d = module.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "_hf_hook" in d
        or "forward" in d
    )


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


def compute_dtype_4bit(layer: Any, x: Tensor) -> torch.dtype:
    if not layer.compute_type_is_set:  # as Linear4bit.forward does at its first call
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return layer.compute_dtype or x.dtype


def weight_4bit_of(layer: Any) -> Weight4bit:
    """The weight of a Linear4bit, after the repairs that its own forward makes: a quant_state that sharding lost is
    restored, and a weight that bitsandbytes repacked for CPU inference is unpacked."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None and layer.quant_state is not None:
        import_module("bitsandbytes.nn.modules").fix_4bit_weight_quant_state_from_module(layer)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # bitsandbytes' own way back: it saves the standard format only
    return weight_4bit(layer.weight)
