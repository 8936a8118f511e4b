"""Checkpointing: a block is computed again less its last base product, and what comes out is the same to the bit."""

import gc
import resource

import peft
import pytest
import torch
from blocks import HIDDEN, MLP, Block, CountOps, gradients, randomise
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastlora
from fastlora import autograd, ops
from fastlora.benchmarks.accuracy import same
from fastlora.fused_block import unfuse

LAYERS = 7  # of a block
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def block(dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    return randomise(fastlora.add_lora(Block().to(dtype), r=4, target_modules=TARGETS, **arguments))


def base_products(model, forward, x):
    """How many products with base weights the forward and the backward of a step compute."""
    bases = {p.data_ptr() for name, p in model.named_parameters() if "base_layer.weight" in name}
    assert len(bases) == LAYERS
    with CountOps() as ahead:
        y = forward(x)
    with CountOps() as back:
        y.sum().backward()
    return [sum(count for pointer, count in ops.bases.items() if pointer in bases) for ops in (ahead, back)]


def recomputed(model, use_reentrant=False):
    x = torch.randn(2, 5, HIDDEN).requires_grad_()
    _, plain = base_products(model, model, x)
    forward, back = base_products(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x)
    assert forward == plain == LAYERS
    return back - plain


def patched(fast=True):
    torch.manual_seed(0)
    model = peft.get_peft_model(Block(), peft.LoraConfig(r=4, target_modules=TARGETS))
    if fast:
        assert len(fastlora.patch(model).patched) == LAYERS
    return model


def test_the_last_base_product_is_not_computed_again():
    assert recomputed(patched(fast=False)) == 7
    assert recomputed(patched()) == 6
    assert recomputed(block()) == 6


def test_nor_is_that_of_an_mlp_that_is_not_fused():
    model = block()
    unfuse(model.mlp)
    assert recomputed(model) == 6


def test_reentrant_checkpointing_computes_everything_again():
    """It never stops early, for anyone."""
    assert recomputed(block(), use_reentrant=True) == 7


def outcomes(model, forward, x):
    """y, dx and the gradients, from one seed."""
    torch.manual_seed(3)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = forward(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *gradients(model).values()]


def selective(policy):
    def forward(model):
        context = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=context)

    return forward


def save_products(ctx, op, *args, **kwargs):
    name = op.name()
    products = ("aten::mm", "aten::addmm", "fastlora::lora_matmul", "fastlora::shrink_group")
    return CheckpointPolicy.MUST_SAVE if name in products else CheckpointPolicy.PREFER_RECOMPUTE


WAYS = {
    "non-reentrant": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
    "reentrant": lambda model: lambda x: checkpoint(model, x, use_reentrant=True),
    "selective, products": selective(save_products),
    "selective, nothing": selective(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE),
    "nested": lambda model: (
        lambda x: checkpoint(lambda x: checkpoint(model, x, use_reentrant=False), x, use_reentrant=False)
    ),
    "saved elsewhere": lambda model: lambda x: saved_elsewhere(model, x),
}


def saved_elsewhere(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_gives_the_same_to_the_bit(way, p):
    model = block(lora_dropout=p)
    x = torch.randn(2, 5, HIDDEN)
    outcomes(model, model, x)  # siblings know each other from now on
    expected = outcomes(model, model, x)
    for ours, theirs in zip(outcomes(model, way(model), x), expected, strict=True):
        assert torch.equal(ours, theirs)


class ChangedInPlace(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.layer = fastlora.LoRALinear(HIDDEN, HIDDEN, r=4, bias=False, **arguments)
        nn.init.normal_(self.layer.lora_B, std=0.1)

    def forward(self, x):
        return torch.sin(self.layer(x).mul_(2)) * x


@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
def test_what_selective_checkpointing_keeps_is_not_changed_by_the_model(use_dora):
    """It would take the changed output for the product's, without an error."""
    model, x = ChangedInPlace(use_dora=use_dora), torch.randn(2, 5, HIDDEN)
    expected = outcomes(model, model, x)
    for ours, theirs in zip(outcomes(model, selective(save_products)(model), x), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_split_changes_no_bit(p, monkeypatch):
    """Two Functions or one, with and without checkpointing."""
    model = block(lora_dropout=p)
    x = torch.randn(2, 5, HIDDEN)
    results = []
    for split in (True, False):
        monkeypatch.setattr(autograd, "top_saved_tensors_hooks", lambda _, hooks=() if split else None: hooks)
        for forward in (model, WAYS["non-reentrant"](model)):
            outcomes(model, forward, x)
            results.append(outcomes(model, forward, x))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_the_product_is_deferred_only_under_hooks():
    model = block()
    y = model.attention.o_proj(torch.randn(3, HIDDEN).requires_grad_())
    assert type(y.grad_fn).__name__ == "FusedLinearBackward"
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = model.attention.o_proj(torch.randn(3, HIDDEN).requires_grad_())
    assert type(y.grad_fn).__name__ == "DeferredProductBackward"


def test_a_compiled_checkpoint_is_right():
    torch._dynamo.reset()
    model = block()
    x = torch.randn(2, 5, HIDDEN)
    compiled = torch.compile(WAYS["non-reentrant"](model), backend="aot_eager")
    for ours, theirs in zip(outcomes(model, compiled, x), outcomes(model, model, x), strict=True):
        assert same(ours, theirs, longest=MLP)


@pytest.mark.skipif(ops.NO_CPU_KERNELS is not None, reason="what a step keeps does not depend on who computes it")
@pytest.mark.parametrize(
    "way", ["non-reentrant", *(pytest.param(w, marks=pytest.mark.slow) for w in ("plain", "reentrant"))]
)
def test_memory_does_not_grow(way):
    """Forty steps take what ten take. One step's activations are some 3 MB, of which not even a tenth may stay."""
    model = nn.Sequential(block(lora_dropout=0.1), block())
    forward = model if way == "plain" else WAYS[way](model)
    x = torch.randn(8, 256, HIDDEN)

    def steps(n):
        for _ in range(n):
            outcomes(model, forward, x)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # peak, MB

    before = steps(10)
    assert steps(30) - before < 9
