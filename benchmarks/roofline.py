"""The least work of a layer, which every implementation has to do, and the seconds it takes at a device's rates."""

from fastlora import costs
from fastlora.benchmarks.cases.modules import Case
from fastlora.costs import Problem, Rates


def passes(c: Problem, packed: bool = False) -> list[tuple[float, float]]:
    """The least bytes and FLOPs of the layer's forward and of its backward: every tensor is moved once.

    Forward reads x and w (4-bit if packed) and writes y. Backward reads dy, w and x and writes dx; da and db are small.
    Without an adapter (r = 0) backward needs no x.
    """
    M, N, K, r, i = c.M, c.N, c.K, c.r, c.itemsize
    weight = costs.packed_bytes(c) if packed else N * K * i
    return [
        (M * (K + N) * i + weight, 2 * M * (N * K + r * (N + K))),
        (M * ((2 if r else 1) * K + N) * i + weight, 2 * M * (N * K + 2 * r * (N + K))),
    ]


def seconds(moved: float, flops: float, c: Problem, rates: Rates) -> float:
    """What a pass takes at the rates of a copy and of the vendor's GEMM, whichever is longer."""
    return max(moved / rates.copy, flops / (rates.gemm if c.itemsize == 2 else rates.gemm_fp32))


def least(case: Case, mode: str, adapted: bool, rates: Rates) -> tuple[float, float, float]:
    """The least FLOPs, bytes and seconds of the case's linear layers.

    A checkpointed step's second forward is not among them, nor is what stands between a block's layers.
    """
    total = [0.0, 0.0, 0.0]
    packed = case.base in ("nf4", "fp4")
    for M, N, K in case.sizes:
        c = Problem(M, N, K, case.r if adapted else 0, itemsize=case.dtype.itemsize)
        both = passes(c, packed)
        chosen = {"forward": both[:1], "backward": both[1:], "step": both}[mode]
        for moved, flops in chosen:
            total[0] += flops
            total[1] += moved
            total[2] += seconds(moved, flops, c, rates)
    return total[0], total[1], total[2]
