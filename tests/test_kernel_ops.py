"""Whole layers through the kernels: the ops on CPU tensors run in Triton's interpreter."""

from functools import partial

import accuracy
import interpreter
import pytest
import torch

import fastlora
from fastlora import kernel_ops, ops, plans

interpreter.repair()

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU"),
    pytest.mark.usefixtures("bitsandbytes_eager"),
]
COMPOSITIONS = {name: getattr(ops, name) for name in ("shrink", "lora_matmul", "lora_grad", "decode_4bit")}


@pytest.fixture
def in_interpreter():
    with kernel_ops.in_interpreter(COMPOSITIONS):
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

    for name, composition in COMPOSITIONS.items():
        monkeypatch.setitem(kernel_ops._LAUNCHERS, name, partial(launch, name, composition))
    with kernel_ops.in_interpreter(COMPOSITIONS):
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_is_as_accurate_as_peft(in_interpreter, dtype, quant_type):
    t = leaves(dtype=dtype)
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


def test_other_dtypes_stay_with_the_composition(in_interpreter):
    t = leaves(dtype=torch.float64)
    assert torch.equal(ops.shrink(t["x"], t["a"], 2.0), torch.ops.fastlora.shrink(t["x"], t["a"], 2.0))


def test_zero_tokens(in_interpreter):
    t = leaves(M=0)
    y, dx, da, db, dbias = forward_and_backward(t, 0.0)
    assert (y.shape, dx.shape) == ((0, 48), (0, 64))
    assert not da.any() and not db.any() and not dbias.any()
