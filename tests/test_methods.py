"""The ways to fine-tune that PEFT has, on patched models: fused where the products are fastlora's, else untouched."""

import copy

import peft
import pytest
import torch
from accuracy import check_model
from oracle import CASES, LONGEST, Twin, adapted, in_fp64, pass_of
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader

import fastlora
from fastlora.benchmarks.accuracy import same
from fastlora.calls import calls_of
from fastlora.peft import patch

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, which says much about initialisations
LLAMA = CASES["llama"]


def check_fused(model):
    """A patched copy gives the results of this model, through fastlora in every layer."""
    fast = copy.deepcopy(model)
    patch(fast)
    results = [pass_of(each, tokens=16) for each in (fast, model, in_fp64(model))]
    check_model(*results, LONGEST, torch.float32)
    layers = {name: calls_of(m) for name, m in fast.named_modules() if isinstance(m, LoraLayer)}
    assert layers and all(calls.fused == 1 and calls.own == 0 for calls in layers.values())


def with_eva():
    """The adapter's rows are directions in which the inputs vary."""
    model = adapted(LLAMA, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    ids = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    batches = DataLoader([{"input_ids": row} for row in ids], batch_size=4)
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def with_loftq():
    """The base holds what a quantised one would, and the adapter its error."""
    pytest.importorskip("scipy", reason="PEFT's LoftQ needs scipy")
    if not torch.cuda.is_available():
        pytest.skip("PEFT's LoftQ needs CUDA")
    return adapted(LLAMA, init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))


VARIANTS = {
    "rsLoRA": lambda: adapted(LLAMA, use_rslora=True),
    "DoRA": lambda: adapted(LLAMA, use_dora=True),
    "DoRA and rsLoRA": lambda: adapted(LLAMA, use_dora=True, use_rslora=True),
    "PiSSA": lambda: adapted(LLAMA, init_lora_weights="pissa"),
    "PiSSA, fast SVD": lambda: adapted(LLAMA, init_lora_weights="pissa_niter_4"),
    "OLoRA": lambda: adapted(LLAMA, init_lora_weights="olora"),
    "orthogonal": lambda: adapted(LLAMA, init_lora_weights="orthogonal"),
    "gaussian": lambda: adapted(LLAMA, init_lora_weights="gaussian"),
    "EVA": with_eva,
    "LoftQ": with_loftq,
    "ranks and alphas by layer": lambda: adapted(
        LLAMA, rank_pattern={"q_proj": 2, "down_proj": 7}, alpha_pattern={"k_proj": 1}
    ),
    "adapters' biases": lambda: adapted(LLAMA, lora_bias=True),
    "one block of two": lambda: adapted(
        LLAMA._replace(base=lambda: LLAMA.base(layers=2)), target_modules=["q_proj", "up_proj"], layers_to_transform=[1]
    ),
    "biases beside LoRA": lambda: adapted(CASES["qwen2, biases trained"], bias="all"),
    "embeddings trained": lambda: adapted(LLAMA, modules_to_save=["embed_tokens"]),
    "norms trained": lambda: adapted(LLAMA, modules_to_save=["input_layernorm", "norm"]),
    "a layer trained whole": lambda: adapted(LLAMA, modules_to_save=["down_proj"], target_modules=["q_proj", "k_proj"]),
    "some tokens trained": lambda: adapted(LLAMA, trainable_token_indices=[1, 5]),
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_runs_fused_and_equal_to_peft(make):
    check_fused(make())


def lora_fa(model):
    return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)


def lora_plus(model):
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0)


@pytest.mark.parametrize("make", [lora_fa, lora_plus], ids=["LoRA-FA", "LoRA+"])
def test_optimizers_of_their_own(make):
    """LoRA-FA freezes lora_A; LoRA+ gives lora_B a larger step."""
    plain = adapted(LLAMA)
    fast = copy.deepcopy(plain)
    patch(fast, strict=True)
    losses = []
    for model in (plain, fast):
        optimizer, twin = make(model), Twin(LLAMA, model)
        losses.append([])
        for _ in range(5):
            loss = twin.logits(twin.randn(2, 16, 64)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    assert same(*map(torch.stack, losses), longest=1 << 16)  # what five steps add up to
    assert losses[1][-1] < losses[1][0]


PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning, P-tuning v2": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


def prompted(config, fused):
    """A tiny model with LoRA layers, fused or not, and a prompt that trains: the loss and all gradients."""
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules="all-linear"), LLAMA.base())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model = peft.get_peft_model(model, config())  # which freezes what is in it
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "lora_" in name)
    if fused:
        patch(model)
    ids = torch.arange(8)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return model, loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
def test_prompts_around_adapted_layers(config):
    """PEFT's prompt learners are no layers of fastlora's, and train on a model that has such."""
    model, ours, gradients = prompted(config, fused=True)
    _, theirs, expected = prompted(config, fused=False)
    assert same(ours, theirs, longest=1 << 14) and gradients.keys() == expected.keys()
    assert any("prompt" in name for name in gradients) and any("lora_A" in name for name in gradients)
    for name, t in expected.items():
        assert same(gradients[name], t, longest=1 << 14), name
    assert "0 by the module's own forward" in str(fastlora.report(model))


def bitfit():
    model = CASES["qwen2, biases trained"].base()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return model


def with_method(config):
    torch.manual_seed(0)
    return peft.get_peft_model(LLAMA.base(), config(task_type="CAUSAL_LM"))


OTHERS = {
    "BitFit": bitfit,
    "IA3": lambda: with_method(
        lambda **kw: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **kw)
    ),
    "VeRA": lambda: with_method(lambda **kw: peft.VeraConfig(r=4, target_modules=["q_proj"], **kw)),
    "LoHa": lambda: with_method(lambda **kw: peft.LoHaConfig(r=4, target_modules=["q_proj"], **kw)),
    "OFT": lambda: with_method(lambda **kw: peft.OFTConfig(target_modules=["q_proj"], **kw)),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_methods_are_left_alone(make):
    model = make()
    fast = copy.deepcopy(model)
    if hasattr(fast, "peft_config"):
        patch(fast)
    ours, theirs = pass_of(fast, tokens=16), pass_of(model, tokens=16)
    assert ours.keys() == theirs.keys() and len(ours) > 2
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())
    assert not any(type(m).__module__.startswith("fastlora") for m in fast.modules())
