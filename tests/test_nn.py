"""LoRALinear: construction, computation, merging."""

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from accuracy import check_model, gradients
from oracle import in_fp64
from torch import nn

from fastlora import LoRALinear
from fastlora.benchmarks.accuracy import relative_error, same


def linear_4bit(K, N, quant_type="nf4", nested=True, bias=True, compute_dtype=torch.bfloat16):
    layer = bnb.nn.Linear4bit(
        K, N, bias=bias, compute_dtype=compute_dtype, quant_type=quant_type, compress_statistics=nested
    )
    return layer.to("cpu").train()


def randomise_B(layer):
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
    return layer


def eager(layer, x):
    """The layer as its docstring says, on its own base layer."""
    return layer.base_layer(x) + layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)


@pytest.mark.parametrize("bias", [True, False])
def test_new_layer_is_a_frozen_linear_with_a_zero_adapter(bias):
    layer = LoRALinear(12, 7, r=3, lora_alpha=6, bias=bias)
    x = torch.randn(5, 12)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} >= {"lora_A", "lora_B"}
    assert not layer.base_layer.weight.requires_grad
    assert (layer.r, layer.in_features, layer.out_features, layer.scaling) == (3, 12, 7, 2.0)
    assert same(layer(x), layer.base_layer(x), longest=12)
    assert layer.lora_A.abs().max() <= 1 / 12**0.5 and layer.lora_A.std() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(24, 16),
        lambda: nn.Linear(24, 16, bias=False, dtype=torch.float64),
        lambda: linear_4bit(24, 16, "nf4", True, compute_dtype=torch.float32),
        lambda: linear_4bit(24, 16, "fp4", False, bias=False, compute_dtype=torch.float32),
        lambda: Doubling(24, 16),
    ],
    ids=["dense", "fp64 no bias", "nf4 nested", "fp4", "opaque"],
)
def test_from_linear_computes_the_adapted_layer(make):
    base = make()
    layer = randomise_B(LoRALinear.from_linear(base, r=4, lora_alpha=6))
    assert layer.base_layer is base
    x, dy = torch.randn(2, 3, 24, dtype=layer.lora_A.dtype), torch.randn(2, 3, 16)

    def results(forward, layer, x):
        x = x.requires_grad_()
        return gradients(forward(layer, x), dy, {"dx": x, "da": layer.lora_A, "db": layer.lora_B})

    truth = results(eager, in_fp64(layer), x.double())
    check_model(results(LoRALinear.__call__, layer, x), results(eager, layer, x), truth, 24, torch.float32)


class Doubling(nn.Linear):
    """A base layer with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_adapters_of_a_half_precision_base_are_fp32_unless_asked():
    assert LoRALinear(8, 8, r=2, dtype=torch.bfloat16).lora_A.dtype == torch.float32
    assert LoRALinear(8, 8, r=2, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16).lora_B.dtype == torch.bfloat16
    assert LoRALinear(8, 8, r=2, dtype=torch.float64).lora_A.dtype == torch.float64


def test_rslora_and_gaussian_init():
    layer = LoRALinear(400, 8, r=4, lora_alpha=8, use_rslora=True, init_lora_weights="gaussian")
    assert layer.scaling == 4.0
    assert 0.2 < layer.lora_A.std() < 0.3  # std 1/r


def test_dropout_only_while_training():
    layer = randomise_B(LoRALinear(32, 8, r=4, lora_dropout=0.5))
    x = torch.randn(6, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert same(layer(x), eager(layer, x), longest=32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LoRALinear(8, 8, r=0), ValueError, "r must be positive, got 0"),
        (lambda: LoRALinear(8, 8, r=-3), ValueError, "r must be positive, got -3"),
        (lambda: LoRALinear(8, 8, r=2.0), TypeError, "r must be an integer"),
        (lambda: LoRALinear(8, 8, r=2, lora_dropout=1.0), ValueError, r"in \[0, 1\), got 1.0"),
        (lambda: LoRALinear(8, 8, r=2, lora_dropout=-0.1), ValueError, r"in \[0, 1\), got -0.1"),
        (lambda: LoRALinear(8, 8, r=2, lora_alpha=float("nan")), ValueError, "lora_alpha must be a finite number"),
        (lambda: LoRALinear(8, 8, r=2, lora_alpha=10**400), ValueError, "lora_alpha must be a finite number"),
        (lambda: LoRALinear(8, 8, r=2).set_scaling(None), ValueError, "lora_alpha must be a finite number, got None"),
        (lambda: LoRALinear(8, 8, r=2, init_lora_weights="pissa"), ValueError, "init_lora_weights must be"),
        (lambda: LoRALinear.from_linear(nn.LayerNorm(8), r=2), TypeError, "got LayerNorm"),
        (lambda: LoRALinear.from_linear(int8_linear(), r=2), TypeError, "floating point, got torch.int8"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def int8_linear():
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return linear


def test_a_rank_above_the_smaller_side_warns():
    with pytest.warns(UserWarning, match=r"r=9 exceeds min\(in_features, out_features\)=8"):
        LoRALinear(16, 8, r=9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4"])
def test_merge_is_the_same_layer_and_unmerge_is_exact(kind, dtype):
    base = nn.Linear(64, 48, dtype=dtype) if kind == "dense" else linear_4bit(64, 48, kind, compute_dtype=dtype)
    base = base.to(dtype) if kind == "dense" else base
    base.bias.data = base.bias.data.to(dtype)  # as the forward of bitsandbytes' layer does, which a merged one runs
    layer = randomise_B(LoRALinear.from_linear(base, r=4, lora_alpha=4)).eval()
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)  # with a gradient, so that bitsandbytes does not repack
    y = layer(x)
    before = layer.base_layer.weight.data.clone()
    layer.merge()
    layer.merge()  # harmless
    assert layer.merged and not torch.equal(layer.base_layer.weight.data, before)
    if kind == "dense":
        assert same(layer(x), y, longest=64)
    else:  # requantising moves a weight by up to half a step of the 4-bit grid, which is wider in FP4 than in NF4
        assert relative_error(layer(x), y) <= {"nf4": 0.2, "fp4": 0.35}[kind]
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight.data, before)
    assert torch.equal(layer(x), y)


def test_merge_refuses_a_broken_adapter_and_an_opaque_base():
    layer = LoRALinear(8, 8, r=2)
    with torch.no_grad():
        layer.lora_A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge()
    with pytest.raises(TypeError, match="cannot merge into a Doubling"):
        LoRALinear.from_linear(Doubling(8, 8), r=2).merge()
