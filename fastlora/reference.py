"""The whole package in plain torch: what every op computes, and nothing about how.

    xa  = s · drop(x) aᵀ            [M, r]
    y   = x wᵀ + bias + xa bᵀ       [M, N]
    dxa = s · dy b                  [M, r]
    dx  = dy w + D ∘ (dxa a)        [M, K]
    da  = dxaᵀ drop(x)              [r, K]
    db  = dyᵀ xa                    [N, r]

``x[M,K] w[N,K] a[r,K] b[N,r] y[M,N] bias[N]``, ``s`` the adapter's scaling, ``D`` the scaled dropout mask.
Each function has the signature of the op of the same name in ``torch.ops.fastlora``; give it fp64 tensors and it is
the truth the tests and benchmarks compare with.
"""

import torch
from torch import Tensor

DROPOUT_LEVELS = 1 << 15  # a keep decision takes 15 random bits, so p is resolved to 1/32768


def dropout_mask(M: int, K: int, p: float, seed: Tensor) -> Tensor:
    """-1 (all bits set) where dropout keeps an element, 0 where it drops it: ``int16[M, K]``, a pure function of the
    seed, the shape and ``p``.

    Nothing stores this mask: backward draws it again from the seed. One 64-bit word of the generator decides four
    elements, and the comparison is integer arithmetic: on a CPU several times faster than ``torch.bernoulli``.
    """
    generator = torch.Generator(seed.device)
    generator.manual_seed(int(seed))
    words = torch.empty((M * K + 3) // 4, dtype=torch.int64, device=seed.device)
    words.random_(-(1 << 63), None, generator=generator)
    levels = words.view(torch.int16)[: M * K].view(M, K).bitwise_right_shift_(1)  # uniform in [-2^14, 2^14)
    dropped_below = _dropped_levels(p) - DROPOUT_LEVELS // 2
    return torch.rsub(levels, dropped_below - 1).bitwise_right_shift_(15)


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
    x: Tensor, w: Tensor, xa: Tensor, b: Tensor, bias: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """``x @ w.T + bias + dropout(xa @ b.T, p)``: forward with ``p = 0``, dx with ``w.T`` and ``a.T`` for w and b."""
    y = x @ w.to(x.dtype).T + dropout(xa @ b.to(x.dtype).T, p, seed)
    return y if bias is None else y + bias.to(x.dtype)


def lora_grad(
    dy: Tensor, x: Tensor, b: Tensor, xa: Tensor, s: float, p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``dxa, da, db``; ``b`` also gives the dtype of da and db."""
    dxa = s * (dy @ b.to(dy.dtype))
    return dxa, (dxa.T @ dropout(x, p, seed)).to(b.dtype), (dy.T @ xa).to(b.dtype)


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
