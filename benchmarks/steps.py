"""The steps of `gpu.py` that check and time ops and layers.

Each yields (case, rows) as it measures, and passes over the cases that are done.
"""

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastlora import kernel_ops, plans, roofline, tuning
from fastlora.benchmarks import layers, resume
from fastlora.benchmarks.timing import block, clocks, free, host_seconds, measure, rates, samples
from fastlora.cases import decoded, poisoned, random_weight_4bit
from fastlora.environment import versions
from fastlora.roofline import Problem

Found = Iterator[tuple[str, list[dict[str, Any]]]]
ROOT = Path(__file__).resolve().parents[1]


def step_environment(run: Any) -> Found:
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
    found["a kernel runs and is right"] = str(torch.allclose(kernel, x @ a.t(), atol=1e-3))
    yield "all", [{"name": name, "value": value} for name, value in found.items()]


def _installed(name: str) -> str:
    return "installed" if importlib.util.find_spec(name) else "missing"


def step_smoke(run: Any) -> Found:
    """The tests of layers and of launches: a minute that says whether the rest is worth measuring."""
    yield from _tests(run, "smoke", ["tests/test_gpu.py", "tests/test_gpu_runtime.py"])


def step_correctness(run: Any) -> Found:
    """Every kernel against fp64 truth."""
    files = ["tests/test_kernels.py"]
    if importlib.util.find_spec("bitsandbytes"):
        files.append("tests/test_nf4_kernels.py")
    selection = ["-k", "TestShrink and fp32-"] if run.tiny else []
    yield from _tests(run, "correctness", files + selection)


