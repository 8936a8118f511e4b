"""The MLP as one function: `fastlora.mlp`, `LoRAMLP`, and how blocks are found and fused."""

import copy
import gc
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from accuracy import linear_4bit
from blocks import HIDDEN, MLP, CountOps, SwiGLU, gradients, randomise
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXConfig, GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
from transformers.models.phi.modeling_phi import PhiConfig, PhiMLP

import fastlora
from fastlora import LoRAMLP, fuse, proof, reference
from fastlora.fourbit import is_4bit, weight_4bit

SHAPE = dict(hidden_size=HIDDEN, intermediate_size=MLP)
KINDS = ["dense", "nf4"]


def make(gated=True, activation="silu", kind="dense", dtype=torch.float64, **arguments):
    """A LoRAMLP with biases and trained adapters, on 4-bit layers if wanted."""
    module = LoRAMLP(HIDDEN, MLP, 24, activation, gated, bias=True, r=5, dtype=dtype, **arguments)
    if kind == "nf4":
        for layer in module.children():
            layer.base_layer = linear_4bit(
                layer.base_layer.weight.detach().float(), layer.base_layer.bias.detach().float()
            )
    for layer in module.children():
        layer.base_layer.bias.requires_grad_()
    return randomise(module)


def truth(module, x, seeds, p):
    """The MLP by `reference` in fp64, with dropout by these seeds."""

    def layer(layer, x, seed):
        weight = layer.base_layer.weight
        w = (weight_4bit(weight).decode(torch.float32) if is_4bit(weight) else weight).double()
        a, b, bias = layer.lora_A.double(), layer.lora_B.double(), layer.base_layer.bias.double()
        return reference.lora_linear(x, w, a, b, layer.scaling, bias, p, seed)

    first = [child for child in (module.gate_proj, module.up_proj) if child is not None]
    outputs = [layer(child, x, seed) for child, seed in zip(first, seeds, strict=False)]
    h = reference.swiglu(outputs[0], outputs[1] if len(outputs) == 2 else None, module.activation)
    return layer(module.down_proj, h, seeds[-1])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", proof.ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_is_that_of_the_reference(gated, activation, kind, p):
    dtype = torch.float64 if kind == "dense" else torch.float32
    module = make(gated, activation, kind, dtype, lora_dropout=p)
    x = torch.randn(3, 7, HIDDEN, dtype=dtype).requires_grad_()
    dy = torch.randn(3, 7, 24, dtype=dtype)
    torch.manual_seed(5)
    y = module(x)
    ours = [y, *torch.autograd.grad(y, [x, *(q for q in module.parameters() if q.requires_grad)], dy)]
    torch.manual_seed(5)
    seeds = [torch.randint(0, (1 << 63) - 1, ()) for _ in range(3 if gated else 2)]
    wide = x.detach().double().requires_grad_()
    y = truth(module, wide.view(-1, HIDDEN), seeds, p).view(3, 7, 24)
    parameters = [q for q in module.parameters() if q.requires_grad]
    theirs = [y, *torch.autograd.grad(y, [wide, *parameters], dy.double())]
    assert len(ours) == len(theirs) == 2 + 3 * (3 if gated else 2)
    for t, expected in zip(ours, theirs, strict=True):
        assert (t - expected).norm() <= (1e-12 if dtype == torch.float64 else 2e-6) * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_any_gradient_alone(kind):
    """Every tensor that may train, with all others frozen, gets the gradient that it gets among them."""
    module = make(kind=kind, dtype=torch.float32)
    x = torch.randn(4, HIDDEN).requires_grad_()
    tensors = [x, *(p for p in module.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(module(x).square().sum(), tensors)
    for t, grad in zip(tensors, expected, strict=True):
        for other in tensors:
            other.requires_grad_(other is t)
        (ours,) = torch.autograd.grad(module(x).square().sum(), t)
        torch.testing.assert_close(ours, grad)


@pytest.mark.parametrize("rows", [(0,), (1,), (2, 0, 3)], ids=str)
def test_few_tokens(rows):
    module = make()
    x = torch.randn(*rows, HIDDEN, dtype=torch.float64).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.shape == (*rows, 24) and x.grad.shape == x.shape
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_saves_x_gate_up_and_no_more(kind, p):
    module = make(kind=kind, dtype=torch.float32, lora_dropout=p)
    x = torch.randn(50, HIDDEN).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in module.parameters()}
    for layer in module.children():
        if kind == "nf4":
            known |= {t.untyped_storage().data_ptr() for t in weight_4bit(layer.base_layer.weight)[:5] if t is not None}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.shape
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    large = sorted(shape for shape in saved.values() if shape.numel() > 50 * 5)
    assert large == [(50, HIDDEN), (50, MLP), (50, MLP)]


@pytest.mark.parametrize("kind", KINDS)
def test_h_dies_with_forward(kind, monkeypatch):
    """However it might be kept: saved, or as an attribute of the graph's node."""
    made = []

    def swiglu(*args):
        h = torch.ops.fastlora.swiglu(*args)
        made.append(StorageWeakRef(h.untyped_storage()))
        return h

    monkeypatch.setattr("fastlora.mlp.swiglu", swiglu)
    y = make(kind=kind, dtype=torch.float32)(torch.randn(4, HIDDEN).requires_grad_())
    assert y.requires_grad
    gc.collect()  # Triton's interpreter leaves a kernel's arguments in reference cycles
    assert made and all(h.expired() for h in made)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_twice_and_in_place_on_nothing_saved(kind):
    """Gate and up become their gradients only if no other backward comes."""
    module = make(kind=kind, dtype=torch.float32)
    x = torch.randn(4, HIDDEN).requires_grad_()
    y = module(x).square().sum()
    tensors = [x, *(p for p in module.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y, tensors, retain_graph=True)
    second = torch.autograd.grad(y, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_allocates_two_tensors_as_large_as_h_in_backward():
    """dh, which becomes h, and dropout's nothing: gradients of gate and up are made in place."""
    module = make(dtype=torch.float32)
    y = module(torch.randn(50, HIDDEN).requires_grad_())
    with CountOps() as count:
        y.sum().backward()
    assert count.names["fastlora::swiglu_backward_"] == 1
    assert count.names["fastlora::swiglu"] == count.names["aten::clone"] == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_is_exact(kind, use_reentrant):
    module = make(kind=kind, dtype=torch.float32, lora_dropout=0.2)
    x = torch.randn(4, HIDDEN).requires_grad_()
    results = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        module.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        results.append([x.grad, *gradients(module).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    module = make(kind=kind, dtype=torch.float32)
    x = torch.randn(4, HIDDEN).requires_grad_()
    tensors = [x, *(p for p in module.parameters() if p.requires_grad)]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, ours = (torch.autograd.grad(f(x).square().sum(), tensors) for f in (module, compiled))
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    module = make(dtype=torch.float32)
    x = torch.randn(4, HIDDEN).requires_grad_()
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.02 * expected.norm()
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_unusual_layers_run_by_themselves():
    """Merged, hooked, or not linear underneath: the same result, by the layers' own forward."""
    module = make()
    x = torch.randn(4, HIDDEN, dtype=torch.float64)
    expected = module(x)
    module.up_proj.merge()
    torch.testing.assert_close(module(x), expected)
    module.up_proj.unmerge()
    seen = []
    handle = module.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(x), expected)
    assert seen
    handle.remove()

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    other = Other(HIDDEN, MLP, dtype=torch.float64)
    other.load_state_dict(module.up_proj.base_layer.state_dict())
    module.up_proj.base_layer = other
    with torch.no_grad():
        other.bias -= 1
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(activation="relu"), "activation must be one of silu, gelu_tanh, gelu, got 'relu'"),
        (dict(r=0), "r must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRAMLP(8, 16, **arguments)


# ---- blocks of models


class Functional(SwiGLU):
    """Its activation is not a module."""


class Strange(SwiGLU):
    def forward(self, x):
        return 2 * self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Dropping(SwiGLU):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Relu(SwiGLU):
    def forward(self, x):
        return self.down_proj(F.relu(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(SwiGLU):
    """The layer called up_proj is what others call gate."""

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


class Failing(SwiGLU):
    def forward(self, x):
        raise KeyError("mask")


def phi(activation):
    return PhiMLP(PhiConfig(**SHAPE, hidden_act=activation))


FUSED = {
    "llama": (lambda: LlamaMLP(LlamaConfig(**SHAPE)), ("gate_proj", "up_proj", "down_proj"), "silu"),
    "gemma": (lambda: GemmaMLP(GemmaConfig(**SHAPE)), ("gate_proj", "up_proj", "down_proj"), "gelu_tanh"),
    "neox": (
        lambda: GPTNeoXMLP(GPTNeoXConfig(**SHAPE, num_attention_heads=4)),
        ("dense_h_to_4h", "dense_4h_to_h"),
        "gelu",
    ),
    "phi": (lambda: phi("gelu_new"), ("fc1", "fc2"), "gelu_tanh"),
    "functional": (Functional, ("gate_proj", "up_proj", "down_proj"), "silu"),
    "down first": (lambda: DownFirst(), ("up", "down"), "silu"),
    "up first": (UpFirst, ("up_proj", "gate_proj", "down_proj"), "silu"),
}


class DownFirst(nn.Module):
    """Registered in another order than called."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(MLP, HIDDEN), nn.Linear(HIDDEN, MLP)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


KEPT = {
    "scaled": (Strange, "not that of an MLP"),
    "dropout": (Dropping, "another one in training"),
    "relu": (Relu, "not that of an MLP"),
    "quick gelu": (lambda: phi("quick_gelu"), "not that of an MLP"),
    "failing": (Failing, "a probe of its forward failed: 'mask'"),
}


def in_model(make, dtype=torch.float32, **config):
    """A PEFT model with this block."""
    model = nn.Sequential(nn.Identity(), make()).to(dtype)
    targets = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    return randomise(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **config)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_blocks_are_found_and_fused(case, dtype):
    make, layers, activation = case
    model = in_model(make, dtype)
    x = torch.randn(2, 3, HIDDEN, dtype=dtype)
    expected = model(x)
    state = torch.get_rng_state()
    report = fastlora.patch(model)
    assert torch.equal(torch.get_rng_state(), state), "probing draws from a generator of its own"
    assert report.fused == ["base_model.model.1"] and not report.skipped and not report.not_fused
    assert fuse.fusion_of(model.base_model.model[1]).block == proof.Block(layers, activation)
    y = model(x)
    assert "MLP" in type(y.grad_fn).__name__
    assert (y - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
    assert fastlora.patch(model).fused == report.fused, "again"
    fastlora.unpatch(model)
    assert fuse.fusion_of(model.base_model.model[1]) is None
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_other_blocks_are_kept_and_the_reason_is_told(case):
    make, reason = case
    model = in_model(make)
    training = {name: m.training for name, m in model.named_modules()}
    report = fastlora.patch(model)
    assert not report.fused and reason in report.not_fused["base_model.model.1"]
    assert not report.skipped, "its layers are patched all the same"
    assert reason in str(report)
    assert training == {name: m.training for name, m in model.named_modules()}


def test_a_block_that_is_wrapped_is_kept():
    model = in_model(SwiGLU)
    block = model.base_model.model[1]
    block.forward = block.forward
    assert "wrapped on the instance" in fastlora.patch(model).not_fused["base_model.model.1"]


def test_attention_is_no_mlp():
    from blocks import Attention

    assert not fastlora.patch(in_model(Attention)).fused


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("case", ["disabled", "merged", "hooked", "two adapters", "switched"])
def test_a_fused_block_follows_peft(case, p):
    """Whatever is done to the PEFT model, the block gives what PEFT gives."""
    model = in_model(SwiGLU, torch.float64, lora_dropout=p)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    randomise(model)
    model.eval()
    original = copy.deepcopy(model)
    fastlora.patch(model)
    for m in (model, original):
        if case == "disabled":
            m.disable_adapter_layers()
        elif case == "merged":
            m.merge_adapter()
        elif case == "hooked":
            m.base_model.model[1].up_proj.register_forward_hook(lambda module, args, y: y * 2)
        elif case == "two adapters":
            m.base_model.set_adapter(["default", "other"])
        else:
            m.set_adapter("other")
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(model(x), original(x))


def test_a_fused_model_can_be_copied_and_pickled():
    model = fastlora.add_lora(nn.Sequential(SwiGLU()), r=4, target_modules="all-linear")
    x = torch.randn(2, HIDDEN)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fuse.fusion_of(other[0]) is not None
        with torch.no_grad():
            other[0].up_proj.lora_B.fill_(1)
        assert not torch.equal(other(x), model(x)), "the copy computes with its own layers"


def test_add_lora_fuses_and_unloading_takes_it_apart():
    model = randomise(fastlora.add_lora(nn.Sequential(SwiGLU()), r=4, target_modules="all-linear"))
    x = torch.randn(2, HIDDEN)
    y = model(x)
    assert "MLP" in type(y.grad_fn).__name__
    fastlora.merge(model, unload=True)
    assert fuse.fusion_of(model[0]) is None
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_from_mlp(case):
    make, names, activation = case
    block = make()
    x = torch.randn(3, HIDDEN)
    expected = block(x)
    module = LoRAMLP.from_mlp(block, r=4)
    assert module.activation == activation and module.down_proj.base_layer is block.get_submodule(names[-1])
    torch.testing.assert_close(module(x), expected)
    assert {layer.r for layer in module.children()} == {4}


def test_from_mlp_of_something_else_changes_nothing():
    block = Strange()
    with pytest.raises(ValueError, match="cannot make a LoRAMLP of this Strange: its forward is not that of an MLP"):
        LoRAMLP.from_mlp(block)
    assert type(block.gate_proj) is nn.Linear and block.gate_proj.weight.requires_grad
    with pytest.raises(ValueError, match="not two or three linear layers"):
        LoRAMLP.from_mlp(nn.Sequential(nn.Linear(4, 4)))


def test_activations_are_those_of_transformers():
    z = torch.linspace(-5, 5, 50, dtype=torch.float64)
    for name, ours in {
        "silu": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
    }.items():
        torch.testing.assert_close(ACT2FN[name](z), reference.activate(z, ours))


def test_func_grad():
    module = make(dtype=torch.float32)
    parameters = {name: p.detach() for name, p in module.named_parameters() if "lora" in name}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    x = torch.randn(4, HIDDEN)
    ours, dx = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    module(leaf).square().sum().backward()
    torch.testing.assert_close(dx, leaf.grad)
    for name, p in module.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], p.grad)


def test_a_buffer_changed_often_before_is_no_change():
    """Its version is an integer that Python makes anew at each reading."""

    class Scaled(SwiGLU):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

    block = Scaled()
    for _ in range(300):
        block.steps += 1
    model = fastlora.add_lora(nn.Sequential(block), r=2)
    for _ in range(8):
        model(torch.randn(2, 3, HIDDEN))
    assert fastlora.report(model).mlps["0"].fused == 8
