"""The cost model that plans are chosen by: what each plan moves and multiplies, launch by launch.

A device of known rates needs for it

    seconds = sum over launches of max(bytes / copy, FLOPs / GEMM rate, instructions / issue rate, launch)

A product of few tiles leaves multiprocessors without work: its share of the GEMM rate is `fastlora.kernels.waves`'.
The bytes of a launch are those of the tensors it reads and writes, each once, as if caches held the rest. FLOPs are
counted with the rank padded as the tensor core takes it. Dropout's mask costs no bytes and is left out.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any, NamedTuple

from fastlora.kernels.limits import PROGRAMS_4BIT, adds_slabs, cdiv, cut, padded_rank, parts_for, ranks_at_once
from fastlora.kernels.waves import Product


@dataclass(frozen=True)
class Problem:
    """One call: ``x[M, K]`` (or dy), ``w[N, K]``, rank r, dropout p; bytes an element of x and of the adapter.

    A call for several adapters at once (a group) has that many ``parts``, and as r the sum of their ranks; of
    ``lora_matmul_group`` K is the sum of theirs too. The parts count as equals. ``blocksize`` is a 4-bit weight's; its
    bytes are counted as of 64.
    """

    M: int
    N: int
    K: int
    r: int
    p: float = 0.0
    itemsize: int = 2
    adapter_itemsize: int = 4
    parts: int = 1
    blocksize: int = 64


@dataclass(frozen=True)
class Rates:
    """What a device does a second. Modelled until ``fastlora tune`` has measured it."""

    copy: float  # bytes read and written by a large copy
    gemm: float  # FLOPs of the vendor's GEMM in half precision
    kernel_gemm: float  # and of the kernel of lora_matmul
    gemm_fp32: float
    kernel_gemm_fp32: float
    issue: float  # instructions, counted for every lane
    launch: float  # seconds that a launch takes however little it does
    multiprocessors: int
    measured: bool = False

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict) -> "Rates":
        """Raises ValueError or TypeError unless every rate is there and positive."""
        rates = cls(**found)
        for field in fields(cls):
            value = getattr(rates, field.name)
            if field.name != "measured" and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")
        return rates


# Copy and GEMM as published measurements of these parts have them; issue is four warps a clock on every multiprocessor.
# Assumed: our GEMM at 95% of the vendor's in half precision, half of it in fp32; 2.5 µs a launch. On a B200 at 70%: the
# sums of the adapter's and the base's product meet in registers, which its tensor core does not add to.
H100 = Rates(2.9e12, 620e12, 0.95 * 620e12, 50e12, 25e12, issue=132 * 128 * 1.7e9, launch=2.5e-6, multiprocessors=132)
H20 = Rates(3.4e12, 125e12, 0.95 * 125e12, 38e12, 19e12, issue=78 * 128 * 1.7e9, launch=2.5e-6, multiprocessors=78)
B200 = Rates(6.5e12, 1400e12, 0.7 * 1400e12, 65e12, 32e12, issue=148 * 128 * 1.8e9, launch=2.5e-6, multiprocessors=148)
A100 = Rates(1.7e12, 250e12, 0.95 * 250e12, 18e12, 9e12, issue=108 * 128 * 1.4e9, launch=2.5e-6, multiprocessors=108)

_RATES = {"H100": H100, "H200": H100, "H800": H100, "H20": H20, "B100": B200, "B200": B200, "B300": B200}


def modelled(device: str) -> Rates:
    """Rates to assume for the device of this name, those of a relative or else of the A100."""
    return next((rates for name, rates in _RATES.items() if name in device), A100)


class LaunchCost(NamedTuple):
    """What one launch of a kernel, the vendor's GEMM or ours, moves and computes."""

    name: str
    bytes: int
    flops: int = 0
    vendor: bool = False
    instructions: int = 0  # beside those of the product, for all lanes
    share: float = 1.0  # of the GEMM rate, which is that of a product of very many tiles

    def times(self, rates: Rates, itemsize: int) -> dict[str, float]:
        """Seconds by what could bind: the largest is the time of the launch."""
        if itemsize == 2:
            gemm = rates.gemm if self.vendor else rates.kernel_gemm
        else:
            gemm = rates.gemm_fp32 if self.vendor else rates.kernel_gemm_fp32
        return {
            "memory": self.bytes / rates.copy,
            "tensor core" if itemsize == 2 else "fp32 units": self.flops / (gemm * self.share),
            "issue": self.instructions / rates.issue,
            "launch": rates.launch,
        }


@dataclass(frozen=True)
class Prediction:
    """What a plan costs; ``bound`` is what binds its longest launch."""

    flops: int
    bytes: int
    seconds: float
    bound: str


