"""How everything is measured: which providers are timed, in which order and by which clock, and the ratios of times.

A provider whose results are not as exact as PEFT's gets no timing. Those that get one take turns, one turn each a
round, in an order that rotates; a turn is as many calls as fill `TURN` seconds. What is compared is the median over
rounds of the ratio of two turns of one round, so that whatever slows the machine for longer than a round slows both.
"""

import gc
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark.utils.timer import timer

from fastlora import costs
from fastlora.benchmarks import accuracy, roofline, tuning
from fastlora.benchmarks.cases.modules import Case, Subject, make_subject, truth, with_other_inputs
from fastlora.benchmarks.providers import NotApplicable, Provider
from fastlora.benchmarks.training import peak_bytes, saved_bytes
from fastlora.costs import Rates

MODES = ("forward", "backward", "step")
TURN = 0.02  # seconds; one call at least
ROUNDS = 9
AGAIN = (1, 2)  # seeds of other inputs, with which single gradients that were too far off are judged again
QUANTILES = (20, 50, 80)
COLUMNS = (  # of a row, after the case's: seconds, bytes and ratios
    "provider", "mode", "p20", "p50", "p80", "calls", "speedup", "of_limit", "tflops", "gbytes", "roofline",
    "saved_bytes", "peak_bytes", "host", "launches", "relative_error", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """What is timed: ``call(prepare())``, of which only the call counts."""

    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None

    def __call__(self) -> Any:
        return self.call(self.prepare())

    @classmethod
    def of(cls, call: Callable[[], Any]) -> "Way":
        """A call that needs nothing prepared."""
        return cls(lambda _: call())


Clock = Callable[[Way], list[float]]  # one turn: the seconds of each of its calls


def cpu_clock(way: Way) -> list[float]:
    taken: list[float] = []
    end = time.monotonic() + TURN
    while not taken or (time.monotonic() < end and len(taken) < 1000):
        state = way.prepare()
        start = timer()
        result = way.call(state)
        taken.append(timer() - start)
        del state, result
    return taken


def gpu_clock(way: Way) -> list[float]:
    """Seconds of each call by the device's events, the L2 cache emptied before each."""
    from triton.runtime import driver
    from triton.testing import do_bench

    if way.prepare is Way.prepare:
        return [ms / 1e3 for ms in do_bench(way, warmup=5, rep=TURN * 1e3, return_mode="all")]
    cache = driver.active.get_empty_cache_for_benchmark()
    events = []
    for _ in range(10):  # what is prepared must not run between the events: do_bench cannot do that
        state = way.prepare()
        driver.active.clear_cache(cache)
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        result = way.call(state)
        events[-1][1].record()
        del state, result
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def clock_of(device: torch.device) -> Clock:
    return gpu_clock if device.type == "cuda" else cpu_clock


Turns = list[list[float]]  # the seconds of each call, by round


def interleave(ways: Mapping[Any, Way], clock: Clock, rounds: int = ROUNDS) -> dict[Any, Turns]:
    """The turns of all ways, after one that does not count."""
    for way in ways.values():
        way()
    return tuning.measure(dict(ways), clock, rounds)


def quantiles(turns: Turns) -> dict[str, Any]:
    """p20, p50 and p80 of the calls of all turns, None if there were none."""
    pooled = torch.tensor([seconds for turn in turns for seconds in turn], dtype=torch.float64)
    return {f"p{q}": torch.quantile(pooled, q / 100).item() if pooled.numel() else None for q in QUANTILES}


def ratio(one: Turns, other: Turns) -> float:
    """How many times as long one takes as the other: the median over rounds of the ratio of their medians."""
    return median(median(a) / median(b) for a, b in zip(one, other, strict=True))


# ---- which providers may be timed


@dataclass
class Gate:
    """The truth of a case, and how far from it PEFT's own layers are."""

    subject: Subject

    def __post_init__(self) -> None:
        self.exact = {adapted: truth(self.subject, adapted) for adapted in (False, True)}
        rounding = torch.finfo(self.subject.case.dtype).eps / 2  # others may round adapters and xa to the compute dtype
        errors = self._errors(self._results(self.subject.adapted), self.exact[True])
        self.bar = {name: max(error, rounding) for name, error in errors.items()}

    def judge(self, provider: Provider, module: nn.Module) -> tuple[float, str | None]:
        """The largest error of y and the gradients, and why there is no timing, if there is none.

        The error of one gradient in a model does not average out over its elements: it is mostly that of what reaches
        the layer, the same for all of them, and may be a third of the baseline's or three times as much by chance. So
        single gradients that are too far off, where their root mean square is not, are judged again with other inputs:
        chance seldom chooses the same ones, and a mistake is there every time.
        """
        error, reason, suspects = self._judge(provider, module, None)
        for seed in AGAIN if suspects else ():
            _, reason, _ = Gate(with_other_inputs(self.subject, seed))._judge(provider, module, suspects)
            if reason is not None:
                break
        return error, reason and f"wrong: {reason}"

    def _judge(
        self, provider: Provider, module: nn.Module, singly: Collection[str] | None
    ) -> tuple[float, str | None, list[str]]:
        """The largest error; what is wrong (see `accuracy.judge`); and, if single gradients alone are, which."""
        with provider.within(), accuracy.poisoned():
            results = self._results(module)
        exact = self.exact[provider.adapted]
        ours, theirs = ([list(t.shape) for t in each.values()] for each in (results, exact))
        if ours != theirs:
            return math.nan, f"shapes {ours}, not {theirs}", []
        errors = self._errors(results, exact)
        floor = accuracy.floor(self.subject.case.dtype, *self.subject.case.terms_and_elements)
        judged = errors, self.bar, dict.fromkeys(errors, floor), _kind
        together = accuracy.judge(*judged, singly=())
        suspects = accuracy.far_off(*judged) if together is None else []
        return max(errors.values()), accuracy.judge(*judged, singly=singly), suspects

    def _errors(self, results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
        """By the names of PEFT's parameters: those of other providers may be called otherwise, not be ordered so."""
        names = ("y", *self.subject.leaves(self.subject.adapted))
        pairs = zip(names, results.values(), exact.values(), strict=False)
        return {name: accuracy.relative_error(ours, theirs) for name, ours, theirs in pairs}

    def _results(self, module: nn.Module) -> dict[str, Tensor]:
        """Without dropout: every provider draws masks of its own."""
        training = module.training
        try:
            return self.subject.results(module.eval() if self.subject.case.dropout else module)
        finally:
            module.train(training)


def _kind(name: str) -> str:
    """The gradients of all lora_A, and of all lora_B, are results of a kind."""
    return next((part for part in ("lora_A", "lora_B") if part in name), name)


# ---- one case


def run(
    case: Case,
    providers: Iterable[Provider],
    device: torch.device,
    rates: Rates,
    rounds: int = ROUNDS,
    modes: Collection[str] = MODES,
    clock: Clock | None = None,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure all providers on one case. Yields (what is being done, nothing) and at the end ("done", the rows).

    Every provider has a row for each mode, or a single one that says why it has none.
    """
    yield "weights and truth", []
    subject = make_subject(case, device)
    gate = Gate(subject)
    rows: list[dict[str, Any]] = []
    ways: dict[tuple[str, str], Way] = {}
    modules: dict[str, tuple[nn.Module, float | None]] = {}
    for provider in providers:
        yield f"checking {provider.label}", []
        try:
            module = provider.build(subject)
            error, reason = gate.judge(provider, module)
        except ImportError as missing:
            error, reason = None, f"missing: {missing.name or missing} is not installed"  # type: ignore[assignment]
        except NotApplicable as why:
            error, reason = None, f"not applicable: {why}"  # type: ignore[assignment]
        except torch.AcceleratorError:  # nothing more can run on the device
            raise
        except Exception as failure:
            first = next(iter(str(failure).splitlines()), "")
            error, reason = None, f"failed: {type(failure).__name__}: {first}"  # type: ignore[assignment]
        if reason is not None:
            rows.append(empty_row(case, provider.name, error, reason))
            continue
        modules[provider.name] = module, error
        ways |= {(provider.name, mode): way for mode, way in ways_of(subject, provider, module).items()}
    del gate
    free()
    yield "timing", []
    turns = interleave({at: way for at, way in ways.items() if at[1] in modes}, clock or clock_of(device), rounds)
    yield "memory", []  # last: hooks and profilers must not be what torch.compile has seen
    for name, (module, error) in modules.items():
        facts = memory(subject, module, {at[1]: way for at, way in ways.items() if at[0] == name})
        facts["relative_error"] = error
        if name.endswith("+compile") and device.type != "cuda":
            facts["launches"] = None  # what watches operators turns compilation off
        for mode in modes:
            row = case.row() | dict.fromkeys(COLUMNS) | {"provider": name, "mode": mode} | facts
            rows.append(row | derived(case, mode, name, turns, rates))
            if device.type == "cuda":
                rows[-1]["host"] = host_seconds(ways[name, mode])
    if any(name.endswith("+compile") for name in modules):
        torch.compiler.reset()  # or the next case would meet the limit of recompilations
    yield "done", rows


def empty_row(case: Case, provider: str, error: float | None, reason: str) -> dict[str, Any]:
    return case.row() | dict.fromkeys(COLUMNS) | {"provider": provider, "relative_error": error, "error": reason}


def ways_of(subject: Subject, provider: Provider, module: nn.Module) -> dict[str, Way]:
    def forward(_: Any = None) -> Tensor:
        with provider.within():
            return subject.forward(module)

    def backward(y: Tensor) -> Any:
        with provider.within():
            return subject.gradients(module, y)

    def generate(_: Any) -> Tensor:
        with provider.within():
            return subject.generate(module)

    if subject.case.verb == "generate":
        return {"forward": Way(generate)}
    return {"forward": Way(forward), "backward": Way(backward, forward), "step": Way.of(lambda: backward(forward()))}


def derived(
    case: Case, mode: str, name: str, turns: Mapping[tuple[str, str], Turns], rates: Rates
) -> dict[str, float | int | None]:
    """What follows from the times: ratios to PEFT and frozen, and rates of what has to be done at least."""
    own = turns[name, mode]
    peft, frozen = turns.get(("peft", mode)), turns.get(("frozen", mode))
    found: dict[str, Any] = {
        **quantiles(own),
        "calls": sum(map(len, own)),
        "speedup": ratio(peft, own) if peft else None,
        "of_limit": ratio(own, frozen) if frozen else None,
    }
    if not case.of_a_model:
        flops, moved, floor = roofline.least(case, mode, name != "frozen", rates)
        seconds = found["p50"]
        found |= {"tflops": flops / seconds / 1e12, "gbytes": moved / seconds / 1e9, "roofline": floor / seconds}
    return found


def memory(subject: Subject, module: nn.Module, ways: Mapping[str, Way]) -> dict[str, Any]:
    """Bytes kept for backward, the peak of a step (of generation, where there is no step) beyond what was there before,
    and what it launches."""
    device, whole = subject.x.device, ways.get("step", ways["forward"])
    whole()
    kept = saved_bytes(module, lambda: subject.forward(module)) if "step" in ways else None
    return {"saved_bytes": kept, "peak_bytes": peak_bytes(device, whole), "launches": launches(whole, device)}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any], device: torch.device) -> int:
    """The kernels that a call launches; on a CPU, the operators that it dispatches, views not counted."""
    if device.type != "cuda":
        with _Count() as counted:
            call()
        return counted.count
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type.name == "CUDA" for event in profiled.events())  # type: ignore[union-attr]


def host_seconds(way: Way, calls: int = 20) -> float:
    """What a call takes the host, which does not wait for the device: the median."""
    taken = []
    for _ in range(calls):
        state = way.prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = way.call(state)
        taken.append(time.perf_counter() - start)
        del state, result
    torch.cuda.synchronize()
    return median(taken)


def measure_rates(device: torch.device, dtype: torch.dtype, size: int = 2048) -> Rates:
    """What the device does a second, here and now: a copy far beyond any cache, and the vendor's GEMM."""
    source = torch.ones(size * size * 16, device=device)
    target = torch.empty_like(source)
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    ways = {"copy": Way.of(lambda: target.copy_(source)), "gemm": Way.of(lambda: x @ w.t())}
    times = {name: quantiles(turns)["p50"] for name, turns in interleave(ways, clock_of(device), 5).items()}
    copy, gemm = 2 * source.nbytes / times["copy"], 2 * size**3 / times["gemm"]
    known = costs.modelled(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    return Rates.from_json(
        known.to_json() | {"copy": copy, "gemm": gemm, "kernel_gemm": gemm, "gemm_fp32": gemm, "kernel_gemm_fp32": gemm}
        | {"measured": True}
    )  # fmt: skip


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
