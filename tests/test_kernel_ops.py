"""Whole layers through the kernels: the ops on CPU tensors run in Triton's interpreter."""

import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import accuracy
import interpreter
import pytest
import torch
from test_ops import calls, weight_4bit
from torch.utils._pytree import tree_leaves, tree_map_only

import fastlora
from fastlora import kernel_ops, ops, plans
from fastlora.benchmarks.accuracy import same
from fastlora.benchmarks.commands.info import implementations
from fastlora.costs import Problem

ROOT = Path(__file__).parents[1]

interpreter.repair()

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU"),
    pytest.mark.usefixtures("bitsandbytes_eager"),
]


@pytest.fixture
def in_interpreter():
    with interpreter.kernels():
        yield


def leaves(M=23, K=64, N=48, r=6, dtype=torch.float32, adapter_dtype=None):
    shapes = {"x": (M, K), "a": (r, K), "b": (N, r), "bias": (N,), "w": (N, K), "dy": (M, N)}
    t = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    t["a"], t["b"] = (t[name].to(adapter_dtype or dtype) for name in "ab")
    return {name: v.requires_grad_(name in ("x", "a", "b", "bias")) for name, v in t.items()}


def forward_and_backward(t, p):
    torch.manual_seed(1)
    y = fastlora.lora_linear(t["x"], t["w"], t["a"], t["b"], 0.7, t["bias"], p)
    return y.detach(), *torch.autograd.grad(y, (t["x"], t["a"], t["b"], t["bias"]), t["dy"])


def test_within_the_context_kernels_run(monkeypatch):
    launched = []

    def launch(name, composition, *args):
        launched.append(name)
        return composition(*args)

    for name, composition in kernel_ops.compositions.items():
        monkeypatch.setitem(kernel_ops._LAUNCHERS, name, partial(launch, name, composition))
    with interpreter.kernels():
        forward_and_backward(leaves(), 0.0)
    forward_and_backward(leaves(), 0.0)
    assert launched == ["shrink", "lora_matmul", "lora_grad", "lora_matmul"]


def test_layer_gives_what_the_compositions_give(in_interpreter):
    t = leaves()
    ours = forward_and_backward(t, 0.0)
    double = {name: v.detach().double().requires_grad_(v.requires_grad) for name, v in t.items()}
    for value, expected in zip(ours, forward_and_backward(double, 0.0), strict=True):  # fp64: the compositions
        assert same(value, expected, torch.float32)


