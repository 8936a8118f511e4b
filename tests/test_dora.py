"""DoRA: patched layers beside PEFT's and fp64, what they save and compute, and `add_lora(use_dora=True)`."""

import copy

import pytest
import torch
from accuracy import check_model, linear, linear_4bit
from blocks import CountOps
from oracle import CASES, LONGEST, Twin, adapted, in_fp64, lora_layers, pass_of, randomise
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.benchmarks.accuracy import same
from fastlora.calls import calls_of
from fastlora.dora import column_scale
from fastlora.fourbit import weight_4bit
from fastlora.peft import patch

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("bitsandbytes_eager")
DORA_CASES = [name for name in CASES if name.endswith("dora")]


@pytest.mark.parametrize("case", DORA_CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
def test_as_accurate_as_peft(case, dropout):
    model = adapted(CASES[case], lora_dropout=dropout).train()
    fast = copy.deepcopy(model)
    report = patch(fast)
    assert not any("mlp." in name or "attn." in name for name in report.skipped)
    results = []
    for each in (fast, model, in_fp64(model)):
        torch.manual_seed(0)
        results.append(pass_of(each, tokens=64))
    assert any("magnitude" in name for name in results[0])
    check_model(*results, LONGEST, BF16 if "bf16" in case else torch.float32)
    if not dropout and case != "gpt2, dora":  # whose MLP has biases
        assert "0 by the module's own forward" in str(fastlora.report(fast))
    assert all(
        calls_of(layer).fused == 1 or "mlp" in name
        for name, layer in fast.named_modules()
        if isinstance(layer, LoraLayer)
    )


def layer_of(weight, rows=40, bias=False, r=5, p=0.0):
    """An adapted layer of ours, as after some training, and an input."""
    torch.manual_seed(0)
    N, K = 96, 128
    w = torch.randn(N, K).to(BF16 if weight == "bf16" else torch.float32) / 10
    bias = torch.randn(N).to(w.dtype) if bias else None
    base = linear_4bit(w, bias) if weight == "nf4" else linear(w, bias)
    layer = fastlora.LoRALinear.from_linear(base, r=r, lora_dropout=p, use_dora=True)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn(N))
    return layer, torch.randn(rows, K).to(w.dtype)


def run(layer, x, dy, after=lambda y: y):
    layer.zero_grad()
    x = (x + 0).requires_grad_()
    y = after(layer(x))
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


RESULTS = ("y", "dx", "da", "db", "dm")  # of `run`
WEIGHTS = ("fp32", "bf16", "nf4")


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("r", [1, 5, 40])
def test_norms_are_those_of_the_sum(weight, r):
    layer, _ = layer_of(weight, r=r)
    w = layer.base_layer.weight
    w = w if weight != "nf4" else weight_4bit(w).decode(torch.float32)
    a, b, s = layer.lora_A.double(), layer.lora_B.double(), layer.scaling
    expected = (w.double() + s * b @ a).norm(dim=1)
    norms = layer._row_norms()
    assert norms.dtype == torch.float32
    assert same(norms, expected.float(), dtype=BF16 if weight == "bf16" else None, longest=128)  # a enters in bf16


def test_an_adapter_that_cancels_the_weight_gives_finite_norms():
    layer, x = layer_of("fp32", r=40)
    with torch.no_grad():
        layer.base_layer.weight.copy_(-layer.scaling * layer.lora_B @ layer.lora_A)
    assert all(t.isfinite().all() for t in run(layer, x, torch.randn(40, 96)))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_is_kept_of_a_weight_is_its_own(weight):
    """In place, by assignment, and under a new parameter: norms follow the weight."""
    layer, _ = layer_of(weight)
    before = layer._row_norms()
    assert torch.equal(layer._row_norms(), before)
    layer.lora_B.data.zero_()
    plain = layer._row_norms()
    if weight == "nf4":
        layer.base_layer.weight = linear_4bit(torch.randn(96, 128)).weight
        layer.base_layer.quant_state = layer.base_layer.weight.quant_state
        assert not same(layer._row_norms(), plain)
        return
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    assert same(layer._row_norms(), 2 * plain, longest=128)
    layer.base_layer.weight.data = 4 * layer.base_layer.weight.data
    assert same(layer._row_norms(), 8 * plain, longest=128)
    layer.base_layer.weight.data.mul_(2)  # which counts no version
    assert same(layer._row_norms(), 16 * plain, longest=128)
    before = layer._row_norms()
    for part in ((slice(0, None, 2),), (slice(1, None, 2),), (slice(None), slice(1, None, 2))):
        layer.base_layer.weight.data[part] *= 4
        now = layer._row_norms()
        assert not same(now, before, longest=128)
        before = now
    layer.base_layer.weight.data = plain.new_ones(96, 1).expand(96, 128).to(layer.base_layer.weight.dtype).contiguous()
    plain = layer._row_norms()
    layer.base_layer.weight.requires_grad_(True)
    layer.base_layer.weight.data[3] *= 2
    assert same(layer._row_norms()[3], 2 * plain[3], longest=128)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_norms_for_inference_follow_the_adapter(weight):
    """Also where it changes without autograd's knowing, as hotswapping does."""
    layer, x = layer_of(weight)
    with torch.no_grad():
        layer(x)
        for tensor in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            tensor.data.copy_(2 * tensor)
            assert torch.equal(layer(x), with_gradients(layer, x))
        layer.set_scaling(7.0)
        assert torch.equal(layer(x), with_gradients(layer, x))


