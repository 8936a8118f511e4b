"""A layer whose x is an activation's output keeps nothing for x, and its gradients are the same to the bit."""

import math

import peft
import pytest
import torch
from accuracy import linear_4bit
from blocks import graph_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

import fastlora
from fastlora import recompute
from fastlora.nn import LoRALinear

K, H = 32, 64


def gelu_in_words(z):
    return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


def dropped_by_a_gpu(z):
    return torch.native_dropout(F.gelu(z), 0.3, True)[0]  # which F.dropout is there


# By name: what makes the last layer's x of the first one's output z.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "gelu in words": gelu_in_words,
    "gated": lambda z: F.silu(z) * (z + 1),
    "gelu, dropout": lambda z: F.dropout(F.gelu(z), 0.3),
    "gated, dropout": lambda z: F.dropout(F.silu(z) * (z + 1), 0.3),
    "gelu, dropout of a GPU": dropped_by_a_gpu,
}
KEEP_THEIR_INPUT_ALONE = {
    "relu, which keeps x": F.relu,
    "a view": lambda z: F.gelu(z).view(-1, H),
    "a norm": lambda z: F.layer_norm(F.gelu(z), (H,)),
    "a weight of another size": lambda z: torch.ones(H) * F.gelu(z),
    "changed in place": lambda z: F.gelu(z).mul_(2),
    "changed without gradients": lambda z: changed_without_gradients(F.gelu(z)),
    "no op at all": lambda z: z.detach().requires_grad_(),
}


def changed_without_gradients(h):
    with torch.no_grad():
        h.add_(1)
    return h


def layers(fourbit=False, dtype=torch.float32):
    torch.manual_seed(0)
    bases = nn.Linear(K, H), nn.Linear(H, K)
    if fourbit:
        bases = [linear_4bit(base.weight.detach(), base.bias.detach(), dtype=dtype) for base in bases]
    found = [LoRALinear.from_linear(base, r=4) for base in bases]
    for layer in found:
        nn.init.normal_(layer.lora_B, std=0.1)
    return found


def of_last_layer(y):
    """The node of the layer that made y. Autocast and 4-bit layers may convert what it returns."""
    node = y.grad_fn
    while "FusedLinear" not in type(node).__name__:
        node = node.next_functions[0][0]
    return node


def trained(fc1, fc2, act, x, autocast=False):
    """y, the x of fc2, and the gradients of x and the adapters, twice."""
    given = []
    hook = fc2.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = fc2(act(fc1(x)))
    hook.remove()
    parameters = [x, *(p for layer in (fc1, fc2) for p in (layer.lora_A, layer.lora_B))]
    loss = y.float().square().sum()
    return y, given[0], [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2)]


def keeps(y, x):
    """Whether the node of the last layer has x among what it saved."""
    return any(
        t is not None and t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        for t in of_last_layer(y).saved_tensors
    )


@pytest.mark.parametrize("how", ["dense", "nf4", "nf4 in bf16", "autocast"])
@pytest.mark.parametrize("act", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_gradients_are_the_same_to_the_bit_and_x_is_not_kept(act, how, monkeypatch):
    if act is dropped_by_a_gpu and how == "autocast":
        pytest.skip("on a CPU this op, which nothing calls there, rounds 1/(1-p) to bf16 first")
    fc1, fc2 = layers("nf4" in how, torch.bfloat16 if "bf16" in how else torch.float32)
    x = torch.randn(2, 5, K).requires_grad_()
    y, h, grads = trained(fc1, fc2, act, x, how == "autocast")
    assert not keeps(y, h) and of_last_layer(y).again is not None
    monkeypatch.setattr("fastlora.autograd.MAKERS", ())
    with_x, h, expected = trained(fc1, fc2, act, x, how == "autocast")
    assert keeps(with_x, h) or how in ("nf4 in bf16", "autocast"), "it keeps x, or x in the dtype it computes in"
    assert torch.equal(y, with_x)
    for ours, theirs in zip(grads, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("make_x", KEEP_THEIR_INPUT_ALONE.values(), ids=KEEP_THEIR_INPUT_ALONE)
def test_what_is_not_an_activation_is_kept(make_x):
    fc1, _ = layers()
    z = fc1(torch.randn(2, 5, K))
    assert recompute.recipe_of(make_x(z)) is None


def test_x_is_kept_where_torch_does_not_say_what_a_node_keeps(monkeypatch):
    monkeypatch.setattr(recompute, "kept_by", lambda node, name: None)
    fc1, _ = layers()
    for act in ACTIVATIONS.values():
        assert recompute.recipe_of(act(fc1(torch.randn(2, 5, K)))) is None


def test_an_input_changed_after_the_call_is_an_error():
    fc1, fc2 = layers()
    z = fc1(torch.randn(2, 5, K)) * 1
    y = fc2(F.gelu(z))
    z.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), fc2.lora_A)


def test_an_output_changed_after_the_call_is_none():
    """What was given to the layer is what its gradients are of; plain PyTorch refuses."""
    fc1, fc2 = layers()
    h = F.gelu(fc1(torch.randn(2, 5, K)))
    expected = torch.autograd.grad(fc2(h).sum(), fc2.lora_A, retain_graph=True)
    y = fc2(h)
    h.detach().zero_()
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), fc2.lora_A), expected))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_nothing_is_brought_back_through_hooks(use_reentrant):
    """An activation inside a checkpoint, the layer outside: reading what the activation keeps would recompute it."""
    fc1, fc2 = layers()
    calls = []

    def act(x):
        calls.append(1)
        return F.gelu(fc1(x))

    x = torch.randn(2, 5, K).requires_grad_()
    y = fc2(checkpoint(act, x, use_reentrant=use_reentrant))
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2
    expected = x.grad
    x.grad = None
    fc2(F.gelu(fc1(x))).sum().backward()
    assert torch.equal(x.grad, expected)


def test_a_model_of_many_layers_keeps_no_activation():
    """BERT's MLP is spread over two modules, and OPT's and Whisper's is in the decoder layer."""
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = peft.get_peft_model(BertModel(config), peft.LoraConfig(r=3, target_modules="all-linear")).train()
    fastlora.patch(model)
    y = model(input_ids=torch.arange(5)[None]).last_hidden_state
    ours = [node for node in graph_of(y) if "FusedLinear" in type(node).__name__]
    assert sum(node.again is not None for node in ours) == 2, "one in each layer"
