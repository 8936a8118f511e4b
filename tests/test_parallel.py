"""ParallelAdapter beside its one-line equivalent in plain torch, and against fp64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_model, decoded, linear, linear_4bit
from blocks import CountOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import ParallelAdapter
from fastlora.benchmarks.accuracy import same
from fastlora.kernels.limits import ACTIVATIONS
from fastlora.reference import activate

K, N, M, R = 64, 96, 10, 5
LONGEST = max(K, N, M)
BF16 = torch.bfloat16


class ComputesItself(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def tensors(dtype):
    torch.manual_seed(0)
    return torch.randn(N, K).to(dtype) / K**0.5, torch.randn(N).to(dtype)


def conv1d(dtype):
    layer, (w, bias) = Conv1D(N, K), tensors(dtype)
    layer.weight, layer.bias = nn.Parameter(w.t().contiguous()), nn.Parameter(bias)
    return layer


def opaque(dtype):
    layer = ComputesItself(K, N).to(dtype)
    layer.load_state_dict(linear(*tensors(dtype)).state_dict())
    return layer


BASES = {
    "dense": lambda dtype: linear(*tensors(dtype)),
    "nf4": lambda dtype: linear_4bit(*tensors(dtype)),
    "fp4": lambda dtype: linear_4bit(*tensors(dtype), quant_type="fp4"),
    "conv1d": conv1d,
    "opaque": opaque,
}


def adapted(base="dense", dtype=torch.float32, **config) -> ParallelAdapter:
    layer = ParallelAdapter(BASES[base](dtype), **{"r": R, "scaling": 1.5} | config)
    nn.init.normal_(layer.adapter_up, std=0.3)
    layer.base_layer.requires_grad_(False)
    return layer


def plain(layer: ParallelAdapter, x: torch.Tensor) -> torch.Tensor:
    """The equivalent of the docstring, on a dense weight."""
    base, down, up = layer.base_layer, layer.adapter_down, layer.adapter_up
    transposed = isinstance(base, Conv1D)
    weight = base.weight.t() if transposed else decoded(base, x.dtype)
    y = F.linear(x, weight, base.bias if base.bias is None else base.bias.to(x.dtype))
    h = activate(F.linear(x.to(down.dtype), down), layer.activation)
    return y + (layer.scaling * F.linear(h, up)).to(y.dtype)


def results(layer, x, forward=None) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = (layer if forward is None else forward)(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad}
    for name, p in layer.named_parameters():
        if p.requires_grad:
            found[name], p.grad = p.grad, None
    return found


def in_fp64(layer: ParallelAdapter) -> ParallelAdapter:
    wide = copy.deepcopy(layer)
    if not isinstance(wide.base_layer, Conv1D):
        bias = wide.base_layer.bias
        wide.base_layer = linear(decoded(wide.base_layer), None if bias is None else bias.detach().double())
    return wide.double()


def an_input(dtype=torch.float32):
    return torch.randn(2, M // 2, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_its_equivalent(activation, base, dtype):
    layer = adapted(base, dtype, activation=activation)
    x = an_input(dtype)
    wide = in_fp64(layer)
    truth = results(wide, x.double(), lambda x: plain(wide, x))
    theirs = results(layer, x, lambda x: plain(layer, x))
    check_model(results(layer, x), theirs, truth, LONGEST, dtype)
    (counted,) = fastlora.report(nn.Sequential(layer)).layers.values()
    assert (counted.fused, counted.added) == ((0, 1) if base == "opaque" else (1, 0))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_two_products_and_nothing_of_the_size_of_h_or_y_is_saved(base):
    layer, x = adapted(base), an_input().requires_grad_()
    saved = {}
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), CountOps() as ran:
        y = layer(x)
        y.sum().backward()
    sizes = set(saved.values())
    assert M * N not in sizes and {M * K, M * R} <= sizes
    assert ran.names["fastlora::lora_matmul"] + ran.names["fastlora::lora_matmul_4bit"] == 2


WAYS = {
    "checkpointed": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=False),
    "reentrant": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=True),
    "compiled": lambda layer: torch.compile(layer, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_in_other_ways(way, base, compiling):
    torch.compiler.reset()
    layer, x = adapted(base), an_input()
    expected = results(layer, x)
    found = results(layer, x, WAYS[way](layer))
    assert all(same(found[name], t, longest=LONGEST) for name, t in expected.items())


def test_copies_and_pickles():
    layer, x = adapted(), an_input()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_without_gradients_and_one_token_and_none():
    layer, x = adapted(), an_input()
    expected = layer(x)
    with torch.no_grad():
        assert same(layer(x), expected, longest=K)
        assert same(layer(x[0, 0]), expected[0, 0], longest=K)
        assert layer(x[:0]).shape == (0, M // 2, N)
    found = results(layer, x[:0])
    assert all(not t.any() for t in found.values())


def test_autocast():
    layer, x = adapted(), an_input()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == BF16 and layer.adapter_down.grad.dtype == torch.float32
    assert same(y, layer(x).bfloat16(), BF16, longest=K)


def test_only_needed_gradients():
    layer, x = adapted(), an_input()
    layer.adapter_down.requires_grad_(False)
    expected = results(adapted(), x)
    found = results(layer, x)
    assert same(found["adapter_up"], expected["adapter_up"], longest=M) and same(found["dx"], expected["dx"], longest=N)
    layer.adapter_down.requires_grad_(True)
    layer.adapter_up.requires_grad_(False)
    (grad,) = torch.autograd.grad(layer(x).sum(), [layer.adapter_down])
    assert grad.any()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), [layer.adapter_down], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_it_starts_as_the_base_layer():
    base = BASES["dense"](torch.float32)
    layer = ParallelAdapter(base, r=R)
    assert same(layer(an_input()), base(an_input()), longest=K)
    assert not base.weight.requires_grad and layer.base_layer is base
    assert (layer.r, layer.in_features, layer.out_features) == (R, K, N) and "activation=relu" in repr(layer)


@pytest.mark.parametrize(
    "config, error, message",
    [
        ({"r": 0}, ValueError, "r must be positive"),
        ({"r": 2.5}, TypeError, "r must be an integer"),
        ({"activation": "tanh"}, ValueError, "activation must be one of silu"),
        ({"scaling": float("nan")}, ValueError, "scaling must be a finite number"),
        ({"base_layer": nn.ReLU()}, TypeError, "expected a linear layer"),
    ],
)
def test_bad_input(config, error, message):
    with pytest.raises(error, match=message):
        ParallelAdapter(**{"base_layer": nn.Linear(K, N)} | config)


def test_bad_x():
    with pytest.raises(ValueError, match=r"x must be \[..., 64\], got \[2, 3\]"):
        adapted()(torch.ones(2, 3))
    with pytest.raises(TypeError, match="autocast is off"):
        adapted()(an_input(BF16))
