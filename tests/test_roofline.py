"""The model's bytes against what the kernels touch: every address that a launch loads or stores, counted once."""

from dataclasses import replace

import interpreter
import numpy as np
import pytest
import torch
from test_ops import weight_4bit
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastlora import costs, kernel_ops, plans
from fastlora.benchmarks import roofline
from fastlora.costs import A100, COSTS, H100, LaunchCost, Problem, Rates, predict
from fastlora.kernels.limits import FUSED_STEP

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="watches kernels in Triton's interpreter"),
    pytest.mark.usefixtures("bitsandbytes_eager"),
]
BF16, FP32 = torch.bfloat16, torch.float32
INTERPRETED = replace(H100, multiprocessors=4)  # as kernels believe of the interpreter
COUNTERS = 4 * 64  # of arrivals, at most: a few bytes of a split reduction that the model leaves out
CODE_BOOKS = 8 * 256 + 4 * 256 + 4  # of bytes, of nested statistics and their offset: not counted by the model


class Traffic(TorchDispatchMode):
    """Bytes of every launch: of kernels the distinct addresses, of torch's products their operands and result."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.launches = []
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        run = InterpretedFunction.run

        def create_masked_load(builder, ptrs, mask, *args):
            result = load(builder, ptrs, mask, *args)
            self._touch("loads", ptrs, mask, result.data.itemsize)
            return result

        def create_masked_store(builder, ptrs, value, mask, *args):
            self._touch("stores", ptrs, mask, value.data.itemsize)
            return store(builder, ptrs, value, mask, *args)

        def launch(function, *args, **kwargs):
            self._touched = {"loads": [], "stores": []}
            with _disable_current_modes():  # the interpreter's own work
                run(function, *args, **kwargs)
            moved = sum(np.unique(np.concatenate(found)).size for found in self._touched.values())
            self.launches.append((function.__name__.strip("_").removesuffix("_kernel"), moved))

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", create_masked_store)
        monkeypatch.setattr(InterpretedFunction, "run", launch)

    def _touch(self, kind, ptrs, mask, itemsize):
        first = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.int64)
        self._touched[kind].append((first[:, None] + np.arange(itemsize)).reshape(-1))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            tensors = [t for t in args if isinstance(t, torch.Tensor)]
            self.launches.append(("gemm", sum(t.numel() * t.element_size() for t in (*tensors, result))))
        else:
            assert not name.startswith(("aten::copy", "aten::_to_copy", "aten::sum", "aten::mul")), name
        return result


def operands(c, dtype):
    def new(*shape, dtype=dtype):
        return torch.randn(shape).to(dtype)

    adapters = FP32 if c.adapter_itemsize == 4 else BF16
    N = max(c.N, 1)
    return {
        "x": new(c.M, c.K), "w": new(N, c.K), "a": new(c.r, c.K, dtype=adapters), "b": new(N, c.r, dtype=adapters),
        "xa": new(c.M, c.r, dtype=adapters), "bk": new(c.K, c.r, dtype=adapters),
    }  # fmt: skip


def launch(op, plan, c):
    """Carry out the op by the plan, by its launchers."""
    from fastlora.kernels.dora import dora_grad
    from fastlora.kernels.lora_grad import lora_grad
    from fastlora.kernels.lora_matmul import (
        lora_matmul,
        lora_matmul_base_last,
        lora_matmul_group,
        lora_matmul_group_base_last,
    )
    from fastlora.kernels.nf4 import decode_4bit
    from fastlora.kernels.nf4_matmul import nf4_matmul
    from fastlora.kernels.shrink import shrink, shrink_group
    from fastlora.kernels.swiglu import swiglu, swiglu_backward_

    dtype = BF16 if c.itemsize == 2 else FP32
    t = operands(c, dtype)
    x, w, a, b, xa = (t[name] for name in ("x", "w", "a", "b", "xa"))
    dense = {"tail": lora_matmul, "base_last": lora_matmul_base_last}
    if op.endswith("_group"):
        return launch_group(
            c, dtype, {"": shrink_group, "tail": lora_matmul_group, "base_last": lora_matmul_group_base_last}[plan]
        )
    if op in ("decode_4bit", "linear_4bit"):
        weight, _ = weight_4bit(c.N, c.K, 64, "nf4", True)

    def decode(*adapter):
        return decode_4bit(*weight, dtype, *(adapter or (None, None)), 0.5)

    cases = {
        ("shrink", ""): lambda: shrink(x, a, 0.5),
        ("lora_matmul", plan): lambda: dense[plan](x, w, xa, b),
        ("lora_grad", plan): lambda: lora_grad(x, None, t["bk"], xa, 0.5, one_pass=plan == "one_pass"),
        ("lora_grad_a", ""): lambda: lora_grad(x, None, None, xa, 0.5),
        ("decode_4bit", ""): decode,
        ("decode_4bit", "merged"): lambda: decode(a, b),
        ("linear_4bit", "merged"): lambda: torch.mm(x, decode(a, b).t()),
        ("linear_4bit", "decoded"): lambda: dense["tail"](x, decode(), shrink(x, a, 0.5), b),
        ("linear_4bit", "fused"): lambda: nf4_matmul(x, *weight, a, b, 0.5),
        ("dora_grad", ""): lambda: dora_grad(x, x.clone(), torch.ones(c.K)),
        ("swiglu", ""): lambda: swiglu(x, x.clone(), "silu"),
        ("swiglu_backward_", ""): lambda: swiglu_backward_(x, x.clone(), x.clone(), "silu"),
    }
    return cases[op, plan]


def launch_group(c, dtype, launcher):
    """A call for as many adapters as there are parts."""
    n, r, p, seed = c.parts, c.r // c.parts, [0.0] * c.parts, [None] * c.parts
    t = operands(replace(c, r=r), dtype)
    if launcher.__name__ == "shrink_group":
        return lambda: launcher(t["x"], [t["a"].clone() for _ in range(n)], [0.5] * n, p, seed)
    parts = operands(replace(c, r=r, K=c.K // n), dtype)
    each = {name: [parts[name].clone() for _ in range(n)] for name in ("x", "w", "xa", "b")}
    return lambda: launcher(each["x"], each["w"], each["xa"], each["b"], p, seed)


PROBLEMS = [
    Problem(48, 64, 256, 16),
    Problem(48, 65, 96, 6, itemsize=4),  # no whole tiles, padded rank
    Problem(9, 320, 512, 24, adapter_itemsize=2),  # few tokens: the reduction is split
    Problem(200, 64, 512, 40),  # many rows, several slabs
]


@pytest.mark.one_case_in(7)
@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: f"{c.M}x{c.N}x{c.K} r={c.r}, {c.itemsize} bytes")
@pytest.mark.parametrize(("op", "plan"), COSTS, ids=map(" ".join, COSTS))
def test_bytes_are_those_that_the_kernels_touch(op, plan, c, monkeypatch):
    interpreter.repair()
    if plan == "fused":
        c = replace(c, M=min(c.M, 16), K=c.K // FUSED_STEP * FUSED_STEP)
    if op.startswith("swiglu"):
        c = replace(c, M=min(c.M, 9))  # tiles of the interpreter are small, and this has many
    if op.endswith("_group"):
        c = replace(c, r=2 * c.r, parts=2)
    run = launch(op, plan, c)
    with Traffic(monkeypatch) as traffic:
        run()
    rates = replace(INTERPRETED, kernel_gemm=1e15, kernel_gemm_fp32=1e15)  # `decoded` then goes on by `tail`
    expected = COSTS[op, plan](c, rates)
    assert [name for name, _ in traffic.launches] == [launched.name for launched in expected]
    for (name, moved), launched in zip(traffic.launches, expected, strict=True):
        slack = COUNTERS + (CODE_BOOKS if name in ("decode_4bit", "nf4_matmul") else 0)
        assert launched.bytes <= moved <= launched.bytes + slack, name
    assert predict(op, plan, c, rates).bytes == sum(launched.bytes for launched in expected)


@pytest.mark.parametrize("plan", ["merged", "fused"])
def test_bytes_without_an_adapter(plan, monkeypatch):
    from fastlora.kernels.nf4 import decode_4bit
    from fastlora.kernels.nf4_matmul import nf4_matmul

    interpreter.repair()
    c = Problem(9, 320, 512, 0)
    (weight, _), x = weight_4bit(c.N, c.K, 64, "nf4", True), torch.randn(c.M, c.K).to(BF16)
    with Traffic(monkeypatch) as traffic:
        if plan == "fused":
            nf4_matmul(x, *weight, None, None, 1.0)
        else:
            torch.mm(x, decode_4bit(*weight, BF16, None, None, 1.0).t())
    expected = COSTS["linear_4bit", plan](c, INTERPRETED)
    assert [name for name, _ in traffic.launches] == [launched.name for launched in expected]
    moved, modelled = (sum(each[1] for each in found) for found in (traffic.launches, expected))
    assert modelled <= moved <= modelled + CODE_BOOKS + COUNTERS


def test_problems_above_split_reductions_and_do_not(monkeypatch):
    cut, splits = costs._cut, []
    monkeypatch.setattr(costs, "_cut", lambda *args: splits.append(cut(*args)[1]) or cut(*args))
    for c in PROBLEMS:
        COSTS["shrink", ""](c, INTERPRETED)
    assert {each > 1 for each in splits} == {True, False}


def test_every_plan_has_a_cost():
    assert {(op, plan) for op, names in plans.PLANS.items() for plan in names} <= COSTS.keys()
    known_as = {"nf4_matmul": "linear_4bit"}
    ops = {op for op in kernel_ops._LAUNCHERS if not op.endswith("_experts")}  # what those move depends on the routing
    assert {op for op, _ in COSTS} == {known_as.get(op, op) for op in ops}


class TestSeconds:
    def test_are_those_of_what_binds(self):
        rates = Rates(1e9, 1e12, 5e11, 1e11, 5e10, issue=1e12, launch=1e-6, multiprocessors=1)
        cases = [
            (LaunchCost("", bytes=2000, flops=10**6), 2, 2e-6, "memory"),
            (LaunchCost("", bytes=2000, flops=10**7), 2, 2e-5, "tensor core"),
            (LaunchCost("", bytes=2000, flops=10**7, vendor=True), 2, 1e-5, "tensor core"),
            (LaunchCost("", bytes=2000, flops=10**7, vendor=True), 4, 1e-4, "fp32 units"),
            (LaunchCost("", bytes=2000, flops=10**7), 4, 2e-4, "fp32 units"),
            (LaunchCost("", bytes=2000, instructions=10**7), 2, 1e-5, "issue"),
            (LaunchCost("", bytes=2), 2, 1e-6, "launch"),
        ]
        for launched, itemsize, seconds, bound in cases:
            times = launched.times(rates, itemsize)
            assert max(times.values()) == pytest.approx(seconds)
            assert max(times, key=lambda name: times[name]) == bound

    def test_add_up_over_launches(self):
        c = Problem(8192, 4096, 4096, 16)
        one, two = COSTS["lora_matmul", "base_last"](c, H100)
        expected = max(one.times(H100, 2).values()) + max(two.times(H100, 2).values())
        prediction = predict("lora_matmul", "base_last", c, H100)
        assert prediction.seconds == expected
        assert prediction.flops == 2 * 8192 * 4096 * (4096 + 3 * 16)  # fp32 adapters: high and low parts
        assert prediction.bound == "tensor core"

    def test_of_a_group_are_less_than_of_its_parts(self):
        c = Problem(8192, 4096, 4096, 16)
        q_k_v = replace(c, r=3 * 16, parts=3)
        assert predict("shrink_group", "", q_k_v, H100).seconds < 2 * predict("shrink", "", c, H100).seconds
        dx = replace(q_k_v, K=3 * 4096)
        single = predict("lora_matmul", "tail", c, H100)
        together = predict("lora_matmul_group", "tail", dx, H100)
        assert together.bytes == 3 * single.bytes - 2 * 8192 * 4096 * 2, "dx is written once"

    @staticmethod
    def floor(c, rates, backward=False, packed=False):
        both = roofline.passes(c, packed)
        return sum(roofline.seconds(*each, c, rates) for each in both[: 1 + backward])

    @pytest.mark.parametrize("rates", [H100, A100], ids=["H100", "A100"])
    @pytest.mark.parametrize("M", [1, 64, 1024, 8192])
    def test_no_plan_beats_the_floor(self, rates, M):
        for K, N in ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)):
            c = Problem(M, N, K, 16)
            for plan in plans.possible("linear_4bit", c):
                assert predict("linear_4bit", plan, c, rates).seconds > self.floor(c, rates, packed=True)
            for plan in plans.PLANS["lora_matmul"]:
                whole = predict("lora_matmul", plan, c, rates).seconds + predict("shrink", "", c, rates).seconds
                assert whole > self.floor(c, rates)
            assert 2 * self.floor(c, rates) <= self.floor(c, rates, backward=True)


def test_modelled_rates_by_name():
    assert costs.modelled("NVIDIA H100 80GB HBM3") is costs.modelled("NVIDIA H200") is H100
    assert costs.modelled("NVIDIA H20").gemm < H100.gemm < costs.modelled("NVIDIA B200").gemm
    assert costs.modelled("NVIDIA A100-SXM4-80GB") is costs.modelled("some GPU") is A100
    assert not H100.measured


def test_rates_survive_json():
    assert Rates.from_json(H100.to_json()) == H100
    for wrong in ({"copy": 0.0}, {"gemm": float("inf")}, {"issue": "fast"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a positive number"):
            Rates.from_json(H100.to_json() | wrong)
    with pytest.raises(TypeError):
        Rates.from_json({"copy": 1.0})
