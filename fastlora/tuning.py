"""Measuring plans and tiles on the device at hand, and the table that `plans` and the kernels then go by.

A way to carry out an op is timed only once its result is as exact as torch's. Ways that are compared are timed in turn,
in rounds whose order rotates; the median of the rounds counts, and what is there stays unless another is faster by more
than noise (`GAIN`). Problems that share an entry of the table are decided together, by their total time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastlora import kernel_ops, ops, plans, reference, roofline
from fastlora.fourbit import Weight4bit
from fastlora.plans import Table
from fastlora.roofline import Problem, Rates

Clock = Callable[[Callable[[], Any]], float]  # seconds that a call takes on the device
ROUNDS = 3
GAIN = 0.02  # a way that is faster by less is not worth an entry

# hidden size, intermediate size, width of k and v
MODELS = {
    "llama-3-8b": (4096, 14336, 1024),
    "llama-2-7b": (4096, 11008, 4096),
    "mistral-7b": (4096, 14336, 1024),
    "qwen2.5-7b": (3584, 18944, 512),
    "smollm2-135m": (576, 1536, 192),
}


def linears(hidden: int, intermediate: int, kv: int) -> dict[str, tuple[int, int]]:
    """(N, K) of the seven linear layers of a Llama-style block."""
    return {
        "q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden),
        "gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate),
    }  # fmt: skip


def gpu_clock(run: Callable[[], Any]) -> float:
    """Seconds a call, by events on the device, with the L2 cache emptied before each; the median."""
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3


@contextmanager
def kernels(device: torch.device) -> Iterator[None]:
    """Let the ops run the kernels on this device: in the interpreter on a CPU, registered already on a GPU."""
    compositions = {name: getattr(ops, name) for name in ("shrink", "lora_matmul", "lora_grad", "decode_4bit")}
    with ExitStack() as stack:
        key = device.type.upper()
        if device.type == "cpu":
            stack.enter_context(kernel_ops.in_interpreter(compositions))
        elif not torch._C._dispatch_has_kernel_for_dispatch_key("fastlora::lora_matmul", key):
            library = torch.library.Library("fastlora", "IMPL")
            stack.callback(library._destroy)
            kernel_ops.register(library, key, compositions)
        yield


def measure(ways: dict[Any, Callable[[], Any]], clock: Clock, rounds: int = ROUNDS) -> dict[Any, list[float]]:
    """Seconds of each way in each round; they take turns, and the first of a round is another one every time."""
    times: dict[Any, list[float]] = {way: [] for way in ways}
    names = list(ways)
    for i in range(rounds):
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            times[name].append(clock(ways[name]))
    return times


Results = tuple[Tensor, ...]


def wrong(ours: Results, eager: Results, truth: Results, longest: int) -> str | None:
    """Why these results must not be timed: they are less exact than eager torch's. None if they are not.

    error <= 1.5 · eager's error + floor, relative to the fp64 truth in the Frobenius norm; the floor is for what eager's
    error misses by luck on few elements, with ``longest`` terms in the longest sum.
    """
    for mine, theirs, exact in zip(ours, eager, truth, strict=True):
        if mine.shape != exact.shape:
            return f"shape {list(mine.shape)} instead of {list(exact.shape)}"
        norm = exact.norm().item() or 1.0
        error, bar = ((t.double() - exact).norm().item() / norm for t in (mine, theirs))
        eps = max(torch.finfo(t.dtype).eps for t in (mine, theirs))
        floor = (2 * eps + math.sqrt(longest) * 2**-23) / math.sqrt(max(1, exact.numel()))
        if not error <= 1.5 * bar + floor:
            return f"error {error:.1e}, eager torch's is {bar:.1e}"
    return None


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


def linear_4bit(x: Tensor, w: Weight4bit, a: Tensor, b: Tensor, s: float, plan: str) -> Tensor:
    """``x @ (decode(w) + s * b @ a).T``, carried out by this plan."""
    if plan == "fused":
        return kernel_ops.launcher("nf4_matmul", "nf4_matmul")(x, *w, a, b, s)
    if plan == "merged":
        return torch.mm(x, w.decode_merged(x.dtype, a, b, s).t())
    xa = torch.ops.fastlora.shrink(x, a, s)
    return torch.ops.fastlora.lora_matmul(x, w.decode(x.dtype), xa, b)


@dataclass(frozen=True)
class Case:
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


def cases(shapes: list[tuple[int, int, int]], ranks: list[int], dtype: torch.dtype, four_bit: bool) -> list[Case]:
    """What a training step calls for layers ``(M, N, K)``, each problem once."""
    found: dict[tuple[str, str, Problem], Case] = {}

    def add(op: str, name: str, problem: Problem, make: Callable) -> None:
        found.setdefault((op, name, problem), Case(op, problem, name, make))

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
    return list(found.values())


def _normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def _shrink(M: int, K: int, r: int, dtype: torch.dtype) -> Callable:
    def make(device: torch.device):
        x, a = _normal(device, M, K, dtype=dtype), _normal(device, r, K)
        return (
            lambda plan: (torch.ops.fastlora.shrink(x, a, S),),
            lambda: (ops.shrink(x, a, S),),
            lambda: (reference.shrink(*_double(x, a), S),),
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
            lambda: (reference.lora_matmul(*_double(x, w, xa, b)),),
        )

    return make


def _lora_grad(M: int, N: int, K: int, r: int, dtype: torch.dtype) -> Callable:
    def make(device: torch.device):
        dy, x = _normal(device, M, N, dtype=dtype), _normal(device, M, K, dtype=dtype)
        b, xa = _normal(device, N, r), _normal(device, M, r)
        return (
            _forcing("lora_grad", lambda: torch.ops.fastlora.lora_grad(dy, x, b, xa, S)),
            lambda: ops.lora_grad(dy, x, b, xa, S),
            lambda: reference.lora_grad(*_double(dy, x, b, xa), S),
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

        return lambda plan: (linear_4bit(x, w, a, b, S, plan),), eager, truth

    return make


def _forcing(op: str, run: Callable[[], Results]) -> Callable[[str], Results]:
    def forced(plan: str) -> Results:
        with plans.use(**{op: plan}):
            return run()

    return forced


@dataclass
class Change:
    """One entry of the table: what was done before, what is done now, and their seconds in total over ``problems``."""

    kind: str  # "plan" or "tile"
    op: str
    problems: str
    before: str
    after: str
    seconds_before: float
    seconds_after: float


@dataclass
class Tuning:
    """What a run of `Tuner.run` found."""

    table: Table = field(default_factory=Table)
    changes: list[Change] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)  # what got no timing, and why


class Tuner:
    """Tunes the kernels of one device. ``found`` is valid at any time, also after an interruption."""

    def __init__(self, device: torch.device, clock: Clock, name: str, size: int = 8192) -> None:
        self.device, self.clock, self.name, self.size = device, clock, name, size
        self.found = Tuning(Table(**vars(plans.table(name))))
        self.found.table.plans, self.found.table.tiles = dict(self.found.table.plans), dict(self.found.table.tiles)

    def run(self, problems: list[Case]) -> Iterator[tuple[int, int, str]]:
        """Tune, and say before every step how many are done, how many there are, and what it is."""
        from fastlora.kernels import tiles

        yield 0, 1, "rates of the device"
        with kernels(self.device):
            self.found.table.rates = measure_rates(self.device, self.clock, roofline.modelled(self.name), self.size)
            used = self._tiles_used(problems)
            by_plan = defaultdict(list)
            for case in problems:
                if len(case.plans) > 1:
                    by_plan[plans.key(case.op, case.problem)].append(case)
            total = 1 + len(used) + len(by_plan)
            tiles.measured_by(lambda device: self.found.table.tiles)
            try:
                for i, (at, (tile, users)) in enumerate(used.items()):
                    yield 1 + i, total, f"tiles of {at[0]}, size {at[1]}"
                    self._tune_tile(at, tile, users)
                for i, (key, sharing) in enumerate(by_plan.items()):
                    yield 1 + len(used) + i, total, f"plans of {sharing[0].op}, {sharing[0].name}"
                    self._tune_plan(key, sharing)
            finally:
                tiles.measured_by(lambda device: plans.table(device).tiles)
        yield total, total, "done"

    def _tiles_used(self, problems: list[Case]) -> dict[tuple[str, int], tuple[Any, list[tuple[Case, str]]]]:
        """(kernel, size) -> its tile, and the cases and plans that launch it."""
        from fastlora.kernels import tiles

        used: dict[tuple[str, int], tuple[Any, list[tuple[Case, str]]]] = {}
        for case in problems:
            run, _, _ = case.make(self.device)
            for plan in case.plans:
                with tiles.watch() as launched:
                    run(plan)
                for at, tile in launched.items():
                    used.setdefault(at, (tile, []))[1].append((case, plan))
        return used

    def _tune_tile(self, at: tuple[str, int], tile: Any, users: list[tuple[Case, str]]) -> None:
        """Climb from the tile in use to its best neighbour, on the largest problem, until none is better; then let the
        best and the one in use run on all problems."""
        from fastlora.kernels import tiles

        largest = max(users, key=lambda user: user[0].problem.M * user[0].problem.K * max(1, user[0].problem.N))
        best, seen = tile, {tile}
        while True:
            tried = [t for t in neighbours(best) if t not in seen]
            seen.update(tried)
            seconds = self._seconds(largest, {t: tiles.use(at[0], t) for t in (best, *tried)}, at[0])
            fastest = min(seconds, key=lambda t: seconds[t])
            if fastest == best or seconds[fastest] > (1 - GAIN) * seconds[best]:
                break
            best = fastest
        if best == tile:
            return
        totals = {tile: 0.0, best: 0.0}
        for user in users:
            seconds = self._seconds(user, {t: tiles.use(at[0], t) for t in totals}, at[0])
            for t in totals:
                totals[t] += seconds.get(t, math.inf)
        if totals[best] < (1 - GAIN) * totals[tile]:
            self.found.table.tiles[at] = {name: value for name, value in asdict(best).items() if value}
            names = "; ".join(dict.fromkeys(case.name for case, _ in users))
            change = Change("tile", at[0], names, _show(tile), _show(best), totals[tile], totals[best])
            self.found.changes.append(change)

    def _tune_plan(self, key: plans.Key, sharing: list[Case]) -> None:
        before = plans.choose(key[0], sharing[0].problem, self.name)
        totals = dict.fromkeys(sharing[0].plans, 0.0)
        for case in sharing:
            run, eager, truth = case.make(self.device)
            exact = self._exact({plan: lambda plan=plan: run(plan) for plan in case.plans}, case, eager, truth)
            seconds = {plan: median(found) for plan, found in measure(exact, self.clock).items()}
            for plan in totals:
                totals[plan] += seconds.get(plan, math.inf)
        best = min(totals, key=lambda plan: totals[plan])
        if totals[best] == math.inf:
            return
        if before in totals and totals[best] > (1 - GAIN) * totals[before]:
            best = before
        self.found.table.plans[key] = best
        if best != before:
            names = "; ".join(case.name for case in sharing)
            self.found.changes.append(Change("plan", key[0], names, before, best, totals[before], totals[best]))

    def _seconds(self, user: tuple[Case, str], ways: dict[Any, Any], kernel: str) -> dict[Any, float]:
        """Median seconds of a case in each of these contexts that gives a right result."""
        case, plan = user
        run, eager, truth = case.make(self.device)

        def within(context: Any) -> Callable[[], Results]:
            def call() -> Results:
                with context():
                    return run(plan)

            return call

        exact = self._exact({way: within(_again(context)) for way, context in ways.items()}, case, eager, truth, kernel)
        return {way: median(times) for way, times in measure(exact, self.clock).items()}

    def _exact(self, ways: dict[Any, Callable], case: Case, eager: Callable, truth: Callable, kernel: str = "") -> dict:
        """Those ways whose results are right; the others are noted with the reason."""
        expected, exact, bar = {}, truth(), eager()
        for way, run in ways.items():
            try:
                reason = wrong(run(), bar, exact, case.longest)
            except Exception as error:  # a tile that does not fit or compile
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if reason is None:
                expected[way] = run
            else:
                self.found.rejected.append(f"{kernel or case.op} {_show(way)}, {case.name}: {reason}")
        return expected