@pytest.mark.parametrize("lora_grad", plans.PLANS["lora_grad"])
@pytest.mark.parametrize("lora_matmul", plans.PLANS["lora_matmul"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_every_plan_gives_the_same(in_interpreter, lora_matmul, lora_grad, p):
    t = leaves()
    expected = forward_and_backward(t, p)
    with plans.use(lora_matmul=lora_matmul, lora_grad=lora_grad):
        for ours, value in zip(forward_and_backward(t, p), expected, strict=True):
            assert same(ours, value)


@pytest.mark.parametrize("quant_type", ["dense", "nf4", "fp4"])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["", "fp32 adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_is_as_accurate_as_peft(in_interpreter, dtype, adapter_dtype, quant_type):
    t = leaves(dtype=dtype, adapter_dtype=adapter_dtype)
    w, bias = t["w"].detach(), t["bias"].detach()
    base = accuracy.linear(w, bias) if quant_type == "dense" else accuracy.linear_4bit(w, bias, quant_type)
    a, b = t["a"].detach(), t["b"].detach()
    accuracy.check(accuracy.LayerCase(t["x"].detach(), base, a, b, 0.7, t["dy"], train_bias=quant_type == "dense"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp64_adapters_are_as_accurate_as_fp32_ones(in_interpreter, dtype):
    t = leaves(dtype=dtype, adapter_dtype=torch.float32)
    double = t | {name: t[name].detach().double().requires_grad_() for name in "ab"}
    for ours, expected in zip(forward_and_backward(double, 0.0), forward_and_backward(t, 0.0), strict=True):
        assert torch.equal(ours, expected.to(ours.dtype))
    assert forward_and_backward(double, 0.3)[2].dtype == torch.float64


@pytest.mark.parametrize("fourbit", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_twice_the_same_bits(in_interpreter, p, fourbit):
    t = leaves(M=70, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    t["w"] = accuracy.linear_4bit(t["w"].detach()).weight if fourbit else t["w"]
    for once, again in zip(forward_and_backward(t, p), forward_and_backward(t, p), strict=True):
        assert torch.equal(once, again)


def test_backward_draws_the_mask_of_forward(in_interpreter):
    """dx of the adapter alone is (D ∘ ...): with x = 1 the mask that y used is what dx shows."""
    K = 64
    x, eye = torch.ones(23, K, requires_grad=True), torch.eye(K)
    torch.manual_seed(1)
    y = fastlora.lora_linear(x, torch.zeros(K, K), eye, eye, 1.0, None, 0.3)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, dx)
    assert 0 < (y == 0).sum() < y.numel()


def test_checkpointing_replays_the_mask(in_interpreter):
    t = leaves()

    def layer(x):
        return fastlora.lora_linear(x, t["w"], t["a"], t["b"], 0.7, t["bias"], 0.3).square()

    torch.manual_seed(1)
    expected = torch.autograd.grad(layer(t["x"]).sum(), (t["x"], t["a"], t["b"]))
    torch.manual_seed(1)
    y = torch.utils.checkpoint.checkpoint(layer, t["x"], use_reentrant=False)
    for ours, value in zip(torch.autograd.grad(y.sum(), (t["x"], t["a"], t["b"])), expected, strict=True):
        assert torch.equal(ours, value)


@pytest.mark.parametrize("fourbit_base", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_layer_compiles_around_the_kernels(in_interpreter, p, fourbit_base):
    t = leaves(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    w = accuracy.linear_4bit(t["w"].detach()).weight if fourbit_base else t["w"].detach()

    def layer(x, a, b):
        return fastlora.lora_linear(x, w, a, b, 0.7, None, p).square()

    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        y = run(t["x"], t["a"], t["b"])
        results.append((y, *torch.autograd.grad(y.sum(), (t["x"], t["a"], t["b"]))))
    for eager, compiled in zip(*results, strict=True):
        assert same(compiled, eager)


def test_other_dtypes_stay_with_the_composition(in_interpreter):
    t = leaves(dtype=torch.float64)
    assert torch.equal(ops.shrink(t["x"], t["a"], 2.0), torch.ops.fastlora.shrink(t["x"], t["a"], 2.0))


def test_zero_tokens(in_interpreter):
    t = leaves(M=0)
    y, dx, da, db, dbias = forward_and_backward(t, 0.0)
    assert (y.shape, dx.shape) == ((0, 48), (0, 64))
    assert not da.any() and not db.any() and not dbias.any()


def test_every_op_has_a_kernel_or_is_left_to_torch():
    """A new op whose kernel was forgotten would run its composition on a GPU without a word."""
    names = set(implementations()["cpu"])
    call_others = {"lora_matmul_4bit", "lora_matmul_experts_4bit"}
    assert names - call_others == set(kernel_ops._LAUNCHERS)


@pytest.mark.parametrize("call", calls(torch.float32, torch.float32))
def test_kernels_are_compiled_around(in_interpreter, call, compiling):
    """Each op by its kernel gives what its composition gives, eager and compiled: the fakes fit the kernels too."""
    function, args = calls(torch.float32, torch.float32)[call]
    composition = kernel_ops.compositions[function.__name__]
    runs = [composition, function, torch.compile(function, backend="aot_eager", fullgraph=True)]
    copies = [tree_map_only(torch.Tensor, torch.clone, args) for _ in runs]
    results = [tree_leaves((run(*copy), copy)) for run, copy in zip(runs, copies, strict=True)]
    for expected, ours, compiled in zip(*results, strict=True):
        if isinstance(expected, torch.Tensor):
            assert ours.stride() == compiled.stride()
            assert torch.equal(ours, compiled)
            assert same(ours, expected) if ours.is_floating_point() else torch.equal(ours, expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("plan", plans.PLANS["linear_4bit"])
def test_nf4_matmul_by_every_plan(in_interpreter, plan, quant_type):
    weight, w = weight_4bit(48, 128, quant_type=quant_type)
    x, a, b, bias = torch.randn(5, 128), torch.randn(6, 128), torch.randn(48, 6), torch.randn(48)
    with plans.use(linear_4bit=plan):
        y = torch.ops.fastlora.nf4_matmul(x, *weight, a, b, 0.3, bias)
    expected = x.double() @ (w.double() + 0.3 * b.double() @ a.double()).t() + bias
    assert same(y, expected, torch.float32)


def test_few_tokens_are_multiplied_without_a_decoded_weight(in_interpreter, monkeypatch):
    weight, w = weight_4bit(48, 128)
    decoded = []
    monkeypatch.setattr(kernel_ops, "decode_4bit", lambda *args: decoded.append(args) or w)
    for tokens in (1, 300):
        x = torch.randn(tokens, 128)
        torch.ops.fastlora.nf4_matmul(x, *weight, None, None, 1.0)
    assert len(decoded) == 1


@pytest.mark.parametrize(
    ("plan", "p", "launched"),
    [
        ("fused", 0.0, ["nf4_matmul"]),
        ("merged", 0.0, ["decode_4bit"]),
        ("decoded", 0.0, ["decode_4bit", "shrink", "lora_matmul"]),
        (None, 0.3, ["shrink", "decode_4bit", "lora_matmul"]),  # a mask leaves no choice
    ],
)
def test_a_4bit_layer_takes_the_plan(in_interpreter, monkeypatch, plan, p, launched):
    base = accuracy.linear_4bit(torch.randn(48, 128))
    x, a, b = torch.randn(5, 128), torch.randn(6, 128), torch.randn(48, 6)
    seen, launcher = [], kernel_ops.launcher

    def watched(module, name):
        function = launcher(module, name)
        return (lambda *args: seen.append(name) or function(*args)) if name in kernel_ops._LAUNCHERS else function

    monkeypatch.setattr(kernel_ops, "launcher", watched)
    with plans.use(lora_matmul="tail", **{"linear_4bit": plan} if plan else {}):
        fastlora.lora_linear(x, base.weight, a, b, 0.3, None, p)
    assert seen == launched


def test_forced_plans_hold_in_other_threads():
    """Autograd runs the backward of a GPU's tensors in threads of its own."""
    seen = []
    with plans.use(lora_grad="two_pass", kernels="off"):
        thread = threading.Thread(
            target=lambda: seen.extend([plans.choose("lora_grad", Problem(8, 0, 8, 4)), plans.kernels_are_off()])
        )
        thread.start()
        thread.join()
    assert seen == ["two_pass", True]


def test_kernels_can_be_turned_off(in_interpreter, monkeypatch):
    launched = []
    for name, launch in kernel_ops._LAUNCHERS.items():
        monkeypatch.setitem(kernel_ops._LAUNCHERS, name, partial(lambda f, *a: launched.append(f) or f(*a), launch))
    t = leaves(dtype=torch.bfloat16)
    with plans.use(kernels="off"):
        off = forward_and_backward(t, 0.3)
        assert not launched
        with plans.use(kernels="on"):
            forward_and_backward(t, 0.3)
    assert launched
    with interpreter_off():
        for ours, value in zip(off, forward_and_backward(t, 0.3), strict=True):
            assert torch.equal(ours, value)


@contextmanager
def interpreter_off():
    """The ops in plain torch, on a CPU too."""
    library = torch.library.Library("fastlora", "IMPL")
    for name, composition in kernel_ops.compositions.items():
        library.impl(name, composition, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def python(script):
    """What a fresh process prints that has imported no Triton."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


IS_KERNEL = """
import sys, torch
{before}
import fastlora
from fastlora import kernel_ops
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*{{has(f"fastlora::{{name}}", key) for name in kernel_ops._LAUNCHERS for key in ("CUDA", "XPU")}})
"""


def test_importing_registers_the_kernels_for_gpus_and_imports_no_triton():
    assert python(IS_KERNEL.format(before="") + "assert 'triton' not in sys.modules") == "True\n"


def test_without_triton_torch_computes_and_info_says_so():
    script = (
        IS_KERNEL.format(before="sys.modules['triton'] = None")
        + """
x, w, a, b = (torch.randn(s, requires_grad=i != 1) for i, s in enumerate(((5, 8), (6, 8), (2, 8), (6, 2))))
y = fastlora.lora_linear(x, w, a, b, 0.5)
y.sum().backward()
from fastlora.benchmarks.accuracy import same
assert same(y, x @ w.t() + 0.5 * x @ a.t() @ b.t(), longest=8) and b.grad is not None
from fastlora.cli import main
main(["info"])"""
    )
    first, *info = python(script).splitlines()
    assert first == "False"
    assert any(line.split() == ["gpu", "kernels", "triton", "is", "not", "installed"] for line in info)
    assert any(re.match(r"ops on cuda +torch composition: .*shrink", line) for line in info)
    assert not any(re.match(r"ops on cuda +kernel", line) for line in info)


def test_a_gpu_older_than_triton_supports_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (8, 0))
    assert kernel_ops.unsupported_reason(torch.device("cuda", 0)) is None
    assert kernel_ops.unsupported_reason(torch.device("cuda", 1)) == "compute capability 7.5, Triton needs 8.0"
    kernel_ops.unsupported_reason.cache_clear()


@pytest.mark.parametrize("device", ["cuda:0", "xpu:0"])
@pytest.mark.parametrize("call", calls(torch.float32, torch.float32))
def test_fake_tensors_of_a_gpu_reach_the_fake_and_no_kernel(call, device, monkeypatch):
    for name in kernel_ops._LAUNCHERS:
        monkeypatch.setitem(kernel_ops._LAUNCHERS, name, None)
    function, args = calls(torch.bfloat16, torch.float32)[call]
    with torch._subclasses.FakeTensorMode():
        there = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), args)
        results = tree_leaves(function(*there))
    for real, fake in zip(tree_leaves(function(*args)), results, strict=True):
        if real is not None:
            assert (real.shape, real.dtype, str(fake.device)) == (fake.shape, fake.dtype, device)
