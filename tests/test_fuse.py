"""How the MLP blocks of a model are found and fused, and which are kept as they are."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from accuracy import linear_4bit
from blocks import HIDDEN, MLP, SwiGLU, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXConfig, GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
from transformers.models.phi.modeling_phi import PhiConfig, PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP

import fastlora
from fastlora import LoRAMLP
from fastlora.benchmarks.accuracy import same
from fastlora.fused_block import fusion_of

SHAPE = dict(hidden_size=HIDDEN, intermediate_size=MLP)


class Functional(SwiGLU):
    """Its activation is not a module."""


class Strange(SwiGLU):
    def forward(self, x):
        return 2 * self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Dropping(SwiGLU):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Tanh(SwiGLU):
    def forward(self, x):
        return self.down_proj(F.tanh(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(SwiGLU):
    """The layer called up_proj is what others call gate."""

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


class Failing(SwiGLU):
    def forward(self, x):
        raise KeyError("mask")


def phi(activation):
    return PhiMLP(PhiConfig(**SHAPE, hidden_act=activation))


def phi3():
    return Phi3MLP(Phi3Config(**SHAPE, pad_token_id=0))


class UpBeforeGate(nn.Module):
    """One layer for both, and up is its first half."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(HIDDEN, 2 * MLP), nn.Linear(MLP, HIDDEN)

    def forward(self, x):
        up, gate = self.both(x).split(MLP, dim=-1)
        return self.down(F.gelu(gate) * up)


class DropsInside(SwiGLU):
    """As T5's."""

    def __init__(self, p=0.3):
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.down_proj(self.dropout(F.gelu(self.gate_proj(x)) * self.up_proj(x)))


class DropsAfter(DropsInside):
    """As GPT-2's."""

    def forward(self, x):
        return self.dropout(self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x)))


class DropsTwice(DropsInside):
    """The same module, called twice."""

    def forward(self, x):
        return self.dropout(super().forward(x))


class DropsItsInput(DropsInside):
    def forward(self, x):
        return super().forward(self.dropout(x))


class DropsInTraining(DropsInside):
    """Its dropout does nothing in evaluation, as it would anyway, but that is not known."""

    def forward(self, x):
        y = self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))
        return self.dropout(y) if self.training else y