def predict(op: str, plan: str, problem: Problem, rates: Rates) -> Prediction:
    """The cost of carrying out an op by a plan (``""`` for an op that has one way)."""
    launches = COSTS[op, plan](problem, rates)
    times = [launch.times(rates, problem.itemsize) for launch in launches]
    longest = max(times, key=lambda time: max(time.values()))
    return Prediction(
        sum(launch.flops for launch in launches),
        sum(launch.bytes for launch in launches),
        sum(max(time.values()) for time in times),
        max(longest, key=lambda bound: longest[bound]),
    )


def _tiles() -> Any:
    return import_module("fastlora.kernels.tiles")  # which needs Triton


def _tile(kernel: str, c: Problem, size: int):
    return _tiles().tile(kernel if c.itemsize == 2 else f"{kernel} fp32", size)


def padded(r: int) -> int:
    """A rank, or a number of tokens, as the tensor core takes it."""
    return padded_rank(r) if r else 0


def _cut(length: int, step: int, blocks: int, programs: int, rates: Rates) -> tuple[int, int]:
    """How long the parts are into which the kernels cut a reduction, for so many programs a multiprocessor, and how
    many there are."""
    return cut(length, step, parts_for(programs * rates.multiprocessors, blocks, length, step))


def _sum_bytes(splits: int, numel: int, itemsize: int) -> int:
    """Writing a sum, and where a reduction is split its fp32 parts, which the last programs of the launch read back."""
    return numel * (itemsize if splits == 1 else itemsize + 8 * splits)


def packed_bytes(c: Problem) -> int:
    """A 4-bit weight with nested statistics, in blocks of 64 weights and of 256 scales; code books are not counted."""
    weights = c.N * c.K
    blocks = cdiv(weights, 64)
    return cdiv(weights, 2) + blocks + 4 * cdiv(blocks, 256)


def _dots(c: Problem, wide: int) -> int:
    """Products that one with ``wide`` operands of the adapter takes: fp32 is two parts in half precision."""
    return 1 + wide if c.itemsize == 2 and c.adapter_itemsize == 4 else 1


def _shrink(c: Problem, rates: Rates) -> list[LaunchCost]:
    r, e = c.r // c.parts, c.adapter_itemsize
    R = padded(r)
    t = _tile("shrink", c, R * c.parts)
    blocks = cdiv(c.M, t.BLOCK_M) * cdiv(r, ranks_at_once(r, c.parts))
    _, splits = _cut(c.K, t.BLOCK_K, blocks, 2, rates)
    moved = c.M * c.K * c.itemsize + c.r * c.K * e + _sum_bytes(splits, c.M * c.r, e)
    flops = 2 * c.M * c.K * R * c.parts * _dots(c, 1)
    return [LaunchCost("shrink", moved, flops)]


def _adapter_bytes(c: Problem) -> int:
    return (c.M + c.N) * c.r * c.adapter_itemsize


