"""Calls of ops at the sizes of a model's layers, to be measured: their inputs, eager torch's results, and the truth."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import kernel_ops, ops, plans, reference
from fastlora.costs import Problem
from fastlora.fourbit import Weight4bit


def kernels(device: torch.device) -> AbstractContextManager:
    """All ops run the kernels on this device within the context: on a CPU in the interpreter, on a GPU anyway."""
    return kernel_ops.in_interpreter() if device.type == "cpu" else nullcontext()


Results = tuple[Tensor, ...]


def random_weight_4bit(N: int, K: int, device: torch.device, quant_type: str = "nf4") -> Weight4bit:
    """A 4-bit weight of random bits with nested statistics, of values like those of a trained layer."""
    blocks = -(-N * K // 64)
    scale = 2.5 / math.sqrt(K)
    return Weight4bit(
        packed=torch.randint(256, (-(-N * K // 2), 1), dtype=torch.uint8, device=device),
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        code2=torch.linspace(-1, 1, 256, device=device),
        absmax2=torch.full((-(-blocks // 256),), scale / 2, device=device),
        offset=torch.tensor(scale, device=device),
        blocksize=64,
        blocksize2=256,
        quant_type=quant_type,
        N=N,
        K=K,
    )


def decoded(w: Weight4bit, dtype: torch.dtype) -> Tensor:
    """The weight by the reference's formulas, computed in fp32."""
    from fastlora.kernels.nf4 import CODES

    assert w.code2 is not None and w.absmax2 is not None and w.offset is not None
    absmax = reference.decode_absmax(w.absmax, w.code2, w.absmax2, w.blocksize2, w.offset)
    code = torch.tensor(CODES[w.quant_type], device=w.packed.device)
    return reference.decode_4bit(w.packed, absmax, code, w.blocksize, w.N, w.K).to(dtype)


@dataclass(frozen=True)
class OpCase:
    """One op on one problem. ``make`` allocates it: (run by a plan, eager torch's results, the truth)."""

    op: str
    problem: Problem
    name: str
    make: Callable[[torch.device], tuple[Callable[[str], Results], Callable[[], Results], Callable[[], Results]]]

    @property
    def longest(self) -> int:
        c = self.problem
        return max(c.M, c.N, c.K, c.r)

    @property
    def plans(self) -> tuple[str, ...]:
        return plans.possible(self.op, self.problem) if self.op in plans.PLANS else ("",)


S = 0.5  # the adapter's scaling


def op_cases(
    shapes: list[tuple[int, int, int]],
    ranks: list[int],
    dtype: torch.dtype,
    four_bit: bool,
    siblings: Sequence[tuple[int, tuple[int, ...], int]] = (),
) -> list[OpCase]:
    """What a training step calls for layers ``(M, N, K)`` and for groups of them ``(M, (N, ...), K)``, each once."""
    found: dict[tuple[str, str, Problem], OpCase] = {}

    def add(op: str, name: str, problem: Problem, make: Callable) -> None:
        found.setdefault((op, name, problem), OpCase(op, problem, name, make))

    i = dtype.itemsize
    for M, N, K in shapes:
        for r in ranks:
            size = f"M={M} N={N} K={K} r={r}"
            add("shrink", f"M={M} K={K} r={r}", Problem(M, 0, K, r, 0.0, i), _shrink(M, K, r, dtype))
            add("lora_matmul", size, Problem(M, N, K, r, 0.0, i), _lora_matmul(M, N, K, r, dtype, False))
            add("lora_matmul", f"{size}, dx", Problem(M, K, N, r, 0.0, i), _lora_matmul(M, K, N, r, dtype, True))
            add("lora_grad", size, Problem(M, 0, N, r, 0.0, i), _lora_grad(M, N, K, r, dtype))
            if four_bit:
                add("linear_4bit", size, Problem(M, N, K, r, 0.0, i), _linear_4bit(M, N, K, r, dtype))
    for M, Ns, K in siblings:
        for r in ranks:
            n, size = len(Ns), f"M={M} N={'+'.join(map(str, Ns))} K={K} r={r}"
            xa, dx = Problem(M, 0, K, n * r, 0.0, i, parts=n), Problem(M, K, sum(Ns), n * r, 0.0, i, parts=n)
            add("shrink_group", f"M={M} K={K} r={n}x{r}", xa, _shrink_group(M, n, K, r, dtype))
            add("lora_matmul", f"{size}, dx", dx, _lora_matmul_group(M, Ns, K, r, dtype))
    return list(found.values())


