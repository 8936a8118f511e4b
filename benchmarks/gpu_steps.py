"""The steps of `gpu.py`: each yields its cases, and with a case how to measure its rows, or the rows themselves.

Each is a function ``step_NAME(run)`` of a `gpu.Run`.
"""

import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import costs, functional, kernel_ops, plans
from fastlora.benchmarks import decode, protocol, tuning
from fastlora.benchmarks.accuracy import relative_error
from fastlora.benchmarks.cases.modules import Case, linear_cases, make_subject
from fastlora.benchmarks.cases.ops import op_cases
from fastlora.benchmarks.cases.shapes import SHAPES
from fastlora.benchmarks.environment import environment, versions
from fastlora.benchmarks.providers import PROVIDERS, NotApplicable, Provider, forcing
from fastlora.benchmarks.records import clocks
from fastlora.benchmarks.training import synchronize
from fastlora.costs import Problem, Rates

Rows = list[dict[str, Any]]
Cases = Iterator[tuple[str, Rows | Callable[[], Rows]]]


def step_environment(run: Any) -> Cases:
    found = {**versions(), "platform": platform.platform(), "torch.version.cuda": torch.version.cuda or "none"}
    found |= {name: _installed(name) for name in ("pytest", "rich", "matplotlib", "hypothesis")}
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": str(properties.total_memory),
            "multiprocessors": str(properties.multi_processor_count),
            **clocks(run.device),
        }
    x, a = torch.randn(64, 64, device=run.device), torch.randn(4, 64, device=run.device)
    kernel = kernel_ops.launcher("shrink", "shrink")(x, a, 1.0)
    # The kernel keeps 16 bits of an fp32 number, so it is off by at most 2^-16 = 1.5e-5 of each.
    found["a kernel runs and is right"] = str(relative_error(kernel, x @ a.t()) <= 1e-4)
    yield "all", [{"name": name, "value": value} for name, value in found.items()]


def _installed(name: str) -> str:
    return "installed" if importlib.util.find_spec(name) else "missing"


def step_smoke(run: Any) -> Cases:
    """The tests of layers and of launches: a minute that says whether the rest is worth measuring."""
    from fastlora.benchmarks.gpu_tests import run_tests  # which needs pytest

    yield from run_tests(run, "smoke", ["tests/test_gpu.py", "tests/test_gpu_runtime.py"])


def step_correctness(run: Any) -> Cases:
    """Every kernel against fp64 truth."""
    files = ["tests/test_kernels.py"]
    if importlib.util.find_spec("bitsandbytes"):
        files.append("tests/test_nf4_kernels.py")
    selection = ["-k", "TestShrink and fp32-"] if run.tiny else []
    from fastlora.benchmarks.gpu_tests import run_tests

    yield from run_tests(run, "correctness", files + selection)


def step_rates(run: Any) -> Cases:
    if run.tiny:
        tuning.SIZE = 64
    found = tuning.measure_rates(run.device, clock(run), costs.modelled(run.name))
    yield "all", [{"name": name, "value": value} for name, value in asdict(found).items() if name != "measured"]


def clock(run: Any) -> tuning.Clock:
    """Seconds of a call: on a GPU the median, elsewhere of a single one."""
    if run.device.type == "cuda":
        return tuning.gpu_clock
    return lambda call: protocol.cpu_clock(protocol.Way.of(call))[0]


def rates(run: Any) -> Rates:
    """Those that the step `rates` measured, or the modelled ones."""
    found = {row["name"]: row["value"] for row in run.results.get("rates", [])}
    return Rates.from_json({**found, "measured": True}) if found else costs.modelled(run.name)


def layers_of(run: Any, **fields: Any) -> list[Case]:
    """The distinct linears of Llama-3-8B."""
    return linear_cases("tiny" if run.tiny else "llama-3-8b", **fields)


def rounds(run: Any) -> int:
    return 1 if run.tiny else 3


FORCED = {
    "bf16": [{"lora_matmul": plan, "lora_grad": "one_pass"} for plan in plans.PLANS["lora_matmul"]]
    + [{"lora_grad": "two_pass"}],
    "nf4": [{"lora_grad": plan} for plan in plans.PLANS["lora_grad"]],
}


def providers_of(base: str) -> list[Provider]:
    """Those without torch.compile, which is for `fastlora bench`; and fastlora by every plan."""
    plain = [provider for name, provider in PROVIDERS.items() if not name.endswith("+compile")]
    return plain + [forcing(**forced) for forced in FORCED[base]]