def with_gradients(layer, x):
    with torch.enable_grad():
        return layer(x).detach()


def test_no_sum_of_the_size_of_the_weight():
    layer, x = layer_of("fp32", r=5)
    N, K = layer.base_layer.weight.shape
    run(layer, x, torch.randn(40, N))  # the squares of the weight are summed up once

    class Sizes(CountOps):
        def __init__(self):
            super().__init__()
            self.sizes = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.sizes |= {t.shape for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)}
            return result

    with Sizes() as seen:
        run(layer, x, torch.randn(40, N))
    assert (N, K) not in seen.sizes


@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_output_changed_in_place_is_computed_again(weight):
    """The layer keeps its output for the gradient of the magnitude; the model may do what it likes with it."""
    layer, x = layer_of(weight)
    dy = torch.randn(40, 96).to(x.dtype)
    expected = run(layer, x, dy)
    changed = run(layer, x, 2 * dy, after=lambda y: y.mul_(0.5))
    for name, one, other in zip(RESULTS, expected, changed, strict=True):
        assert same(other, one if name != "y" else one / 2, longest=128), name


def test_the_output_is_not_copied_and_not_kept_after_backward():
    layer, x = layer_of("fp32")
    y = layer(x.requires_grad_())
    assert y.grad_fn.y.data_ptr() == y.data_ptr()
    node = y.grad_fn
    y.sum().backward(retain_graph=True)
    assert node.y is not None
    y.sum().backward()
    assert node.y is None


def test_backward_twice():
    layer, x = layer_of("bf16")
    y = layer(x.requires_grad_())
    dy = torch.randn_like(y)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    second = torch.autograd.grad(y, wanted, dy)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(weight, reentrant):
    layer, x = layer_of(weight)
    dy = torch.randn(40, 96).to(x.dtype)
    expected = run(layer, x, dy)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=reentrant)

    for ours, value in zip(run(Checkpointed(), x, dy), expected, strict=True):
        assert same(ours, value, longest=128)


@pytest.mark.parametrize("train", ["a b", "m", "x"])
def test_only_what_is_asked_for(train):
    layer, x = layer_of("fp32")
    dy = torch.randn(40, 96)
    expected = dict(zip(RESULTS, run(layer, x, dy), strict=True))
    named = {"a": layer.lora_A, "b": layer.lora_B, "m": layer.lora_magnitude_vector}
    for name, p in named.items():
        p.requires_grad_(name in train.split()).grad = None
    x = x.clone().requires_grad_(train == "x")
    layer(x).backward(dy)
    for name, t in (named | {"x": x}).items():
        assert (t.grad is None) == (name not in train.split())
        assert t.grad is None or same(t.grad, expected[f"d{name}"], longest=128), name


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_magnitude_of_zero_has_a_gradient(weight, bias):
    layer, x = layer_of(weight, bias=bias)
    dy = torch.randn(40, 96).to(x.dtype)
    with torch.no_grad():
        layer.lora_magnitude_vector[3] = 1e-3
    *_, expected = run(layer, x, dy)
    with torch.no_grad():
        layer.lora_magnitude_vector[3] = 0.0
    y, *_, dm = run(layer, x, dy)
    assert dm.isfinite().all() and same(dm, expected, dtype=BF16)
    assert (y[:, 3] - (layer.bias[3] if bias else 0)).abs().max() < 100 * 1e-20


