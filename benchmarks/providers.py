"""The implementations of an adapted layer that are compared, each a provider.

A provider turns a copy of PEFT's adapted module into its own. It raises ImportError if it is not installed, and
`NotApplicable` if it cannot compute the case; both are reported, and neither is dropped silently.
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastlora import plans
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.cases.modules import Case, Subject, blocks
from fastlora.benchmarks.training import copy_sharing_frozen
from fastlora.fourbit import is_4bit


class NotApplicable(ValueError):
    """The provider cannot compute this case. The message says why."""


@dataclass(frozen=True)
class Provider:
    """``make`` changes the adapted module in place, or returns another one.

    Raises ImportError or NotApplicable. ``within`` is entered whenever the module runs, backward included.
    """

    name: str
    label: str
    make: Callable[[Any, Case], nn.Module]
    within: Callable[[], AbstractContextManager] = nullcontext
    adapted: bool = True
    experts: bool = False  # whether it computes experts too

    def build(self, subject: Subject) -> nn.Module:
        if subject.case.verb == "experts" and not self.experts:
            raise NotApplicable("has no experts")
        if not self.adapted:
            return subject.base
        # On a CPU bitsandbytes repacks 4-bit weights that it generates with, in place: a provider has its own.
        repacked = subject.case.verb == "generate" and subject.case.base not in models.DENSE
        copied = copy.deepcopy if repacked and subject.x.device.type == "cpu" else copy_sharing_frozen
        return self.make(copied(subject.adapted), subject.case)


def peft(module: nn.Module, case: Case) -> nn.Module:
    """PEFT's own layers, eager: the baseline, and its errors are the bar for the others'."""
    return module


def fastlora(module: nn.Module, case: Case) -> nn.Module:
    from fastlora.peft import patch

    report = patch(module)
    if report.skipped or report.not_fused or not report.patched:
        raise NotApplicable(f"not everything was patched: {report}")
    return module


def compiled(make: Callable[[Any, Case], nn.Module]) -> Callable[[Any, Case], nn.Module]:
    def make_compiled(module: Any, case: Case) -> nn.Module:
        if case.verb == "generate":
            raise NotApplicable("generate() calls the eager model")
        return torch.compile(make(module, case))  # type: ignore[return-value]

    return make_compiled


class Addmm(Function):
    """The vendor's GEMM, then the adapter added in place; x is all that is saved, and xa computed again."""

    @staticmethod
    def forward(ctx, x, a, b, bias, s, dense):
        ctx.save_for_backward(x, a, b)
        ctx.s, ctx.dense = s, dense
        y = F.linear(x, dense(), bias)
        return y.view(-1, y.shape[-1]).addmm_(_rows(x) @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=s).view_as(y)

    @staticmethod
    def backward(ctx, dy):
        x, a, b = ctx.saved_tensors
        a_half, b_half, rows, dy = a.to(x.dtype), b.to(x.dtype), _rows(x), _rows(dy)
        dxa = dy @ b_half
        dx = (dy @ ctx.dense()).addmm_(dxa, a_half, alpha=ctx.s)
        da = (dxa.t() @ rows).mul_(ctx.s).to(a.dtype)
        db = (dy.t() @ (rows @ a_half.t())).mul_(ctx.s).to(b.dtype)
        return dx.view_as(x), da, db, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def addmm(module: nn.Module, case: Case) -> nn.Module:
    """What the fastest published implementations do without kernels of their own: one Function a layer."""
    _refuse_dropout(case)
    for layer in adapted_layers(module):
        layer.forward = _addmm_forward(layer)
    return module


def _addmm_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    s, bias, dense = layer.scaling["default"], base.bias, dense_weight(base)
    return lambda x: Addmm.apply(x, a, b, bias, s, dense)


def dense_weight(base: Any) -> Callable[[], Tensor]:
    """The layer's weight; a 4-bit one is decoded by bitsandbytes at every call."""
    if not is_4bit(base.weight):
        return lambda: base.weight
    from bitsandbytes.functional import dequantize_4bit

    return lambda: dequantize_4bit(base.weight.data, base.weight.quant_state)


