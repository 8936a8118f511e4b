"""What counts as an MLP: `fastlora.proof`, and how a fused block notices that it has changed."""

import re
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from blocks import HIDDEN, MLP, SwiGLU, randomise
from torch import nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

import fastlora
from fastlora import fused_block
from fastlora.benchmarks.accuracy import same
from fastlora.proof import ACTIVATIONS, Block, own_class, prove
from fastlora.reference import activate

NAMES = ("gate_proj", "up_proj", "down_proj")


class Variant(SwiGLU):
    """A gated MLP of any activation and forward."""

    def __init__(self, h=lambda self, gate, up: F.silu(gate) * up, finish=lambda self, x, y: y):
        super().__init__()
        self.h, self.finish, self.limit = h, finish, 10.0

    def forward(self, x):
        h = self.h(self, self.gate_proj(x), self.up_proj(x))
        return self.finish(self, x, self.down_proj(h))


def layers_of(module):
    return {name: module.get_submodule(name) for name in NAMES}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_identified(activation):
    module = Variant(lambda self, gate, up: activate(gate, activation) * up)
    assert prove(module, layers_of(module)) == Block(NAMES, activation)
    swapped = Variant(lambda self, gate, up: activate(up, activation) * gate)
    assert prove(swapped, layers_of(swapped)) == Block(("up_proj", "gate_proj", "down_proj"), activation)


DROPOUTS = {
    "none called": (lambda self, h: h, lambda self, x, y: y, (None, None)),
    "inside": (lambda self, h: self.one(h), lambda self, x, y: y, ("one", None)),
    "after": (lambda self, h: h, lambda self, x, y: self.one(y), (None, "one")),
    "both": (lambda self, h: self.one(h), lambda self, x, y: self.other(y), ("one", "other")),
    "both by one": (lambda self, h: self.one(h), lambda self, x, y: self.one(y), ("one", "one")),
    "of two, the called": (lambda self, h: self.other(h), lambda self, x, y: (self.one(y), y)[1], ("other", None)),
}


@pytest.mark.parametrize("of_h, of_y, names", DROPOUTS.values(), ids=DROPOUTS)
def test_dropouts_are_found(of_h, of_y, names):
    module = Variant(lambda self, gate, up: of_h(self, F.silu(gate) * up), of_y)
    module.one, module.other = nn.Dropout(0.1), nn.Dropout(0.1)
    assert prove(module, layers_of(module)) == Block(NAMES, "silu", None, *names)
    module.one.p = module.other.p = 0.0
    assert prove(module, layers_of(module)) == Block(NAMES, "silu")


OTHERS = nn.Dropout(0.1, inplace=True), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1)


@pytest.mark.parametrize("dropout", OTHERS, ids=str)
def test_other_dropouts_are_not(dropout):
    module = Variant(finish=lambda self, x, y: self.dropout(y))
    module.dropout = dropout
    assert "in training" in prove(module, layers_of(module))


def test_a_dropout_that_drops_nothing_may_be_anywhere():
    module = Variant(lambda self, gate, up: F.silu(self.dropout(gate)) * up)
    module.dropout = nn.Dropout(0.0)
    assert prove(module, layers_of(module)) == Block(NAMES, "silu")
    module.dropout.p = 0.1
    assert "not that of an MLP" in prove(module, layers_of(module))


def test_dropping_twice_in_a_row_is_not_dropping_once():
    module = Variant(finish=lambda self, x, y: self.dropout(self.dropout(y)))
    module.dropout = nn.Dropout(0.1)
    assert "not that of an MLP" in prove(module, layers_of(module))


def clamped(limit):
    return lambda self, gate, up: F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