@pytest.mark.parametrize("weight", ["bf16", "nf4"])
def test_few_tokens_without_gradients(weight):
    """Generation: other kernels multiply then."""
    layer, x = layer_of(weight, rows=3)
    g = column_scale(layer.lora_magnitude_vector, layer._row_norms()).double()
    w = layer.base_layer.weight
    w = w if weight == "bf16" else weight_4bit(w).decode(torch.float32)
    expected = g * (x.double() @ (w.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).T)
    with torch.no_grad():
        for n in (1, 2, 3):
            assert same(layer(x[:n]), expected[:n].to(x.dtype), longest=128)


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("weight", ["fp32", "nf4"])
def test_compiled(weight, dynamic, compiling):
    layer, x = layer_of(weight)
    dy = torch.randn(40, 96)
    expected = run(layer, x, dy)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for ours, value in zip(run(compiled, x, dy), expected, strict=True):
        assert same(ours, value, longest=128)


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("case", ["qwen2, dora", "nf4, dora"])
def test_a_patched_model_compiles_as_one_graph(case, dynamic):
    """Where PEFT's does not: Dynamo breaks at its reading of the weight."""
    model = adapted(CASES[case])
    patch(model)
    x = Twin(CASES[case], model).randn(2, 4, 64)

    def trained(model):
        model.zero_grad()
        y = model(inputs_embeds=x, use_cache=False).logits
        y.square().sum().backward()
        return y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)

    expected = trained(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert all(same(one, other, longest=1 << 14) for one, other in zip(trained(compiled), expected, strict=True))
    with torch.no_grad():
        assert same(compiled(inputs_embeds=x, use_cache=False).logits, expected[0], longest=1 << 14)


def test_torch_func_and_fake_tensors_leave_nothing_behind():
    """They give stand-ins for parameters, which have no memory, or for what is computed from them."""
    layer, x = layer_of("fp32")
    layer.base_layer.weight.requires_grad_(True)
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(layer(x), FakeTensor)
    found = torch.func.grad(loss)(parameters)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert same(found[name], p.grad, longest=128), name
    with torch.no_grad():
        assert type(layer(x)) is torch.Tensor


@pytest.mark.parametrize("second", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_two_active_adapters(second):
    """PEFT scales what the adapters before have given: ours if DoRA is the first and only one."""
    case = CASES["qwen2, dora"]
    model = adapted(case)
    config = copy.deepcopy(model.peft_config["default"])
    config.use_dora = bool(second)
    model.add_adapter("other", config)
    randomise(model, "other")
    model.base_model.set_adapter(["default", "other"])
    fast = copy.deepcopy(model)
    patch(fast)
    ours, theirs = pass_of(fast, tokens=64), pass_of(model, tokens=64)
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert same(ours[name], t, longest=1 << 14), name
    fused = "0 by the module's own forward" in str(fastlora.report(fast))
    assert fused != bool(second)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(64, 48, bias=False), nn.Linear(64, 48)

    def forward(self, x):
        return self.q(x) * self.k(x)


def trained(base):
    """An adapted copy of a model, as after some training, and an input."""
    torch.manual_seed(1)
    model = fastlora.add_lora(copy.deepcopy(base), r=4, use_dora=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                p.add_(torch.randn(p.shape) / 10)
    return model, torch.randn(3, 64)


def test_files_are_those_of_peft(tmp_path):
    base = Two()
    ours, x = trained(base)
    fastlora.save_adapter(ours, tmp_path / "ours")
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True)
    assert same(peft(x), ours(x), longest=64)
    with torch.no_grad():
        lora_layers(peft)[0].lora_magnitude_vector["default"].weight.mul_(2)
    peft.save_pretrained(tmp_path / "theirs")
    for model in (ours, copy.deepcopy(base)):
        fastlora.load_adapter(model, tmp_path / "theirs")
        assert same(model(x), peft(x), longest=64)
    with pytest.raises(ValueError, match="use_dora=True; the model's has use_dora=False"):
        fastlora.load_adapter(fastlora.add_lora(copy.deepcopy(base), r=4), tmp_path / "theirs")


def test_merged_is_the_layer():
    model, x = trained(Two())
    y = model(x)
    fastlora.merge(model)
    assert same(model(x), y, longest=128)
    fastlora.unmerge(model)
    assert torch.equal(model(x), y)
    plain = fastlora.merge(model, unload=True)
    assert type(plain.q) is nn.Linear and same(plain(x), y, longest=128)


def test_begins_as_the_base():
    base = Two()
    x = torch.randn(3, 64)
    assert same(fastlora.add_lora(copy.deepcopy(base), use_dora=True)(x), base(x), longest=64)


def test_dora_needs_a_weight():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(TypeError, match="DoRA needs the weight of its base layer; that of Own is unknown"):
        fastlora.LoRALinear.from_linear(Own(8, 8), use_dora=True)
