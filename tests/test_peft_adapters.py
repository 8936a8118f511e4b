"""Adapters of a patched model: several at once, switched, disabled, merged, in mixed batches, hot-swapped."""

import copy

import pytest
import torch
from oracle import lora_layers
from peft import LoraConfig
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_models import (
    BF16,
    H,
    K,
    adapted,
    assert_like_peft,
    dense,
    fourbit,
    gpt2_like,
    inputs,
    loaded_in_4bit,
    patched,
    results,
    uses_fastlora,
)
from torch import nn

from fastlora.benchmarks.accuracy import relative_error, same
from fastlora.peft import patch


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
    # The variance of 20000 tokens has a standard deviation of sqrt(2 / 20000), a hundredth: a tenth is ten of these.
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
        assert same(model(x), before, longest=H)
        model.unmerge_adapter()
        assert uses_fastlora(model)
        assert same(model(x), before, longest=H)

    def test_disable_while_merged_unmerges(self):
        model = patched()
        x = inputs()
        base = model.get_base_model().down.base_layer(silu_up(model, x))
        model.merge_adapter()
        with model.disable_adapter():
            assert same(model(x), base, longest=H)

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
        assert same(mixed, torch.stack([expected[0][0], expected[1][1]]), longest=H)

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
        assert same(model(inputs()), before, longest=H)
        assert uses_fastlora(model)
        assert_like_peft(model)


def silu_up(model, x):
    return torch.nn.functional.silu(model.get_base_model().up.base_layer(x))


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
        assert relative_error(after[name], t) <= 0.03, name


def test_gradients_reach_every_adapter_parameter_and_no_other():
    model = patched()
    model(inputs()).sum().backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {name for name, _ in model.named_parameters() if "lora_" in name}
