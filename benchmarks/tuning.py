"""Measuring plans and tiles on the device at hand, and the table that `plans` and the kernels then go by.

A way to carry out an op is timed only once its result is as exact as torch's. Ways that are compared are timed in turn,
in rounds whose order rotates; the median of the rounds counts, and the way in use is kept unless another is faster by
more than noise (`GAIN`). Problems that share an entry of the table are decided together, by their total time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlora import costs, kernel_ops, plans
from fastlora.benchmarks.accuracy import inexact, poisoned
from fastlora.benchmarks.cases.ops import OpCase, Results, kernels
from fastlora.costs import Problem, Rates
from fastlora.plans import Table

Name = TypeVar("Name")
Way = TypeVar("Way")
Taken = TypeVar("Taken")
Bucket = tuple[str, tuple[int, ...]]  # of problems that share a tile
Clock = Callable[[Callable[[], Any]], float]  # seconds that a call takes on the device
ROUNDS = 3
GAIN = 0.02  # a way that is faster by less is not worth an entry


def gpu_clock(run: Callable[[], Any]) -> float:
    """Seconds a call, by events on the device, with the L2 cache emptied before each; the median."""
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3


def measure(ways: dict[Name, Way], clock: Callable[[Way], Taken], rounds: int = ROUNDS) -> dict[Name, list[Taken]]:
    """What the clock says of each way in each round; they take turns, and the first of a round is another one every
    time."""
    times: dict[Name, list[Taken]] = {way: [] for way in ways}
    names = list(ways)
    for i in range(rounds):
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            times[name].append(clock(ways[name]))
    return times


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

    def __init__(self, device: torch.device, clock: Clock, name: str) -> None:
        self.device, self.clock, self.name = device, clock, name
        known = plans.table(name)  # without tiles, if they are of other versions
        self.found = Tuning(replace(known, plans=dict(known.plans), tiles=dict(known.tiles), versions=plans.versions()))

    def run(self, problems: list[OpCase], done: Container[str] = ()) -> Iterator[tuple[int, int, str]]:
        """Tune, and say before every step how many are done, how many there are, and what it is.

        Steps named in ``done`` are passed over: what they found is in the table already.
        """
        from fastlora.kernels import tiles

        yield 0, 1, (text := "rates of the device")
        with kernels(self.device):
            if text not in done:
                self.found.table.rates = measure_rates(self.device, self.clock, costs.modelled(self.name))
            used = self._tiles_used(problems)
            by_plan = defaultdict(list)
            for case in problems:
                if len(case.plans) > 1:
                    by_plan[plans.key(case.op, case.problem)].append(case)
            steps: list[tuple[str, Callable[[], None]]] = [
                (f"plans of {sharing[0].op}, {sharing[0].name}", partial(self._tune_plan, key, sharing))
                for key, sharing in by_plan.items()
            ]
            again = [(f"{text}, again", tune) for text, tune in steps]  # with the tiles that were found
            for at, (tile, users) in used.items():
                text = f"tiles of {at[0]}, {' x '.join(map(str, at[1]))}"
                steps.append((text, partial(self._tune_tile, at, tile, users)))
            total = 1 + len(steps) + len(again)
            tiles.measured_by(lambda device: self.found.table)
            try:
                for i, (text, tune) in enumerate(steps + again):
                    yield 1 + i, total, text
                    if text not in done:
                        tune()
            finally:
                tiles.measured_by(plans.table)
        yield total, total, "done"

    def _tiles_used(self, problems: list[OpCase]) -> dict[Bucket, tuple[Any, list[tuple[OpCase, str]]]]:
        """By kernel and sizes its tile, and the cases and plans that launch it."""
        from fastlora.kernels import tiles

        used: dict[Bucket, tuple[Any, list[tuple[OpCase, str]]]] = {}
        for case in problems:
            run, _, _ = case.make(self.device)
            for plan in case.plans:
                with tiles.watch() as launched:
                    run(plan)
                for at, tile in launched.items():
                    used.setdefault(at, (tile, []))[1].append((case, plan))
        return used

    def _tune_tile(self, at: Bucket, tile: Any, users: list[tuple[OpCase, str]]) -> None:
        """Climb from the tile in use to its best neighbour, on the largest problem, until none is better; then let the
        best and the one in use run on all problems."""
        largest = max(users, key=lambda user: user[0].problem.M * user[0].problem.K * max(1, user[0].problem.N))
        best, seen = tile, {tile}
        while True:
            tried = [t for t in neighbours(best) if t not in seen]
            seen.update(tried)
            seconds = self._seconds_of_tiles(largest, at[0], [best, *tried])
            fastest = min(seconds, key=lambda t: seconds[t], default=best)
            if fastest == best or not seconds[fastest] < (1 - GAIN) * seconds.get(best, math.inf):
                break
            best = fastest
        if best == tile:
            return
        totals = {tile: 0.0, best: 0.0}
        for user in users:
            seconds = self._seconds_of_tiles(user, at[0], list(totals))
            for t in totals:
                totals[t] += seconds.get(t, math.inf)
        if totals[best] < (1 - GAIN) * totals[tile]:
            self.found.table.tiles[at] = {name: value for name, value in best._asdict().items() if value}
            names = "; ".join(dict.fromkeys(case.name for case, _ in users))
            change = Change("tile", at[0], names, _show(tile), _show(best), totals[tile], totals[best])
            self.found.changes.append(change)

    def _tune_plan(self, key: plans.Key, sharing: list[OpCase]) -> None:
        before = self.found.table.plans.get(key) or plans.choose(key[0], sharing[0].problem, self.name)
        totals = dict.fromkeys(sharing[0].plans, 0.0)
        for case in sharing:
            run, eager, truth = case.make(self.device)
            ways: dict[str, Callable[[], Results]] = {plan: partial(run, plan) for plan in case.plans}
            seconds = self._seconds(ways, case, case.op, eager, truth)
            for plan in totals:
                totals[plan] += seconds.get(plan, math.inf)
        best = min(totals, key=lambda plan: totals[plan])
        if totals[best] == math.inf:
            return
        if totals[best] > (1 - GAIN) * totals[before]:
            best = before
        self.found.table.plans[key] = best
        if best != before:
            names = "; ".join(case.name for case in sharing)
            self.found.changes.append(Change("plan", key[0], names, before, best, totals[before], totals[best]))

    def _seconds_of_tiles(self, user: tuple[OpCase, str], kernel: str, tried: list[Any]) -> dict[Any, float]:
        from fastlora.kernels import tiles

        case, plan = user
        run, eager, truth = case.make(self.device)

        def with_tile(t: Any) -> Results:
            with tiles.use(kernel, t):
                return run(plan)

        return self._seconds({t: partial(with_tile, t) for t in tried}, case, kernel, eager, truth)

    def _seconds(
        self, ways: Mapping[Any, Callable[[], Results]], case: OpCase, what: str, eager: Callable, truth: Callable
    ) -> dict[Any, float]:
        """Median seconds of those ways whose results are right; the others are noted with the reason."""
        right, bar, exact = {}, eager(), truth()
        for way, run in ways.items():
            try:
                with poisoned():
                    results = run()
                reason = inexact(results, bar, exact, case.longest)
            except Exception as error:  # a tile that does not compile, or does not fit
                reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            if reason is None:
                right[way] = run
            else:
                self.found.rejected.append(f"{what} {_show(way)}, {case.name}: {reason}")
        del bar, exact
        return {way: median(times) for way, times in measure(right, self.clock).items()}


MAX_ELEMENTS = 128 * 256  # of two sides of a tile: an accumulator that fills the registers


def neighbours(tile: Any) -> list[Any]:
    """Tiles that differ in one size by a factor of two, or in the stages by one. Not all of them compile or fit."""
    found = []
    for name, value in tile._asdict().items():
        if name == "num_stages":
            found += [tile._replace(num_stages=value + step) for step in (-1, 1) if 1 <= value + step <= 6]
        elif value:
            least, most = {"num_warps": (1, 16), "GROUP_M": (1, 16)}.get(name, (16, 1024))
            found += [tile._replace(**{name: size}) for size in (value // 2, value * 2) if least <= size <= most]
    blocks = [[t.BLOCK_M, t.BLOCK_N, t.BLOCK_K] for t in found]
    return [t for t, b in zip(found, blocks, strict=True) if math.prod(sorted(b)[1:]) <= MAX_ELEMENTS]


def _show(way: Any) -> str:
    if isinstance(way, str):
        return way
    sizes = " ".join(
        f"{name[-1]}{value}" for name, value in way._asdict().items() if value and not name.startswith("num")
    )
    return f"{sizes} warps {way.num_warps} stages {way.num_stages}"


SIZE = 8192  # rows of the matrices that rates are measured on


def measure_rates(device: torch.device, clock: Clock, assumed: Rates) -> Rates:
    """Copy and GEMM rates, and what a launch takes, while `kernels` is active.

    The issue rate is not measured: it is the assumed part's, for as many multiprocessors as there are.
    """
    found = _copy_rate(device, clock)
    found |= _gemm_rates(device, clock, SIZE, torch.bfloat16, "gemm", "kernel_gemm")
    found |= _gemm_rates(device, clock, SIZE // 4, torch.float32, "gemm_fp32", "kernel_gemm_fp32")
    multiprocessors = kernel_ops.launcher("tiles", "multiprocessors")(device)
    return replace(
        assumed,
        **found,
        launch=_launch_seconds(device, clock),
        issue=assumed.issue / assumed.multiprocessors * multiprocessors,
        multiprocessors=multiprocessors,
        measured=True,
    )


def _copy_rate(device: torch.device, clock: Clock) -> dict[str, float]:
    source = torch.randn(16 * SIZE, SIZE // 4, device=device)  # 1 GiB: far beyond any cache
    target = torch.empty_like(source)
    return {"copy": 2 * source.nbytes / median(measure({"": lambda: target.copy_(source)}, clock)[""])}


def _gemm_rates(
    device: torch.device, clock: Clock, M: int, dtype: torch.dtype, vendor: str, ours: str
) -> dict[str, float]:
    """FLOPs a second of the vendor's GEMM and of the plan `tail`, in turn."""
    N = K = SIZE // 2
    r = 16
    x, w = torch.randn(M, K, device=device).to(dtype), torch.randn(N, K, device=device).to(dtype)
    xa, b = torch.randn(M, r, device=device), torch.randn(N, r, device=device)

    def tail() -> Tensor:
        with plans.use(lora_matmul="tail"):
            return torch.ops.fastlora.lora_matmul(x, w, xa, b)

    times = measure({vendor: lambda: torch.mm(x, w.t()), ours: tail}, clock)
    c = Problem(M, N, K, r, itemsize=dtype.itemsize)
    flops = {vendor: 2 * M * N * K, ours: costs.predict("lora_matmul", "tail", c, costs.H100).flops}
    return {name: flops[name] / median(found) for name, found in times.items()}


LAUNCHES = 100


def _launch_seconds(device: torch.device, clock: Clock) -> float:
    """Seconds of a launch that does next to nothing, in a row of them that the host does not hold up."""
    t = torch.zeros(1, device=device)

    def row() -> None:
        for _ in range(LAUNCHES):
            t.add_(1)

    row()
    if device.type != "cuda":
        return clock(row) / LAUNCHES
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row()
    return clock(graph.replay) / LAUNCHES