def _tests(run: Any, name: str, arguments: list[str]) -> Found:
    """pytest, its tests dealt out to several processes because most of the time is compiling."""
    shards = 1 if run.tiny else max(1, min(8, (os.cpu_count() or 1) // 2))
    run.folder.mkdir(parents=True, exist_ok=True)
    notes = [run.folder / f"{name}-{shard}.jsonl" for shard in range(shards)]
    if run.again:
        for path in notes:
            path.unlink(missing_ok=True)
    with ThreadPoolExecutor(shards) as pool:
        ends = list(pool.map(partial(_pytest, run, arguments, shards), range(shards), notes))
    for outcome in (outcome for path in notes for outcome in resume.read(path)):
        if outcome["test"] not in run.done:
            yield outcome["test"], [{name: outcome[name] for name in ("outcome", "seconds", "reason")}]
    for code, text in ends:
        if code not in (0, 1, resume.STOPPED, 5):  # all passed, some failed, out of time, nothing was left to run
            raise RuntimeError(f"pytest ended with {code}: {text[-2000:]}")
    if any(code == resume.STOPPED for code, _ in ends):
        run.deadline = 0.0
        yield "out of time", []


def _pytest(run: Any, arguments: list[str], shards: int, shard: int, notes: Path) -> tuple[int, str]:
    """Run one shard, again and again while its tests break the device, and stop it if one hangs."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.resume",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    command += ["--outcomes", str(notes), "--shard", f"{shard}/{shards}", "--seconds"]
    while True:
        left = max(1.0, run.seconds_left - 20)
        worker = subprocess.Popen(
            [*command, str(left)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            text, _ = worker.communicate(timeout=left + 60)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.communicate()
            return resume.STOPPED, "a test did not end"
        if worker.returncode != resume.BROKEN:
            return worker.returncode, text


def step_rates(run: Any) -> Found:
    def clock(call: Callable[[], Any]) -> float:
        return median(samples(run, call))

    if run.tiny:
        tuning.SIZE = 64
    found = tuning.measure_rates(run.device, clock, roofline.modelled(run.name))
    yield "all", [{"name": name, "value": value} for name, value in asdict(found).items() if name != "measured"]


def step_sweep(run: Any) -> Found:
    tokens = (8,) if run.tiny else (8192, 1, 16, 4096, 1024, 256)
    for r in (4,) if run.tiny else (16, 64):
        for M in tokens:
            for base in ("bf16", "nf4"):
                for names, (N, K, count) in block(run).items():
                    case = f"{base} {names} M={M} r={r}"
                    if case not in run.done:
                        run.case = case
                        sizes = {"base": base, "layer": names, "count": count, "M": M, "N": N, "K": K, "r": r}
                        yield case, [sizes | row for row in _sweep_case(run, base, M, N, K, r)]
                        free()


def _sweep_case(run: Any, base: str, M: int, N: int, K: int, r: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layer = layers.make_layer(base, M, N, K, r, run.device)
    dense = layer.dense
    exact = {adapted: layers.truth(layer, dense, adapted) for adapted in (True, False)}
    bar = layers.errors(layers.step(layer, layers.eager(layer)), exact[True])
    ways: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "step": {}}
    rows: list[dict[str, Any]] = []
    found = {}
    providers = layers.providers(base)
    for name, (make, forced) in providers.items():
        try:
            forward, adapted = make(layer), name != "frozen"
            way = partial(_forced, forced, partial(layers.step, layer, forward, adapted))
            with poisoned():
                results = way()
            found[name] = layers.errors(results, exact[adapted])
            del results
            if (reason := layers.inexact(found[name], bar)) is not None:
                raise ArithmeticError(reason)
        except (ImportError, ArithmeticError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            rows.append({"provider": name, "mode": "step", "p50": None, "error": f"{type(error).__name__}: {error}"})
            continue
        ways["step"][name] = way
        ways["forward"][name] = partial(_without_grad, forced, forward)
    del exact
    c, at, device = Problem(M, N, K, r), rates(run), kernel_ops._name(run.device)
    for mode, named in ways.items():
        backward = mode == "step"
        floor = roofline.floor(c, at, backward, packed=base == "nf4")
        for name, times in measure(run, named).items():
            row = {"provider": name, "mode": mode, **times, "host": host_seconds(run, named[name]), "floor": floor}
            if name.startswith("ours"):
                with plans.use(**providers[name][1]):
                    row["predicted"] = layers.predicted(c, base, at, device, backward)
                    row["plan"] = plans.choose("lora_matmul", c, device) if base == "bf16" else "merged"
            worst = max(found[name]) if backward else found[name][0]
            rows.append(row | {"relative_error": worst, "error": None})
    return rows


def _forced(forced: dict[str, str], call: Callable[[], Any]) -> Any:
    with plans.use(**forced):
        return call()


def _without_grad(forced: dict[str, str], forward: Callable[[], Any]) -> Any:
    with plans.use(**forced), torch.no_grad():
        return forward()


def step_decode(run: Any) -> Found:
    """Decoding alone and with an adapter merged, and products of few tokens, against a copy of 1 GiB.

    Bytes are those that no implementation can spare: partial sums do not count as bandwidth that was used.
    """
    nf4_matmul = kernel_ops.launcher("nf4_matmul", "nf4_matmul")
    source = torch.randn((1 << 16) if run.tiny else (1 << 27), device=run.device)
    target = torch.empty_like(source)
    r, s = 16, layers.S
    for names, (N, K, count) in block(run).items():
        if names in run.done:
            continue
        run.case = names
        torch.manual_seed(0)
        w = random_weight_4bit(N, K, run.device)
        a, b = torch.randn(r, K, device=run.device) / K, torch.randn(N, r, device=run.device)
        dense, merged = decoded(w, torch.bfloat16), decoded(w, torch.float64) + s * b.double() @ a.double()
        packed = roofline.packed_bytes(Problem(0, N, K, r))
        # name, tokens -> bytes, the call, what eager torch gives, the truth
        ways: dict[tuple[str, int | None], tuple[int, Callable, Callable, Callable]] = {
            ("decode", None): (
                packed + 2 * N * K,
                partial(w.decode, torch.bfloat16),
                lambda dense=dense: dense,
                partial(decoded, w, torch.float64),
            ),
            ("decode merged", None): (
                packed + 2 * N * K + 4 * r * (N + K),
                partial(w.decode_merged, torch.bfloat16, a, b, s),
                lambda merged=merged: merged.bfloat16(),
                lambda merged=merged: merged,
            ),
        }
        for M in (1, 8) if run.tiny else (1, 4, 16, 32, 64):
            x = torch.randn(M, K, device=run.device).bfloat16()
            ways["nf4_matmul", M] = (
                packed + 2 * M * (N + K) + 4 * r * (N + K),
                partial(nf4_matmul, x, *w, a, b, s),
                lambda x=x, a=a, b=b, dense=dense: (x @ dense.t()) + (s * (x.float() @ a.t()) @ b.t()).bfloat16(),
                lambda x=x, merged=merged: x.double() @ merged.t(),
            )
        rows, right = [], {}
        for (kernel, tokens), (moved, call, eager, truth) in ways.items():
            with poisoned():
                result = call()
            (error,), (bar,) = (layers.errors((each,), (truth(),)) for each in (result, eager()))
            row = {"kernel": kernel, "layer": names, "count": count, "N": N, "K": K, "M": tokens, "bytes": moved}
            reason = layers.inexact([error], [bar])
            rows.append(row | dict.fromkeys(("p20", "p50", "p80", "copy")) | {"relative_error": error, "error": reason})
            if reason is None:
                right[f"{kernel} {tokens}"] = (call, rows[-1])
        times = measure(run, {name: call for name, (call, _) in right.items()} | {"copy": lambda: target.copy_(source)})
        for name, (_, row) in right.items():
            row |= {**times[name], "copy": 2 * source.nbytes / times["copy"]["p50"]}
        yield names, rows
        free()