def _normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _shrink(M: int, K: int, r: int, dtype: torch.dtype) -> Callable:
    def make(device: torch.device):
        x, a = _normal(device, M, K, dtype=dtype), _normal(device, r, K)
        return (
            lambda plan: (torch.ops.fastlora.shrink(x, a, S),),
            lambda: (ops.shrink(x, a, S),),
            lambda: (reference.shrink(x.double(), a.double(), S),),
        )

    return make


def _lora_matmul(M: int, N: int, K: int, r: int, dtype: torch.dtype, transposed: bool) -> Callable:
    def make(device: torch.device):
        x, xa = _normal(device, M, K, dtype=dtype), _normal(device, M, r)
        w = _normal(device, K, N, dtype=dtype).t() if transposed else _normal(device, N, K, dtype=dtype)
        b = _normal(device, r, N).t() if transposed else _normal(device, N, r)
        return (
            _forcing("lora_matmul", lambda: (torch.ops.fastlora.lora_matmul(x, w, xa, b),)),
            lambda: (ops.lora_matmul(x, w, xa, b),),
            lambda: (reference.lora_matmul(x.double(), w.double(), xa.double(), b.double()),),
        )

    return make


def _shrink_group(M: int, n: int, K: int, r: int, dtype: torch.dtype) -> Callable:
    def make(device: torch.device):
        x, a = _normal(device, M, K, dtype=dtype), [_normal(device, r, K) for _ in range(n)]
        s, p, seed = [S] * n, [0.0] * n, [None] * n
        return (
            lambda plan: tuple(torch.ops.fastlora.shrink_group(x, a, s, p, seed)),
            lambda: tuple(ops.shrink_group(x, a, s, p, seed)),
            lambda: tuple(reference.shrink(x.double(), each.double(), S) for each in a),
        )

    return make


def _lora_matmul_group(M: int, Ns: tuple[int, ...], K: int, r: int, dtype: torch.dtype) -> Callable:
    """dx of layers that take the same x."""

    def make(device: torch.device):
        dy, w = [_normal(device, M, N, dtype=dtype) for N in Ns], [_normal(device, N, K, dtype=dtype).t() for N in Ns]
        dxa, a = [_normal(device, M, r) for _ in Ns], [_normal(device, r, K).t() for _ in Ns]
        p, seed = [0.0] * len(Ns), [None] * len(Ns)

        def truth() -> Results:
            x, weights, xa, b = ([t.double() for t in each] for each in (dy, w, dxa, a))
            return (reference.lora_matmul_group(x, weights, xa, b, p, seed),)

        return (
            _forcing("lora_matmul", lambda: (torch.ops.fastlora.lora_matmul_group(dy, w, dxa, a, p, seed),)),
            lambda: (ops.lora_matmul_group(dy, w, dxa, a, p, seed),),
            truth,
        )

    return make


def _lora_grad(M: int, N: int, K: int, r: int, dtype: torch.dtype) -> Callable:
    def make(device: torch.device):
        dy, x = _normal(device, M, N, dtype=dtype), _normal(device, M, K, dtype=dtype)
        b, xa = _normal(device, N, r), _normal(device, M, r)
        return (
            _forcing("lora_grad", lambda: torch.ops.fastlora.lora_grad(dy, x, b, xa, S)),
            lambda: ops.lora_grad(dy, x, b, xa, S),
            lambda: reference.lora_grad(dy.double(), x.double(), b.double(), xa.double(), S),
        )

    return make


def _linear_4bit(M: int, N: int, K: int, r: int, dtype: torch.dtype) -> Callable:
    def make(device: torch.device):
        w = random_weight_4bit(N, K, device)
        x, a, b = _normal(device, M, K, dtype=dtype), _normal(device, r, K), _normal(device, N, r)

        def eager() -> Results:
            dense = decoded(w, dtype)
            return (ops.lora_matmul(x, dense, ops.shrink(x, a, S), b),)

        def truth() -> Results:
            return (reference.lora_linear(x.double(), decoded(w, torch.float64), a.double(), b.double(), S),)

        return (
            _forcing("linear_4bit", lambda: (torch.ops.fastlora.nf4_matmul(x, *w, a, b, S),)),
            eager,
            truth,
        )

    return make


def _forcing(op: str, run: Callable[[], Results]) -> Callable[[str], Results]:
    def forced(plan: str) -> Results:
        with plans.use(**{op: plan}):
            return run()

    return forced
