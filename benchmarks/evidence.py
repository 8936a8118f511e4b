"""The steps of `gpu.py` that show more than a layer's time: graphs, profiles, training, tuning."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora import functional, plans
from fastlora.benchmarks import protocol, steps, tuning
from fastlora.benchmarks.cases.modules import Case, make_subject
from fastlora.benchmarks.cases.ops import op_cases
from fastlora.benchmarks.cases.shapes import SHAPES
from fastlora.benchmarks.environment import environment
from fastlora.benchmarks.providers import PROVIDERS, NotApplicable
from fastlora.benchmarks.training import synchronize

Found = Iterator[tuple[str, list[dict[str, Any]]]]


def step_graph(run: Any) -> Found:
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
        y = functional._apply(x, zero, eye, eye, 1.0, None, p)
        return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]

    if "masks" not in run.done:
        yield "masks", _check_masks(masks, p)
    for base in ("bf16", "nf4"):
        for M in (4,) if run.tiny else (16, 256, 4096):
            if (case := f"{base} M={M}") in run.done:
                continue
            run.case = case
            N = K = 64 if run.tiny else 4096
            subject = make_subject(Case("linear", "square", "q", M, 16, base, N=N, K=K), run.device)
            step = partial(_results, subject, PROVIDERS["fastlora"].build(subject))
            expected = step()
            graph, results = capture(step)
            graph.replay()
            same = all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
            ways = {"eager": protocol.Way.of(step), "graph": protocol.Way.of(graph.replay)}
            turns = protocol.interleave(ways, protocol.clock_of(run.device), steps.rounds(run))
            rows = [{"check": "time", "provider": n, **protocol.quantiles(found)} for n, found in turns.items()]
            yield case, [{"check": "same bits as eager", "outcome": same}, *rows]
            protocol.free()


def _results(subject: Any, module: Any) -> tuple[Tensor, ...]:
    return tuple(subject.results(module).values())


def _check_masks(step: Callable[[], tuple[Tensor, Tensor]], p: float) -> list[dict[str, Any]]:
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


def step_profile(run: Any) -> Found:
    """The kernels of forward and backward of a block's seven linears, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    M, r = (8, 4) if run.tiny else (8192, 16)
    on_gpu = run.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for base in ("bf16", "nf4"):
        for name in ("frozen", "peft", "addmm", "fastlora"):
            case = f"{base} {name}"
            if case in run.done:
                continue
            run.case = case
            try:
                calls = []
                for layer in steps.layers_of(run, M=M, r=r, base=base):
                    subject = make_subject(layer, run.device)
                    calls += [partial(_results, subject, PROVIDERS[name].build(subject))] * layer.count
            except (ImportError, NotApplicable) as error:
                yield case, [{"kernel": None, "error": str(error)}]
                continue
            for call in calls:
                call()
            synchronize(run.device)
            with profile(activities=activities) as profiled:
                for call in calls:
                    call()
                synchronize(run.device)
            yield case, kernel_rows(profiled.key_averages(), on_gpu)
            del calls
            protocol.free()


def kernel_rows(events: Any, on_gpu: bool, most: int = 25) -> list[dict[str, Any]]:
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


def step_compare(run: Any) -> Found:
    """Training steps of whole models with random weights: frozen, PEFT, PEFT + fastlora, in turn."""
    from fastlora.benchmarks import training
    from fastlora.benchmarks.cases import models

    tokens, rounds, r = (8, 1, 4) if run.tiny else (2048, 20, 16)
    quantise = ("nf4",) if importlib.util.find_spec("bitsandbytes") else ()
    makers: dict[str, tuple[int, Callable[[], Any]]] = {
        "smollm2": (4, lambda: models.load_model("smollm2-random")),
        "two blocks of llama-3-8b": (4, partial(two_blocks, "llama-3-8b", run.device)),
    }
    if run.tiny:
        makers = {"tiny": (1, partial(two_blocks, "tiny", run.device))}
    for base in ("bf16", *quantise):
        for dropout in (0.0, 0.05):
            for name, (batch, make) in makers.items():
                case = f"{name} {base} dropout={dropout}"
                if case in run.done:
                    continue
                run.case = case
                loaded = make()
                data = models.batches(loaded, None, batch, tokens, 1 + rounds)
                model = models.to_base(loaded.model.to(run.device), base)
                trainers = training.make_trainers(model, r, dropout, False, False, 2e-4, 0)
                for _ in training.train(trainers, data, 0):
                    pass
                known = {"model": name, "base": base, "dropout": dropout, "tokens": tokens * batch}
                yield case, [known | _training_row(trainer) for trainer in trainers]
                del trainers, model, loaded
                protocol.free()


def _training_row(trainer: Any) -> dict[str, Any]:
    found = trainer.results
    quantiles = protocol.quantiles([found.step_seconds[1:]])
    memory = {"saved_bytes": found.saved_bytes, "peak_bytes": found.peak_bytes}
    return {"provider": trainer.name, **quantiles, **memory, "final_loss": found.losses[-1]}


def two_blocks(shape: str, device: torch.device) -> Any:
    """A model of two blocks of this shape and hardly a vocabulary: its time is that of the blocks."""
    from fastlora.benchmarks.cases.models import LoadedModel, random_model

    model = random_model(shape, torch.bfloat16, device, num_hidden_layers=2, vocab_size=256)
    return LoadedModel(model, "two blocks, RANDOM weights", None)


def step_tune(run: Any) -> Found:
    """`fastlora tune` for Llama-3-8B at 8192 and 16 tokens; the table goes beside the results, not to the user's."""
    sizes = [(case.N, case.K) for case in steps.layers_of(run, M=0, r=0, base="bf16")]
    shapes = [(M, N, K) for M in ((8,) if run.tiny else (8192, 16)) for N, K in sizes]
    siblings = [(M, Ns, K) for M, *_ in shapes[::4] for Ns, K in SHAPES["llama-3-8b"].groups()]
    problems = op_cases(shapes, [4 if run.tiny else 16], torch.bfloat16, True, siblings)
    if run.tiny:
        tuning.SIZE, problems = 64, problems[:1]
    tuner = tuning.Tuner(run.device, steps.clock(run), run.name)
    path = run.folder / plans.TABLE_FILE
    if run.done and path.exists():
        tuner.found.table = plans.read_tables(path)[run.name]
    step, changes = None, 0
    for done, total, text in tuner.run(problems, run.done):
        if step is not None and step not in run.done:
            tuner.found.table.environment = environment(run.device)
            plans.write_tables(path, {run.name: tuner.found.table})
            yield step, [asdict(change) for change in tuner.found.changes[changes:]] or [{"kind": "nothing changed"}]
            changes = len(tuner.found.changes)
        step = text
        print(f"  {done}/{total} {text}", flush=True)
    yield "rejected", [{"kind": "rejected", "op": line} for line in tuner.found.rejected]
