"""The work that no implementation of a layer can spare, and the seconds that it takes at the rates of a device."""

from fastlora import costs
from fastlora.benchmarks.cases.modules import Case
from fastlora.costs import Problem, Rates


def passes(c: Problem, packed: bool = False) -> list[tuple[float, float]]:
    """Bytes and FLOPs of forward and of backward that no implementation of the layer can spare: every tensor once.

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
    """FLOPs, bytes and seconds that no implementation of the case's linear layers can spare.

    A checkpointed step's second forward is not among them, nor is what stands between a block's layers.
    """
    total = [0.0, 0.0, 0.0]
    packed = case.base in ("nf4", "fp4")
    for N, K in case.sizes:
        c = Problem(case.M, N, K, case.r if adapted else 0, itemsize=case.dtype.itemsize)
        both = passes(c, packed)
        chosen = {"forward": both[:1], "backward": both[1:], "step": both}[mode]
        for moved, flops in chosen:
            total[0] += flops
            total[1] += moved
            total[2] += seconds(moved, flops, c, rates)
    return total[0], total[1], total[2]
