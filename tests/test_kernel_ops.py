"""Whole layers through the kernels: the ops on CPU tensors run in Triton's interpreter."""

import subprocess
import sys
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

    for name, composition in interpreter.compositions().items():
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
        assert (value.double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("lora_grad", plans.PLANS["lora_grad"])
@pytest.mark.parametrize("lora_matmul", plans.PLANS["lora_matmul"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_every_plan_gives_the_same(in_interpreter, lora_matmul, lora_grad, p):
    t = leaves()
    expected = forward_and_backward(t, p)
    with plans.use(lora_matmul=lora_matmul, lora_grad=lora_grad):
        for ours, value in zip(forward_and_backward(t, p), expected, strict=True):
            assert (ours - value).norm() <= 1e-6 * value.norm()


@pytest.mark.parametrize("quant_type", ["dense", "nf4", "fp4"])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["", "fp32 adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_is_as_accurate_as_peft(in_interpreter, dtype, adapter_dtype, quant_type):
    t = leaves(dtype=dtype, adapter_dtype=adapter_dtype)
    w, bias = t["w"].detach(), t["bias"].detach()
    base = accuracy.linear(w, bias) if quant_type == "dense" else accuracy.linear_4bit(w, bias, quant_type)
    a, b = t["a"].detach(), t["b"].detach()
    accuracy.check(accuracy.Problem(t["x"].detach(), base, a, b, 0.7, t["dy"], train_bias=quant_type == "dense"))


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
        assert (eager - compiled).norm() <= 4 * torch.finfo(eager.dtype).eps * eager.norm()


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
    names = {name.removeprefix("fastlora::") for name in torch._C._dispatch_get_all_op_names() if "fastlora::" in name}
    assert names == set(interpreter.compositions())


@pytest.mark.parametrize("call", calls(torch.float32, torch.float32))
def test_kernels_are_compiled_around(in_interpreter, call):
    """Each op by its kernel gives what its composition gives, eager and compiled: the fakes fit the kernels too."""
    function, args = calls(torch.float32, torch.float32)[call]
    composition = interpreter.compositions()[function.__name__]
    runs = [composition, function, torch.compile(function, backend="aot_eager", fullgraph=True)]
    copies = [tree_map_only(torch.Tensor, torch.clone, args) for _ in runs]
    results = [tree_leaves((run(*copy), copy)) for run, copy in zip(runs, copies, strict=True)]
    for expected, ours, compiled in zip(*results, strict=True):
        if isinstance(expected, torch.Tensor):
            assert ours.stride() == compiled.stride()
            assert torch.equal(ours, compiled)
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("plan", plans.PLANS["linear_4bit"])
def test_nf4_matmul_by_every_plan(in_interpreter, plan, quant_type):
    weight, w = weight_4bit(48, 128, quant_type=quant_type)
    x, a, b, bias = torch.randn(5, 128), torch.randn(6, 128), torch.randn(48, 6), torch.randn(48)
    with plans.use(linear_4bit=plan):
        y = torch.ops.fastlora.nf4_matmul(x, *weight, a, b, 0.3, bias)
    expected = x.double() @ (w.double() + 0.3 * b.double() @ a.double()).t() + bias
    assert (y - expected).norm() <= 1e-6 * expected.norm()


def test_few_tokens_are_multiplied_without_a_decoded_weight(in_interpreter, monkeypatch):
    weight, w = weight_4bit(48, 128)
    decoded = []
    monkeypatch.setattr(kernel_ops, "decode_4bit", lambda *args: decoded.append(args) or w)
    for tokens in (1, 300):
        x = torch.randn(tokens, 128)
        torch.ops.fastlora.nf4_matmul(x, *weight, None, None, 1.0)
    assert len(decoded) == 1


def test_registering_for_gpus_imports_no_triton():
    script = """if True:
    import sys, torch
    import fastlora.ops_4bit
    from fastlora import kernel_ops, ops
    library = torch.library.Library("fastlora", "IMPL")
    names = [name for name in kernel_ops._LAUNCHERS if hasattr(ops, name)]
    kernel_ops.register_gpus(library, {name: getattr(ops, name) for name in names})
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert "triton" not in sys.modules
    print(*(has(f"fastlora::{name}", key) for name in kernel_ops._LAUNCHERS for key in ("CUDA", "XPU")))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) == {"True"}


def test_without_triton_nothing_is_registered(monkeypatch):
    monkeypatch.setattr(kernel_ops, "find_spec", lambda name: None)
    registered = []
    monkeypatch.setattr(kernel_ops, "register", lambda *args: registered.append(args))
    kernel_ops.register_gpus(None, interpreter.compositions())
    assert not registered
