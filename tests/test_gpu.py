"""The same layers on a CUDA device: run with `make gpu` or `pytest -m gpu`."""

import pytest
import torch

import fastlora
from fastlora import reference
from fastlora.benchmarks.accuracy import same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def operands(dtype, adapter_dtype, M=37, K=96, N=50, r=6):
    generator = torch.Generator("cuda").manual_seed(0)

    def new(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    x, w, bias = new(M, K), new(N, K) / K**0.5, new(N)
    return x, w, new(r, K, dtype=adapter_dtype) / K**0.5, new(N, r, dtype=adapter_dtype), bias, new(M, N)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_layer_is_right_on_the_device(dtype, adapter_dtype, p):
    x, w, a, b, bias, dy = operands(dtype, adapter_dtype)
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    torch.manual_seed(5)
    y = fastlora.lora_linear(x, w, a, b, 1.5, bias, p)
    grads = torch.autograd.grad(y, leaves, dy)

    torch.manual_seed(5)
    seed = torch.randint(0, (1 << 63) - 1, (), device="cuda")
    exact = [t.detach().double().requires_grad_() for t in (x, a, b, bias)]
    truth = reference.lora_linear(exact[0], w.double(), exact[1], exact[2], 1.5, exact[3], p, seed)
    expected = torch.autograd.grad(truth, exact, dy.double())
    for ours, theirs in zip((y, *grads), (truth, *expected), strict=True):
        assert same(ours, theirs, dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_4bit_layer_is_right_on_the_device(quant_type, p):
    bnb = pytest.importorskip("bitsandbytes")
    layer = fastlora.LoRALinear.from_linear(
        bnb.nn.Linear4bit(96, 64, compute_dtype=torch.bfloat16, quant_type=quant_type).cuda(), r=6, lora_dropout=p
    )
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(37, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer.eval()
    w = bnb.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).double()
    truth = reference.lora_linear(
        x.double(), w, layer.lora_A.double(), layer.lora_B.double(), layer.scaling, layer.base_layer.bias.double()
    )
    assert same(layer(x), truth, torch.bfloat16)
    layer.train()(x).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, layer.lora_A, layer.lora_B))