ALMOST = {  # functions that a probe in half precision, or of small numbers, takes for SwiGLU
    "clamped at 7": clamped(7.0),
    "clamped at 10": clamped(10.0),
    "clamped at 100": clamped(100.0),
    "up clamped alone": lambda self, gate, up: F.silu(gate) * up.clamp(-16, 16),
    "2% more": lambda self, gate, up: 1.02 * F.silu(gate) * up,
    "a little of the gate": lambda self, gate, up: (F.silu(gate) + 1e-5 * gate) * up,
    "steeper": lambda self, gate, up: gate * torch.sigmoid(1.00001 * gate) * up,
    "nearly quick gelu": lambda self, gate, up: gate * torch.sigmoid(1.7 * gate) * up,
    "leaky": lambda self, gate, up: F.leaky_relu(gate, 1e-4) * up,
    "up to six": lambda self, gate, up: F.relu6(gate) * up,
    "one more": lambda self, gate, up: F.silu(gate) * (up + 1),
}


@pytest.mark.parametrize("h", ALMOST.values(), ids=ALMOST)
def test_almost_is_not_enough(h):
    module = Variant(h)
    assert "not that of an MLP" in prove(module, layers_of(module))


DEPENDS = {
    "the length": (lambda self, x, y: y * 2 if x.shape[-2] > 600 else y, "for an x of"),
    "the batch": (lambda self, x, y: y * 2 if x.dim() > 2 and x.shape[0] > 1 else y, "for an x of"),
    "one token": (lambda self, x, y: y * 2 if x.shape[:-1].numel() == 1 else y, "(for an x of|not that of)"),
    "the number of dimensions": (lambda self, x, y: y * 2 if x.dim() == 2 else y, "for an x of"),
    "the mode": (lambda self, x, y: y * 2 if self.training else y, "in training"),
    "gradients": (lambda self, x, y: y * 2 if torch.is_grad_enabled() else y, "with gradients"),
    "a residual": (lambda self, x, y: x + y, "not that of an MLP"),
}


@pytest.mark.parametrize("finish, reason", DEPENDS.values(), ids=DEPENDS)
def test_a_forward_that_depends_on(finish, reason):
    module = Variant(finish=finish)
    found = prove(module, layers_of(module))
    assert isinstance(found, str) and re.search(reason, found), found


def test_no_layer_and_no_hook_is_called():
    """Layers of any size, on meta here, and of any quantisation: a proof asks only for their widths."""
    with torch.device("meta"):
        module = LlamaMLP(LlamaConfig(hidden_size=2048, intermediate_size=8192))
    for layer in layers_of(module).values():
        layer.register_forward_hook(lambda *_: pytest.fail("called"))
    state = torch.get_rng_state()
    assert prove(module, layers_of(module)) == Block(NAMES, "silu")
    assert torch.equal(torch.get_rng_state(), state)


def patched(module, dtype=torch.float64):
    model = peft.get_peft_model(nn.Sequential(module.to(dtype)), peft.LoraConfig(r=3, target_modules=list(NAMES)))
    randomise(model)
    assert fastlora.patch(model).fused == ["base_model.model.0"]
    return model, model.base_model.model[0]


class Scaled(nn.Module):
    """An activation with a buffer and a flag."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.sharp = False

    def forward(self, x):
        return F.silu(x) * self.scale if not self.sharp else F.tanh(x)


class WithParts(SwiGLU):
    def __init__(self):
        super().__init__()
        self.act, self.function, self.flag, self.options = Scaled(), F.silu, False, {"shift": 0.0}

    def forward(self, x):
        gate = self.gate_proj(x)
        h = (self.function(gate) if self.flag else self.act(gate)) * self.up_proj(x)
        return self.down_proj(h + self.options["shift"])


CHANGES = {
    "activation replaced": lambda m: setattr(m, "act", nn.Tanh()),
    "flag of the activation": lambda m: setattr(m.act, "sharp", True),
    "buffer of the activation in place": lambda m: m.act.scale.fill_(2.0),
    "buffer of the activation replaced": lambda m: setattr(m.act, "scale", torch.full((), 3.0, dtype=torch.float64)),
    "forward of the activation": lambda m: setattr(m.act, "forward", torch.tanh),
    "hook on the activation": lambda m: m.act.register_forward_hook(lambda module, args, y: 2 * y),
    "function and flag": lambda m: (setattr(m, "flag", True), setattr(m, "function", F.tanh)),
    "container that forward reads": lambda m: m.options.update(shift=1.0),
    "a layer replaced": lambda m: setattr(m, "up_proj", nn.Linear(HIDDEN, MLP, dtype=torch.float64)),
    "a dropout put in": lambda m: setattr(m, "act", nn.Sequential(nn.SiLU(), nn.Hardtanh(-0.1, 0.1))),
}


@pytest.mark.one_case_in(3)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_changed_block_runs_its_own_forward(change, compiled):
    if compiled and change is CHANGES["hook on the activation"]:
        pytest.skip("Dynamo does not see hooks that are put on later, whatever the layers are")
    model, block = patched(WithParts())
    call = model
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(model, backend="eager")
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    before = own_class(block).forward(block, x)
    assert same(call(x), before, longest=MLP)
    change(block)
    expected = own_class(block).forward(block, x)
    assert not same(expected, before, torch.float32), "the change shows, whoever computes it"
    if not compiled:
        with pytest.warns(UserWarning, match="runs its own forward"):
            assert same(call(x), expected, longest=MLP)
        assert fastlora.report(model).mlps["base_model.model.0"].own == 1
    else:
        assert same(call(x), expected, longest=MLP)


class Turned(nn.Module):
    """silu, of -z once an attribute has changed; the class has no buffer, so that a graph computes the block as one."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z):
        return F.silu(-z if self.value == 2 else z)


