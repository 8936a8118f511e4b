"""One adapted linear layer, by everyone who computes it: the providers that are timed against each other."""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastlora import functional, plans, roofline
from fastlora.cases import decoded, random_weight_4bit
from fastlora.fourbit import Weight4bit, weight_4bit
from fastlora.roofline import Problem, Rates

S = 2.0  # lora_alpha / r
PLANS = {
    "bf16": [{"lora_matmul": plan, "lora_grad": "one_pass"} for plan in plans.PLANS["lora_matmul"]]
    + [{"lora_grad": "two_pass"}],
    "nf4": [{"lora_grad": plan} for plan in plans.PLANS["lora_grad"]],
}


@dataclass
class Layer:
    """The tensors that all providers share: fp32 adapters on a frozen bf16 or NF4 weight."""

    x: Tensor
    dy: Tensor
    a: Tensor
    b: Tensor
    base: nn.Module | None  # nn.Linear, bitsandbytes' Linear4bit, or None where bitsandbytes is missing
    weight: Tensor | Weight4bit

    @property
    def dense(self) -> Tensor:
        return self.weight if isinstance(self.weight, Tensor) else decoded(self.weight, self.x.dtype)


def make_layer(base: str, M: int, N: int, K: int, r: int, device: torch.device) -> Layer:
    def new(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (std * torch.randn(shape, device=device)).to(dtype)

    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(new(N, K, std=K**-0.5), requires_grad=False)
    module: nn.Module | None = linear
    weight: Tensor | Weight4bit = linear.weight.detach()
    if base == "nf4":
        module = _quantise(linear)
        weight = random_weight_4bit(N, K, device) if module is None else weight_4bit(module.weight)
    a, b = new(r, K, std=K**-0.5, dtype=torch.float32), new(N, r, std=0.1, dtype=torch.float32)
    x = new(M, K).requires_grad_()
    return Layer(x, new(M, N), a.requires_grad_(), b.requires_grad_(), module, weight)


def _quantise(linear: nn.Linear) -> Any:
    """bitsandbytes' layer of this weight, None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes as bnb

    N, K = linear.weight.shape
    layer = bnb.nn.Linear4bit(
        K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True, device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return layer.to(linear.weight.device)


def frozen(layer: Layer) -> Callable[[], Tensor]:
    """The layer without an adapter: the limit."""
    if layer.base is None:
        raise ModuleNotFoundError("bitsandbytes is not installed")
    return lambda: layer.base(layer.x)  # type: ignore[misc]


def peft(layer: Layer) -> Callable[[], Tensor]:
    """PEFT's own layer, eager; on NF4 with bitsandbytes."""
    if layer.base is None:
        raise ModuleNotFoundError("bitsandbytes is not installed")
    from peft import LoraConfig, get_peft_model

    model: Any = nn.Module()
    model.layer = layer.base
    model.is_loaded_in_4bit = not isinstance(layer.weight, Tensor)  # what PEFT looks at to choose its 4-bit layer
    r = layer.a.shape[0]
    config = LoraConfig(target_modules=["layer"], r=r, lora_alpha=int(S * r))
    adapted: Any = get_peft_model(model, config).base_model.model.layer  # type: ignore[union-attr]
    adapted.lora_A["default"].weight, adapted.lora_B["default"].weight = nn.Parameter(layer.a), nn.Parameter(layer.b)
    layer.base.weight.requires_grad_(False)
    assert adapted.scaling["default"] == S
    layer.a, layer.b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    return lambda: adapted(layer.x)


class _Addmm(Function):
    """The vendor's GEMM, then the adapter added in place; x is all that is saved, and xa computed again."""

    @staticmethod
    def forward(ctx, x, a, b, dense):
        ctx.save_for_backward(x, a, b)
        ctx.dense = dense
        y = x @ dense().t()
        return y.addmm_(x @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=S)

    @staticmethod
    def backward(ctx, dy):
        x, a, b = ctx.saved_tensors
        a_half, b_half = a.to(x.dtype), b.to(x.dtype)
        dxa = dy @ b_half
        dx = (dy @ ctx.dense()).addmm_(dxa, a_half, alpha=S)
        da = (dxa.t() @ x).mul_(S).to(a.dtype)
        db = (dy.t() @ (x @ a_half.t())).mul_(S).to(b.dtype)
        return dx, da, db, None


def addmm(layer: Layer) -> Callable[[], Tensor]:
    """A single autograd Function around the vendor's GEMM and ``addmm_``; on NF4 bitsandbytes decodes."""
    if isinstance(layer.weight, Tensor):
        weight = layer.weight
        return lambda: _Addmm.apply(layer.x, layer.a, layer.b, lambda: weight)
    if layer.base is None:
        raise ModuleNotFoundError("bitsandbytes is not installed")
    from bitsandbytes.functional import dequantize_4bit

    packed: Any = layer.base.weight
    return lambda: _Addmm.apply(layer.x, layer.a, layer.b, lambda: dequantize_4bit(packed.data, packed.quant_state))


def ours(layer: Layer, forced: dict[str, str] | None = None) -> Callable[[], Tensor]:
    """fastlora, by the plan that it chooses or by this one."""

    def run() -> Tensor:
        with plans.use(**forced) if forced else nullcontext():
            return functional._apply(layer.x, layer.weight, layer.a, layer.b, S, None, 0.0)

    return run


def eager(layer: Layer) -> Callable[[], Tensor]:
    """PEFT's arithmetic in three products: its errors are the bar that the others have to pass."""

    def run() -> Tensor:
        update = F.linear(F.linear(layer.x.to(layer.a.dtype), layer.a), layer.b)
        y = F.linear(layer.x, layer.dense)
        return y + (S * update).to(y.dtype)

    return run


def providers(base: str) -> dict[str, tuple[Callable[[Layer], Callable[[], Tensor]], dict[str, str]]]:
    """Name -> (how to make it, plans that are in force while it runs, backward included)."""
    found: dict[str, Any] = {"frozen": (frozen, {}), "peft": (peft, {}), "addmm": (addmm, {}), "ours": (ours, {})}
    for forced in PLANS[base]:
        found["ours " + " ".join(forced.values())] = (ours, forced)
    return found


def step(layer: Layer, forward: Callable[[], Tensor], adapted: bool = True) -> tuple[Tensor, ...]:
    """y, dx and, if there is an adapter, da and db."""
    y = forward()
    leaves = (layer.x, layer.a, layer.b) if adapted else (layer.x,)
    return y, *torch.autograd.grad(y, leaves, layer.dy)


def predicted(c: Problem, base: str, rates: Rates, device: str, backward: bool) -> float:
    """Seconds that the roofline says our layer takes, by the plans that are in force on the device of this name."""
    dy, dx = replace(c, N=0, K=c.N), replace(c, N=c.K, K=c.N)
    matmul, grad = plans.choose("lora_matmul", c, device), plans.choose("lora_grad", dy, device)
    calls = [("shrink", "", c), ("lora_matmul", matmul, c)] if base == "bf16" else [("linear_4bit", "merged", c)]
    if backward and base == "bf16":
        calls += [("lora_matmul", plans.choose("lora_matmul", dx, device), dx)]
    elif backward:
        calls += [("shrink", "", c), ("linear_4bit", "merged", c)]  # the same bytes and FLOPs for dx as for y
    if backward:
        calls += [("lora_grad", grad, dy), ("lora_grad_a", "", c)]
    return sum(roofline.predict(op, plan, problem, rates).seconds for op, plan, problem in calls)


def truth(layer: Layer, weight: Tensor, adapted: bool) -> tuple[Tensor, ...]:
    """The same in fp64."""
    x, a, b = (t.detach().double().requires_grad_() for t in (layer.x, layer.a, layer.b))
    y = x @ weight.double().t()
    if adapted:
        y = y + S * (x @ a.t()) @ b.t()
    return y.detach(), *torch.autograd.grad(y, (x, a, b) if adapted else (x,), layer.dy.double())


def errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Of y, dx, da, db against the truth, relative in the Frobenius norm."""
    return [
        ((ours.double() - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(results, exact, strict=False)
    ]


def inexact(found: list[float], bar: list[float]) -> str | None:
    """Why this must not be timed: further from the truth than eager torch and one rounding of bf16 are. Else None."""
    for name, error, theirs in zip(("y", "dx", "da", "db"), found, bar, strict=False):
        if not error <= 1.5 * theirs + 2**-8:
            return f"error of {name} {error:.1e}, eager torch's is {theirs:.1e}"
    return None
