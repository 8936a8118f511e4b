import copy
import io
import re
import weakref

import pytest
import torch
from accuracy import check_model, linear, linear_4bit
from oracle import in_fp64, lora_layers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastlora import ops
from fastlora.peft import FastLinear, FastLinear4bit, _adapters, patch, unpatch, why_peft

K, H = 64, 128
BF16 = torch.bfloat16


class Tiny(nn.Module):
    """Two adapted layers, one with a bias; ``emb`` and ``head`` for what only some tests adapt."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down
        self.emb, self.head = nn.Embedding(7, K), nn.Linear(K, 5)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


def tensors(dtype=torch.float32):
    return torch.randn(H, K).to(dtype) / K**0.5, torch.randn(H).to(dtype), torch.randn(K, H).to(dtype) / H**0.5


def dense(dtype=torch.float32):
    up, bias, down = tensors(dtype)
    return Tiny(linear(up, bias), linear(down)).to(dtype)


def fourbit(dtype=torch.float32, **kwargs):
    up, bias, down = tensors(dtype)
    return Tiny(linear_4bit(up, bias, **kwargs), linear_4bit(down, **kwargs))


def loaded_in_4bit():
    model = fourbit()
    model.is_loaded_in_4bit = True
    return model


def gpt2_like():
    up, down = Conv1D(H, K), Conv1D(K, H)
    return Tiny(up, down)


BASES = {
    "dense": (dense, FastLinear, PeftLinear),
    "dense bf16, fp32 adapters": (lambda: dense(BF16), FastLinear, PeftLinear),
    "4-bit in lora.Linear": (fourbit, FastLinear, PeftLinear),
    "4-bit in lora.Linear, bf16": (lambda: fourbit(BF16), FastLinear, PeftLinear),
    "4-bit in lora.Linear4bit": (loaded_in_4bit, FastLinear4bit, PeftLinear4bit),
    "Conv1D": (gpt2_like, FastLinear, PeftLinear),
}
CONFIGS = {
    "plain": {},
    "rank 5": {"r": 5},
    "dropout in eval": {"lora_dropout": 0.3},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "ranks by layer": {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 32}},
}


def adapted(base=dense, adapters=("default",), **config) -> PeftModel:
    """A PEFT model in eval mode with random adapters, all of them active."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"]} | config
    torch.manual_seed(2)
    base = base()
    model = get_peft_model(base, LoraConfig(fan_in_fan_out=isinstance(base.up, Conv1D), **config))
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(**config | {"r": 3}))
    model.base_model.set_adapter(list(adapters))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def patched(*args, **config) -> PeftModel:
    model = adapted(*args, **config)
    patch(model)
    return model


def inputs(model=None, dtype=torch.float32):
    weight = None if model is None else next(p for n, p in model.named_parameters() if n.endswith("up.base_layer.bias"))
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 5, K, generator=generator).to(dtype if weight is None else weight.dtype)


def results(model, x, **kwargs):
    """y, dx and the gradient of every parameter that has one."""
    x = x.detach().requires_grad_()
    y = model(x, **kwargs)
    wanted = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return {"y": y.detach()} | {name: g for name, g in zip(wanted, grads, strict=True) if g is not None}


def assert_like_peft(model, x=None, **kwargs):
    x = inputs(model) if x is None else x
    theirs = copy.deepcopy(model)
    unpatch(theirs)
    assert not any(type(m) in (FastLinear, FastLinear4bit) for m in theirs.modules())
    truth = results(in_fp64(model), x.double(), **kwargs)
    check_model(results(model, x, **kwargs), results(theirs, x, **kwargs), truth, H, x.dtype)