class Turning(SwiGLU):
    def __init__(self, value):
        super().__init__()
        self.act_fn = Turned(value)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("values", [(0, 2), (1.5, 2.0), (1, 2)], ids=str)
def test_a_graph_is_guarded_on_attributes(values):
    model, block = patched(Turning(values[0]))
    torch._dynamo.reset()
    call, x = torch.compile(model, backend="eager"), torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    for value in values:
        block.act_fn.value = value
        assert same(call(x), own_class(block).forward(block, x), longest=MLP)


def test_a_block_is_fused_again_when_the_change_is_undone():
    model, block = patched(WithParts())
    x = torch.randn(2, HIDDEN, dtype=torch.float64)
    calls = fastlora.report(model).mlps["base_model.model.0"]
    handle = block.act.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="Scaled has hooks"):
        model(x)
    handle.remove()
    block.act = nn.SiLU()  # another object, the same function
    model(x)
    assert (calls.fused, calls.own) == (1, 1)


def test_a_block_whose_attributes_change_at_every_call_is_proven_only_so_often(monkeypatch):
    model, block = patched(WithParts())
    proofs = []
    monkeypatch.setattr(fused_block, "prove", lambda *args: proofs.append(1) or prove(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(20):
            block.step = step + 1000
            model(torch.randn(2, HIDDEN, dtype=torch.float64))
    assert len(proofs) == fused_block.PROOFS
    assert "change from call to call" in fastlora.report(model).mlps["base_model.model.0"].reason


class Swish(nn.Module):
    """silu for beta = 1, quick GELU for 1.702; ``by_class`` is an attribute of the class."""

    by_class = 1.0

    def __init__(self, beta=1.0):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * self.by_class * x)


class WithSwish(SwiGLU):
    def __init__(self):
        super().__init__()
        self.act = Swish()

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def agrees_with_its_own_forward(call, model, block):
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(call(x), own_class(block).forward(block, x), longest=MLP)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_number_that_changes_back_and_forth(compiled, compiling):
    model, block = patched(WithSwish())
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    for beta in (1.0, 1.702, 1.0, 1.702, 3.0, 1.0):
        block.act.beta = beta
        agrees_with_its_own_forward(call, model, block)


@pytest.mark.parametrize("of", ["instance", "class"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_attribute_of_the_class(compiled, of, compiling, monkeypatch):
    model, block = patched(WithSwish())
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    agrees_with_its_own_forward(call, model, block)
    monkeypatch.setattr(block.act if of == "instance" else Swish, "by_class", 3.0)
    agrees_with_its_own_forward(call, model, block)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_forward_of_the_class_that_changes(compiled, compiling, monkeypatch):
    model, block = patched(WithSwish())
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    agrees_with_its_own_forward(call, model, block)
    changed = lambda self, x: self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))  # noqa: E731
    monkeypatch.setattr(WithSwish, "forward", changed)
    agrees_with_its_own_forward(call, model, block)
