"""The steps of `gpu.py` that check and time ops and layers.

Each yields (case, rows) as it measures, and passes over the cases that are done.
"""

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora import costs, kernel_ops, plans
from fastlora.benchmarks import decode, protocol, resume, tuning
from fastlora.benchmarks.cases.modules import Case, linear_cases
from fastlora.benchmarks.environment import versions
from fastlora.benchmarks.providers import PROVIDERS, Provider, forcing
from fastlora.benchmarks.records import clocks
from fastlora.costs import Problem, Rates

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


def step_sweep(run: Any) -> Found:
    tokens = (8,) if run.tiny else (8192, 1, 16, 4096, 1024, 256)
    for r in (4,) if run.tiny else (16, 64):
        for M in tokens:
            for base in ("bf16", "nf4"):
                for case in layers_of(run, M=M, r=r, base=base):
                    if str(case) not in run.done:
                        run.case = str(case)
                        yield str(case), _sweep_case(run, case)
                        protocol.free()


def _sweep_case(run: Any, case: Case) -> list[dict[str, Any]]:
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


def step_decode(run: Any) -> Found:
    """Decoding alone and with an adapter merged, and products of few tokens.

    Bytes are those that no implementation can spare: partial sums do not count as bandwidth that was used.
    """
    tokens = (1, 8) if run.tiny else (1, 4, 16, 32, 64)
    for case in (replace(case, verb="decode") for case in layers_of(run, M=0, r=16, base="nf4")):
        if case.layer not in run.done:
            run.case = case.layer
            given = decode.operands(case, run.device)
            found = [*decode.candidates(case, given), *_products(case, given, tokens)]
            yield case.layer, decode.run(case, found, run.device, rates(run), rounds(run))
            protocol.free()


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
