"""Layers that are fed one x share its reading and its gradient, and nothing else, however they are called."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from blocks import HIDDEN, Attention, CountOps, gradients, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import siblings
from fastlora.benchmarks.accuracy import same

QKV = ("q_proj", "k_proj", "v_proj")


def attention(dtype=torch.float64, seed=0, **arguments):
    torch.manual_seed(seed)
    model = fastlora.add_lora(Attention().to(dtype), **{"r": 4, "target_modules": "all-linear", **arguments})
    return randomise(model)


def an_input(dtype=torch.float64):
    """x as a model has it: not a leaf, so that its own graph does not hold it. That graph can be used again."""
    return torch.randn(2, 5, HIDDEN, dtype=dtype).requires_grad_().clone()


@pytest.fixture
def alone(monkeypatch):
    """A function that runs another one without any sharing."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(siblings.Siblings, "share", lambda *_: None)
            return function()

    return run


def step(model, x, forward=None):
    """y, dx and the gradients of one step."""
    model.zero_grad()
    x.retain_grad()
    y = (forward or model)(x)
    y.square().sum().backward()
    dx, x.grad = x.grad, None
    return y.detach(), dx, *gradients(model).values()


def assert_same(ours, theirs, dtype=None):
    for t, expected in zip(ours, theirs, strict=True):
        assert same(t, expected, dtype, longest=HIDDEN)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sharing_changes_nothing(dtype, p, alone):
    model, x = attention(dtype, lora_dropout=p), an_input(dtype)
    for _ in range(3):
        torch.manual_seed(1)
        ours = step(model, x)
        torch.manual_seed(1)
        theirs = alone(lambda: step(model, x.detach().requires_grad_()))
        assert_same(ours, theirs)


def test_one_read_of_x_and_one_gradient_of_x():
    model = attention()
    step(model, an_input())  # who follows whom is seen the first time
    x = an_input()
    model.zero_grad()
    with CountOps() as forward:
        y = model(x)
    assert forward.names["fastlora::shrink_group"] == 2, "q, k and v together; o alone"
    assert forward.names["fastlora::shrink"] == 0
    with CountOps() as backward:
        y.sum().backward()
    assert backward.names["fastlora::lora_matmul_group"] == 1
    assert backward.names["fastlora::lora_matmul"] == 1, "o"
    assert backward.names["aten::add"] == backward.names["aten::add_"] == 0, "no sum of temporaries"


class Latent(nn.Module):
    """As DeepSeek's attention: between the two layers of x there is another one, of another x."""

    def __init__(self):
        super().__init__()
        self.q_a, self.q_b, self.kv_a = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.q_b(torch.tanh(self.q_a(x))) * self.kv_a(x)


def test_another_layer_may_be_called_in_between(alone):
    model = randomise(fastlora.add_lora(Latent().double(), r=4, target_modules="all-linear"))
    step(model, an_input())
    x = an_input()
    with CountOps() as ops:
        ours = step(model, x)
    assert ops.names["fastlora::lora_matmul_group"] == 1, "one gradient of x"
    assert_same(ours, alone(lambda: step(model, x.detach().requires_grad_())))


def test_4bit_layers_share_too():
    bnb = pytest.importorskip("bitsandbytes")
    model = Attention()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = bnb.nn.Linear4bit(HIDDEN, getattr(model, name).out_features, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(getattr(model, name).weight.data, requires_grad=False).to("cpu")
        model.set_submodule(name, layer)
    model = randomise(fastlora.add_lora(model, r=4, target_modules="all-linear"))
    x = an_input(torch.float32)
    step(model, an_input(torch.float32))  # q learns who follows it
    with CountOps() as count:
        ours = step(model, x)
    assert count.names["fastlora::shrink_group"] == 2, "for o, and for q, k and v"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siblings.Siblings, "share", lambda *_: None)
        assert_same(ours, step(model, x.detach().requires_grad_()))


