"""DoRA: ``y = g ∘ (x wᵀ + s x aᵀ bᵀ) + bias`` with ``g = m / ‖w + s b a‖``, a trained magnitude m for each row of w.

The norm of a row is constant in the gradient, as in the paper and in PEFT. It is computed without the sum [N, K]:
``‖w + s b a‖² = ‖w‖² + 2 s b·(w aᵀ) + s² b (a aᵀ)·b`` by row, of which the first term is kept while w is frozen.

Backward needs ``dz = g ∘ dy`` in the place of dy, and for m the sums over rows of ``dy ∘ y / g``: the op `dora_grad`.
Without a bias y is the layer's own output, so it takes no memory of its own.

Source: DoRA, arXiv:2402.09353.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastlora.compat import functorch_is_active, keeps_graph, top_saved_tensors_hooks
from fastlora.fourbit import Weight4bit
from fastlora.ops import overload
from fastlora.products import Weight

shrink = overload("shrink")
nf4_matmul = overload("nf4_matmul")
dora_grad = overload("dora_grad")

ROWS = 256  # of a weight, converted to fp32 at a time
SAMPLES = 16.618  # values of a weight that are compared; not an integer, or they could all be of one column


def column_scale(m: Tensor, norms: Tensor) -> Tensor:
    """``g = m / norms`` in the dtype of norms, 1e-20 where that is zero, by which the backward could not divide."""
    g = m.detach().to(norms.dtype) / norms
    return g.masked_fill_(g == 0, 1e-20)  # a constant: with dynamic shapes a global would be an input of the graph


def row_norms(parameter: Tensor, weight: Weight, a: Tensor, b: Tensor, s: float | Tensor, dtype: torch.dtype) -> Tensor:
    """``‖w + s b a‖`` of every row [N], in fp32 (fp64 for fp64). ``weight`` is read from ``parameter``, and a product
    with one in 4 bits has this dtype.

    Without gradients on a CPU, where tokens are generated one after another, the norms are kept too. They are found
    by comparing values: a and b may change through ``.data``, which counts no version.
    """
    if _is_traced() or torch.is_grad_enabled() or a.device.type != "cpu" or isinstance(s, Tensor):
        with torch.no_grad():
            return _row_norms(parameter, weight, a, b, s, dtype)
    state = _state(parameter, weight), s, dtype
    found = _for_inference.get(a)
    if found is None or found[0] != state or not (torch.equal(found[1], a) and torch.equal(found[2], b)):
        norms = _row_norms(parameter, weight, a, b, s, dtype)
        found = _for_inference[a] = state, a.detach().clone(), b.detach().clone(), norms
    return found[3]


def _row_norms(
    parameter: Tensor, weight: Weight, a: Tensor, b: Tensor, s: float | Tensor, dtype: torch.dtype
) -> Tensor:
    if isinstance(weight, Weight4bit):
        wa = nf4_matmul(a.to(dtype), *weight, None, None, 1.0).t()
    elif weight.stride(1) == 1:
        wa = shrink(weight, a if a.dtype == torch.float64 else a.float(), 1.0)
    else:
        wa = torch.mm(weight, a.to(weight.dtype).t())
    squares = _squares_of(parameter, weight)
    a, b = a.to(squares.dtype), b.to(squares.dtype) * s
    inner = torch.addmm(2 * wa.to(squares.dtype), b, a @ a.t())
    least = squares * torch.finfo(squares.dtype).eps  # what cancels beyond that is rounding
    return torch.maximum(squares + (b * inner).sum(1), least).sqrt_()


_kept: Any = WeakIdKeyDictionary()  # by parameter: its state, and the squared norms of its rows
_for_inference: Any = WeakIdKeyDictionary()  # by a: what the norms were computed from, and the norms


def _is_traced() -> bool:
    """Whether tensors are stand-ins, of which nothing can be kept: for torch.compile, or for torch.func."""
    return torch.compiler.is_compiling() or functorch_is_active()


def _state(parameter: Tensor, weight: Weight) -> tuple:
    """Where the values of a frozen weight are, how often they were changed, and on a CPU a few of them: a change
    through ``.data`` counts no version. (A GPU would have to be waited for.)"""
    values = weight.packed if isinstance(weight, Weight4bit) else parameter
    version = None if values.is_inference() else values._version
    on_cpu = values.device.type == "cpu" and values.is_contiguous()
    some = values.flatten()[:: max(1, int(values.numel() / SAMPLES))].tolist() if on_cpu else None
    return values.data_ptr(), version, values.device, values.dtype, some


def _squares_of(parameter: Tensor, weight: Weight) -> Tensor:
    if _is_traced() or parameter.requires_grad:
        return _squares(weight)
    state = _state(parameter, weight)
    found = _kept.get(parameter)
    if found is None or found[0] != state:
        found = state, _squares(weight)
        if type(found[1]) is Tensor:  # not a fake one
            _kept[parameter] = found
    return found[1]


def _squares(weight: Weight) -> Tensor:
    """``‖w‖²`` by row"""
    w = weight.decode(torch.float32) if isinstance(weight, Weight4bit) else weight
    if w.dtype == torch.float64:
        return w.square().sum(1)
    return torch.cat([rows.float().square().sum(1) for rows in w.split(ROWS)])


def keep_output(ctx: Any, y: Tensor) -> Tensor | None:
    """Keep the output of a Function for its backward; what ``save_for_backward`` is to be given for it.

    It is kept beside the saved tensors, whose check would forbid the model to change it in place, except where they go
    through hooks: to checkpointing, or to memory elsewhere.
    """
    ctx.y = ctx.version = None
    if torch.compiler.is_compiling():  # a graph without changes in place
        return y
    y = y.detach()
    ctx.version = y._version
    if top_saved_tensors_hooks(True) is not None:
        return y
    ctx.y = y
    return None


def kept_output(ctx: Any, saved: Tensor | None) -> Tensor | None:
    """In backward: the output, None if it was changed since."""
    y = saved if ctx.y is None else ctx.y
    if torch.compiler.is_compiling():
        return y
    if not keeps_graph():
        ctx.y = None
    return y if y is not None and y._version == ctx.version else None


def through_scale(
    dy: Tensor, y: Tensor | None, m: Tensor, norms: Tensor, need_dm: bool
) -> tuple[Tensor, Tensor | None]:
    """``dz = g ∘ dy`` and dm, for 2-D dy and the output y before the bias."""
    g = column_scale(m, norms)
    if not need_dm or y is None:
        return (dy * g).to(dy.dtype), None
    dz, dscale = dora_grad(dy, y, g)
    return dz, (dscale / norms).to(m.dtype)
