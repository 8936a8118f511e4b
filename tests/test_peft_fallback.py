"""What a patched model leaves to PEFT's own forward, and that any change of a layer is noticed."""

import re
import weakref

import pytest
import torch
from accuracy import linear
from oracle import lora_layers
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft_models import H, K, adapted, inputs, patched, results, uses_fastlora
from torch import nn

from fastlora.benchmarks.accuracy import same
from fastlora.peft import patch
from fastlora.peft_layers import _adapters, why_peft


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


def other_dropout(model):
    lora_layers(model)[0].lora_dropout["default"] = nn.Hardtanh(-0.5, 0.5)
    return model


def other_lora_A(model):
    layer = lora_layers(model)[0]
    layer.lora_A["default"] = nn.utils.parametrizations.weight_norm(layer.lora_A["default"])
    return model


class OwnVariant(DoraLinearVariant):
    """What may compute anything."""


def own_variant(model):
    for layer in lora_layers(model):
        layer.lora_variant["default"] = OwnVariant()
    return model


def hook_on_magnitude(model):
    return hook_on(lambda m: m.lora_magnitude_vector["default"])(model)


LEFT_TO_PEFT = {
    "another variant": (
        lambda: own_variant(adapted(use_dora=True)),
        r"'default' is not LoRA or DoRA \(OwnVariant\)",
    ),
    "hook on the magnitude": (
        lambda: hook_on_magnitude(adapted(use_dora=True)),
        r"magnitude of adapter.* has hooks",
    ),
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
        assert same(ours[name], t, longest=H), name


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
    "a trained base": (lambda layer: layer.base_layer.weight.requires_grad_(True), True),
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
    assert same(y, PeftLinear.forward(layer, x), longest=K)


def test_no_layer_keeps_a_replaced_tensor_or_adapter():
    model = patched(adapters=("default", "second"))
    layer = lora_layers(model)[0]
    layer.set_adapter("default")
    layer(inputs())
    gone = [weakref.ref(t) for t in (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"])]
    layer.base_layer.weight = nn.Parameter(torch.zeros(H, K), requires_grad=False)
    layer.delete_adapter("default")
    assert all(ref() is None for ref in gone)


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
    assert same(model(inputs()), expected, longest=H)
