"""add_lora, merge and unmerge on whole models."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora import LoRALinear
from fastlora.benchmarks.accuracy import same
from fastlora.model import lora_layers


def tiny_llama(**overrides):
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**(shape | dict(num_key_value_heads=2) | overrides)))


def adapted(model):
    return {name.removeprefix("model.layers.") for name, _ in lora_layers(model)}


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("arguments", "count", "some"),
    [
        (dict(), 21, {"0.self_attn.q_proj", "2.mlp.down_proj"}),
        (dict(target_modules=["q_proj", "v_proj"]), 6, {"1.self_attn.v_proj"}),
        (dict(target_modules=["1.mlp.up_proj"]), 1, {"1.mlp.up_proj"}),
        (dict(target_modules=r".*\.(up|down)_proj"), 6, {"0.mlp.down_proj"}),
        (dict(target_modules=["lm_head", "q_proj"]), 4, {"lm_head"}),
        (dict(layers_to_transform=1), 7, {"1.mlp.up_proj"}),
        (dict(target_modules=["o_proj"], layers_to_transform=[0, 2]), 2, {"2.self_attn.o_proj"}),
    ],
    ids=["all-linear", "list", "dotted", "regex", "head by name", "one layer", "two layers"],
)
def test_targets(arguments, count, some):
    model = fastlora.add_lora(tiny_llama(), r=4, **arguments)
    assert len(adapted(model)) == count and some <= adapted(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trainable) and len(trainable) == 2 * count


def test_targets_are_what_peft_would_take():
    import peft

    for target in ("all-linear", ["q_proj", "v_proj"], r".*layers\.[01].*proj"):
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=target))
        names = {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        assert {n for n, _ in lora_layers(fastlora.add_lora(tiny_llama(), r=2, target_modules=target))} == names


def test_patterns_and_scaling():
    model = fastlora.add_lora(
        tiny_llama(),
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 1},
        alpha_pattern={"q_proj": 16},
    )
    layers = dict(lora_layers(model))
    assert layers["model.layers.0.self_attn.q_proj"].r == 2
    assert layers["model.layers.0.self_attn.q_proj"].scaling == 16 / 2**0.5
    assert layers["model.layers.1.mlp.up_proj"].r == 1 and layers["model.layers.0.mlp.up_proj"].r == 4
    assert layers["model.layers.0.mlp.up_proj"].scaling == 4.0


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {"0.base_layer.bias"}),
        ("all", {"0.base_layer.bias", "1.bias", "2.bias"}),
    ],
)
def test_which_biases_train(bias, expected):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    fastlora.add_lora(model, r=2, target_modules=["0"], bias=bias)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == expected
    model(torch.randn(3, 8)).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in expected)


@pytest.mark.as_installed
def test_training_lowers_the_loss_and_leaves_the_base_alone():
    torch.manual_seed(0)
    model = fastlora.add_lora(tiny_llama(), r=4, target_modules=[*PROJECTIONS, "lm_head"], lora_dropout=0.1).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids = torch.randint(0, 64, (2, 16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


# Llama-2-7B: 32 layers of hidden size 4096 and MLP size 11008, a vocabulary of 32000.
LLAMA_2_7B = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("r", "target_modules", "trainable"),
    [
        (8, ["q_proj", "v_proj"], 4_194_304),
        (8, [*PROJECTIONS, "lm_head"], 20_277_248),
        (16, [*PROJECTIONS, "lm_head"], 40_554_496),
        (256, [*PROJECTIONS, "lm_head"], 648_871_936),
    ],
)
def test_published_parameter_counts_of_llama_2_7b(r, target_modules, trainable):
    with torch.device("meta"):
        model = tiny_llama(**LLAMA_2_7B)
    fastlora.add_lora(model, r=r, target_modules=target_modules)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 6_738_415_616
    assert all(p.is_meta for p in model.parameters())
    if trainable == 4_194_304:  # AdamW keeps two values a parameter
        assert round(2 * 2 * trainable / 1e6, 2) == 16.78


def snapshot(model):
    return {n: (type(m), [(k, p.requires_grad) for k, p in m.named_parameters()]) for n, m in model.named_modules()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(target_modules=["q_porj"]), ValueError, r"matches no module; did you mean .*q_proj"),
        (dict(target_modules="q_pro"), ValueError, "did you mean .*q_proj"),
        (dict(target_modules=["zzzz"]), ValueError, "linear layers end in: down_proj, gate_proj"),
        (dict(layers_to_transform=9), ValueError, "in layers 9"),
        (dict(target_modules=["input_layernorm"]), TypeError, "got LlamaRMSNorm"),
        (dict(target_modules=["q_proj", "input_layernorm"]), TypeError, "got LlamaRMSNorm"),
        (dict(r=0), ValueError, "r must be positive"),
        (dict(lora_dropout=1.5), ValueError, r"in \[0, 1\)"),
        (dict(bias="some"), ValueError, "bias must be"),
        (dict(target_modules="q_proj("), ValueError, "is not a regular expression"),
        (dict(rank_pattern={"q_proj(": 2}), ValueError, "is not a regular expression"),
        (dict(alpha_pattern={"q_proj{99999999999}": 2}), ValueError, "is not a regular expression"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fastlora.add_lora(model, **arguments)
    assert snapshot(model) == before


class Scaled(nn.Linear):
    """A linear layer that has another one in it."""

    def __init__(self):
        super().__init__(8, 8)
        self.gain = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(x) * self.gain(x)


def test_a_layer_and_a_part_of_it_are_not_both_adapted():
    model = nn.Sequential(Scaled(), nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'0\.gain' is part of a layer that would be adapted too"):
        fastlora.add_lora(model, r=2)
    assert snapshot(model) == before
    fastlora.add_lora(model, r=2, target_modules=["0", "1"])(torch.randn(3, 8))


def test_adapters_are_added_once():
    import peft

    with pytest.raises(ValueError, match="already"):
        fastlora.add_lora(fastlora.add_lora(tiny_llama(), r=2), r=2)
    with pytest.raises(ValueError, match=r"fastlora\.patch"):
        fastlora.add_lora(peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])), r=2)


def randomise(model):
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def test_merge_unmerge_unload():
    torch.manual_seed(0)
    model = randomise(fastlora.add_lora(tiny_llama(), r=4)).eval()
    ids = torch.randint(0, 64, (2, 9))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        y = model(input_ids=ids).logits
        fastlora.merge(model)
        assert same(model(input_ids=ids).logits, y, longest=48)
        fastlora.unmerge(model)
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        plain = fastlora.merge(copy.deepcopy(model), unload=True)
        assert same(plain(input_ids=ids).logits, y, longest=48)
    assert not any(isinstance(m, LoRALinear) for m in plain.modules())
    assert plain.state_dict().keys() == tiny_llama().state_dict().keys()


def test_merge_is_all_or_nothing():
    model = randomise(fastlora.add_lora(tiny_llama(), r=2))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    last = list(lora_layers(model))[-1][1]
    with torch.no_grad():
        last.lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        fastlora.merge(model)
    assert not any(layer.merged for _, layer in lora_layers(model))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("function", [fastlora.merge, fastlora.unmerge])
def test_merge_needs_adapters(function):
    with pytest.raises(ValueError, match="no LoRALinear layers"):
        function(tiny_llama())


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    model = randomise(fastlora.add_lora(nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 8)), r=3))
    x = torch.randn(5, 16)
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(compiled(x), y, longest=24)
    grads = torch.autograd.grad(
        compiled(x).sum(), list(p for p in model.parameters() if p.requires_grad and p.dim() > 1)
    )
    expected = torch.autograd.grad(
        model(x).sum(), list(p for p in model.parameters() if p.requires_grad and p.dim() > 1)
    )
    for g, e in zip(grads, expected, strict=True):
        assert same(g, e, longest=24)
