"""Several adapters in one batch: each entry is computed, and each adapter trained, as if it were alone."""

import copy
import warnings

import pytest
import torch
from accuracy import check_model, linear_4bit
from blocks import CountOps
from oracle import in_fp64
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.benchmarks.accuracy import same
from fastlora.calls import calls_of
from fastlora.peft import patch, unpatch

K, N = 64, 128
BF16 = torch.bfloat16
NAMES = ["first", "second", "__base__", "third", "third", "first"]
LONGEST = 6 * 5 + N  # of all sums

pytestmark = [pytest.mark.usefixtures("bitsandbytes_eager")]


class Two(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def dense(dtype):
    return Two(nn.Linear(K, N), nn.Linear(N, K, bias=False)).to(dtype)


def fourbit(dtype):
    base = dense(torch.float32)
    return Two(*(linear_4bit(m.weight.detach(), m.bias, dtype=dtype) for m in (base.up, base.down)))


def conv1d(dtype):
    return Two(Conv1D(N, K), Conv1D(K, N)).to(dtype)


class ComputesItself(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def opaque(dtype):
    return Two(ComputesItself(K, N), ComputesItself(N, K, bias=False)).to(dtype)


BASES = {"dense": dense, "4bit": fourbit, "conv1d": conv1d, "opaque": opaque}


def adapted(base="dense", dtype=torch.float32, dropout=0.0, **changes) -> PeftModel:
    """With three adapters: of other ranks and scalings, and the third on one layer only."""
    torch.manual_seed(0)
    common = {"lora_dropout": dropout, "fan_in_fan_out": base == "conv1d"} | changes
    model = get_peft_model(BASES[base](dtype), LoraConfig(r=4, target_modules=["up", "down"], **common), "first")
    model.add_adapter("second", LoraConfig(r=7, lora_alpha=3, target_modules=["up", "down"], **common))
    model.add_adapter("third", LoraConfig(r=2, lora_alpha=20, use_rslora=True, target_modules=["down"], **common))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.requires_grad_()
            if "lora_B" in name:
                nn.init.normal_(p, std=0.2)
    return model


def an_input(dtype=torch.float32, tokens=5):
    return torch.randn(len(NAMES), tokens, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def dy_like(y):
    return torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)


def step(model, x, names, run=None) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    with fastlora.adapters_of_rows(model, names):
        y = (model if run is None else run)(x)
        y.backward(dy_like(y))
    return results(model, x, y)


def results(model, x, y):
    found = {"y": y.detach(), "dx": x.grad}
    for name, p in model.named_parameters():
        if "lora_" in name:
            found[name], p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
    return found


def one_by_one(model, x, names) -> dict[str, torch.Tensor]:
    """Plain PEFT, an entry at a time."""
    x = x.detach().clone().requires_grad_()
    ys = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                ys.append(model(x[i : i + 1]))
        else:
            model.base_model.set_adapter(name)
            for key, p in model.named_parameters():
                p.requires_grad_("lora_" in key)
            ys.append(model(x[i : i + 1]))
    y = torch.cat(ys)
    y.backward(dy_like(y))
    return results(model, x, y)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_as_accurate_as_peft_one_by_one(base, dtype):
    model, x = adapted(base, dtype), an_input(dtype)
    fast = copy.deepcopy(model)
    patch(fast)
    truth = one_by_one(in_fp64(model), x.double(), NAMES)
    check_model(step(fast, x, NAMES), one_by_one(model, x, NAMES), truth, LONGEST, dtype)
    layers = (fast.base_model.model.up, fast.base_model.model.down)
    ran = (0, 1, 0) if base == "opaque" else (1, 0, 0)
    assert [(calls.fused, calls.added, calls.own) for calls in map(calls_of, layers)] == [ran] * 2


@pytest.mark.parametrize("base", BASES)
def test_adapter_names_of_peft(base):
    """Inference by PEFT's own argument."""
    model = adapted(base).eval()
    fast = copy.deepcopy(model)
    patch(fast)
    truth = in_fp64(model)  # bitsandbytes may compute in bf16 here
    with torch.no_grad():
        expected = truth(an_input().double(), adapter_names=NAMES)
        assert same(fast(an_input(), adapter_names=NAMES), expected.float(), longest=LONGEST)
    assert calls_of(fast.base_model.model.up).own == 0


def test_numbers_are_those_of_the_config():
    model = adapted()
    patch(model)
    numbers = [{"first": 0, "second": 1, "third": 2, "__base__": -1}[name] for name in NAMES]
    expected = step(model, an_input(), NAMES)
    for given in (numbers, torch.tensor(numbers), tuple(NAMES)):
        assert all(map(torch.equal, step(model, an_input(), given).values(), expected.values()))


def test_one_adapter_for_all_is_that_adapter():
    model = adapted()
    patch(model)
    mixed = step(model, an_input(), ["second"] * len(NAMES))
    model.base_model.set_adapter("second")
    x = an_input().requires_grad_()
    y = model(x)
    y.backward(dy_like(y))
    alone = results(model, x, y)
    for name, t in mixed.items():
        assert same(t, alone[name], longest=LONGEST), name


def test_dropout_drops_on_the_way_to_adapters_alone():
    """Within training, with the mask of forward drawn again in backward: dx shows what y dropped."""
    model = adapted(dropout=0.5).train()
    patch(model)
    up = model.base_model.model.up
    with torch.no_grad():
        up.base_layer.weight.zero_()
        for name in ("first", "second"):
            up.lora_A[name].weight.fill_(1.0)
            up.lora_B[name].weight.fill_(1.0)
    x = torch.ones(2, 300, K, requires_grad=True)
    with fastlora.adapters_of_rows(model, ["first", "second"]):
        y = up(x)
        y.sum().backward()
    kept = x.grad != 0
    assert 0.45 < kept.float().mean() < 0.55
    per_row = (y - up.base_layer.bias).detach()[..., 0] / kept.sum(-1)
    assert all(same(row, row.mean().expand(row.shape), longest=K) for row in per_row)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    model = adapted()
    patch(model)
    expected = step(model, an_input(), NAMES)
    with CountOps() as ran:
        found = step(model, an_input(), NAMES, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert all(map(torch.equal, found.values(), expected.values()))
    assert ran.names["fastlora::lora_matmul"] == 2 + 2 + (2 if use_reentrant else 1)


def test_generation_and_training_of_a_whole_model():
    """MLP blocks run layer by layer within the context and as one after it."""
    torch.manual_seed(0)
    shape = dict(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(**shape))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, "first")
    model.add_adapter("second", config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    fast = copy.deepcopy(model)
    patch(fast)
    names, ids = ["second", "first", "__base__"], torch.arange(12).view(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastlora.adapters_of_rows(fast, names):
            ours = fast.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
            mixed = fast(input_ids=ids).logits
        fast(input_ids=ids)
        fast.eval()(input_ids=ids, adapter_names=names)
    for i, name in enumerate(names):
        model.base_model.set_adapter("first" if name == "__base__" else name)
        alone = model.disable_adapter() if name == "__base__" else warnings.catch_warnings()
        with alone, torch.no_grad():
            one = ids[i : i + 1]
            theirs = model.generate(input_ids=one, max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert torch.equal(ours[i : i + 1], theirs)
            assert same(mixed[i : i + 1].detach(), model(input_ids=one).logits, longest=LONGEST)
    assert [calls.fused for calls in fastlora.report(fast).mlps.values()] == [1]


def test_modules_that_are_trained_and_saved_too():
    """PEFT's ``modules_to_save`` of each adapter is that of its own entries."""
    torch.manual_seed(0)
    model = get_peft_model(dense(torch.float32), LoraConfig(target_modules=["up"], modules_to_save=["down"]), "first")
    model.add_adapter("second", LoraConfig(target_modules=["up"], modules_to_save=["down"]))
    for name, p in model.named_parameters():
        if "first" in name or "second" in name:
            nn.init.normal_(p, std=0.2)
    x, names = an_input()[:3], ["first", "second", "first"]
    with torch.no_grad():
        expected = []
        for i, name in enumerate(names):
            model.set_adapter(name)
            expected.append(model(x[i : i + 1]))
        patch(model)
        with fastlora.adapters_of_rows(model, names):
            assert same(model(x), torch.cat(expected), longest=LONGEST)


def test_inference_and_then_training_in_one_context():
    model = adapted()
    patch(model)
    x = an_input().requires_grad_()
    with fastlora.adapters_of_rows(model, NAMES):
        with torch.inference_mode():
            model(an_input())
        model(x).sum().backward()
    assert x.grad is not None


def test_in_fp64():
    model = adapted(dtype=torch.float64)
    fast = copy.deepcopy(model)
    patch(fast)
    ours, theirs = (run(each, an_input(torch.float64), NAMES) for run, each in ((step, fast), (one_by_one, model)))
    for name, t in ours.items():
        assert same(t, theirs[name], longest=LONGEST), name


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_to_one_graph(grad, compiling):
    model = adapted()
    patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = step(model, an_input(), NAMES)
    if grad:
        assert all(same(t, expected[n], longest=LONGEST) for n, t in step(model, an_input(), NAMES, compiled).items())
    else:
        with torch.no_grad(), fastlora.adapters_of_rows(model, NAMES):
            assert same(compiled(an_input()), expected["y"], longest=LONGEST)


def test_layers_that_are_not_patched_go_through_peft():
    model, x = adapted(), an_input()
    expected = one_by_one(copy.deepcopy(model), x, NAMES)
    for name, t in step(model, x, NAMES).items():
        assert same(t, expected[name], longest=LONGEST), name


def test_what_is_left_to_peft():
    model = adapted()
    patch(model)
    model.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="its base layer has hooks"):
        step(model, an_input(), NAMES)
    assert calls_of(model.base_model.model.up).own == 1 and calls_of(model.base_model.model.down).fused == 1


def test_the_context_leaves_nothing():
    model = adapted()
    patch(model)
    with pytest.raises(KeyError), fastlora.adapters_of_rows(model, NAMES):
        raise KeyError
    assert all("forward" not in module.__dict__ for module in model.modules())
    with fastlora.adapters_of_rows(model, ["first"] * 6):
        with fastlora.adapters_of_rows(model, ["second"] * 6), torch.no_grad():
            inner = model(an_input())
        with torch.no_grad():
            outer = model(an_input())
    assert not same(inner, outer, longest=LONGEST)
    assert unpatch(model)


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        (
            ["first", "fourth"],
            ValueError,
            "adapters must be of first, second, third, or '__base__' for none, got 'fourth'",
        ),
        ([0, 3], ValueError, "numbers of adapters must be from -1 .* to 2, got 3"),
        ([0, -2], ValueError, "got -2"),
        ("first", TypeError, "adapters must be a list"),
        ([0.0], TypeError, "adapters must be names or numbers, got 0.0"),
        ([True], TypeError, "got True"),
    ],
)
def test_bad_adapters(adapters, error, message):
    with pytest.raises(error, match=message), fastlora.adapters_of_rows(adapted(), adapters):
        pass


def test_a_batch_of_another_size():
    model = adapted()
    patch(model)
    with fastlora.adapters_of_rows(model, NAMES[:2]), pytest.raises(ValueError, match="same as the number of inputs"):
        warnings.simplefilter("ignore")
        model(an_input())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), 3], ids=["no LoRA", "no module"])
def test_not_a_peft_model(model):
    with pytest.raises((TypeError, ValueError), match="model must be"), fastlora.adapters_of_rows(model, ["a"]):
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_an_entry_without_an_adapter_has_reaches_no_other(value):
    model = adapted()
    patch(model)
    x = an_input()
    expected = step(model, x, NAMES)
    x[NAMES.index("__base__"), 0, 3] = value
    found = step(model, x, NAMES)
    others = [i for i, name in enumerate(NAMES) if name != "__base__"]
    for name, t in expected.items():
        rows = others if name in ("y", "dx") else slice(None)
        assert same(found[name][rows], t[rows], longest=LONGEST), name
    base = NAMES.index("__base__")
    with torch.no_grad(), model.disable_adapter():
        alone = model(x[base : base + 1])
    assert torch.equal(found["y"][base].isfinite(), alone[0].isfinite()), "nothing but the base layers' own"
