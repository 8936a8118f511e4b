"""What patch and report say, and that it is what happens; transforms that fastlora has no rule for."""

import copy
import warnings

import peft
import pytest
import torch
from accuracy import linear_4bit
from blocks import HIDDEN, MLP, Attention, Block, SwiGLU, randomise
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
)

import fastlora
from fastlora.benchmarks.accuracy import same
from fastlora.fuse import fuse_mlps

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
CONFIGS = {
    "llama": LlamaConfig(**TINY, intermediate_size=48, num_key_value_heads=2),
    "bert": BertConfig(**TINY, intermediate_size=48),
    "opt": OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32),
    "phi3": Phi3Config(**TINY, intermediate_size=48, num_key_value_heads=2, pad_token_id=0),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
}


def adapted(model, **config):
    config = {"r": 3, "target_modules": "all-linear"} | config
    return randomise(peft.get_peft_model(model, peft.LoraConfig(**config)))


@pytest.fixture(autouse=True)
def every_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def test_report_counts_what_ran():
    model = adapted(nn.Sequential(Block()))
    assert "no patched layers" in str(fastlora.report(model))
    fastlora.patch(model)
    x = torch.randn(2, 3, HIDDEN)
    model(x)
    with model.disable_adapter():
        model(x)
    report = fastlora.report(model)
    assert len(report.layers) == 7 and len(report.mlps) == 1
    assert all((calls.fused, calls.own) == (1, 1) for calls in (report.layers | report.mlps).values())
    assert "7 layers: 7 calls fused, 7 by the module's own forward" in str(report)
    assert "its adapters are disabled" in str(report)
    fastlora.unpatch(model)
    assert not fastlora.report(model).layers
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got dict"):
        fastlora.report({})


def test_report_of_a_model_of_add_lora():
    model = fastlora.add_lora(nn.Sequential(Block()), r=3)
    model(torch.randn(2, 3, HIDDEN))
    report = fastlora.report(model)
    assert {calls.fused for calls in (report.layers | report.mlps).values()} == {1}
    fastlora.merge(model)
    model(torch.randn(2, 3, HIDDEN))
    assert "its adapter is merged" in str(fastlora.report(model))


def test_gpt2_runs_fused():
    """In training, with its dropout."""
    model = adapted(AutoModel.from_config(CONFIGS["gpt2"]), fan_in_fan_out=True).train()
    assert not fastlora.patch(model).not_fused
    model(torch.zeros(1, 3, dtype=torch.long))
    report = fastlora.report(model)
    assert report.mlps and {(c.fused, c.added, c.own) for c in (report.layers | report.mlps).values()} == {(1, 0, 0)}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_computes_itself_is_counted_apart():
    model = adapted(nn.Sequential(Doubled(4, 4), Doubled(4, 4)))
    fastlora.patch(model)
    model(torch.zeros(1, 4))
    assert all((c.fused, c.added, c.own) == (0, 1, 0) for c in fastlora.report(model).layers.values())
    assert "added to a base layer's own output" in str(fastlora.report(model))


def test_falling_back_is_said_once_a_reason():
    model = adapted(nn.Sequential(Attention()))
    fastlora.patch(model)
    layer = model.base_model.model[0].q_proj
    layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, HIDDEN)
    with pytest.warns(UserWarning, match="its base layer has hooks") as said:
        for _ in range(3):
            model(x)
    assert len(said) == 1 and said[0].filename.endswith("blocks.py"), "where the layer is called"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            model(x)  # what the user asks for is no warning


def test_strict_refuses_what_peft_would_compute():
    model = adapted(nn.Sequential(Attention()))
    hook = model.base_model.model[0].k_proj.base_layer.register_forward_hook(lambda *_: None)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"k_proj: its base layer has hooks"):
        fastlora.patch(model, strict=True)
    assert [type(m) for m in model.modules()] == classes
    hook.remove()
    fastlora.patch(model, strict=True)
    model.base_model.model[0].q_proj.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="cannot run fused: its base layer has hooks"):
        model(torch.randn(2, 3, HIDDEN))
    with model.disable_adapter():
        model(torch.randn(2, 3, HIDDEN))


def test_a_layer_whose_hooks_gather_its_weight_says_so():
    """As under ZeRO-3, here without DeepSpeed: its parameters have a ``ds_id`` and its modules have hooks."""
    model = adapted(nn.Sequential(Attention()))
    layer = model.base_model.model[0].q_proj
    layer.base_layer.weight.ds_id = 1
    assert fastlora.patch(model).skipped == {"base_model.model.0.q_proj": "its base weight is sharded by ZeRO-3"}
    layer.base_layer.register_forward_pre_hook(lambda *_: None)
    x = torch.randn(2, 3, HIDDEN)
    with pytest.warns(UserWarning, match="its base layer is sharded by itself, through hooks") as said:
        model(x)
        model(x)
    assert len(said) == 1


