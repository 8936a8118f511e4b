"""Dropout that stores no mask: whether x[m, k] is kept is a pure function of (seed, m, k).

    keep[m, k] = lane(k % 8) of Philox4x32-7(counter = (k // 8, m, 0, 0), key = seed)  >=  round(65536 p)
    D[m, k]    = keep[m, k] * 65536 / (65536 - round(65536 p))

One Philox call gives four 32-bit words, two lanes of 16 bits each: lane j is the low half of word j // 2 if j is even,
its high half if j is odd. Seven rounds pass the usual batteries of tests (Salmon et al., SC 2011). Every device and the
reference draw this mask, so a layer can run forward on one and backward on another.
"""

import triton
import triton.language as tl

LEVELS = 1 << 16  # p is resolved to 1/65536


def dropped_levels(p: float) -> int:
    """How many of the 65536 values of a lane drop an element."""
    return min(round(p * LEVELS), LEVELS - 1)


def dropout_scale(p: float) -> float:
    """``1 / P(keep)``, with the probability that the mask really has."""
    return LEVELS / (LEVELS - dropped_levels(p))


@triton.jit
def keep_mask(seed, offs_m, start_k, dropped, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """``keep[offs_m, start_k : start_k + BLOCK_K]``, a boolean tile; start_k and BLOCK_K are multiples of 8."""
    group = start_k // 8 + tl.arange(0, BLOCK_K // 8)
    c0 = tl.broadcast_to(group[None, :], BLOCK_M, BLOCK_K // 8).to(tl.uint32)
    c1 = tl.broadcast_to(offs_m[:, None], BLOCK_M, BLOCK_K // 8).to(tl.uint32)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes count 0, 1, 2, 3
    keep = tl.join((words & 0xFFFF) >= dropped, (words >> 16) >= dropped)
    return tl.reshape(keep, BLOCK_M, BLOCK_K)
