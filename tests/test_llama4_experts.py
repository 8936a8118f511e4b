"""Llama 4's experts, which are given the rows of every expert: patched beside PEFT's and fp64, compiled, and as
LoRAExperts."""

import copy

import peft
import pytest
import torch
from accuracy import check_model
from blocks import CountOps
from peft import LoraConfig, PeftModel, get_peft_model
from test_experts import results_of
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe

import fastlora
from fastlora.benchmarks.accuracy import same
from fastlora.calls import calls_of
from fastlora.peft import patch, unpatch
from fastlora.peft_experts import WRAPPER

K, H, E, T = 64, 32, 6, 40
LONGEST = T * E  # of all sums
NAMES = ["experts.gate_up_proj", "experts.down_proj"]
BF16 = torch.bfloat16

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*target_parameters"),
    pytest.mark.skipif(WRAPPER == (), reason="this PEFT has no target_parameters"),
]


class Net(nn.Module):
    def __init__(self, top: int) -> None:
        super().__init__()
        config = Llama4TextConfig(
            hidden_size=K, intermediate_size=H, num_local_experts=E, num_experts_per_tok=top, hidden_act="silu"
        )
        self.moe = Llama4TextMoe(config)
        for p in self.parameters():
            nn.init.normal_(p, std=0.15)

    def forward(self, x):
        return self.moe(x)[0].view(x.shape)


def frozen(dtype=torch.float32, top=1) -> nn.Module:
    torch.manual_seed(0)
    return Net(top).to(dtype).requires_grad_(False)


def adapted(dtype=torch.float32, top=1, parameters=NAMES, **config) -> PeftModel:
    config = LoraConfig(**{"r": 3, "lora_alpha": 6} | config, target_modules=[], target_parameters=parameters)
    model = get_peft_model(frozen(dtype, top), config)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1
    return model


def an_input(dtype=torch.float32, tokens=T):
    return torch.randn(2, tokens // 2, K, generator=torch.Generator().manual_seed(2)).to(dtype)


def all_fused(model) -> bool:
    calls = calls_of(model.base_model.model.moe.experts)
    return calls.fused > 0 and calls.own == 0


@pytest.mark.parametrize("parameters", [NAMES, NAMES[:1], NAMES[1:]], ids=["both", "gate and up", "down"])
@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_as_accurate_as_peft(dtype, top, parameters):
    model = adapted(dtype, top, parameters)
    fast = copy.deepcopy(model)
    report = patch(fast)
    assert not report.skipped and len(report.patched) == len(parameters) and len(report.fused) == 1
    x = an_input(dtype)
    results = [results_of(each, x) for each in (fast, model, copy.deepcopy(model).double())]
    check_model(*results, LONGEST, dtype)
    assert all_fused(fast)


def test_an_expert_multiplies_the_tokens_that_chose_it():
    """PEFT's multiplies all tokens by every expert, most of them zeros."""
    model = adapted()
    patch(model)

    class Rows(CountOps):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "fastlora::lora_matmul_experts":
                self.rows += len(args[0])
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Rows() as ran, torch.no_grad():
        model(an_input())
    assert ran.rows == 2 * T


def test_no_tokens():
    model = adapted()
    patch(model)
    found = results_of(model, torch.zeros(2, 0, K))
    assert found["y"].shape == (2, 0, K) and all(not t.any() for t in found.values())


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_to_one_graph(grad, compiling):
    model = adapted()
    patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for tokens in (40, 14):
        x = an_input(tokens=tokens)
        if grad:
            ours, expected = results_of(model, x, compiled), results_of(model, x)
            assert all(same(ours[name], t, longest=LONGEST) for name, t in expected.items())
        else:
            with torch.no_grad():
                assert same(compiled(x), model(x), longest=LONGEST)


def test_merging_and_other_calls_are_peft_s():
    model = adapted()
    x = an_input()
    expected = model(x)
    patch(model)
    model.merge_adapter()
    assert same(model(x), expected, longest=LONGEST)
    model.unmerge_adapter()
    assert same(model(x), expected, longest=LONGEST)
    with model.disable_adapter():
        plain = model(x)
    assert same(plain, frozen()(x), longest=LONGEST)
    unpatch(model)
    assert same(model(x), expected, longest=LONGEST)


@pytest.mark.skipif(peft.__version__.startswith("0.18"), reason="PEFT 0.18 takes every stack of weights as transposed")
def test_without_peft_and_files_both_ways(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "peft")
    ours = frozen()
    fastlora.load_adapter(ours, tmp_path / "peft")
    x = an_input()
    expected = model(x)
    assert same(ours(x), expected, longest=LONGEST)
    fastlora.save_adapter(ours, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(frozen(), tmp_path / "ours")
    assert same(loaded(x), expected, longest=LONGEST)
    fastlora.merge(ours)
    assert same(ours(x), expected, longest=LONGEST)


def test_dropout_that_peft_does_not_have():
    model = frozen()
    fastlora.add_lora(model, r=3, target_modules=[], target_parameters=NAMES, lora_dropout=0.5)
    found = results_of(model.train(), an_input())
    assert all(t.isfinite().all() for t in found.values())
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    torch.manual_seed(1)
    first, second = model(an_input()), model(an_input())
    assert not torch.equal(first, second) and torch.equal(model.eval()(an_input()), model(an_input()))
