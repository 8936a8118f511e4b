"""`LoRAExperts` and `add_lora(target_parameters=...)`: beside PEFT, with dropout, on disk, merged."""

import copy
import json

import pytest
import torch
from accuracy import check_model
from peft import PeftModel
from test_experts import FAMILIES, LONGEST, E, K, Net, adapted, an_input, experts_of, in_fp64, results_of
from torch import nn

import fastlora
from fastlora import reference
from fastlora.adapter_files import CONFIG
from fastlora.benchmarks.accuracy import same
from fastlora.calls import calls_of

BOTH = ("experts.gate_up_proj", "experts.down_proj")
pytestmark = [
    pytest.mark.usefixtures("bitsandbytes_eager"),
    pytest.mark.filterwarnings("ignore:.*target_parameters"),
    pytest.mark.filterwarnings("ignore:r=.*overcomplete"),
]


def weights_of(experts):
    return [f"experts.{'gate_up_proj' if experts.has_gate else 'up_proj'}", "experts.down_proj"]


def ours(family="qwen3_moe", dtype=torch.float32, parameters=None, **arguments) -> nn.Module:
    """A model of `add_lora`, its adapters as after some training."""
    experts = experts_of(family, dtype)
    model = Net(experts)
    arguments = {"r": 3, "lora_alpha": 6, "target_modules": []} | arguments
    fastlora.add_lora(model, **arguments, target_parameters=parameters or weights_of(experts))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_peft_saved_and_back(family, dtype, tmp_path):
    theirs = adapted(experts_of(family, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    model = Net(experts_of(family, dtype))
    model.router.load_state_dict(theirs.base_model.model.router.state_dict())
    router = copy.deepcopy(model.router)
    fastlora.load_adapter(model, tmp_path / "theirs")
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    x = an_input(dtype)
    results = [list(results_of(each, x).values())[:2] for each in (model, theirs, in_fp64(theirs))]
    check_model(*(dict(zip(("y", "dx"), each, strict=True)) for each in results), LONGEST, dtype)
    fastlora.save_adapter(model, tmp_path / "ours")
    again = Net(experts_of(family, dtype))
    again.router = router
    again = PeftModel.from_pretrained(again, tmp_path / "ours")
    if dtype == torch.float32:
        assert same(again(x).detach(), theirs(x).detach(), longest=LONGEST)
    assert again.peft_config["default"].target_parameters == sorted(weights_of(model.experts.base_layer))


def test_gradients_are_those_of_peft():
    theirs = adapted(experts_of("gpt_oss", torch.float32))
    model = ours("gpt_oss")
    model.router.load_state_dict(theirs.base_model.model.router.state_dict())
    wrappers = {m.parameter_name: m for m in theirs.modules() if hasattr(m, "parameter_name")}
    with torch.no_grad():
        for name, wrapper in wrappers.items():
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            model.experts.lora_A[name].copy_(a.view(E, -1, a.shape[1]))
            model.experts.lora_B[name].copy_(b.view(b.shape[0], -1, E).permute(2, 0, 1))
    found, expected = results_of(model, an_input()), results_of(theirs, an_input())
    for key, t in expected.items():
        if "lora_" in key:
            weight = next(
                name for name, m in wrappers.items() if m is theirs.get_submodule(key.rpartition(".lora_")[0])
            )
            part = "lora_A" if "lora_A" in key else "lora_B"
            own = found[f"experts.{part}.{weight}"]
            t = t.view(E, -1, t.shape[1]) if part == "lora_A" else t.view(t.shape[0], -1, E).permute(2, 0, 1)
        else:
            own = found[key]
        assert same(own, t, longest=LONGEST), key


def test_dropout_is_that_of_the_reference():
    """Every expert's adapter sees the rows of its tokens dropped, in forward and backward."""
    model = ours(lora_dropout=0.4).train()
    experts, x = model.experts, an_input(tokens=(1, 8))[0]
    chosen, weights = torch.tensor([[0, 3], [3, 1], [5, 0], [1, 0]] * 2), torch.rand(8, 2)
    torch.manual_seed(5)
    y = experts(x, chosen, weights)
    torch.manual_seed(5)
    seeds = [torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64) for _ in range(2)]
    base, flat = experts.base_layer, chosen.flatten()
    order = flat.argsort(stable=True)
    rows, s = x[order // 2].double(), experts.scaling

    def layer(rows, name, seed):
        w = getattr(base, name).double()
        a, b = experts.lora_A[name].double(), experts.lora_B[name].double()
        dropped = reference.dropout(rows, 0.4, seed)
        return torch.stack([rows[i] @ w[e].T + s * dropped[i] @ a[e].T @ b[e].T for i, e in enumerate(flat[order])])

    gate, up = layer(rows, "gate_up_proj", seeds[0]).chunk(2, -1)
    out = layer(nn.functional.silu(gate) * up, "down_proj", seeds[1]) * weights.flatten()[order].double()[:, None]
    expected = torch.zeros(8, K, dtype=torch.float64).index_add(0, order // 2, out)
    assert same(y.detach(), expected.detach().float(), longest=LONGEST)
    assert same(model.eval().experts(x, chosen, weights).detach(), ours().experts(x, chosen, weights).detach())


def test_gradcheck_with_dropout():
    model = ours(lora_dropout=0.4, adapter_dtype=torch.float64)
    model.experts.base_layer.config._experts_implementation = "eager"
    model.double().train()
    x = an_input(torch.float64, tokens=(1, 4))[0].requires_grad_()
    chosen, weights = torch.tensor([[0, 3], [3, 1], [5, 0], [1, 0]]), torch.rand(4, 2, dtype=torch.float64)
    weights.requires_grad_()
    leaves = [p for p in model.parameters() if p.requires_grad]

    def run(x, weights, *_):
        torch.manual_seed(7)
        return model.experts(x, chosen, weights)

    assert torch.autograd.gradcheck(run, (x, weights, *leaves), fast_mode=True)


def test_beside_linear_layers():
    model = Net(experts_of("qwen3_moe", torch.float32))
    fastlora.add_lora(model, r=2, target_modules=["router"], target_parameters=["experts.down_proj"])
    assert isinstance(model.router, fastlora.LoRALinear) and list(model.experts.lora_A) == ["down_proj"]
    model(an_input())
    report = fastlora.report(model)
    assert [calls.fused for calls in report.mlps.values()] == [1] and len(report.layers) == 1


def test_merging(tmp_path):
    for family in ("qwen3_moe", "gpt_oss"):
        model, x = ours(family), an_input()
        before = {name: p.clone() for name, p in model.experts.base_layer.named_parameters()}
        with torch.no_grad():
            expected = model(x)
            fastlora.merge(model)
            assert same(model(x), expected, longest=LONGEST)
            assert calls_of(model.experts).own == 1
            fastlora.unmerge(model)
            now = dict(model.experts.base_layer.named_parameters())
            assert all(torch.equal(now[name], p) for name, p in before.items())
            assert torch.equal(model(x), expected)
            fastlora.merge(model, unload=True)
            assert same(model(x), expected, longest=LONGEST)
        assert not any("lora_" in name for name in model.state_dict())


def test_4bit_experts_are_not_merged():
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    experts = experts_of("qwen3_moe", torch.float32)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(experts, name, quant_type="nf4")
    model = fastlora.add_lora(Net(experts), r=3, target_modules=[], target_parameters=BOTH)
    model(an_input()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(TypeError, match="it is not dense"):
        fastlora.merge(model)


def test_saved_over_and_loaded_over(tmp_path):
    model = ours(lora_dropout=0.1)
    fastlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0.0
    other = ours()
    for p in other.experts.parameters():
        if p.requires_grad:
            p.data.zero_()
    fastlora.load_adapter(other, tmp_path)
    for name, p in model.experts.lora_A.items():
        assert torch.equal(other.experts.lora_A[name], p)
    for name, p in model.experts.lora_B.items():
        assert torch.equal(other.experts.lora_B[name], p)


def test_what_does_not_fit_is_not_loaded(tmp_path):
    fastlora.save_adapter(ours(), tmp_path)
    with pytest.raises(ValueError, match="other experts than the model's adapters"):
        fastlora.load_adapter(ours(parameters=["experts.down_proj"]), tmp_path)
    with pytest.raises(ValueError, match="has rank 3, the model's 2"):
        fastlora.load_adapter(ours(r=2), tmp_path)
    with pytest.raises(ValueError):
        fastlora.load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_parameters": ["experts.down_proj"]}))
    model = Net(experts_of("qwen3_moe", torch.float32))
    with pytest.raises(ValueError):
        fastlora.load_adapter(model, tmp_path)
    assert not any("lora_" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_parameters": ["experts.no_proj"]}, ValueError, "matches no parameter"),
        ({"target_parameters": ["router.weight"]}, TypeError, "cannot adapt this Linear: a Linear is adapted"),
        ({"target_parameters": BOTH, "r": 0}, ValueError, "r must be positive"),
        ({"target_parameters": BOTH, "lora_dropout": 1.0}, ValueError, "dropout"),
        ({"target_parameters": BOTH, "init_lora_weights": "zeros"}, ValueError, "init_lora_weights"),
        ({"target_parameters": BOTH, "lora_alpha": float("nan")}, ValueError, "lora_alpha"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = Net(experts_of("qwen3_moe", torch.float32).requires_grad_())
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        fastlora.add_lora(model, target_modules=[], **arguments)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_parameters_by_name():
    experts = experts_of("qwen3_moe", torch.float32)
    with pytest.raises(TypeError, match="cannot adapt up_proj of experts whose weights are gate_up_proj and down_proj"):
        fastlora.LoRAExperts(experts, ["up_proj"])
    assert list(fastlora.LoRAExperts(experts, ["down_proj"]).lora_A) == ["down_proj"]
    assert list(fastlora.LoRAExperts(experts).lora_A) == ["gate_up_proj", "down_proj"]


def test_layers_to_transform_chooses_experts_too():
    model = nn.ModuleDict({"layers": nn.ModuleList(Net(experts_of("qwen3_moe", torch.float32)) for _ in range(3))})
    with pytest.raises(ValueError, match="matches no parameter"):
        fastlora.add_lora(model, target_modules=[], target_parameters=BOTH, layers_to_transform=[7])
    fastlora.add_lora(model, target_modules=[], target_parameters=BOTH, layers_to_transform=1)
    adapted = [name for name, module in model.named_modules() if isinstance(module, fastlora.LoRAExperts)]
    assert adapted == ["layers.1.experts"]


def test_experts_that_cannot_be_computed_any_more():
    model = ours()
    model.experts.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="these experts cannot be computed: the experts have hooks"):
        model(an_input())


def test_compiles_to_one_graph(compiling):
    model = ours(lora_dropout=0.2).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, expected = results_of(model, an_input(), compiled), results_of(model, an_input())
    assert all(same(t, expected[name], longest=LONGEST) for name, t in found.items())