CALLS = {
    "never called": lambda m, x: m.q_proj(x).sum(-1) + m.v_proj(x).sum(-1),
    "only one": lambda m, x: m.k_proj(x).sum(-1),
    "in another order": lambda m, x: m.v_proj(x).sum(-1) + m.q_proj(x).sum(-1) + m.k_proj(x).sum(-1),
    "another tensor": lambda m, x: m.q_proj(x).sum(-1) + m.k_proj(x * 2).sum(-1) + m.v_proj(x * 2).sum(-1),
    "the same values": lambda m, x: m.q_proj(x).sum(-1) + m.k_proj(x.clone()).sum(-1) + m.v_proj(x).sum(-1),
    "twice": lambda m, x: m.q_proj(x).sum(-1) + m.q_proj(x).sum(-1) + m.k_proj(x).sum(-1),
    "o, too": lambda m, x: m.o_proj(x).sum(-1) + m.q_proj(x).sum(-1),
    "without gradients between": lambda m, x: m.q_proj(x).sum(-1) + quietly(m.k_proj, x) + m.v_proj(x).sum(-1),
    "output unused": lambda m, x: (m.q_proj(x).sum(-1), m.k_proj(x))[0] + m.v_proj(x).sum(-1),
    "leader's output unused": lambda m, x: (m.q_proj(x), m.k_proj(x).sum(-1))[1],
}


def quietly(layer, x):
    with torch.no_grad():
        return layer(x).sum(-1)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_any_sequence_of_calls(calls, p, alone):
    model, x = attention(lora_dropout=p), an_input()
    step(model, x)  # now q, k and v are expected
    for _ in range(2):
        torch.manual_seed(1)
        ours = step(model, x, lambda x: calls(model, x))
        torch.manual_seed(1)
        theirs = alone(lambda: step(model, x.detach().requires_grad_(), lambda x: calls(model, x)))
        assert_same(ours, theirs)


def test_x_changed_in_place_between():
    model = attention()
    step(model, an_input())
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        model.q_proj(x)
        x.mul_(2)
        assert torch.equal(model.k_proj(x), attention().k_proj(x.clone()))


def test_adapter_changed_between():
    """By an optimizer, by loading, or by another scaling: what was begun for the sibling is not taken."""
    model = attention()
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    changes = [
        lambda layer: layer.lora_A.data.mul_(2),
        lambda layer: layer.lora_A.mul_(3),
        lambda layer: setattr(layer, "lora_A", nn.Parameter(layer.lora_A * 2)),
        lambda layer: layer.set_scaling(7.0),
    ]
    for change in changes[1:]:
        with torch.no_grad():
            model.q_proj(x), model.k_proj(x)  # k is expected from now on
            model.q_proj(x)
            change(model.k_proj)
            ours = model.k_proj(x)
            assert torch.equal(ours, copy.deepcopy(model.k_proj)(x.clone()))


def test_siblings_of_any_kind(alone):
    """Ranks, dropout, dtypes and training modes of their own; one merged, one frozen."""
    model = attention(rank_pattern={"k_proj": 7}, alpha_pattern={"q_proj": 5})
    model.v_proj.lora_dropout = 0.4
    model.k_proj.lora_A.data = model.k_proj.lora_A.data.float()
    x = an_input()
    for change in (
        lambda: None,
        lambda: model.v_proj.eval(),
        lambda: model.k_proj.merge(),
        lambda: model.k_proj.unmerge(),
        lambda: model.q_proj.lora_A.requires_grad_(False),
        lambda: model.q_proj.lora_B.requires_grad_(False),
        lambda: model.eval(),
    ):
        change()
        for _ in range(2):
            torch.manual_seed(1)
            ours = step(model, x)
            torch.manual_seed(1)
            assert_same(ours, alone(lambda: step(model, x.detach().requires_grad_())))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(use_reentrant, p):
    model = attention(lora_dropout=p)
    base = (torch.randn(2, 5, HIDDEN, dtype=torch.float64)).requires_grad_()

    def block(x):
        return model(x.tanh())

    def layer_by_layer(x):
        x = x.tanh()
        one = [checkpoint(layer, x, use_reentrant=use_reentrant) for layer in model.projections()]
        return sum(y.square().sum(-1) for y in one)

    plain = {block: block, layer_by_layer: lambda x: sum(y.square().sum(-1) for y in map_layers(model, x.tanh()))}
    wrapped = {block: lambda x: checkpoint(block, x, use_reentrant=use_reentrant), layer_by_layer: layer_by_layer}
    for forward in (block, layer_by_layer):
        for _ in range(2):  # with nobody expected, and with k and v
            results = []
            for run in (plain[forward], wrapped[forward]):
                torch.manual_seed(3)
                model.zero_grad()
                base.grad = None
                run(base).square().sum().backward()
                results.append([base.grad.clone(), *gradients(model).values()])
            assert_same(*results)