FUSED = {
    "llama": (lambda: LlamaMLP(LlamaConfig(**SHAPE)), ("gate_proj", "up_proj", "down_proj"), "silu"),
    "gemma": (lambda: GemmaMLP(GemmaConfig(**SHAPE)), ("gate_proj", "up_proj", "down_proj"), "gelu_tanh"),
    "neox": (
        lambda: GPTNeoXMLP(GPTNeoXConfig(**SHAPE, num_attention_heads=4)),
        ("dense_h_to_4h", "dense_4h_to_h"),
        "gelu",
    ),
    "phi": (lambda: phi("gelu_new"), ("fc1", "fc2"), "gelu_tanh"),
    "quick gelu": (lambda: phi("quick_gelu"), ("fc1", "fc2"), "quick_gelu"),
    "relu": (lambda: phi("relu"), ("fc1", "fc2"), "relu"),
    "squared relu": (lambda: phi("relu2"), ("fc1", "fc2"), "relu2"),
    "phi3": (phi3, ("gate_up_proj", "down_proj"), "silu"),
    "up before gate": (UpBeforeGate, ("both", "down"), "gelu"),
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
    "tanh": (Tanh, "not that of an MLP"),
    "failing": (Failing, "a probe of its forward failed: 'mask'"),
    "dropout of x": (DropsItsInput, "not that of an MLP"),
    "dropout by mode": (DropsInTraining, "another one in training"),
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
    assert fusion_of(model.base_model.model[1]).block[:2] == (layers, activation)
    y = model(x)
    assert "MLP" in type(y.grad_fn).__name__
    assert same(y, expected, longest=MLP)
    assert fastlora.patch(model).fused == report.fused, "again"
    fastlora.unpatch(model)
    assert fusion_of(model.base_model.model[1]) is None
    assert same(model(x), expected, longest=MLP)


def with_4bit_layers(module):
    for name, layer in [(n, m) for n, m in module.named_modules() if type(m) is nn.Linear]:
        module.set_submodule(name, linear_4bit(layer.weight.detach(), layer.bias))
    return module


TRAINED = {
    "phi3": phi3,
    "up before gate": UpBeforeGate,
    "nf4": lambda: with_4bit_layers(UpBeforeGate()),
    "dropout inside": DropsInside,
    "dropout inside, nf4": lambda: with_4bit_layers(DropsInside()),
    "dropout after": DropsAfter,
    "dropout twice": DropsTwice,
}
WAYS = {
    "plain": lambda model: model,
    "checkpointed": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
    "compiled": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "twice": lambda model: lambda x: backward_first(model(x)),
    "eval": lambda model: model.eval(),
}


def backward_first(y):
    y.sum().backward(retain_graph=True)
    return y


@pytest.mark.one_case_in(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_a_block_trains_as_with_peft(make, way):
    """With the model's own dropout too: the same seed drops the same elements."""
    model = in_model(make).train()
    twin = copy.deepcopy(model)
    assert fastlora.patch(model).fused
    results = []
    for each in (twin, model):
        torch._dynamo.reset()
        x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        y = WAYS[way](each)(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert len(results[0]) == 2 + 2 * len(fastlora.unpatch(model))
    assert all(same(ours, theirs, longest=10 * MLP) for theirs, ours in zip(*results, strict=True))


@pytest.mark.parametrize("before, after", [(0.0, 0.4), (0.4, 0.0), (0.2, 0.5), (0.2, 1.0)])
def test_dropout_that_is_changed_later(before, after):
    model = in_model(lambda: DropsInside(before)).train()
    twin = copy.deepcopy(model)
    assert fastlora.patch(model).fused
    x = torch.randn(2, 5, HIDDEN)
    for p in (before, after):
        results = []
        for each in (twin, model):
            each.base_model.model[1].dropout.p = p
            torch.manual_seed(3)
            results.append(each(x))
        assert same(results[1], results[0], longest=10 * MLP), p


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
    assert same(model(x), original(x), longest=MLP)


def test_a_fused_model_can_be_copied_and_pickled():
    model = fastlora.add_lora(nn.Sequential(SwiGLU()), r=4, target_modules="all-linear")
    x = torch.randn(2, HIDDEN)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fusion_of(other[0]) is not None
        with torch.no_grad():
            other[0].up_proj.lora_B.fill_(1)
        assert not torch.equal(other(x), model(x)), "the copy computes with its own layers"


def test_add_lora_fuses_and_unloading_takes_it_apart():
    model = randomise(fastlora.add_lora(nn.Sequential(SwiGLU()), r=4, target_modules="all-linear"))
    x = torch.randn(2, HIDDEN)
    y = model(x)
    assert "MLP" in type(y.grad_fn).__name__
    fastlora.merge(model, unload=True)
    assert fusion_of(model[0]) is None
    assert same(model(x), y, longest=MLP)


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_from_mlp(case):
    make, names, activation = case
    block = make()
    x = torch.randn(3, HIDDEN)
    expected = block(x)
    if len(names) == 2 and block.get_submodule(names[0]).out_features == 2 * MLP:
        with pytest.raises(ValueError, match="one layer gives gate and up"):
            LoRAMLP.from_mlp(block, r=4)
        return
    module = LoRAMLP.from_mlp(block, r=4)
    assert module.activation == activation and module.down_proj.base_layer is block.get_submodule(names[-1])
    assert same(module(x), expected, longest=MLP)
    assert {layer.r for layer in module.children()} == {4}


def test_from_mlp_with_dropout_of_its_own():
    """LoRAMLP has none; where it does nothing it is left out."""
    with pytest.raises(ValueError, match="it has dropout besides that of adapters"):
        LoRAMLP.from_mlp(DropsTwice(), r=2)
    assert LoRAMLP.from_mlp(DropsTwice(p=0.0), r=2).activation == "gelu"


def test_from_mlp_of_something_else_changes_nothing():
    block = Strange()
    with pytest.raises(ValueError, match="cannot make a LoRAMLP of this Strange: its forward is not that of an MLP"):
        LoRAMLP.from_mlp(block)
    assert type(block.gate_proj) is nn.Linear and block.gate_proj.weight.requires_grad
    with pytest.raises(ValueError, match="not two or three linear layers"):
        LoRAMLP.from_mlp(nn.Sequential(nn.Linear(4, 4)))


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


class Registered(SwiGLU):
    known: list = []  # noqa: RUF012

    def __init_subclass__(cls, *, key, **kwargs):
        Registered.known.append(key)


class OfARegistry(Registered, key="one"):
    pass


def test_a_class_that_registers_its_subclasses_is_told_of_none():
    model = in_model(OfARegistry)
    assert fastlora.patch(model).fused and Registered.known == ["one"]
    block = model.base_model.model[1]
    assert isinstance(block, OfARegistry) and (type(block).__name__, repr(block)[:11]) == ("OfARegistry", "OfARegistry")
    fastlora.unpatch(model)
    assert type(block) is OfARegistry


class Meta(type):
    def __new__(cls, name, bases, namespace, *, key=None):
        if key is None:
            raise TypeError("a key is needed")
        return super().__new__(cls, name, bases, namespace)

    def __init__(cls, *args, **_):
        super().__init__(*args)


class OfAMeta(SwiGLU, metaclass=Meta, key=1):
    pass


class AsksForItsClass(SwiGLU):
    def forward(self, x):
        if type(self) is not AsksForItsClass:
            raise TypeError("another class")
        return super().forward(x)


class CopiedItsWay(SwiGLU):
    def __reduce__(self):
        return CopiedItsWay, ()


@pytest.mark.parametrize(
    "make, reason",
    [
        (OfAMeta, "no class can be derived from its own: a key is needed"),
        (AsksForItsClass, "its forward asks for its class"),
        (CopiedItsWay, "its class is copied in a way of its own"),
    ],
)
def test_a_class_that_cannot_be_derived_from_keeps_its_forward(make, reason):
    model = in_model(make)
    x = torch.randn(2, HIDDEN)
    expected = model(x)
    report = fastlora.patch(model)
    assert reason in report.not_fused["base_model.model.1"] and len(report.patched) == 3
    assert type(model.base_model.model[1]) is make and same(model(x), expected, longest=MLP)


def test_a_wrapped_forward_that_was_unwrapped_is_pickled():
    """As accelerate's hooks leave it."""
    model = in_model(SwiGLU)
    fastlora.patch(model)
    block, x = model.base_model.model[1], torch.randn(2, HIDDEN)
    block.forward = block.forward
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    fastlora.unpatch(model)
    assert same(pickle.loads(pickle.dumps(model))(x), expected, longest=MLP)


def test_a_shallow_copy_is_proven_for_itself():
    class WithFunction(SwiGLU):
        def __init__(self):
            super().__init__()
            self.function = F.silu

        def forward(self, x):
            return self.down_proj(self.function(self.gate_proj(x)) * self.up_proj(x))

    model = in_model(WithFunction)
    fastlora.patch(model)
    block, x = model.base_model.model[1], torch.randn(2, HIDDEN)
    first = block(x)
    other = copy.copy(block)
    other.function = F.relu
    assert same(other(x), WithFunction.forward(other, x), longest=MLP)
    assert fusion_of(other) is not fusion_of(block) and torch.equal(block(x), first)