def step_sweep(run: Any) -> Cases:
    points = [(M, 16) for M in (8192, 512, 2048, 1, 16, 4096, 1024, 16384)] + [(8192, 64), (8192, 128)]
    for M, r in [(8, 4)] if run.tiny else points:
        for base in ("bf16", "nf4"):
            for case in layers_of(run, M=M, r=r, base=base):
                yield str(case), partial(_sweep_case, run, case)


def _sweep_case(run: Any, case: Case) -> Rows:
    providers = providers_of(case.base)
    if case.base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return [protocol.empty_row(case, p.name, None, "missing: bitsandbytes is not installed") for p in providers]
    at, device = rates(run), kernel_ops._name(run.device)
    *_, (_, rows) = protocol.run(case, providers, run.device, at, rounds(run), ("forward", "step"))
    within = {provider.name: provider.within for provider in providers}
    c = Problem(case.M, case.N, case.K, case.r)
    for row in rows:
        row |= {"predicted": None, "plan": None}
        if row["provider"].startswith("fastlora") and row["p50"]:
            with within[row["provider"]]():
                row["predicted"] = predicted(c, case.base, at, device, row["mode"] == "step")
                row["plan"] = plans.choose("lora_matmul" if case.base == "bf16" else "linear_4bit", c, device)
    return rows


def predicted(c: Problem, base: str, rates: Rates, device: str, backward: bool) -> float:
    """Seconds that the roofline says our layer takes, by the plans that are in force on the device of this name."""
    dy, dx = replace(c, N=0, K=c.N), replace(c, N=c.K, K=c.N)
    matmul, grad = plans.choose("lora_matmul", c, device), plans.choose("lora_grad", dy, device)
    linear_4bit = plans.choose("linear_4bit", c, device)
    calls = [("shrink", "", c), ("lora_matmul", matmul, c)] if base == "bf16" else [("linear_4bit", linear_4bit, c)]
    if backward and base == "bf16":
        calls += [("lora_matmul", plans.choose("lora_matmul", dx, device), dx)]
    elif backward:
        calls += [("shrink", "", c), ("linear_4bit", "merged", c)]  # the same bytes and FLOPs for dx as for y
    if backward:
        calls += [("lora_grad", grad, dy), ("lora_grad_a", "", c)]
    return sum(costs.predict(op, plan, problem, rates).seconds for op, plan, problem in calls)


def step_experts(run: Any) -> Cases:
    """A mixture of experts: frozen, by PEFT and by fastlora."""
    for name, M in [("tiny-moe", 8)] if run.tiny else [("qwen3-30b-a3b", 4096), ("qwen3-30b-a3b", 16)]:
        case = Case("experts", name, name, M, 4 if run.tiny else 16, "bf16")
        yield str(case), partial(_experts, run, case)


def _experts(run: Any, case: Case) -> Rows:
    providers = [provider for provider in PROVIDERS.values() if provider.experts and "compile" not in provider.name]
    *_, (_, rows) = protocol.run(case, providers, run.device, rates(run), rounds(run), ("forward", "step"))
    return rows


def step_decode(run: Any) -> Cases:
    """Decoding alone and with an adapter merged, and products of few tokens.

    Bytes are those that every implementation has to move: partial sums do not count as bandwidth that was used.
    """
    tokens = (1, 8) if run.tiny else (1, 4, 16, 32, 64)
    for case in (replace(case, verb="decode") for case in layers_of(run, M=0, r=16, base="nf4")):
        yield case.layer, partial(_decode, run, case, tokens)


def _decode(run: Any, case: Case, tokens: tuple[int, ...]) -> Rows:
    given = decode.operands(case, run.device)
    found = [*decode.candidates(case, given), *_products(case, given, tokens)]
    return decode.run(case, found, run.device, rates(run), rounds(run))


def _products(case: Case, given: decode.Operands, tokens: tuple[int, ...]) -> Iterator[decode.Candidate]:
    nf4_matmul = kernel_ops.launcher("nf4_matmul", "nf4_matmul")
    w, a, b, s = given.w, given.a, given.b, given.s
    dense = given.exact.bfloat16()

    def eager(x: Tensor) -> Tensor:
        return x @ dense.t() + (s * (x.float() @ a.t()) @ b.t()).bfloat16()

    def truth(x: Tensor) -> Tensor:
        return x.float() @ given.merged.t()

    for M in tokens:
        x = torch.randn(M, case.K, device=a.device).bfloat16()
        c = Problem(M, case.N, case.K, case.r)
        moved = int(costs.packed_bytes(c)) + 2 * M * (c.N + c.K) + 4 * c.r * (c.N + c.K)
        yield decode.Candidate(
            "fastlora", f"nf4_matmul M={M}", moved,
            partial(nf4_matmul, x, *w, a, b, s), partial(eager, x), partial(truth, x),
        )  # fmt: skip


