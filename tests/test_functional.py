import copy

import bitsandbytes as bnb
import pytest
import torch
from accuracy import check_model, decoded, gradients, linear, linear_4bit
from blocks import CountOps
from oracle import in_fp64
from torch import nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import reference
from fastlora.base_layers import base_kind
from fastlora.benchmarks.accuracy import inexact, relative_error
from fastlora.fourbit import weight_4bit
from fastlora.functional import Adapter, adapted_forward, lora_linear

K, N, r = 128, 32, 4
INF = float("inf")


def arguments(**changed):
    good = {
        "x": torch.randn(3, K),
        "weight": torch.randn(N, K),
        "lora_A": torch.randn(r, K),
        "lora_B": torch.randn(N, r),
        "scaling": 2.0,
        "bias": torch.randn(N),
        "dropout_p": 0.0,
    }
    assert changed.keys() <= good.keys()
    return good | changed


def unquantised():
    return bnb.nn.Linear4bit(K, N).weight


BAD = {
    "x of another width": (dict(x=torch.randn(3, K + 1)), ValueError, r"x must be \[\.\.\., 128\].*got \[3, 129\]"),
    "x without dimensions": (dict(x=torch.tensor(1.0)), ValueError, r"x must be \[\.\.\., 128\].*got \[\]"),
    "x of integers": (dict(x=torch.ones(3, K, dtype=torch.int64)), TypeError, r"x must be floating.*int64"),
    "x not a tensor": (dict(x=[1.0]), TypeError, r"x must be a tensor, got list"),
    "x of another dtype": (dict(x=torch.randn(3, K).bfloat16()), TypeError, r"one dtype.*bfloat16.*float32"),
    "x on another device": (dict(x=torch.randn(3, K, device="meta")), ValueError, r"on x's device meta, got cpu"),
    "weight of one dimension": (dict(weight=torch.randn(K)), ValueError, r"weight must be \[N, K\], got \[128\]"),
    "weight of integers": (dict(weight=torch.ones(N, K, dtype=torch.int8)), TypeError, r"weight must be float.*int8"),
    "weight not a tensor": (dict(weight=nn.Linear(K, N)), TypeError, r"weight must be a tensor.*got Linear"),
    "weight None": (dict(weight=None), TypeError, r"weight must be a tensor.*got NoneType"),
    "weight on another device": (dict(weight=torch.randn(N, K, device="meta")), ValueError, r"weight must be on.*cpu"),
    "weight transposed": (dict(weight=torch.randn(K, N)), ValueError, r"x must be \[\.\.\., 32\]"),
    "weight not quantised yet": (dict(weight=unquantised()), ValueError, r"not quantised yet.*\.to\(device\)"),
    "lora_A of another width": (dict(lora_A=torch.randn(r, 9)), ValueError, r"lora_A must be \[r, 128\].*got \[4, 9\]"),
    "lora_A of one dimension": (dict(lora_A=torch.randn(K)), ValueError, r"lora_A must be \[r, 128\].*got \[128\]"),
    "lora_A None": (dict(lora_A=None), TypeError, r"lora_A must be a tensor, got NoneType"),
    "lora_A of integers": (dict(lora_A=torch.ones(r, K).int()), TypeError, r"lora_A must be floating.*int32"),
    "lora_A on another device": (dict(lora_A=torch.randn(r, K, device="meta")), ValueError, r"lora_A must be on"),
    "rank 0": (
        dict(lora_A=torch.randn(0, K), lora_B=torch.randn(N, 0)),
        ValueError,
        r"the rank r must be positive",
    ),
    "lora_B transposed": (dict(lora_B=torch.randn(r, N)), ValueError, r"lora_B must be \[32, 4\].*got \[4, 32\]"),
    "lora_B of another rank": (dict(lora_B=torch.randn(N, 5)), ValueError, r"lora_B must be \[32, 4\].*got \[32, 5\]"),
    "lora_B of integers": (dict(lora_B=torch.ones(N, r).long()), TypeError, r"lora_B must be floating.*int64"),
    "lora_B a number": (dict(lora_B=1.0), TypeError, r"lora_B must be a tensor, got float"),
    "bias of another width": (dict(bias=torch.randn(K)), ValueError, r"bias must be \[32\], got \[128\]"),
    "bias of two dimensions": (dict(bias=torch.randn(1, N)), ValueError, r"bias must be \[32\], got \[1, 32\]"),
    "bias of integers": (dict(bias=torch.ones(N).int()), TypeError, r"bias must be floating.*int32"),
    "bias a number": (dict(bias=0.0), TypeError, r"bias must be a tensor, got float"),
    "scaling infinite": (dict(scaling=INF), ValueError, r"scaling must be finite, got inf"),
    "scaling nan": (dict(scaling=float("nan")), ValueError, r"scaling must be finite, got nan"),
    "scaling a string": (dict(scaling="2"), TypeError, r"scaling must be a number.*got str"),
    "scaling None": (dict(scaling=None), TypeError, r"scaling must be a number.*got NoneType"),
    "scaling a flag": (dict(scaling=True), TypeError, r"scaling must be a number.*got bool"),
    "scaling of two numbers": (dict(scaling=torch.ones(2)), ValueError, r"one number, got a tensor \[2\]"),
    "dropout 1": (dict(dropout_p=1.0), ValueError, r"in \[0, 1\), got 1\.0"),
    "dropout negative": (dict(dropout_p=-0.1), ValueError, r"in \[0, 1\), got -0\.1"),
    "dropout nan": (dict(dropout_p=float("nan")), ValueError, r"in \[0, 1\), got nan"),
    "dropout a string": (dict(dropout_p="0.1"), ValueError, r"in \[0, 1\), got '0\.1'"),
    "dropout None": (dict(dropout_p=None), ValueError, r"in \[0, 1\), got None"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    lora_linear(**arguments())
    with pytest.raises(error, match=message):
        lora_linear(**arguments(**changed))


def repacked_layer(**kwargs) -> bnb.nn.Linear4bit:
    """A Linear4bit whose weight bitsandbytes repacked in place for CPU inference."""
    layer = linear_4bit(torch.randn(N, K).bfloat16(), **kwargs)
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks 4-bit weights only on a CPU with AVX512-BF16")
    with torch.no_grad():
        layer.eval()(torch.randn(2, K).bfloat16())
    assert layer.weight.quant_state.packing_format_for_cpu
    return layer


def test_repacked_weight_is_refused_with_the_way_back():
    layer = repacked_layer()
    x = torch.randn(3, K).bfloat16()
    with pytest.raises(ValueError, match=r"repacked in place.*state_dict\(\)"):
        lora_linear(**arguments(x=x, weight=layer.weight, bias=None))
    layer.state_dict()
    lora_linear(**arguments(x=x, weight=layer.weight, bias=None))


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("by_hand", [False, True], ids=["by the layer", "by state_dict"])
def test_repacked_weight_is_put_back(nested, by_hand):
    """Up to the bf16 that bitsandbytes keeps its scales in, and their second quantisation; also time after time."""
    torch.manual_seed(3)
    intact = weight_4bit(linear_4bit(torch.randn(N, K).bfloat16(), nested=nested).weight).decode(torch.float32)
    torch.manual_seed(3)
    layer = repacked_layer(nested=nested)
    x, a, b = torch.randn(5, K).bfloat16(), torch.zeros(r, K), torch.zeros(N, r)
    lost = 0.03  # bf16 keeps eight bits of a scale, and the second quantisation moves it by up to two hundredths
    for _ in range(3):
        if by_hand:
            layer.state_dict()
            restored = lora_linear(x, layer.weight, a, b, 1.0)
        else:
            restored = adapted_forward(layer, x, Adapter(a, b, 1.0))
        assert relative_error(restored, x.float() @ intact.t()) <= lost
        assert relative_error(weight_4bit(layer.weight).decode(torch.float32), intact) <= lost
        with torch.no_grad():
            inferred = layer(x)
        assert relative_error(inferred, x.float() @ intact.t()) <= lost


@pytest.mark.parametrize("parameter", [bnb.nn.Params4bit, nn.Parameter], ids=lambda cls: cls.__name__)
def test_quant_state_lost_by_sharding_is_found_again(parameter):
    layer = linear_4bit(torch.randn(N, K))
    x, a, b = torch.randn(5, K), torch.randn(r, K), torch.randn(N, r)
    expected = adapted_forward(layer, x, Adapter(a, b, 1.0))
    kwargs = {"bnb_quantized": True} if parameter is bnb.nn.Params4bit else {}
    layer.weight = parameter(layer.weight.data, requires_grad=False, **kwargs)
    assert torch.equal(adapted_forward(layer, x, Adapter(a, b, 1.0)), expected)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("scaling", [2, 2.0, torch.tensor(2.0), torch.tensor([2.0])], ids=repr)
def test_scaling_as_any_number(scaling, with_bias):
    good = arguments() if with_bias else arguments(bias=None)
    y = lora_linear(**good | {"scaling": scaling})
    operands = [good[name] for name in ("x", "weight", "lora_A", "lora_B")]
    eager, truth = (
        reference.lora_linear(*(t.to(dtype) for t in operands), 2.0, good["bias"])
        for dtype in (torch.float32, torch.float64)
    )
    assert inexact([y], [eager], [truth], K) is None


def test_tensor_scaling_is_differentiable():
    scaling = torch.tensor(0.5, requires_grad=True)
    good = arguments(scaling=scaling, bias=None)
    y = lora_linear(**good)
    y.sum().backward()
    x, a, b = good["x"], good["lora_A"], good["lora_B"]
    eager, truth = ((x.to(dtype) @ a.to(dtype).t() @ b.to(dtype).t()).sum() for dtype in (torch.float32, torch.float64))
    assert inexact([scaling.grad], [eager], [truth], K) is None


def test_dropout_probability_as_int():
    good = arguments(dropout_p=0)
    assert torch.equal(lora_linear(**good), lora_linear(**good | {"dropout_p": 0.0}))


class Redefined(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Renamed(nn.Linear):
    pass


def parametrised() -> nn.Linear:
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    layer = linear(torch.randn(N, K))
    nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    return layer


class MadeAsView(torch.autograd.Function):
    """Its output is a view of a matrix that has no gradient, as that of bitsandbytes' 8-bit product on a CPU."""

    @staticmethod
    def forward(ctx, x, w, bias):
        ctx.save_for_backward(w)
        return (x.flatten(0, -2) @ w.t() + bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[0], None, None


class ByFunction(nn.Linear):
    def forward(self, x):
        return MadeAsView.apply(x, self.weight, self.bias)


BASES = {
    "nn.Linear": (lambda: linear(torch.randn(N, K)), "dense"),
    "subclass of nn.Linear": (lambda: Renamed(K, N), "dense"),
    "subclass with another forward": (lambda: Redefined(K, N), "opaque"),
    "Conv1D": (lambda: Conv1D(N, K), "transposed"),
    "FalconLinear": (lambda: FalconLinear(K, N, bias=False), "dense"),
    "FalconLinear with a bias": (lambda: FalconLinear(K, N), "opaque"),
    "Linear4bit": (lambda: linear_4bit(torch.randn(N, K)), "4bit"),
    "sequential": (lambda: nn.Sequential(nn.Linear(K, N), nn.Tanh()), "opaque"),
    "parametrised weight": (parametrised, "opaque"),
    "Function that makes a view": (lambda: ByFunction(K, N), "opaque"),
}


@pytest.mark.parametrize("make, kind", BASES.values(), ids=BASES)
@pytest.mark.parametrize("lora_bias", [False, True], ids=["no lora bias", "lora bias"])
def test_adapted_forward_on_any_base(make, kind, lora_bias):
    base = make().requires_grad_(False)
    assert base_kind(base) == kind
    x, a, b = torch.randn(2, 3, K), torch.randn(r, K), torch.randn(N, r)
    adapter_bias = torch.randn(N) if lora_bias else None
    exact = in_fp64(nn.Sequential(base))
    dy = torch.randn(2, 3, N)

    def unfused(x):
        base_y = exact(x) if x.dtype == torch.float64 else base(x)
        a_, b_, bias = (None if t is None else t.to(x.dtype) for t in (a, b, adapter_bias))
        return base_y + 0.3 * F.linear(F.linear(x, a_), b_, bias)

    def results(function, x):
        x = x.requires_grad_()
        return gradients(function(x), dy, {"dx": x})

    ours = results(lambda x: adapted_forward(base, x, Adapter(a, b, 0.3, 0.0, adapter_bias)), x)
    check_model(ours, results(unfused, x), results(unfused, x.detach().double()), K, torch.float32)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, None], ids=["fp32", "bf16", "not set"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x fp32", "x bf16"])
def test_4bit_base_computes_in_its_compute_dtype(x_dtype, compute_dtype):
    layer, twin = (linear_4bit(w, dtype=compute_dtype) for w in [torch.randn(N, K)] * 2)
    for each in (layer, twin):
        each.compute_dtype, each.compute_type_is_set = compute_dtype, compute_dtype is not None
    x = torch.randn(3, K, dtype=x_dtype).requires_grad_()
    ours = adapted_forward(layer, x, Adapter(torch.zeros(r, K), torch.zeros(N, r), 1.0))
    theirs = twin(x)
    assert (ours.dtype, layer.compute_dtype, layer.compute_type_is_set) == (
        theirs.dtype,
        twin.compute_dtype,
        twin.compute_type_is_set,
    )
    truth = x.double() @ decoded(layer).T
    check_model({"y": ours}, {"y": theirs}, {"y": truth}, K, compute_dtype or x_dtype)


class Opaque(nn.Module):
    """A layer that fastlora knows nothing of: ``finish(linear(x))``."""

    def __init__(self, finish):
        super().__init__()
        self.linear, self.finish = linear(torch.randn(N, K)), finish
        self.register_buffer("kept", None)

    def forward(self, x):
        return self.finish(self, self.linear(x), x)


def keep(layer, y, x):
    layer.kept = y
    return y


OURS_ALONE = {
    "a product": lambda layer, y, x: y,
    "a sum": lambda layer, y, x: y + 1,
}
NOT_OURS_ALONE = {
    "saved for backward": lambda layer, y, x: y.exp(),
    "saved before it was viewed": lambda layer, y, x: y.sigmoid().view(y.shape),
    "a buffer": keep,
    "a part": lambda layer, y, x: torch.cat([y, y], -1)[..., :N],
    "expanded": lambda layer, y, x: y[..., :1].expand(*y.shape),
    "another view": lambda layer, y, x: (setattr(layer, "kept", y.flatten()), y)[1],
}


@pytest.mark.parametrize("shape", [(6, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("no_grad", [False, True], ids=["grad", "no grad"])
@pytest.mark.parametrize("finish", [*OURS_ALONE, *NOT_OURS_ALONE])
def test_opaque_output_is_added_to_in_place_where_it_is_ours_alone(finish, no_grad, shape):
    layer = Opaque((OURS_ALONE | NOT_OURS_ALONE)[finish])
    x, a, b = (
        torch.randn(shape).requires_grad_(),
        torch.randn(r, K).requires_grad_(),
        torch.randn(N, r).requires_grad_(),
    )
    if no_grad and finish in ("saved for backward", "saved before it was viewed"):
        pytest.skip("nothing is saved")
    exact, dy = copy.deepcopy(layer).double(), torch.randn(*shape[:-1], N)
    base = layer(x).detach().clone()
    with torch.set_grad_enabled(not no_grad), CountOps() as count:
        y = adapted_forward(layer, x, Adapter(a, b, 0.3))
    assert (count.names["aten::addmm_"] == 1) == (finish in OURS_ALONE)
    if layer.kept is not None:
        assert torch.equal(layer.kept.view(base.shape), base)

    def unfused(layer, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, a, b)]
        with torch.set_grad_enabled(not no_grad):
            y = layer(leaves[0]) + 0.3 * leaves[0] @ leaves[1].t() @ leaves[2].t()
        return results(y, *leaves)

    def results(y, *leaves):
        return gradients(y, dy, {} if no_grad else dict(zip(("dx", "da", "db"), leaves, strict=True)))

    check_model(results(y, x, a, b), unfused(layer, torch.float32), unfused(exact, torch.float64), K, torch.float32)


def test_opaque_output_that_is_the_input_is_left_alone():
    x = torch.randn(3, K)
    before = x.clone()
    adapted_forward(nn.Identity(), x, Adapter(torch.randn(r, K), torch.randn(K, r), 1.0))
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [K - 2, K + 2])
def test_no_kernel_sees_an_x_of_the_wrong_width(width, dtype, rows):
    """A layer, a block and a layer that computes itself say so before anything is read."""
    x = torch.randn(rows, width, dtype=dtype)
    message = rf"x must be \[..., {K}\] for a layer with so many in_features, got \[{rows}, {width}\]"
    layer = fastlora.LoRALinear(K, N, r=r, dtype=dtype)
    block = fastlora.LoRAMLP(K, N, r=r, dtype=dtype)
    for module in (layer, block):
        with pytest.raises(ValueError, match=message):
            module(x)