def _adapter_flops(c: Problem) -> int:
    return 2 * c.M * c.N * padded(c.r // c.parts) * c.parts * _dots(c, 2)


def _tail(c: Problem, rates: Rates) -> list[LaunchCost]:
    moved = (c.M * c.K + c.N * c.K + c.M * c.N) * c.itemsize + _adapter_bytes(c)
    tiles = _tiles()
    kernel = tiles.name_of_matmul(tiles.has_tma(), c.itemsize, c.parts > 1, c.p > 0)

    def clocks(product: Product) -> float:
        t = tiles.tile(kernel, product.M, product.N, product.K)
        return product.clocks(t.BLOCK_M, t.BLOCK_N)

    product = _product(c.M, c.N, c.K, c.itemsize, rates)
    share = product.share(clocks(product), clocks(product.large()))
    return [LaunchCost("lora_matmul", moved, 2 * c.M * c.N * c.K + _adapter_flops(c), share=share)]


def _product(M: int, N: int, K: int, itemsize: int, rates: Rates) -> Product:
    return Product(M, N, K, _tiles().family(), rates.multiprocessors, itemsize)


def _gemm(M: int, N: int, K: int, itemsize: int, moved: int, rates: Rates) -> LaunchCost:
    """A vendor's GEMM."""
    product = _product(M, N, K, itemsize, rates)
    share = product.share(product.vendors_clocks(), product.large().vendors_clocks())
    return LaunchCost("gemm", moved, 2 * M * N * K, vendor=True, share=share)


def _base_last(c: Problem, rates: Rates) -> list[LaunchCost]:
    adapter, K = _adapter_bytes(c) + c.M * c.N * c.itemsize, cdiv(c.K, c.parts)
    base = (c.M * K + c.N * K + 2 * c.M * c.N) * c.itemsize
    gemm = _gemm(c.M, c.N, K, c.itemsize, base, rates)
    return [LaunchCost("lora_matmul", adapter, _adapter_flops(c)), *[gemm] * c.parts]


def _walk(c: Problem, rates: Rates, with_b: bool) -> list[LaunchCost]:
    """A walk down the rows of dy[M, K] (or x): db, and with b also dxa."""
    R, e = padded(c.r), c.adapter_itemsize
    t = _tile("lora_grad", c, min(R, 128))
    slabs, blocks = cdiv(c.K, t.BLOCK_N), cdiv(c.r, min(R, 128))
    rows, splits = _cut(c.M, t.BLOCK_M, slabs * blocks, 2, rates)
    moved = c.M * c.K * c.itemsize + c.M * c.r * e + _sum_bytes(splits, c.K * c.r, e)
    flops = (4 if with_b else 2) * c.M * c.K * R * _dots(c, 1)
    if not with_b:
        return [LaunchCost("lora_grad", moved, flops)]
    moved += c.K * c.r * e
    if slabs == 1 or adds_slabs(slabs, rows, min(R, 128)):
        return [LaunchCost("lora_grad", moved + _sum_bytes(slabs, c.M * c.r, e), flops)]
    parts = 4 * slabs * c.M * c.r
    return [LaunchCost("lora_grad", moved + parts, flops), LaunchCost("sum_splits", parts + c.M * c.r * e)]


def _dora_grad(c: Problem, rates: Rates) -> list[LaunchCost]:
    """A pass over dy[M, K] and y that writes dz, with sums over rows in fp32."""
    t = _tiles().tile("dora_grad", c.K)
    _, splits = _cut(c.M, t.BLOCK_M, cdiv(c.K, t.BLOCK_N), 4, rates)
    return [LaunchCost("dora_grad", 3 * c.M * c.K * c.itemsize + 4 * c.K + _sum_bytes(splits, c.K, 4))]


# Instructions that the compiler spends on one weight at r=16 with fp32 adapters (``fastlora inspect --arch sm_90``).
DECODE, DECODE_MERGED, DECODE_FUSED = 7, 10, 8


def _decode(c: Problem, rates: Rates, merged: bool = False) -> list[LaunchCost]:
    moved, flops = packed_bytes(c) + c.N * c.K * c.itemsize, 0
    if merged:
        moved += c.r * (c.K + c.N) * c.adapter_itemsize
        flops = 2 * c.N * c.K * padded(c.r)
    instructions = (DECODE_MERGED if merged else DECODE) * c.N * c.K
    return [LaunchCost("decode_4bit", moved, flops, instructions=instructions)]


def _merged(c: Problem, rates: Rates) -> list[LaunchCost]:
    moved = (c.M * c.K + c.N * c.K + c.M * c.N) * c.itemsize
    return [*_decode(c, rates, merged=c.r > 0), _gemm(c.M, c.N, c.K, c.itemsize, moved, rates)]


def _decoded(c: Problem, rates: Rates) -> list[LaunchCost]:
    if not c.r:
        return _merged(c, rates)
    dense = min(("tail", "base_last"), key=lambda plan: predict("lora_matmul", plan, c, rates).seconds)
    return [*_decode(c, rates), *_shrink(c, rates), *COSTS["lora_matmul", dense](c, rates)]


def _fused(c: Problem, rates: Rates) -> list[LaunchCost]:
    R = padded(c.r)
    t = _tile("nf4_matmul", c, max(16, c.M, R))
    _, splits = _cut(c.K, t.BLOCK_K, cdiv(c.N, t.BLOCK_N), PROGRAMS_4BIT, rates)
    moved = packed_bytes(c) + c.M * c.K * c.itemsize + c.r * (c.K + c.N) * c.adapter_itemsize
    moved += _sum_bytes(splits, c.M * c.N, c.itemsize)
    flops = 2 * max(16, c.M) * (c.N * c.K + R * (c.K * cdiv(c.N, t.BLOCK_N) + c.N * splits))
    return [LaunchCost("nf4_matmul", moved, flops, instructions=DECODE_FUSED * c.N * c.K)]


COSTS: dict[tuple[str, str], Callable[[Problem, Rates], list[LaunchCost]]] = {
    ("shrink", ""): _shrink,
    ("shrink_group", ""): _shrink,
    ("lora_matmul", "tail"): _tail,
    ("lora_matmul", "base_last"): _base_last,
    ("lora_matmul_group", "tail"): _tail,
    ("lora_matmul_group", "base_last"): _base_last,
    ("lora_grad", "one_pass"): lambda c, rates: _walk(c, rates, with_b=True),
    ("lora_grad", "two_pass"): lambda c, rates: [*_shrink(c, rates), *_walk(c, rates, with_b=False)],
    ("lora_grad_a", ""): lambda c, rates: _walk(c, rates, with_b=False),
    ("decode_4bit", ""): _decode,
    ("decode_4bit", "merged"): lambda c, rates: _decode(c, rates, merged=True),
    ("linear_4bit", "merged"): _merged,
    ("linear_4bit", "decoded"): _decoded,
    ("linear_4bit", "fused"): _fused,
    ("dora_grad", ""): _dora_grad,
    ("swiglu", ""): lambda c, rates: [LaunchCost("swiglu", 3 * c.M * c.K * c.itemsize)],
    ("swiglu_backward_", ""): lambda c, rates: [LaunchCost("swiglu", 6 * c.M * c.K * c.itemsize)],
}
