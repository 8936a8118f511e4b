"""The whole package in plain torch: what every op computes, and nothing about how.

    xa  = s · drop(x) aᵀ            [M, r]
    y   = x wᵀ + bias + xa bᵀ       [M, N]
    dxa = s · dy b                  [M, r]
    dx  = dy w + D ∘ (dxa a)        [M, K]
    da  = dxaᵀ drop(x)              [r, K]
    db  = dyᵀ xa                    [N, r]

``x[M,K] w[N,K] a[r,K] b[N,r] y[M,N] bias[N]``, ``s`` the adapter's scaling, ``D`` the scaled dropout mask.
Each function has the signature of the op of the same name in ``torch.ops.fastlora``, but for `decode_4bit`; products
with 4-bit weights are those with the decoded weight. Given fp64 tensors it is the truth that tests and benchmarks
compare with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DROPOUT_LEVELS = 1 << 16  # a keep decision takes 16 random bits, so p is resolved to 1/65536
PHILOX_ROUNDS = 7  # the fewest that pass BigCrush, in the paper below


def dropout_mask(M: int, K: int, p: float, seed: Tensor) -> Tensor:
    """-1 (all bits set) where dropout keeps an element, 0 where it drops it: ``int16[M, K]``, a pure function of the
    seed and the element, the same on every device.

    Element (m, k) is lane ``k % 8`` of ``philox(seed, (k // 8, m, 0, 0))``: each of its four words gives two lanes of
    16 bits, the low half first. It is kept if its lane is at least ``p * 2**16``. Nothing stores this mask: backward
    draws it again.

    Source: Philox4x32, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    seed = seed.reshape(())
    k = torch.arange((K + 7) // 8, device=seed.device)[None]
    m = torch.arange(M, device=seed.device)[:, None]
    words = philox(seed, k, m, torch.zeros_like(k), torch.zeros_like(k))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (lanes >= _dropped_levels(p)).to(torch.int16).neg_().flatten(1)[:, :K]


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32: four words of 32 random bits (as int64) for a 64-bit seed and four broadcastable counter words."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((product1 >> 32) & low) ^ c1 ^ key0, ((product0 >> 32) & low) ^ c3 ^ key1
        c1, c3 = product1 & low, product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _dropped_levels(p: float) -> int:
    return min(round(p * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)


def dropout_scale(p: float) -> float:
    """``1 / P(keep)``, with the probability that ``dropout_mask`` really has."""
    return DROPOUT_LEVELS / (DROPOUT_LEVELS - _dropped_levels(p))


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``D ∘ x``, as ``torch.nn.functional.dropout(x, p)`` with the mask drawn from ``seed``."""
    if p == 0.0:
        return x
    assert seed is not None
    return x * (dropout_mask(x.shape[0], x.shape[1], p, seed).to(x.dtype) * -dropout_scale(p))


def shrink(x: Tensor, a: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s * dropout(x, p) @ a.T``"""
    return s * (dropout(x, p, seed) @ a.to(x.dtype).T)


def lora_matmul(
    x: Tensor, w: Tensor, xa: Tensor, b: Tensor, bias: Tensor | None = None, p: float = 0.0, seed=None, scale=None
) -> Tensor:
    """``x @ w.T + bias + dropout(xa @ b.T, p)``: forward with ``p = 0``, dx with ``w.T`` and ``a.T`` for w and b. The
    columns of a DoRA layer are multiplied by ``scale``."""
    y = x @ w.to(x.dtype).T + dropout(xa @ b.to(x.dtype).T, p, seed)
    y = y if bias is None else y + bias.to(x.dtype)
    return y if scale is None else y * scale.to(x.dtype)


def lora_grad(
    dy: Tensor, x: Tensor, b: Tensor, xa: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``dxa, da, db``; ``b`` also gives the dtype of da and db."""
    dxa = s * (dy @ b.to(dy.dtype))
    return dxa, (dxa.T @ dropout(x, p, seed)).to(b.dtype), (dy.T @ xa).to(b.dtype)


def dora_grad(dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``dz, dscale`` of ``y = scale * z``"""
    return dy * scale, (dy * y / scale).sum(0)


def shrink_group(x: Tensor, a, s, p, seed) -> list[Tensor]:
    """``[shrink(x, a_i, s_i, p_i, seed_i) for ...]``"""
    return [shrink(x, *adapter) for adapter in zip(a, s, p, seed, strict=True)]


def lora_matmul_group(x, w, xa, b, p, seed) -> Tensor:
    """``sum(lora_matmul(x_i, w_i, xa_i, b_i, None, p_i, seed_i) for ...)``"""
    parts = zip(x, w, xa, b, p, seed, strict=True)
    products = [lora_matmul(x_i, w_i, xa_i, b_i, None, p_i, seed_i) for x_i, w_i, xa_i, b_i, p_i, seed_i in parts]
    return torch.stack(products).sum(0)


def lora_grad_a(dxa: Tensor, x: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``dxa.T @ dropout(x, p)``"""
    return dxa.T @ dropout(x, p, seed)


def rows_of_experts(offs: Tensor) -> list[tuple[int, slice]]:
    """Each expert and its rows, which end before row ``offs[expert]``."""
    ends = [0, *offs.tolist()]
    return [(e, slice(ends[e], ends[e + 1])) for e in range(len(ends) - 1)]


def shrink_experts(x: Tensor, a: Tensor, offs: Tensor, s: float, p: float = 0.0, seed=None) -> Tensor:
    """``s * dropout(x, p) @ a[e].T`` for the rows of each expert e"""
    x, xa = dropout(x, p, seed), x.new_zeros(x.shape[0], a.shape[1])
    for e, rows in rows_of_experts(offs):
        xa[rows] = s * (x[rows] @ a[e].to(x.dtype).T)
    return xa


def lora_matmul_experts(
    x: Tensor, w: Tensor, xa: Tensor, b: Tensor, offs: Tensor, bias=None, p=0.0, seed=None
) -> Tensor:
    """``x @ w[e].T + bias[e] + dropout(xa @ b[e].T, p)`` for the rows of each expert e"""
    y, adapted = x.new_zeros(x.shape[0], w.shape[1]), x.new_zeros(x.shape[0], w.shape[1])
    for e, rows in rows_of_experts(offs):
        y[rows] = x[rows] @ w[e].to(x.dtype).T + (0 if bias is None else bias[e].to(x.dtype))
        adapted[rows] = xa[rows] @ b[e].to(x.dtype).T
    return y + dropout(adapted, p, seed)


def lora_grad_experts(dxa: Tensor, x: Tensor, offs: Tensor, p: float = 0.0, seed=None) -> Tensor:
    """``dxa.T @ dropout(x, p)`` for the rows of each expert"""
    x = dropout(x, p, seed)
    return torch.stack([dxa[rows].T @ x[rows] for _, rows in rows_of_experts(offs)])


def combine_experts(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """``(weights[..., None] * rows[index]).sum(1)``: of each token, what its experts made of it"""
    return (rows[index] if weights is None else rows[index] * weights[..., None].to(rows.dtype)).sum(1)


def activate(gate: Tensor, activation: str) -> Tensor:
    """``act(gate)`` of a gated MLP, for one of `fastlora.kernels.limits.ACTIVATIONS`."""
    if activation == "silu":
        return F.silu(gate)
    if activation == "quick_gelu":
        return gate * torch.sigmoid(1.702 * gate)
    if activation in ("relu", "relu2"):
        return F.relu(gate) if activation == "relu" else F.relu(gate).square()
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def halves(z: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of a layer that gives both side by side: views of its output."""
    one, other = z.chunk(2, dim=-1)
    return (one, other) if gate_first else (other, one)


def swiglu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """``act(gate) * up``, or ``act(gate)`` without up"""
    return activate(gate, activation) * (1 if up is None else up)


def merge(w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """``w + s * b @ a``, the weight whose plain matmul is the adapted layer (p = 0)."""
    return w + s * (b.to(w.dtype) @ a.to(w.dtype))


def lora_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float, bias: Tensor | None = None, p: float = 0.0, seed=None
) -> Tensor:
    """The layer: ``linear(x, w, bias) + s * linear(linear(dropout(x), a), b)`` for 2-D ``x``."""
    return lora_matmul(x, w, shrink(x, a, s, p, seed), b, bias)


def decode_4bit(packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, N: int, K: int) -> Tensor:
    """Decode bitsandbytes' 4-bit format to ``fp32[N, K]``: ``code[nibble] * absmax[flat index // blocksize]``.

    Bytes hold the even element in the high nibble; blocks run over the flat tensor, so they may cross rows.
    Source: bitsandbytes' ``quantize_4bit`` (QLoRA, arXiv:2305.14314).
    """
    packed = packed.view(torch.uint8).flatten()
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: N * K].long()
    blocks = torch.arange(N * K, device=packed.device) // blocksize
    return (code[nibbles] * absmax.float()[blocks]).view(N, K)


def decode_absmax(absmax: Tensor, code: Tensor, absmax2: Tensor, blocksize2: int, offset: Tensor) -> Tensor:
    """Decode nested statistics (double quantisation): ``code[absmax_u8] * absmax2[i // blocksize2] + offset``."""
    blocks = torch.arange(absmax.numel(), device=absmax.device) // blocksize2
    return code[absmax.long()] * absmax2[blocks] + offset
