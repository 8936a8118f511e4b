"""``h = act(gate) * up`` of a gated MLP, and a backward that recomputes h instead of having saved it."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.tiles import tile

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # as F.silu, F.gelu, F.gelu(approximate="tanh")


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
    gate_ptr, stride_gm,
    up_ptr, stride_um,
    h_ptr, stride_hm,  # BACKWARD: holds dh, and h afterwards
    M, K,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid_m, pid_k = tl.program_id(0) // blocks_k, tl.program_id(0) % blocks_k
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    mask = (offs_m < M) & (offs_k < K)
    gate_ptrs, up_ptrs = gate_ptr + offs_m * stride_gm + offs_k, up_ptr + offs_m * stride_um + offs_k
    h_ptrs = h_ptr + offs_m * stride_hm + offs_k
    up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if BACKWARD:
        dh = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(gate_ptrs, (dh * up * slope).to(gate_ptr.dtype.element_ty), mask=mask)
        tl.store(up_ptrs, (dh * value).to(up_ptr.dtype.element_ty), mask=mask)
    tl.store(h_ptrs, (value * up).to(h_ptr.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``act(gate) * up``: [M, K], rounded once. Rows may be strided, columns not."""
    h = gate.new_empty(gate.shape)
    _launch(gate, up, h, activation, backward=False)
    return h


def swiglu_backward_(dh: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> None:
    """In one pass and in place: ``gate <- dgate``, ``up <- dup``, and ``dh <- h``, which the next layer's da needs."""
    _launch(gate, up, dh, activation, backward=True)


def _launch(gate: Tensor, up: Tensor, h: Tensor, activation: str, backward: bool) -> None:
    assert activation in ACTIVATIONS and gate.stride(1) == up.stride(1) == h.stride(1) == 1
    M, K = gate.shape
    if M == 0 or K == 0:
        return
    t = tile("swiglu", K)
    grid = (triton.cdiv(M, t.BLOCK_M) * triton.cdiv(K, t.BLOCK_K),)
    _swiglu_kernel[grid](
        gate, gate.stride(0), up, up.stride(0), h, h.stride(0), M, K,
        ACTIVATION=activation, BACKWARD=backward, **t.kwargs(),
    )  # fmt: skip