def uses_fastlora(model, x=None) -> bool:
    """Whether a forward of the model runs fastlora's ops."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(inputs(model) if x is None else x)
    return any(event.key.startswith("fastlora::") for event in profile.key_averages())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("base, ours, theirs", BASES.values(), ids=BASES)
def test_patched_model_is_like_peft(base, ours, theirs, config):
    model = adapted(base, **config)
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    report = patch(model)
    assert report.patched == ["base_model.model.up", "base_model.model.down"]
    assert report.skipped == {}
    assert [type(m) for m in lora_layers(model)] == [ours] * 2
    assert all(isinstance(m, theirs) for m in lora_layers(model))
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert uses_fastlora(model)
    assert_like_peft(model)


def test_patch_twice_and_unpatch():
    model = adapted()
    first, second = patch(model), patch(model)
    assert first == second
    assert [type(m) for m in lora_layers(model)] == [FastLinear] * 2
    assert unpatch(model) == first.patched
    assert [type(m) for m in lora_layers(model)] == [PeftLinear] * 2
    assert unpatch(model) == []


def test_unpatched_model_is_bitwise_what_it_was():
    model = adapted()
    x = inputs()
    before = model(x)
    patch(model)
    unpatch(model)
    assert torch.equal(model(x), before)


def test_report_of_nothing_to_patch():
    report = patch(dense())
    assert (report.patched, report.skipped) == ([], {})
    assert "nothing to patch" in str(report)


@pytest.mark.parametrize("function", [patch, unpatch])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got dict"):
        function({})


def test_save_and_load(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path / "patched")
    x, y = inputs(), model(inputs())
    unpatch(model)
    model.save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("patched", "plain")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(t, files[1][name]) for name, t in files[0].items())
    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(dense(), tmp_path / "patched")
    patch(loaded)
    assert torch.equal(loaded(x), y)


@pytest.mark.parametrize("base", [dense, fourbit, loaded_in_4bit, gpt2_like], ids=lambda base: base.__name__)
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.2}, {"lora_bias": True}], ids=["plain", "dropout", "bias"])
def test_two_active_adapters(base, config):
    assert_like_peft(patched(base, adapters=("default", "second"), **config))


def test_two_active_adapters_drop_independently():
    """On many copies of one token: the mean is the undropped output, and two equal adapters' variances add up."""
    model = patched(adapters=("default", "second"), lora_dropout=0.5)
    layer = lora_layers(model)[0].train()
    for part in (layer.lora_A, layer.lora_B):
        part["second"] = copy.deepcopy(part["default"])
    layer.scaling["second"] = layer.scaling["default"]
    tokens = inputs()[0, :1].expand(20000, K)
    with torch.no_grad():
        both = layer(tokens)
        layer.set_adapter(["default"])
        one = layer(tokens)
        undropped = layer.eval()(tokens[:1])
        base = layer.base_layer(tokens[:1])
    for y, n in ((one, 1), (both, 2)):
        expected = base + n * (undropped - base)
        assert ((y.mean(0) - expected).abs() <= 5 * y.std(0) / 20000**0.5).all()
    assert both.var(0).sum() / one.var(0).sum() == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("base", [dense, fourbit, gpt2_like], ids=lambda base: base.__name__)
def test_dropout_only_in_train_mode(base):
    model = patched(base, lora_dropout=0.5)
    x = inputs()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    model.eval()
    assert_like_peft(model)


