"""A base weight that trains beside its adapter: the layer stays fused, and equal to PEFT."""

import copy

import pytest
import torch
from accuracy import check_model
from oracle import CASES, LONGEST, adapted, in_fp64, lora_layers, pass_of
from peft.tuners.lora import LoraLayer

import fastlora
from fastlora.benchmarks.accuracy import same
from fastlora.calls import calls_of
from fastlora.peft import patch

MODELS = ("llama", "neox, biases trained", "gpt2", "llama bf16", "qwen2, dora", "llama bf16, dora")


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointing", "reentrant"])
@pytest.mark.parametrize("case", MODELS)
def test_equal_to_peft_and_fused(case, checkpointing, autocast):
    if autocast and "bf16" in case:
        pytest.skip("is in bf16 without it")
    model = adapted(CASES[case]).train()
    for layer in lora_layers(model):
        layer.base_layer.weight.requires_grad_(True)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    fast, truth = copy.deepcopy(model), in_fp64(model)
    patch(fast)
    ours, theirs = (pass_of(each, 32, autocast) for each in (fast, model))
    assert any(name.endswith("base_layer.weight") for name in ours)
    check_model(
        ours, theirs, pass_of(truth, 32), LONGEST, torch.bfloat16 if autocast or "bf16" in case else torch.float32
    )
    fused = [calls_of(m).fused for m in fast.modules() if isinstance(m, LoraLayer)]
    assert all(n == (1 if checkpointing is None else 2) for n in fused)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (2, 9), (0,)], ids=str)
def test_lora_linear_gives_a_weight_its_gradient(shape, dtype, p):
    torch.manual_seed(0)
    x = torch.randn(*shape, 48).to(dtype)
    w = torch.randn(40, 48).to(dtype).requires_grad_()
    a, b = torch.randn(3, 48), torch.randn(40, 3)
    dy = torch.randn(*shape, 40).to(dtype)
    fastlora.lora_linear(x, w, a, b, 0.5, dropout_p=p).backward(dy)
    expected = dy.double().reshape(-1, 40).T @ x.double().reshape(-1, 48)
    assert same(w.grad, expected.to(dtype), longest=18)


def test_a_weight_changed_before_backward_is_noticed():
    """As by plain PEFT: dx needs the weight of forward."""
    x = torch.randn(5, 48, requires_grad=True)
    w = torch.randn(40, 48, requires_grad=True)
    y = fastlora.lora_linear(x, w, torch.randn(3, 48), torch.randn(40, 3), 0.5)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