def bitsandbytes(module: nn.Module, case: Case) -> nn.Module:
    """bitsandbytes' Linear4bit and an adapter of two plain linear layers beside it, without PEFT."""
    if case.base not in ("nf4", "fp4"):
        raise NotApplicable("only for 4-bit bases")
    for layer in adapted_layers(module):
        layer.forward = _unfused_forward(layer)
    return module


def _unfused_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    base, s = layer.base_layer, layer.scaling["default"]
    drop, a, b = (part["default"] for part in (layer.lora_dropout, layer.lora_A, layer.lora_B))

    def forward(x: Tensor) -> Tensor:
        y = base(x)
        return y + (s * b(a(drop(x.to(a.weight.dtype))))).to(y.dtype)

    return forward


def torchtune(module: nn.Module, case: Case) -> nn.Module:
    """torchtune's LoRALinear in the place of every layer; its 4-bit weights are of another format."""
    if case.base in ("nf4", "fp4"):
        raise NotApplicable("its 4-bit weights are not bitsandbytes'")
    LoRALinear = importlib.import_module("torchtune.modules.peft").LoRALinear
    for name, layer in [(n, m) for n, m in module.named_modules() if is_adapted(m)]:
        N, K = layer.base_layer.weight.shape
        theirs = LoRALinear(K, N, rank=case.r, alpha=layer.scaling["default"] * case.r, dropout=case.dropout)
        theirs = theirs.to(layer.base_layer.weight.device, case.dtype)  # it wants one dtype for base and adapter
        theirs.weight = layer.base_layer.weight
        with torch.no_grad():
            theirs.lora_a.weight.copy_(layer.lora_A["default"].weight)
            theirs.lora_b.weight.copy_(layer.lora_B["default"].weight)
        module.set_submodule(name, theirs.train(layer.training))
    return module


def unsloth(module: nn.Module, case: Case) -> nn.Module:
    """Unsloth's Functions: one for an MLP, one for every other layer."""
    _refuse_dropout(case)
    theirs = importlib.import_module("unsloth.kernels.fast_lora")
    for layer in adapted_layers(module):
        layer.forward = lambda x, layer=layer: theirs.apply_lora_o(SimpleNamespace(o_proj=layer), x)
    for mlp in blocks(module):
        mlp.forward = lambda x, mlp=mlp: theirs.apply_lora_mlp_swiglu(mlp, x)  # type: ignore[method-assign]
    return module


def liger(module: nn.Module, case: Case) -> nn.Module:
    """PEFT's layers with Liger's SwiGLU between them; it has no adapted linear layer."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    found = list(blocks(module))
    if not found:
        raise NotApplicable("has no adapted linear layer, only what stands between them")
    for mlp in found:
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(  # type: ignore[method-assign]
            functional.liger_swiglu(mlp.gate_proj(x), mlp.up_proj(x))
        )
    return module


def _refuse_dropout(case: Case) -> None:
    if case.dropout:
        raise NotApplicable("has no dropout")


def is_adapted(module: Any) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def adapted_layers(module: nn.Module) -> Iterator[Any]:
    return (m for m in module.modules() if is_adapted(m))


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("frozen", "frozen", peft, adapted=False, experts=True),
        Provider("peft", "PEFT", peft, experts=True),
        Provider("peft+compile", "PEFT, compiled", compiled(peft), experts=True),
        Provider("addmm", "addmm style", addmm),
        Provider("bitsandbytes", "bitsandbytes + adapter", bitsandbytes),
        Provider("torchtune", "torchtune", torchtune),
        Provider("unsloth", "Unsloth", unsloth),
        Provider("liger", "PEFT + Liger", liger),
        Provider("fastlora", "fastlora", fastlora, experts=True),
        Provider("fastlora+compile", "fastlora, compiled", compiled(fastlora), experts=True),
    )
}


def forcing(**forced: str) -> Provider:
    """fastlora by other plans than those it would choose."""
    name = " ".join(["fastlora", *forced.values()])
    return Provider(name, name, fastlora, within=lambda: plans.use(**forced))
