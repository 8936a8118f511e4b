"""What the cost model says: the least work of a layer, which every implementation has to do, and the plans and tiles
of a model's layers on a GPU that need not be there."""

from collections.abc import Iterator
from typing import Any

from fastlora import costs, plans
from fastlora.benchmarks.cases.modules import Case
from fastlora.benchmarks.cases.shapes import Shape
from fastlora.costs import Problem, Rates
from fastlora.kernels.limits import cdiv


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


# A device's name, its architecture, and the tokens for which its plans are listed
GPUS = {"NVIDIA H100": "sm_90", "NVIDIA A100": "sm_80"}
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def planned(device: str, shape: Shape, r: int = 16) -> Iterator[dict[str, Any]]:
    """By which plan and tile each layer of a block is computed on this device, and why.

    ``busy`` is the share of its multiprocessors that have a tile to work on, over all waves; it matters where a product
    is not bound by memory.
    """
    from fastlora.kernels import tiles

    rates = costs.modelled(device)
    tiles.force_family(GPUS[device])
    try:
        for M in TOKENS:
            for N, K in dict.fromkeys(shape.linears().values()):
                c = Problem(M, N, K, r)
                found = {plan: costs.predict("lora_matmul", plan, c, rates) for plan in plans.PLANS["lora_matmul"]}
                plan = min(found, key=lambda plan: found[plan].seconds)
                tile = tiles.tile(tiles.name_of_matmul(tiles.has_tma(), c.itemsize, False, False), M, N, K)
                count = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
                yield {
                    "M": M, "N": N, "K": K, "plan": plan, "tile": f"{tile.BLOCK_M} x {tile.BLOCK_N}",
                    "busy": count / (cdiv(count, rates.multiprocessors) * rates.multiprocessors),
                    "bound": found["tail"].bound, "seconds": found[plan].seconds,
                }  # fmt: skip
    finally:
        tiles.force_family(None)
