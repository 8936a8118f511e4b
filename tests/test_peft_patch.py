"""What `patch` and `unpatch` do: the model computes, trains, is saved, copied and compiled as with PEFT."""

import copy
import io

import pytest
import torch
from accuracy import check_model
from oracle import in_fp64, lora_layers
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from peft_models import (
    BF16,
    H,
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
from safetensors.torch import load_file

from fastlora import ops
from fastlora.peft import patch, unpatch
from fastlora.peft_layers import FastLinear, FastLinear4bit

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
    check_model({"y": model(x)}, {"y": theirs}, {"y": in_fp64(model)(x.double())}, H, x_dtype)


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