class TestManagingAdapters:
    """What PEFT does with adapters, on a patched model."""

    def test_set_adapter(self):
        model = patched(adapters=("default", "second"))
        outputs = []
        for name in ("default", "second"):
            model.set_adapter(name)
            assert_like_peft(model)
            outputs.append(model(inputs()))
        assert not torch.equal(*outputs)

    def test_delete_adapter(self):
        model = patched(adapters=("default", "second"))
        model.delete_adapter("second")
        assert_like_peft(model)

    def test_adapter_added_after_patch(self):
        model = patched()
        model.add_adapter("late", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "late"])
        assert_like_peft(model)

    @pytest.mark.parametrize("base", [dense, fourbit, loaded_in_4bit], ids=lambda base: base.__name__)
    def test_disable_adapter(self, base):
        model = patched(base)
        x = inputs().requires_grad_()
        before = model(x)
        with model.disable_adapter():
            disabled = model(x)
            assert "disabled" in patch(model).skipped["base_model.model.up"]
        assert torch.equal(disabled, model.get_base_model().down.base_layer(silu_up(model, x)))
        assert torch.equal(model(x), before)

    def test_merge_and_unmerge_adapter(self):
        model = patched()
        x = inputs()
        before = model(x)
        model.merge_adapter()
        assert "merged" in patch(model).skipped["base_model.model.up"]
        assert not uses_fastlora(model)
        torch.testing.assert_close(model(x), before)
        model.unmerge_adapter()
        assert uses_fastlora(model)
        torch.testing.assert_close(model(x), before)

    def test_disable_while_merged_unmerges(self):
        model = patched()
        x = inputs()
        base = model.get_base_model().down.base_layer(silu_up(model, x))
        model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(x), base)

    def test_merge_and_unload(self):
        model = adapted()
        theirs = copy.deepcopy(model)
        patch(model)
        merged, expected = model.merge_and_unload(), theirs.merge_and_unload()
        assert type(merged.up) is nn.Linear
        assert all(torch.equal(*pair) for pair in zip(merged.parameters(), expected.parameters(), strict=True))

    def test_unload(self):
        model = patched()
        base = model.get_base_model().up.base_layer
        assert model.unload().up is base

    def test_adapter_names_of_a_mixed_batch(self):
        model = patched(adapters=("default", "second"))
        assert_like_peft(model, adapter_names=["second", "__base__"])
        expected = []
        for name in ("default", "second"):
            model.set_adapter(name)
            expected.append(model(inputs()))
        mixed = model(inputs(), adapter_names=["default", "second"])
        torch.testing.assert_close(mixed, torch.stack([expected[0][0], expected[1][1]]))

    @pytest.mark.parametrize("base", [dense, fourbit], ids=lambda base: base.__name__)
    def test_hotswapped_rank_and_tensor_scaling(self, base):
        """lora_A and lora_B padded beyond ``layer.r``, and scalings that are tensors."""
        model = patched(base)
        before = model(inputs())
        prepare_model_for_compiled_hotswap(model, target_rank=9)
        layer = lora_layers(model)[0]
        assert layer.r["default"] == 4
        assert layer.lora_A["default"].weight.shape[0] == 9
        assert isinstance(layer.scaling["default"], torch.Tensor)
        torch.testing.assert_close(model(inputs()), before)
        assert uses_fastlora(model)
        assert_like_peft(model)


def silu_up(model, x):
    return torch.nn.functional.silu(model.get_base_model().up.base_layer(x))


def hook_on(part):
    def change(model):
        part(lora_layers(model)[0]).register_forward_hook(lambda module, args, out: 2 * out)
        return model

    return change


def forward_on_instance(of):
    """As accelerate wraps a module."""

    def change(model):
        module = of(lora_layers(model)[0])
        module._old_forward, module.forward = module.forward, lambda x: 3 * type(module).forward(module, x)
        return model

    return change


def trained_base(model):
    lora_layers(model)[0].base_layer.weight.requires_grad_(True)
    return model


def other_dropout(model):
    lora_layers(model)[0].lora_dropout["default"] = nn.Hardtanh(-0.5, 0.5)
    return model


def other_lora_A(model):
    layer = lora_layers(model)[0]
    layer.lora_A["default"] = nn.utils.parametrizations.weight_norm(layer.lora_A["default"])
    return model


LEFT_TO_PEFT = {
    "DoRA": (lambda: adapted(use_dora=True), r"'default' is not plain LoRA \(DoraLinearVariant\)"),
    "base weight trained": (lambda: trained_base(adapted()), r"base weight requires grad"),
    "hook on the base": (lambda: hook_on(lambda m: m.base_layer)(adapted()), r"base layer has hooks"),
    "hook on lora_A": (lambda: hook_on(lambda m: m.lora_A["default"])(adapted()), r"lora_A of adapter.* has hooks"),
    "hook on lora_B": (lambda: hook_on(lambda m: m.lora_B["default"])(adapted()), r"lora_B of adapter.* has hooks"),
    "hook on the dropout": (
        lambda: hook_on(lambda m: m.lora_dropout["default"])(adapted(lora_dropout=0.1)),
        r"dropout of adapter.* has hooks",
    ),
    "forward on the layer": (lambda: forward_on_instance(lambda m: m)(adapted()), r"already wrapped on the instance"),
    "forward on the base": (lambda: forward_on_instance(lambda m: m.base_layer)(adapted()), r"base layer has hooks"),
    "another dropout": (lambda: other_dropout(adapted()), r"dropout of adapter 'default' is Hardtanh"),
    "another lora_A": (lambda: other_lora_A(adapted()), r"lora_A.* is a Parametrized\w+, not a plain nn.Linear"),
}


