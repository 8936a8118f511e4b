"""The adapted linear layer as a function of tensors, and of a base layer and an adapter."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import autograd, mlp
from fastlora.base_layers import base_kind, compute_dtype_4bit, weight_4bit_of
from fastlora.compat import any_autocast_is_enabled, functorch_is_active, owners
from fastlora.dora import row_norms
from fastlora.fourbit import is_4bit, weight_4bit
from fastlora.mixed_batch import Rows, mixed_linear
from fastlora.siblings import SharedInput, Siblings

_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout_p), lora_A), lora_B)``

    Differentiable (once) in x, lora_A, lora_B, bias and a dense weight. Saves x and [M, r] for backward, and no dropout
    mask: backward draws the same mask again, from a seed that the default generator of x's device gave to forward.

    Args:
        x: ``[..., K]``, floating point. Under autocast it is cast as ``F.linear`` would.
        weight: a dense ``[N, K]`` tensor of x's dtype, which may train, or a frozen bitsandbytes 4-bit weight
            (``Params4bit``, NF4 or FP4) of logical shape ``[N, K]``, which is decoded to x's dtype.
        lora_A, lora_B: ``[r, K]`` and ``[N, r]``, of any floating dtype: fp32 master weights are converted, x is not.
        scaling: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rank-stabilised LoRA.
        bias: ``[N]`` or None.
        dropout_p: probability of zeroing an element of x on the adapter's path, in [0, 1), resolved to 1/65536.

    Returns:
        ``[..., N]`` in x's dtype, under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: a dtype, shape or value is not as above.
        RuntimeError: under forward-mode AD or ``torch.func.vmap``, which have no rule for it.

    Source: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314.
    """
    _check(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    refuse_transforms()
    operand = weight_4bit(weight) if is_4bit(weight) else weight
    return _fused(x, operand, Adapter(lora_A, lora_B, scaling, dropout_p), bias, None, autograd.is_eager())


class Adapter(NamedTuple):
    """``scaling * (linear(linear(dropout(x, p), a), b) + bias)``; of DoRA if it has a magnitude (`fastlora.dora`)."""

    a: Tensor
    b: Tensor
    scaling: float | Tensor
    p: float = 0.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None


def adapted_forward(
    base_layer: Any, x: Tensor, adapter: Adapter, siblings: Siblings | None = None, layer: Any = None
) -> Tensor:
    """``base_layer(x) + adapter(x)``, fused where the base allows it.

    A plain ``nn.Linear``, GPT-2's ``Conv1D`` and a bitsandbytes ``Linear4bit`` are fused; any other base layer computes
    its own output, through its own autograd, and the adapter is added to it (the `opaque` plan). ``layer`` is what has
    the base and the adapter, one of ``siblings``.
    """
    kind = base_kind(base_layer)
    if kind == "opaque":
        return _added_to_base(base_layer, x, adapter)
    return fused_forward(base_layer, kind, x, adapter, siblings, layer, autograd.is_eager())


def fused_forward(
    base_layer: Any,
    kind: str,
    x: Tensor,
    adapter: Adapter,
    siblings: Siblings | None,
    layer: Any,
    eager: bool,
    with_bias: bool = True,
) -> Tensor:
    """`adapted_forward` for a base of this `base_kind`, not an opaque one."""
    if adapter.magnitude is not None and adapter.p != 0.0:
        return _dora_with_dropout(base_layer, kind, x, adapter, eager)
    shared = siblings.share(layer, x) if eager and siblings is not None else None
    bias = base_layer._parameters["bias"] if adapter.bias is None else whole_bias(base_layer, adapter)
    bias = bias if with_bias else None
    if kind == "4bit":
        dtype, compute_dtype = x.dtype, compute_dtype_4bit(base_layer, x)
        if compute_dtype != dtype:
            x = x.to(compute_dtype) if shared is None else shared.converted(x, compute_dtype)
        return _fused(x, weight_4bit_of(base_layer), adapter, bias, shared, eager, base_layer).to(dtype)
    weight, (a, b, scaling, p, _, m) = base_layer._parameters["weight"], adapter
    if kind == "transposed":
        weight = weight.t()
    plain = eager and p == 0.0 and m is None and type(scaling) is float
    plain = plain and not any_autocast_is_enabled() and x.dim() > 1
    if plain and x.shape[-1] == a.shape[1]:  # nothing that `_fused` would do
        return autograd.fused_linear(x, weight, a, b, bias, scaling, 0.0, None, shared, True)  # type: ignore[arg-type]
    return _fused(x, weight, adapter, bias, shared, eager, base_layer)


def mixed_forward(base_layer: Any, kind: str, x: Tensor, a: Tensor, b: Tensor, rows: Rows, p: float) -> Tensor:
    """`fastlora.mixed_batch.mixed_linear` for a base of this `base_kind`, not an opaque one, in the dtype in which that
    computes."""
    if x.shape[-1] != a.shape[-1]:
        raise _wrong_width(x, a[0])
    x, weight, result = product_operands(base_layer, kind, x)
    bias = base_layer._parameters["bias"]
    return mixed_linear(x, weight, a, b, bias, rows, p, new_seed(x, p)).to(result)


def product_operands(base_layer: Any, kind: str, x: Tensor) -> tuple[Tensor, Any, torch.dtype]:
    """x and the weight of a base of this `base_kind`, not an opaque one, in the dtype in which that computes, and the
    dtype of its output: of a 4-bit base that is x's, under autocast too."""
    if kind == "4bit":
        return x.to(compute_dtype_4bit(base_layer, x)), weight_4bit_of(base_layer), x.dtype
    dtype = autocast_dtype(x) or x.dtype
    weight = base_layer._parameters["weight"].to(dtype)
    return x.to(dtype), weight.t() if kind == "transposed" else weight, dtype


def _dora_with_dropout(base_layer: Any, kind: str, x: Tensor, adapter: Adapter, eager: bool) -> Tensor:
    """``base(x) + (g - 1) ∘ (drop(x) wᵀ) + g ∘ (drop(x) aᵀ bᵀ)``, as PEFT has it, with two products instead of three:
    ``base(x - drop(x))`` and the layer without dropout of drop(x)."""
    dropped = F.dropout(x, adapter.p)
    frozen = Adapter(adapter.a.new_empty(0, adapter.a.shape[1]), adapter.b.new_empty(adapter.b.shape[0], 0), 1.0)
    y = fused_forward(base_layer, kind, x - dropped, frozen, None, None, eager)
    return y + fused_forward(base_layer, kind, dropped, adapter._replace(p=0.0), None, None, eager, with_bias=False)


def _fused(
    x: Tensor,
    weight: autograd.Weight,
    adapter: Adapter,
    bias: Tensor | None,
    shared: SharedInput | None,
    eager: bool,
    base_layer: Any = None,
) -> Tensor:
    """`lora_linear` without its checks, except the one that keeps kernels from reading outside their operands. DoRA
    needs the base layer, whose parameter the norms of its rows are kept for."""
    a, b, scaling, p, _, m = adapter
    if x.shape[-1] != a.shape[1]:
        raise _wrong_width(x, a)
    if x.dim() == 1:
        return _fused(x.unsqueeze(0), weight, adapter, bias, None, eager, base_layer).squeeze(0)
    if isinstance(scaling, Tensor):
        b, scaling = b * scaling, 1.0
    seed = new_seed(x, p)
    dtype = autocast_dtype(x)
    compute = autograd.fused_linear
    if dtype is not None:
        x = x.to(dtype) if shared is None else shared.converted(x, dtype)
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
        compute = autograd.without_autocast(compute)
    if m is None:
        return compute(x, weight, a, b, bias, scaling, p, seed, shared, eager)
    norms = adapted_row_norms(base_layer, adapter, x.dtype)
    y = compute(x, weight, a, b, None, scaling, p, seed, shared, eager, m, norms)
    return y if bias is None else y + bias.to(y.dtype)


def adapted_row_norms(base_layer: Any, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """`fastlora.dora.row_norms` of a base layer that is not opaque and its adapter."""
    kind, parameter = base_kind(base_layer), base_layer._parameters["weight"]
    weight = weight_4bit_of(base_layer) if kind == "4bit" else parameter.t() if kind == "transposed" else parameter
    a, b, scaling, *_ = adapter
    return autograd.without_autocast(row_norms)(parameter, weight, a, b, scaling, dtype)


def _added_to_base(base_layer: Any, x: Tensor, adapter: Adapter) -> Tensor:
    """``base_layer(x) + adapter(x)``, in place in the base layer's output if nothing else owns that."""
    a, b, scaling, p, lora_bias, _ = adapter
    y = base_layer(x)
    in_place = False
    if not torch.compiler.is_compiling():  # which cannot trace reference counts
        references = sys.getrefcount(y)
        in_place = has_one_owner(y, references)
    shape = y.shape
    if in_place and y._is_view():  # of the matrix that the base layer's product returned
        y = y._base
    y = add_adapter_output(y, x, a, b, scaling, p, in_place)
    y = y.view(shape) if in_place else y
    return y if lora_bias is None else y + (scaling * lora_bias).to(y.dtype)


def add_adapter_output(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, p: float, in_place: bool = False
) -> Tensor:
    """``y + scaling * linear(linear(dropout(x, p), a), b)`` for the output y of any base layer of the same x."""
    if x.shape[-1] != a.shape[1]:
        raise _wrong_width(x, a)
    if x.dim() == 1:
        return add_adapter_output(y.unsqueeze(0), x.unsqueeze(0), a, b, scaling, p, in_place).squeeze(0)
    if isinstance(scaling, Tensor):
        b, scaling = b * scaling, 1.0
    x = x.to(autocast_dtype(x) or x.dtype)
    return autograd.add_adapter(x, a, b, y, scaling, p, new_seed(x, p), in_place)


def refuse_transforms() -> None:
    """Raise RuntimeError under a transform that would otherwise drop tangents, or fail deep inside."""
    if (transform := autograd.transform_without_rule()) is not None:
        raise RuntimeError(f"fastlora: this is called under {transform}")


def _wrong_width(x: Tensor, a: Tensor) -> ValueError:
    return ValueError(f"x must be [..., {a.shape[1]}] for a layer with so many in_features, got {list(x.shape)}")


def has_one_owner(y: Tensor, references: int) -> bool:
    """Whether the memory of y, a local variable with so many references, can be written: no other tensor, view or graph
    refers to it, such as the base layer that returned y (as its input, a buffer, or saved for its backward)."""
    if type(y) is not Tensor or functorch_is_active():
        return False
    base: Any = y
    if y._is_view():
        base = y._base
        if base._is_view() or not base.is_contiguous() or base.numel() != y.numel() or base.dim() != 2:
            return False
        # A Function that made its output as a view: only the view has its gradient, and the base would lose it.
        if y.grad_fn is not None and (base.grad_fn is None or y.grad_fn.next_functions[0][0] is not base.grad_fn):
            return False
    counts = owners(y)
    alone = references == _REFERENCES and counts == (2 if base is y else 3, 1)
    return alone and y.is_contiguous() and not (base.is_leaf and base.requires_grad)


def _references(make: Callable[[], Tensor]) -> int:
    y = make()
    return sys.getrefcount(y)


_REFERENCES = _references(lambda: torch.empty(0))  # of a local variable that is the only one


def mlp_forward(
    x: Tensor,
    operands: list[tuple[Any, Adapter] | None],
    activation: str,
    gate_first: bool | None = None,
    dropout_p: float = 0.0,
) -> Tensor | None:
    """``down(act(gate(x)) * up(x))`` for (gate, up, down), ``down(act(up(x)))`` for (up, down): bases and adapters.
    ``gate_first`` as in `fastlora.proof.Block`; ``dropout_p`` is of the input of down.

    None if they cannot be computed as one: one is None, or its base layer is opaque, or it `stands_alone`, or they do
    not all compute in one dtype. 4-bit layers compute in their own dtype, whatever that of x; the tensors between them
    then stay in it.
    """
    layers = [operand for operand in operands if operand is not None]
    if len(layers) < len(operands) or any(stands_alone(x, *layer) for layer in layers):
        return None
    if x.shape[-1] != layers[0][1].a.shape[1]:
        raise _wrong_width(x, layers[0][1].a)
    dtypes = {_compute_dtype(base_layer, x) for base_layer, _ in layers}
    if len(dtypes) > 1 or None in dtypes:
        return None
    if x.dim() == 1:
        y = mlp_forward(x.unsqueeze(0), operands, activation, gate_first, dropout_p)
        return None if y is None else y.squeeze(0)
    dtype: Any = dtypes.pop()
    projections = []
    for base_layer, adapter in layers:
        a, b, scaling, p, _, m = adapter
        if isinstance(scaling, Tensor):
            b, scaling = b * scaling, 1.0
        kind = base_kind(base_layer)
        weight: Any = weight_4bit_of(base_layer) if kind == "4bit" else base_layer._parameters["weight"].to(dtype)
        weight = weight.t() if kind == "transposed" else weight
        bias = whole_bias(base_layer, adapter)
        norms = None if m is None else adapted_row_norms(base_layer, adapter, dtype)
        projections.append(mlp.Projection(weight, a, b, bias, scaling, p, new_seed(x, p), m, norms))
    *first, down = projections
    result = mlp.fused_mlp(x.to(dtype), first, down, activation, gate_first, dropout_p)
    return result if autocast_dtype(x) is not None else result.to(x.dtype)


def stands_alone(x: Tensor, base_layer: Any, adapter: Adapter) -> bool:
    """Whether this layer cannot be part of a fused MLP now: its weight trains, or it is of DoRA with a bias or dropout,
    or for a vector x."""
    weight = base_layer._parameters.get("weight")
    if weight is not None and weight.requires_grad:
        return True
    apart = x.dim() == 1 or adapter.p != 0.0 or whole_bias(base_layer, adapter) is not None
    return adapter.magnitude is not None and apart


def _compute_dtype(base_layer: Any, x: Tensor) -> torch.dtype | None:
    """The dtype in which this base layer multiplies x, None if it is opaque or does not take x's dtype."""
    kind, dtype = base_kind(base_layer), autocast_dtype(x)
    if kind == "4bit":
        return compute_dtype_4bit(base_layer, x)
    if kind == "opaque" or (dtype is None and base_layer._parameters["weight"].dtype != x.dtype):
        return None
    return dtype or x.dtype


def whole_bias(base_layer: Any, adapter: Adapter) -> Tensor | None:
    """The base's bias and the adapter's."""
    bias, lora_bias = base_layer._parameters["bias"], adapter.bias
    if lora_bias is None:
        return bias
    return adapter.scaling * lora_bias if bias is None else bias + adapter.scaling * lora_bias


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives the inputs of a linear layer here, or None outside autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in _CASTABLE:
        return torch.get_autocast_dtype(device)
    return None


def new_seed(x: Tensor, p: float) -> Tensor | None:
    """A fresh dropout seed. Drawn by torch's generator, so that checkpointing replays it when it recomputes."""
    return None if p == 0.0 else torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64, device=x.device)


def _check(x, weight, lora_A, lora_B, scaling, bias, dropout_p) -> None:
    for name, t in (("x", x), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor or a bitsandbytes 4-bit weight, got {type(weight).__name__}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    if is_4bit(weight):
        if weight.requires_grad:
            raise ValueError("a 4-bit weight must be frozen: call weight.requires_grad_(False)")
        N, K = weight_4bit(weight).N, weight_4bit(weight).K
    else:
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating point or a bitsandbytes 4-bit weight, got {weight.dtype}")
        if weight.dim() != 2:
            raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
        N, K = weight.shape
        if weight.dtype != x.dtype and autocast_dtype(x) is None:
            raise TypeError(f"x and weight must have one dtype outside autocast, got {x.dtype} and {weight.dtype}")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for a weight [{N}, {K}], got {list(x.shape)}")
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"lora_A must be [r, {K}] for a weight [N, {K}], got {list(lora_A.shape)}")
    r = lora_A.shape[0]
    if r == 0:
        raise ValueError("lora_A must have at least one row: the rank r must be positive")
    if lora_B.dim() != 2 or lora_B.shape != (N, r):
        raise ValueError(f"lora_B must be [{N}, {r}] for a weight [{N}, K] and r={r}, got {list(lora_B.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be [{N}], got {list(bias.shape)}")
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1:
            raise ValueError(f"scaling must be one number, got a tensor {list(scaling.shape)}")
    elif isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise TypeError(f"scaling must be a number or a one-element tensor, got {type(scaling).__name__}")
    elif not is_finite_number(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    check_dropout(dropout_p)


def check_dropout(p: float) -> None:
    if not isinstance(p, int | float) or not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p!r}")


def is_finite_number(value: Any) -> bool:
    """Whether it is an integer or a float, no bool, that a finite float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