def map_layers(model, x):
    return [layer(x) for layer in model.projections()]


def test_autocast_shares_the_converted_x(alone):
    model, x = attention(torch.float32), an_input(torch.float32)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    step(model, x, run)
    with CountOps() as count:
        ours = step(model, x, run)
    theirs = alone(lambda: step(model, x.detach().requires_grad_(), run))
    assert count.names["fastlora::lora_matmul_group"] == 1
    assert_same(ours, theirs, torch.bfloat16)


def test_partial_backward_leaves_nothing_for_the_next():
    """Gradients of k's adapter alone hand over a part of dx that nobody takes."""
    model, x = attention(), an_input()
    y = sum(layer(x).sum() for layer in model.projections())
    k = model.k_proj.lora_A
    (first,) = torch.autograd.grad(y, k, retain_graph=True)
    x.retain_grad()
    y.backward()
    assert same(k.grad, first, longest=HIDDEN)
    expected = step(model, x.detach().requires_grad_(), lambda x: sum(layer(x).sum() for layer in model.projections()))
    model.zero_grad()
    z = x.detach().requires_grad_()
    sum(copy.deepcopy(layer)(z).sum() for layer in model.projections()).backward()
    assert same(x.grad, z.grad, longest=HIDDEN)
    assert expected


def test_backward_twice():
    model, x = attention(), an_input()
    x.retain_grad()
    y = model(x).square().sum()
    y.backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.backward()
    assert torch.equal(x.grad, first)


def test_copies_and_pickles_share_among_themselves():
    model = attention()
    step(model, an_input())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q_proj._siblings is other.k_proj._siblings is not model.q_proj._siblings
        x = an_input()
        assert_same(step(other, x), step(model, x))
        assert not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}
    assert copy.deepcopy(model.q_proj)._siblings is not model.q_proj._siblings


def in_threads(*functions):
    """Run them at the same time. One that never comes back is a failure, not a wait for ever."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
        assert not thread.is_alive(), "a thread hangs"


def test_nothing_is_shared_between_threads():
    model, x = attention(), an_input()
    model.q_proj(x)
    mine = siblings._thread.recent
    in_threads(lambda: model.k_proj(x))
    assert siblings._thread.recent is mine
    assert mine[0].members == {id(model.q_proj)}


def test_two_models_in_two_threads():
    """Each gets what it gets alone, though both train all the time."""
    inputs = [torch.randn(2, 5, HIDDEN, dtype=torch.float64) for _ in range(2)]

    def train(model, x, results):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-5)
        for _ in range(20):
            optimizer.zero_grad()
            model(x.clone().requires_grad_().tanh()).square().sum().backward()
            optimizer.step()
        results.extend(p.detach().clone() for p in model.parameters())

    expected, results = ([], []), ([], [])
    for i in range(2):
        train(attention(seed=i), inputs[i], expected[i])
    in_threads(*(partial(train, attention(seed=i), inputs[i], results[i]) for i in range(2)))
    for ours, theirs in zip(results, expected, strict=True):
        assert ours
        assert_same(ours, theirs)


def test_one_model_in_two_threads():
    """The same layers, different inputs: what is shared belongs to a thread."""
    model = attention()
    inputs = [an_input().detach() for _ in range(2)]
    expected = [model(x) for x in inputs]
    wrong = []

    def run(i):
        for _ in range(50):
            with torch.no_grad():
                if not same(model(inputs[i]), expected[i], longest=HIDDEN):
                    wrong.append(i)

    in_threads(*(partial(run, i) for i in range(2)))
    assert not wrong


def test_not_while_compiling():
    torch._dynamo.reset()
    model = attention()
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(compiled(x), model(x), longest=HIDDEN)


def test_layers_of_different_parents_are_strangers():
    model = nn.ModuleList([Attention().double(), Attention().double()])
    model = fastlora.add_lora(model, r=4, target_modules="all-linear")
    assert model[0].q_proj._siblings is not model[1].q_proj._siblings
    alone = fastlora.add_lora(nn.Sequential(nn.Linear(4, 4)), r=2, target_modules="all-linear")
    assert alone[0]._siblings is None
