"""Which of several ways an op is carried out on a GPU. Every plan of an op computes the same and passes the same tests.

| op          | plan      | what it does                                          | what it costs                    |
|-------------|-----------|-------------------------------------------------------|----------------------------------|
| lora_matmul | tail      | the adapter's product and the base's in one kernel    | our GEMM instead of the vendor's |
|             | base_last | the vendor's GEMM accumulates into the adapter's      | y written and read once more     |
| lora_grad   | one_pass  | dxa and db in one read of dy                          | partial sums of dxa              |
|             | two_pass  | dxa, then db                                          | a second read of dy              |
| linear_4bit | merged    | decode with the adapter added, then the vendor's GEMM | the weight written and read once |
|             | decoded   | decode, then as lora_matmul                           | the same, and xa                 |
|             | fused     | decode inside the product                             | decoding in every row of tiles   |

A plan is, in this order: forced by `use`, measured (an entry of `MEASURED`), or by the rule of its op, which follows
from counting bytes and FLOPs. Nothing is measured behind a caller's back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

PLANS = {
    "lora_matmul": ("tail", "base_last"),
    "lora_grad": ("one_pass", "two_pass"),
    "linear_4bit": ("merged", "decoded", "fused"),
}


@dataclass(frozen=True)
class Problem:
    """One call: ``x[M, K]`` (or dy), ``w[N, K]``, rank r, dropout p, bytes an element of x."""

    M: int
    N: int
    K: int
    r: int
    p: float = 0.0
    itemsize: int = 2
    intensity: float = 150.0  # FLOPs that the device does in the time of moving one byte

    @property
    def bucket(self) -> int:
        """M rounded up to a power of two: problems that share a measured plan."""
        return 1 << max(0, self.M - 1).bit_length()


# (device name, op, bucket of M, N, K, r) -> plan
MEASURED: dict[tuple[str, str, int, int, int, int], str] = {}

_forced: ContextVar[dict[str, str]] = ContextVar("forced", default={})  # noqa: B039  (never changed in place)


@contextmanager
def use(**plans: str) -> Iterator[None]:
    """Force plans within this context: ``with plans.use(lora_matmul="base_last"): ...``

    Raises ValueError for an op or a plan that does not exist.
    """
    for op, plan in plans.items():
        if plan not in PLANS.get(op, ()):
            known = ", ".join(f"{op}={plan}" for op, names in PLANS.items() for plan in names)
            raise ValueError(f"plan must be one of {known}, got {op}={plan}")
    token = _forced.set(_forced.get() | plans)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: str, problem: Problem, device: str = "") -> str:
    """The plan for this problem on the device of this name."""
    forced = _forced.get().get(op)
    if forced is not None:
        return forced
    key = (device, op, problem.bucket, problem.N, problem.K, problem.r)
    return MEASURED.get(key) or RULES[op](problem)


GEMM_GAP = 0.05  # assumed, not measured: how much longer our GEMM may take than the vendor's


def _lora_matmul(c: Problem) -> str:
    """`base_last` writes and reads y once more, 2 M N itemsize bytes; `tail` pays the gap and 2 M N r more FLOPs."""
    if c.itemsize == 4:  # without tensor cores the gap is large
        return "base_last"
    base = 2 * c.M * c.N * c.K
    tail = GEMM_GAP * base + 2 * c.M * c.N * c.r
    base_last = 2 * c.M * c.N * c.itemsize * c.intensity
    return "tail" if tail < base_last else "base_last"


def _lora_grad(c: Problem) -> str:
    """Partial dxa moves 8R / 256 bytes an element of dy (written and read, 256 columns a slab), a second read 2."""
    return "one_pass" if c.r <= 32 else "two_pass"


FUSED_TOKENS = 16  # modelled: above, decoding in every row of tiles costs more than writing the weight once


def _linear_4bit(c: Problem) -> str:
    if 0 < c.M <= FUSED_TOKENS and c.p == 0.0 and c.r <= 128 and c.K % 32 == 0:
        return "fused"
    return "merged" if c.p == 0.0 else "decoded"


RULES: dict[str, Callable[[Problem], str]] = {
    "lora_matmul": _lora_matmul,
    "lora_grad": _lora_grad,
    "linear_4bit": _linear_4bit,
}