def step_graph(run: Any) -> Cases:
    """A training step of a layer with dropout, captured in a CUDA graph: every replay draws a new mask, backward the
    mask of its forward; and what the host costs an eager step."""
    if run.device.type != "cuda":
        yield "all", [{"check": "needs CUDA", "outcome": None}]
        return
    K, p = 256, 0.25
    eye = torch.eye(K, device=run.device)
    x = torch.ones(512, K, device=run.device, dtype=torch.bfloat16, requires_grad=True)
    zero = torch.zeros(K, K, device=run.device, dtype=torch.bfloat16)

    def masks() -> tuple[Tensor, Tensor]:
        y = functional.lora_linear(x, zero, eye, eye, 1.0, None, p)
        return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]

    yield "masks", partial(_check_masks, masks, p)
    for base in ("bf16", "nf4"):
        for M in (4,) if run.tiny else (16, 256, 4096):
            yield f"{base} M={M}", partial(_eager_and_graph, run, base, M)


def _eager_and_graph(run: Any, base: str, M: int) -> Rows:
    N = K = 64 if run.tiny else 4096
    subject = make_subject(Case("linear", "square", "q", M, 16, base, N=N, K=K), run.device)
    step = partial(_results, subject, PROVIDERS["fastlora"].build(subject))
    expected = step()
    graph, results = capture(step)
    graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
    ways = {"eager": protocol.Way.of(step), "graph": protocol.Way.of(graph.replay)}
    turns = protocol.interleave(ways, protocol.clock_of(run.device), rounds(run))
    times: Rows = [{"check": "time", "provider": name, **protocol.quantiles(found)} for name, found in turns.items()]
    return [{"check": "same bits as eager", "outcome": same}, *times]


def _results(subject: Any, module: Any) -> tuple[Tensor, ...]:
    return tuple(subject.results(module).values())


def _check_masks(step: Callable[[], tuple[Tensor, Tensor]], p: float) -> Rows:
    graph, (y, dx) = capture(step)
    drawn, same = [], []
    for _ in range(3):
        graph.replay()
        drawn.append((y != 0).clone())
        same.append(torch.equal(y, dx))
    dropped = 1 - torch.stack(drawn).float().mean().item()
    checks = {
        "backward draws the mask of forward": all(same),
        "every replay draws a new mask": not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2]),
        "share of elements dropped is p": abs(dropped - p) < 5 * (p * (1 - p) / (3 * y.numel())) ** 0.5,
    }
    return [{"check": name, "outcome": bool(outcome)} for name, outcome in checks.items()]


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of a call, which has run before on another stream as graphs want it, and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def step_profile(run: Any) -> Cases:
    """The kernels of forward and backward of a block's seven linears, by torch's profiler."""
    for base in ("bf16", "nf4"):
        for name in ("frozen", "peft", "addmm", "fastlora"):
            yield f"{base} {name}", partial(_profile, run, base, name)


def _profile(run: Any, base: str, name: str) -> Rows:
    from torch.profiler import ProfilerActivity, profile

    M, r = (8, 4) if run.tiny else (8192, 16)
    on_gpu = run.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    calls: list[Callable[[], Any]] = []
    try:
        for layer in layers_of(run, M=M, r=r, base=base):
            subject = make_subject(layer, run.device)
            calls += [partial(_results, subject, PROVIDERS[name].build(subject))] * layer.count
    except (ImportError, NotApplicable) as error:
        return [{"kernel": None, "error": str(error)}]
    for call in calls:
        call()
    synchronize(run.device)
    with profile(activities=activities) as profiled:
        for call in calls:
            call()
        synchronize(run.device)
    return kernel_rows(profiled.key_averages(), on_gpu)


def kernel_rows(events: Any, on_gpu: bool, most: int = 25) -> Rows:
    """The kernels (on a CPU the operators) that took longest, of all that ran."""
    found = {
        event.key: (event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6)
        for event in events
        if not on_gpu or event.device_type.name == "CUDA"
    }
    total = sum(seconds for _, seconds in found.values())
    top = sorted(found.items(), key=lambda item: -item[1][1])[:most]
    return [
        {"kernel": name, "calls": calls, "seconds": seconds, "share": seconds / total, "error": None}
        for name, (calls, seconds) in top
    ]


class Compared(NamedTuple):
    """Training steps to compare: of which model with random weights, on how many texts of how many tokens."""

    model: str
    base: str
    batch: int = 4
    tokens: int = 2048
    dropout: float = 0.0
    how: str = ""  # or "compiled": beside the others; or "checkpointed"

    def __str__(self) -> str:
        case = f"{self.model} {self.base}, {self.batch} x {self.tokens} tokens"
        return case + f", dropout {self.dropout}" * (self.dropout > 0) + f", {self.how}" * bool(self.how)


