"""Small PEFT models to patch, and what a patched one must have in common with PEFT's."""

import copy

import torch
from accuracy import check_model, linear, linear_4bit
from oracle import in_fp64
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastlora.peft import patch, unpatch
from fastlora.peft_layers import FastLinear, FastLinear4bit

K, H = 64, 128
BF16 = torch.bfloat16


class Tiny(nn.Module):
    """Two adapted layers, one with a bias; ``emb`` and ``head`` for what only some tests adapt."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down
        self.emb, self.head = nn.Embedding(7, K), nn.Linear(K, 5)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


def tensors(dtype=torch.float32):
    return torch.randn(H, K).to(dtype) / K**0.5, torch.randn(H).to(dtype), torch.randn(K, H).to(dtype) / H**0.5


def dense(dtype=torch.float32):
    up, bias, down = tensors(dtype)
    return Tiny(linear(up, bias), linear(down)).to(dtype)


def fourbit(dtype=torch.float32, **kwargs):
    up, bias, down = tensors(dtype)
    return Tiny(linear_4bit(up, bias, **kwargs), linear_4bit(down, **kwargs))


def loaded_in_4bit():
    model = fourbit()
    model.is_loaded_in_4bit = True
    return model


def gpt2_like():
    up, down = Conv1D(H, K), Conv1D(K, H)
    return Tiny(up, down)


def adapted(base=dense, adapters=("default",), **config) -> PeftModel:
    """A PEFT model in eval mode with random adapters, all of them active."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"]} | config
    torch.manual_seed(2)
    base = base()
    model = get_peft_model(base, LoraConfig(fan_in_fan_out=isinstance(base.up, Conv1D), **config))
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(**config | {"r": 3}))
    model.base_model.set_adapter(list(adapters))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def patched(*args, **config) -> PeftModel:
    model = adapted(*args, **config)
    patch(model)
    return model


def inputs(model=None, dtype=torch.float32):
    weight = None if model is None else next(p for n, p in model.named_parameters() if n.endswith("up.base_layer.bias"))
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 5, K, generator=generator).to(dtype if weight is None else weight.dtype)


def results(model, x, **kwargs):
    """y, dx and the gradient of every parameter that has one."""
    x = x.detach().requires_grad_()
    y = model(x, **kwargs)
    wanted = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return {"y": y.detach()} | {name: g for name, g in zip(wanted, grads, strict=True) if g is not None}


def assert_like_peft(model, x=None, **kwargs):
    x = inputs(model) if x is None else x
    theirs = copy.deepcopy(model)
    unpatch(theirs)
    assert not any(type(m) in (FastLinear, FastLinear4bit) for m in theirs.modules())
    truth = results(in_fp64(model), x.double(), **kwargs)
    check_model(results(model, x, **kwargs), results(theirs, x, **kwargs), truth, H, x.dtype)


def uses_fastlora(model, x=None) -> bool:
    """Whether a forward of the model runs fastlora's ops."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(inputs(model) if x is None else x)
    return any(event.key.startswith("fastlora::") for event in profile.key_averages())