NOT_FUSED = {
    "bert": ("encoder.layer.0", "its MLP (intermediate.dense, output.dense) is not a module of its own"),
    "opt": ("decoder.layers.1", "its MLP (fc1, fc2) is not a module of its own"),
}


@pytest.mark.parametrize("family", NOT_FUSED)
def test_every_mlp_that_is_not_fused_is_named_with_its_reason(family):
    name, reason = NOT_FUSED[family]
    report = fastlora.patch(adapted(AutoModel.from_config(CONFIGS[family])))
    assert len(report.not_fused) == 2 and not report.fused
    assert reason in report.not_fused[f"base_model.model.{name}"]
    assert f"(2): {report.not_fused[f'base_model.model.{name}']}" in str(report), "repeated blocks take one line"


def test_an_mlp_of_which_only_some_layers_are_adapted():
    report = fastlora.patch(adapted(nn.Sequential(SwiGLU()), target_modules=["up_proj", "down_proj"]))
    assert "only up_proj and down_proj" in report.not_fused["base_model.model.0"]


def test_layers_that_widen_nothing_are_no_mlp():
    assert not any(fuse_mlps(adapted(nn.Sequential(Attention())), lambda m: hasattr(m, "lora_A")))


def test_kbit_training_without_autocast_is_fused():
    """x is fp32 and the 4-bit layers compute in bf16: h stays in bf16, as what its layers are given is."""
    block = SwiGLU()
    for name, layer in list(block.named_children()):
        block.set_submodule(name, linear_4bit(layer.weight.detach(), dtype=torch.bfloat16))
    model = adapted(nn.Sequential(block), target_modules=["gate_proj", "up_proj", "down_proj"])
    twin = copy.deepcopy(model)
    assert len(fastlora.patch(model).fused) == 1
    x = torch.randn(2, 5, HIDDEN)
    ours, theirs = model(x), twin(x)
    assert ours.dtype == theirs.dtype == torch.float32
    assert fastlora.report(model).mlps["base_model.model.0"].fused == 1
    assert same(ours, theirs, torch.bfloat16)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x).sum(-1))(x),
    "forward AD without grad": lambda f, x: forward_ad(f, x),
}


def forward_ad(f, x):
    ad = torch.autograd.forward_ad
    with torch.no_grad(), ad.dual_level():
        return ad.unpack_dual(f(ad.make_dual(x, x.cos()))).tangent


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_give_what_peft_gives(transform):
    model = adapted(nn.Sequential(SwiGLU(), nn.Linear(HIDDEN, HIDDEN)))
    x = torch.randn(2, 3, HIDDEN)
    expected = transform(model, x)
    assert len(fastlora.patch(model).fused) == 1
    assert same(transform(model, x), expected, longest=MLP)


@pytest.mark.parametrize("name", ["vmap", "vmap of grad", "jvp", "forward AD without grad"])
def test_functions_of_their_own_refuse_transforms_without_a_rule(name):
    layer = fastlora.LoRALinear(8, 6, r=2)
    with pytest.raises(RuntimeError, match="no rule"):
        TRANSFORMS[name](layer, torch.randn(3, 8))
    model = fastlora.add_lora(nn.Sequential(SwiGLU()), r=2)
    with pytest.raises(RuntimeError, match="no rule"):
        TRANSFORMS[name](model, torch.randn(3, HIDDEN))
    w, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    with pytest.raises(RuntimeError, match="no rule"):
        TRANSFORMS[name](lambda x: fastlora.lora_linear(x, w, a, b, 1.0), torch.randn(3, 8))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_model_holds_the_ops(strict):
    model = adapted(nn.Sequential(Block()))
    fastlora.patch(model)
    x = torch.randn(2, 3, HIDDEN)
    with torch.no_grad():
        exported = torch.export.export(model.base_model.model, (x,), strict=strict)
    ops = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"fastlora.lora_matmul.default", "fastlora.swiglu.default"} <= ops
    assert same(exported.module()(x), model(x), longest=MLP)
    assert fastlora.report(model).mlps["base_model.model.0.mlp"].fused == 1, "tracing leaves the block as it was"


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["grad", "no grad"])
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "opt", "phi3"))]
)
def test_compiled_to_no_more_graphs_than_peft(family, grad):
    config = copy.deepcopy(CONFIGS[family])
    config.num_hidden_layers = 1
    model = adapted(AutoModel.from_config(config), fan_in_fan_out=family == "gpt2").eval()
    ids = torch.arange(6).view(1, 6)
    graphs, outputs = [], []
    for patch in (False, True):
        torch._dynamo.reset()
        if patch:
            fastlora.patch(model)
        counter = torch._dynamo.testing.CompileCounter()
        with torch.set_grad_enabled(grad):
            outputs.append(torch.compile(model, backend=counter)(ids).last_hidden_state)
        graphs.append(counter.frame_count)
    assert graphs[1] <= graphs[0]
    assert same(outputs[1], outputs[0], longest=MLP)
