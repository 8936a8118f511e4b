"""Bases that are quantised by other packages compute their own output, and fastlora adds the adapter to it.

torchao is not among the packages that `make test` installs, since PEFT would import it in every process: `make
test-quantised` installs it. GPTQ, AWQ and AQLM need a GPU; a layer of the same shape stands in for theirs.
"""

import copy
import pickle

import bitsandbytes as bnb
import peft
import pytest
import torch
from accuracy import check_model, gradients
from blocks import randomise
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

import fastlora

K, H = 64, 128
CONFIG = peft.LoraConfig(r=4, target_modules=["up", "down"])


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(K, H), nn.GELU(), nn.Linear(H, K)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Quantised(nn.Module):
    """Integers and a scale for each output; its weight is no parameter."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (base.weight.detach() / scale).round().char())
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight * self.scale).to(x.dtype))


def in_8_bits():
    model = MLP()
    for name in ("up", "down"):
        layer = bnb.nn.Linear8bitLt(*((K, H) if name == "up" else (H, K)), has_fp16_weights=False)
        layer.load_state_dict(getattr(model, name).state_dict())
        setattr(model, name, layer.to("cpu"))
    model.is_loaded_in_8bit = True
    return peft.get_peft_model(model, CONFIG)


def standing_in(layer_class):
    def make():
        model = MLP()
        for name in ("up", "down"):
            base = Quantised(getattr(model, name))
            layer = layer_class(base, "default", config=CONFIG, r=4, lora_alpha=8)  # PEFT 0.18 ignores config
            setattr(model, name, layer)
        return model

    return make


INSTALL = "torchao is not installed: make test-quantised"
BY_TORCHAO = (  # that a CPU computes
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
)


def by_torchao(config="Int8WeightOnlyConfig"):
    quantization = pytest.importorskip("torchao.quantization", reason=INSTALL)
    model = MLP()
    quantization.quantize_(model, getattr(quantization, config)())
    return model


BASES = {
    "bitsandbytes, 8 bits": in_8_bits,
    **{f"torchao, {c}": lambda c=c: peft.get_peft_model(by_torchao(c), CONFIG) for c in BY_TORCHAO},
    **{each.__name__: standing_in(each) for each in (GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear)},
}


def step(model, x, dy):
    x = x.clone().requires_grad_()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 4
    return gradients(model(x), dy, {"dx": x, **adapters})


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_a_step_is_that_of_peft(make):
    torch.manual_seed(0)
    model = randomise(make())
    patched = copy.deepcopy(model)
    report = fastlora.patch(patched, strict=True)
    assert len(report.patched) == 2 and not report.skipped
    x, dy = torch.randn(2, 5, K), torch.randn(2, 5, K)
    ours, theirs = step(patched, x, dy), step(model, x, dy)
    check_model(ours, theirs, {name: t.double() for name, t in theirs.items()}, H, torch.float32)
    calls = fastlora.report(patched).layers.values()
    assert [(each.fused, each.added, each.own) for each in calls] == [(0, 1, 0)] * 2
    if make.__name__ != "<lambda>":  # torchao's, whose tensors are not pickled
        with torch.no_grad():
            assert torch.equal(pickle.loads(pickle.dumps(patched))(x), patched(x))
    assert len(fastlora.unpatch(patched)) == 2
    assert [type(m) for m in patched.modules()] == [type(m) for m in model.modules()]


def test_a_base_that_torchao_quantises_later():
    """As in quantisation-aware training: the layers are patched and then quantised in place."""
    model = randomise(peft.get_peft_model(MLP(), CONFIG))
    fastlora.patch(model)
    quantization = pytest.importorskip("torchao.quantization", reason=INSTALL)
    is_base = lambda layer, name: name.endswith("base_layer")  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_base)
    twin = copy.deepcopy(model)
    fastlora.unpatch(twin)
    x, dy = torch.randn(2, 5, K), torch.randn(2, 5, K)
    ours, theirs = step(model, x, dy), step(twin, x, dy)
    check_model(ours, theirs, {name: t.double() for name, t in theirs.items()}, H, torch.float32)
    calls = fastlora.report(model).layers.values()
    assert [(each.fused, each.added, each.own) for each in calls] == [(0, 1, 0)] * 2


def test_a_base_that_torchao_trains_in_float8():
    """Patched, and then converted in place: the frozen products are in float8."""
    float8 = pytest.importorskip("torchao.float8", reason=INSTALL)
    model = randomise(peft.get_peft_model(MLP().bfloat16(), CONFIG))
    fastlora.patch(model)
    float8.convert_to_float8_training(
        model,
        module_filter_fn=lambda layer, name: name.endswith("base_layer"),
        config=float8.Float8LinearConfig(emulate=True),  # a CPU has no such products
    )
    twin = copy.deepcopy(model)
    fastlora.unpatch(twin)
    x, dy = torch.randn(2, 5, K).bfloat16(), torch.randn(2, 5, K).bfloat16()
    ours, theirs = step(model, x, dy), step(twin, x, dy)
    check_model(ours, theirs, {name: t.double() for name, t in theirs.items()}, H, torch.bfloat16)
    calls = fastlora.report(model).layers.values()
    assert [(each.fused, each.added, each.own) for each in calls] == [(0, 1, 0)] * 2


def test_add_lora_to_what_torchao_quantised():
    model = by_torchao()
    expected = model(x := torch.randn(3, K))
    adapted = fastlora.add_lora(model, r=4, target_modules="all-linear")
    torch.testing.assert_close(adapted(x), expected)  # lora_B is zero
    adapted(x).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
