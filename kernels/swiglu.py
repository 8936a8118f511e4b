"""``h = act(gate) * up`` of a gated MLP, and a backward that recomputes h instead of having saved it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import ACTIVATIONS, cdiv
from fastlora.kernels.operands import check_operands
from fastlora.kernels.tiles import Tile, tile


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """``act(x), act'(x)`` in fp32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "quick_gelu":
        sigmoid = tl.sigmoid(1.702 * x)
        value = x * sigmoid
        slope = sigmoid + 1.702 * value * (1.0 - sigmoid)
    elif ACTIVATION == "relu":
        value = tl.where(x <= 0.0, 0.0, x)  # NaN stays NaN
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(x <= 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        cdf = tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh(inner))
        value = x * cdf
        rest = tl.sigmoid(-2.0 * inner)  # 1 - cdf, without its cancellation: the factors after it are large
        slope = cdf + 2.0 * value * rest * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return value, slope


# fmt: off
@triton.jit
def _swiglu_kernel(
    gate_ptr, stride_gm, stride_gk,
    up_ptr, stride_um, stride_uk,  # None: 1
    h_ptr, stride_hm, stride_hk,  # BACKWARD: holds dh, and h afterwards
    M, K,
    ACTIVATION: tl.constexpr, HAS_UP: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid_m, pid_k = tl.program_id(0) // blocks_k, tl.program_id(0) % blocks_k
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    offs_k = (pid_k * BLOCK_K + tl.arange(0, BLOCK_K))[None, :].to(tl.int64)
    mask = (offs_m < M) & (offs_k < K)
    gate_ptrs = gate_ptr + offs_m * stride_gm + offs_k * stride_gk
    h_ptrs = h_ptr + offs_m * stride_hm + offs_k * stride_hk
    value, slope = _activation(tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    h = value
    if HAS_UP:
        up_ptrs = up_ptr + offs_m * stride_um + offs_k * stride_uk
        up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
        h = value * up
    if BACKWARD:
        dh = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_UP:
            tl.store(up_ptrs, (dh * value).to(up_ptr.dtype.element_ty), mask=mask)
            dh *= up
        tl.store(gate_ptrs, (dh * slope).to(gate_ptr.dtype.element_ty), mask=mask)
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """``act(gate) * up``, or ``act(gate)`` without up: [M, K], rounded once."""
    h = torch.empty_like(gate)
    _launch(gate, up, h, activation, backward=False)
    return h


def swiglu_backward_(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> None:
    """In one pass and in place: ``gate <- dgate``, ``up <- dup``, and ``dh <- h``, which the next layer's da needs."""
    _launch(gate, up, dh, activation, backward=True)


def _launch(gate: Tensor, up: Tensor | None, h: Tensor, activation: str, backward: bool) -> None:
    launch = _prepare(*layouts(gate, up, h), activation, backward, tile("swiglu", gate.shape[1]))
    if gate.numel():
        launch(gate_ptr=gate, up_ptr=up, h_ptr=h)


@cached_by_layout
def _prepare(gate: Layout, up: Layout | None, h: Layout, activation: str, backward: bool, t: Tile) -> Launch:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    M, K = gate.shape
    check_operands(gate, up=(up, (M, K)), dh=(h, (M, K)))
    (stride_um, stride_uk) = (0, 0) if up is None else up.stride
    return Launch(
        _swiglu_kernel, (cdiv(M, t.BLOCK_M) * cdiv(K, t.BLOCK_K),),
        stride_gm=gate.stride[0], stride_gk=gate.stride[1], stride_um=stride_um, stride_uk=stride_uk,
        stride_hm=h.stride[0], stride_hk=h.stride[1], M=M, K=K,
        ACTIVATION=activation, HAS_UP=up is not None, BACKWARD=backward, **t.kwargs(),
    )  # fmt: skip