def step_compare(run: Any) -> Cases:
    """Training steps of whole models: frozen, PEFT, PEFT + fastlora, in turn. Blocks have q, k, v and gate, up that
    share their x; the peak memory of a whole model is that of its training."""
    bases = ("bf16", "nf4") if importlib.util.find_spec("bitsandbytes") else ("bf16",)
    blocks, whole = "two blocks of llama-3-8b", "llama-2-7b"
    cases = [Compared(blocks, base) for base in bases]
    cases += [Compared(whole, base, batch=1) for base in bases]
    cases += [Compared(blocks, base, how=how) for how in ("compiled", "checkpointed") for base in bases]
    cases += [Compared(blocks, base, batch=1, tokens=512) for base in bases]
    cases += [Compared(blocks, base, dropout=0.05) for base in bases]
    cases += [Compared(whole, base, batch=1, how="checkpointed") for base in bases]
    cases += [Compared("smollm2", base) for base in bases]
    if run.tiny:
        tiny = [case._replace(model="tiny", batch=1, tokens=8) for case in cases]
        cases = list(dict.fromkeys(tiny))
    for case in cases:
        yield str(case), partial(_compare, run, case)


def _compare(run: Any, case: Compared) -> Rows:
    from fastlora.benchmarks import training
    from fastlora.benchmarks.cases import models

    steps, r = (1, 4) if run.tiny else (5 if case.model.startswith("llama") else 20, 16)
    if case.model == "smollm2":
        loaded = models.load_model("smollm2-random")
    elif case.model.startswith("llama"):
        loaded = models.load_model(case.model, device=run.device)
    else:  # hardly a vocabulary: the time is that of the blocks
        small = {"num_hidden_layers": 2, "vocab_size": 256}
        model = models.random_model(case.model.rpartition(" ")[2], torch.bfloat16, run.device, **small)
        loaded = models.LoadedModel(model, case.model, None)
    data = models.batches(loaded, None, case.batch, case.tokens, 1 + steps)
    base, compiled = models.to_base(loaded.model.to(run.device), case.base), case.how == "compiled"
    checkpointed, backend = case.how == "checkpointed", "eager" if run.tiny else "inductor"
    trainers = training.make_trainers(base, r, case.dropout, checkpointed, compiled, 2e-4, 0, backend=backend)
    for _ in training.train(trainers, data, 0):
        pass
    known = {**case._asdict(), "tokens": case.tokens * case.batch}
    return [known | _training_row(trainer) for trainer in trainers]


def _training_row(trainer: Any) -> dict[str, Any]:
    found = trainer.results
    quantiles = protocol.quantiles([found.timed])
    memory = {"saved_bytes": found.saved_bytes, "peak_bytes": found.peak_bytes}
    return {"provider": trainer.name, **quantiles, **memory, "final_loss": found.losses[-1]}


def step_tune(run: Any) -> Cases:
    """`fastlora tune` for Llama-3-8B at 8192 and 16 tokens; the table goes beside the results, not to the user's."""
    sizes = [(case.N, case.K) for case in layers_of(run, M=0, r=0, base="bf16")]
    shapes = [(M, N, K) for M in ((8,) if run.tiny else (8192, 16)) for N, K in sizes]
    siblings = [(M, Ns, K) for M, *_ in shapes[::4] for Ns, K in SHAPES["llama-3-8b"].groups()]
    problems = op_cases(shapes, [4 if run.tiny else 16], torch.bfloat16, True, siblings)
    if run.tiny:
        tuning.SIZE, problems = 64, problems[:1]
    tuner = tuning.Tuner(run.device, clock(run), run.name)
    path = run.folder / plans.TABLE_FILE
    try:
        if run.done:
            tuner.found.table = plans.read_tables(path)[run.name]
    except (OSError, ValueError, KeyError):  # what was found is gone
        run.done.clear()
    step, changes = None, 0
    for done, total, text in tuner.run(problems, run.done):
        if step is not None and step not in run.done:
            tuner.found.table.environment = environment(run.device)
            plans.write_tables(path, {run.name: tuner.found.table})
            yield step, [asdict(change) for change in tuner.found.changes[changes:]] or [{"kind": "nothing changed"}]
            changes = len(tuner.found.changes)
        run.case = step = text  # which is measured next
        print(f"  {done}/{total} {text}", flush=True)
    yield "rejected", [{"kind": "rejected", "op": line} for line in tuner.found.rejected]