@pytest.mark.parametrize("make, reason", LEFT_TO_PEFT.values(), ids=LEFT_TO_PEFT)
def test_left_to_peft_with_a_reason(make, reason):
    model = make()
    expected = results(model, inputs())
    report = patch(model)
    assert re.search(reason, report.skipped["base_model.model.up"])
    assert re.search(reason, str(report))
    ours = results(model, inputs())
    assert ours.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-4, atol=1e-5)


def set_weight(of, weight):
    def change(layer):
        of(layer).weight = nn.Parameter(weight(of(layer).weight), requires_grad=False)

    return change


def scale(factor):
    def change(layer):
        layer.scaling["default"] = factor(layer.scaling["default"])

    return change


def as_instance_forward(of):
    return lambda layer: forward_on_instance(of)(nn.ModuleList([layer]))


def set_attribute(of, name, value):
    return lambda layer: setattr(of(layer), name, value)


def delete_adapter(layer):
    layer.delete_adapter("default")
    layer.set_adapter("second")


PARTS = {
    "the base": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "the dropout": lambda layer: layer.lora_dropout["default"],
}
CHANGES = {  # of a patched layer that has run: whether it still runs fused with one adapter
    "nothing": (lambda layer: None, True),
    "a new base weight": (set_weight(PARTS["the base"], lambda w: 2 * w), True),
    "a new lora_A": (set_weight(PARTS["lora_A"], lambda w: 2 * w), True),
    "a new lora_B": (set_weight(PARTS["lora_B"], lambda w: 2 * w), True),
    "another base layer": (lambda layer: setattr(layer, "base_layer", linear(torch.randn(H, K))), True),
    "scaling": (scale(lambda s: 3 * s), True),
    "scaling as a tensor": (scale(torch.tensor), True),
    "set_scale": (lambda layer: layer.set_scale("default", 5.0), True),
    "another adapter": (lambda layer: layer.set_adapter("second"), True),
    "the adapter deleted": (delete_adapter, True),
    "dropout": (set_attribute(PARTS["the dropout"], "p", 0.5), True),  # in eval mode
    "two adapters": (lambda layer: layer.set_adapter(["default", "second"]), False),
    "two adapters, in place": (lambda layer: layer.active_adapters.append("second"), False),
    "disabled": (lambda layer: layer.enable_adapters(False), False),
    "merged": (lambda layer: layer.merge(), False),
    "no casting of x": (set_attribute(lambda layer: layer, "cast_input_dtype_enabled", False), False),
    "a trained base": (lambda layer: layer.base_layer.weight.requires_grad_(True), False),
    "ZeRO-3": (set_attribute(lambda layer: layer.lora_A["default"].weight, "ds_id", 1), False),
    "a dropout of 1": (set_attribute(PARTS["the dropout"], "p", 1.0), False),
    "another dropout": (lambda layer: layer.lora_dropout.update({"default": nn.Hardtanh(-0.5, 0.5)}), False),
    "a subclass as lora_A": (
        lambda layer: setattr(layer.lora_A["default"], "__class__", type("Mine", (nn.Linear,), {})),
        False,
    ),
    "a base with its own forward": (
        lambda layer: setattr(
            layer.base_layer, "__class__", type("Mine", (nn.Linear,), {"forward": lambda m, x: nn.Linear.forward(m, x)})
        ),
        False,
    ),
    **{
        f"a hook on {name}": (lambda layer, of=of: of(layer).register_forward_hook(print), False)
        for name, of in PARTS.items()
    },
    **{
        f"a pre-hook on {name}": (lambda layer, of=of: of(layer).register_forward_pre_hook(lambda *_: None), False)
        for name, of in PARTS.items()
    },
    **{
        f"a backward hook on {name}": (
            lambda layer, of=of: of(layer).register_full_backward_hook(lambda *_: None),
            False,
        )
        for name, of in PARTS.items()
    },
    **{f"accelerate's hook on {name}": (set_attribute(of, "_hf_hook", 1), False) for name, of in PARTS.items()},
    **{f"forward set on {name}": (as_instance_forward(of), False) for name, of in PARTS.items()},
}


@pytest.mark.parametrize("change, fused", CHANGES.values(), ids=CHANGES)
def test_a_change_of_a_layer_counts_from_the_next_call_on(change, fused):
    """What every call of a layer reads agrees with the reasons that `why_peft` finds, and with PEFT's results."""
    model = adapted(adapters=("default", "second"), lora_dropout=0.3)
    model.base_model.set_adapter("default")
    patch(model)
    layer, x = lora_layers(model)[0], inputs()
    layer(x)
    change(layer)
    operands = layer.operands_now()
    assert (operands is not None) == fused
    if fused:
        assert why_peft(layer) is None
        assert operands[2] == _adapters(layer)[0]
    y = layer(x)
    torch.testing.assert_close(y, PeftLinear.forward(layer, x), rtol=1e-4, atol=1e-5)


def test_no_layer_keeps_a_replaced_tensor_or_adapter():
    model = patched(adapters=("default", "second"))
    layer = lora_layers(model)[0]
    layer.set_adapter("default")
    layer(inputs())
    gone = [weakref.ref(t) for t in (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"])]
    layer.base_layer.weight = nn.Parameter(torch.zeros(H, K), requires_grad=False)
    layer.delete_adapter("default")
    assert all(ref() is None for ref in gone)


def test_trained_base_gets_its_gradient():
    model = trained_base(adapted())
    patch(model)
    assert any(name.endswith("up.base_layer.weight") for name in results(model, inputs()))


@pytest.mark.parametrize("part", ["base_layer", "lora_A"])
def test_hook_added_after_patch_runs(part):
    model = patched()
    layer, calls = lora_layers(model)[0], []
    module = layer.base_layer if part == "base_layer" else layer.lora_A["default"]
    handle = module.register_forward_hook(lambda *args: calls.append(1))
    model(inputs())
    assert len(calls) == 1
    handle.remove()
    assert why_peft(layer) is None


def test_lora_layers_of_other_types_are_left_alone():
    model = adapted(target_modules=["emb", "up"])
    report = patch(model)
    assert report.patched == ["base_model.model.up"]
    assert re.search(r"Embedding is not a layer type that fastlora replaces", report.skipped["base_model.model.emb"])


def test_offloaded_base_is_left_to_peft():
    model = patched()
    layer = lora_layers(model)[0]
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to("meta"), requires_grad=False)
    assert "offloaded or sharded" in why_peft(layer)


def test_disabled_input_casting_is_left_to_peft():
    model = patched()
    with disable_input_dtype_casting(model):
        assert not uses_fastlora(model)
    assert uses_fastlora(model)


def test_base_with_a_computed_weight():
    """Parametrisation: the base keeps its class's forward, but its weight is no parameter."""

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    model = adapted()
    nn.utils.parametrize.register_parametrization(lora_layers(model)[0].base_layer, "weight", Double())
    expected = model(inputs())
    patch(model)
    torch.testing.assert_close(model(inputs()), expected)


@pytest.mark.parametrize("base_dtype", [torch.float32, BF16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("x_dtype", [torch.float32, BF16, torch.float16, torch.int64], ids=str)
def test_x_of_another_dtype_on_a_dense_base(base_dtype, x_dtype):
    model = adapted(lambda: dense(base_dtype))
    x = inputs().to(x_dtype)
    outcomes = []
    for change in (lambda model: None, patch):
        change(model)
        try:
            outcomes.append(model(x).dtype)
        except (RuntimeError, TypeError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("base", [fourbit, loaded_in_4bit], ids=lambda base: base.__name__)
@pytest.mark.parametrize("x_dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_x_of_any_dtype_on_a_4bit_base(base, x_dtype):
    model = adapted(base)
    x = inputs().to(x_dtype).requires_grad_()  # without, bitsandbytes repacks the weight
    theirs = model(x)
    patch(model)
    ours = model(x)
    assert ours.dtype == theirs.dtype
    eps = max(torch.finfo(x_dtype).eps, torch.finfo(torch.float32).eps)
    assert (ours - theirs).norm() <= 4 * eps * theirs.norm()


@pytest.mark.parametrize("base", [dense, fourbit, loaded_in_4bit, gpt2_like], ids=lambda base: base.__name__)
@pytest.mark.parametrize("x_dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("adapters", [("default",), ("default", "second")], ids=["one adapter", "two adapters"])
def test_autocast(base, adapters, x_dtype):
    model = adapted(base, adapters=adapters)
    x = inputs().to(x_dtype)
    with torch.autocast("cpu", BF16):
        theirs = results(model, x)
        patch(model)
        ours = results(model, x)
    check_model(ours, theirs, results(in_fp64(model), x.double()), H, BF16)


@pytest.mark.parametrize("base", [fourbit, loaded_in_4bit], ids=lambda base: base.__name__)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_training_on_after_bitsandbytes_repacked_the_weight(base, nested):
    """An eval forward with the adapters disabled repacks the 4-bit weight in place; PEFT's next backward has no dx."""
    model = patched(lambda: fourbit(BF16, nested=nested) if base is fourbit else loaded_in_4bit())
    x = inputs(model)
    before = results(model, x)
    with torch.no_grad(), model.disable_adapter():
        model(x)
    if not getattr(lora_layers(model)[0].base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks 4-bit weights only on a CPU with AVX512-BF16")
    model.train()
    assert uses_fastlora(model)
    after = results(model, x)
    assert after.keys() == before.keys()
    for name, t in before.items():  # what bitsandbytes keeps of the scales: bf16, and quantised a second time
        assert (after[name] - t).float().norm() <= 0.03 * t.float().norm(), name


@pytest.mark.parametrize("base", [dense, fourbit, loaded_in_4bit], ids=lambda base: base.__name__)
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_of_a_patched_model(base, how):
    model = patched(base)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert [type(m) for m in lora_layers(twin)] == [type(m) for m in lora_layers(model)]
    assert torch.equal(twin(inputs()), model(inputs()))
    with torch.no_grad():
        lora_layers(twin)[0].lora_B["default"].weight.zero_()
    assert not torch.equal(twin(inputs()), model(inputs()))


@pytest.mark.one_case_in(2)
@pytest.mark.parametrize("base", [dense, fourbit, loaded_in_4bit], ids=lambda base: base.__name__)
@pytest.mark.parametrize("adapters", [("default",), ("default", "second")], ids=["one adapter", "two adapters"])
@pytest.mark.parametrize("p", [0.0, 0.2], ids=["p=0", "p=0.2"])
def test_compiles_to_one_graph(base, adapters, p):
    torch._dynamo.reset()
    model = patched(base, adapters=adapters, lora_dropout=p).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for each in (model, compiled):
        torch.manual_seed(1)
        runs.append(list(results(each, inputs()).values()))
    assert len(runs[0]) == 2 + 4 * len(adapters)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_gradients_reach_every_adapter_parameter_and_no_other():
    model = patched()
    model(inputs()).sum().backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.skipif(ops.NO_CPU_KERNELS is not None, reason="needs the CPU kernels")
def test_4bit_forward_is_one_product():
    """No pass over y or x but the base's, to which the adapter is added or into which it is merged on the way."""
    model = patched(fourbit)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, torch.no_grad():
        lora_layers(model)[1](torch.randn(7, H))
    names = ("aten::mm", "aten::addmm", "aten::linear", "fastlora::lora_matmul_4bit")
    products = [e.key for e in profile.key_averages() if e.key in names]
    assert products == ["fastlora::lora_matmul_4bit"]
