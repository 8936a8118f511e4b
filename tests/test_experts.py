"""Mixtures of experts: patched beside PEFT's and fp64, what they save, and what is left to PEFT."""

import copy
import warnings
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from accuracy import check_model
from blocks import CountOps
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.benchmarks.accuracy import same
from fastlora.calls import calls_of
from fastlora.experts import Routing
from fastlora.peft import patch, unpatch
from fastlora.peft_experts import WRAPPER

K, H, E, TOP, T = 64, 64, 6, 2, 40
LONGEST = T * TOP  # of all sums
BF16 = torch.bfloat16

pytestmark = [
    pytest.mark.usefixtures("bitsandbytes_eager"),
    pytest.mark.filterwarnings("ignore:.*target_parameters"),
    pytest.mark.skipif(
        not hasattr(import_module("transformers.integrations"), "moe"), reason="this transformers has no experts"
    ),
]

FAMILIES = {  # of transformers, by what is special of their experts
    "qwen3_moe": "Qwen3MoeExperts",  # gate and up side by side, silu
    "gpt_oss": "GptOssExperts",  # transposed, biases, a clamped gate of its own, gate and up interleaved
    "nemotron_h": "NemotronHExperts",  # no gate, relu squared
    "aria": "AriaGroupedExpertsGemm",  # transposed
    "muse_spark": "MuseSparkExperts",  # a norm after each expert
    "deepseek_v4": "DeepseekV4Experts",  # a gate with limits of its own
}


def experts_of(family: str, dtype: torch.dtype, implementation: str = "grouped_mm") -> nn.Module:
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    cls = next(
        (each for name, each in vars(module).items() if name.endswith("Experts") and "_apply_gate" in dir(each)), None
    )
    if cls is None:
        pytest.skip(f"this transformers' {family} has other experts")
    sizes = dict.fromkeys(("hidden_size", "moe_hidden_size"), K) | {"moe_latent_size": None, "n_embd": K}
    sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), H)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    acts = dict(hidden_act="silu", mlp_hidden_act="relu2", swiglu_alpha=1.702, swiglu_limit=7.0, post_norm_eps=1e-5)
    config = SimpleNamespace(**sizes, **dict.fromkeys(names, E), **acts, _experts_implementation=implementation)
    torch.manual_seed(0)
    experts = cls(config)
    for name, p in experts.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3 if name.endswith("bias") else 0.15)
    if not hasattr(experts, "has_gate"):
        pytest.skip("transformers 5.0 says nothing of the layout of experts")
    return experts.to(dtype).requires_grad_(False)


class Net(nn.Module):
    """A router and experts; some experts are never chosen."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        dtype = next(experts.parameters()).dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        self.router = nn.Linear(K, E - 2, dtype=dtype).requires_grad_(False)

    def forward(self, x):
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows).softmax(-1).topk(TOP)
        return self.experts(rows, chosen + (chosen > 1), weights).view(x.shape)  # expert 2 has no tokens, nor the last


def adapted(experts: nn.Module, parameters=("first", "down_proj"), adapters=("default",), **config) -> PeftModel:
    """In PEFT, with random adapters, all of them active."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [f"experts.{first if name == 'first' else name}" for name in parameters]
    config = LoraConfig(**{"r": 3, "lora_alpha": 6} | config, target_modules=[], target_parameters=names)
    model = get_peft_model(Net(experts), config)
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(r=5, target_modules=[], target_parameters=names))
    model.base_model.set_adapter(list(adapters))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1
    return model


def results_of(model: nn.Module, x: torch.Tensor, run: Callable | None = None) -> dict[str, torch.Tensor]:
    x = x.detach().to(next(p for p in model.parameters() if p.is_floating_point()).dtype).clone().requires_grad_()
    y = (model if run is None else run)(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name], p.grad = p.grad, None
    return found


def in_fp64(model: PeftModel) -> PeftModel:
    model = copy.deepcopy(model)
    unpatch(model)
    experts = model.base_model.model.experts.get_base_layer()
    experts.config._experts_implementation = "eager"  # torch's grouped products take no fp64
    return model.double()


def an_input(dtype=torch.float32, tokens=(2, T // 2)):
    return torch.randn(*tokens, K, generator=torch.Generator().manual_seed(2)).to(dtype)


def block_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.experts


def all_fused(model: nn.Module) -> bool:
    calls = calls_of(block_of(model))
    return calls.fused > 0 and calls.own == 0


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_accurate_as_peft(family, dtype, implementation):
    model = adapted(experts_of(family, dtype, implementation))
    fast = copy.deepcopy(model)
    report = patch(fast)
    assert not report.skipped and len(report.patched) == 2 and len(report.fused) == 1
    x = an_input(dtype)
    results = [results_of(each, x) for each in (fast, model, in_fp64(model))]
    check_model(*results, LONGEST, dtype)
    assert all_fused(fast)


WAYS = {
    "gate and up only": {"parameters": ("first",)},
    "down only": {"parameters": ("down_proj",)},
    "two adapters": {"adapters": ("default", "other")},
    "rank 1": {"r": 1},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_any_adapters(family, way):
    model = adapted(experts_of(family, torch.float32), **way)
    fast = copy.deepcopy(model)
    patch(fast)
    for tokens in ((2, 20), (1, 1)):
        x = an_input(tokens=tokens)
        results = [results_of(each, x) for each in (fast, model, in_fp64(model))]
        check_model(*results, LONGEST, torch.float32)
    assert all_fused(fast)


def test_no_tokens():
    model = adapted(experts_of("qwen3_moe", torch.float32))
    patch(model)
    found = results_of(model, an_input(tokens=(0, 3)))
    assert found["y"].shape == (0, 3, K)
    assert all(t is not None and not t.any() for t in found.values())


@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "nothing"])
def test_only_needed_gradients(trained):
    model = adapted(experts_of("qwen3_moe", torch.float32))
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    fast = copy.deepcopy(model)
    patch(fast)
    results = [results_of(each, an_input()) for each in (fast, model, in_fp64(model))]
    check_model(*results, LONGEST, torch.float32)


def copy_adapters(to: nn.Module, of: nn.Module) -> None:
    """By the parameter that they adapt: the order of wrappers may differ."""
    wrappers = [{w.parameter_name: w for w in model.modules() if isinstance(w, WRAPPER)} for model in (to, of)]
    for name, wrapper in wrappers[0].items():
        for part in ("lora_A", "lora_B"):
            getattr(wrapper, part).load_state_dict(getattr(wrappers[1][name], part).state_dict())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_4bit_experts(family, nested, quant_type):
    """Quantised by bitsandbytes' parametrisation. Beside the decoded weights in PEFT: with the quantised ones PEFT 0.21
    loses the adapters of one of the two parameters, whose decoded weight has been cached without them."""
    experts, decoded = (experts_of(family, torch.float32) for _ in range(2))
    quantise = import_module("bitsandbytes.nn.parametrize").replace_parameter_4bit
    for name in ("gate_up_proj", "down_proj"):
        quantise(experts, name, compress_statistics=nested, quant_type=quant_type)
        getattr(decoded, name).data = getattr(experts, name).clone()
    fast, model = adapted(experts), adapted(decoded)
    model.base_model.model.router.load_state_dict(fast.base_model.model.router.state_dict())
    copy_adapters(model, fast)
    report = patch(fast)
    assert not report.skipped, report.skipped
    with CountOps() as ran:
        results_of(fast, an_input())
    assert ran.names["fastlora::lora_matmul_experts_4bit"] == 4
    assert not ran.names["bitsandbytes::dequantize_4bit"]
    assert all_fused(fast)
    patch(model)
    ours, theirs = results_of(fast, an_input()), results_of(model, an_input())
    assert same(ours["y"], theirs["y"], longest=LONGEST) and same(ours["dx"], theirs["dx"], longest=LONGEST)
    unpatch(model)
    assert same(ours["y"], results_of(model, an_input())["y"], longest=LONGEST)


def test_4bit_experts_are_fused_again_after_a_call_of_peft_s_forward():
    """PEFT 0.21 leaves its adapter on the weight."""
    experts = experts_of("qwen3_moe", torch.float32)
    for name in ("gate_up_proj", "down_proj"):
        import_module("bitsandbytes.nn.parametrize").replace_parameter_4bit(experts, name)
    model = adapted(experts)
    patch(model)
    expected = model(an_input())
    hook = experts.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(an_input())
    hook.remove()
    calls = calls_of(block_of(model))
    assert (calls.fused, calls.own) == (1, 1)
    assert torch.equal(model(an_input()), expected)
    assert (calls.fused, calls.own) == (2, 1)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same(use_reentrant):
    model = adapted(experts_of("qwen3_moe", torch.float32))
    patch(model)
    x = an_input()
    expected = results_of(model, x)
    with CountOps() as ran:
        found = results_of(model, x, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert all(map(torch.equal, found.values(), expected.values()))
    products = 2 + 2 + (2 if use_reentrant else 1)  # forward, backward, and again: all but the last product
    assert ran.names["fastlora::lora_matmul_experts"] == products


def test_what_is_saved_for_backward():
    """x, the outputs of gate and up, and what has the size of the adapters' ranks: nothing of the size of weights, and
    neither h nor the rows of x that the experts multiplied."""
    model = adapted(experts_of("qwen3_moe", torch.float32))
    patch(model)
    x, saved = an_input().requires_grad_(), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    block, rows = block_of(model), x.flatten(0, -2)
    chosen, weights = torch.arange(TOP * T).view(T, TOP) % E, torch.rand(T, TOP).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(rows, chosen, weights)
    rank_sized = 4 * T * TOP * (3 + 3) + 8 * 3 * T * TOP + 4 * E
    bound = 4 * T * K + 4 * T * TOP * 2 * H + rank_sized + 2 * 4 * T * TOP  # x, z, routing
    assert sum(size for at, size in saved.items() if at not in own) <= bound


def test_another_backward_gives_the_same():
    model = adapted(experts_of("qwen3_moe", torch.float32))
    patch(model)
    x = an_input().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    again = torch.autograd.grad(y.sum(), wanted)
    assert all(map(torch.equal, first, again))


def test_results_do_not_depend_on_threads():
    model = adapted(experts_of("qwen3_moe", BF16))
    patch(model)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(results_of(model, an_input(BF16)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(t, each[name]) for name, t in results[0].items() for each in results[1:])


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_to_one_graph(grad, compiling):
    model = adapted(experts_of("qwen3_moe", torch.float32))
    patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for tokens in ((2, 20), (2, 7)):
        x = an_input(tokens=tokens)
        if grad:
            for name, t in results_of(model, x, compiled).items():
                assert same(t, results_of(model, x)[name], longest=LONGEST), name
        else:
            with torch.no_grad():
                assert same(compiled(x), model(x), longest=LONGEST)


def test_a_graph_is_guarded_on_what_the_experts_compute(compiling):
    """An activation replaced, one of its attributes changed, a gate set on the instance."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.negative = False

        def forward(self, z):
            return nn.functional.silu(-z if self.negative else z)

    model = adapted(experts_of("qwen3_moe", torch.float32))
    experts, x = block_of(model).get_base_layer(), an_input()
    experts.act_fn = Turned()
    patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert same(compiled(x), model(x), longest=LONGEST)
        experts.act_fn.negative = True
        assert same(compiled(x), model(x), longest=LONGEST)
        experts.act_fn = nn.GELU()
        assert same(compiled(x), model(x), longest=LONGEST)
        experts._apply_gate = lambda z: z.chunk(2, -1)[0]
        assert same(compiled(x), model(x), longest=LONGEST)


def random_activation(experts):
    experts.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))


def trained_activation(experts):
    experts.act_fn = nn.PReLU()


@pytest.mark.parametrize("change", [random_activation, trained_activation], ids=["random", "trained"])
def test_a_gate_that_cannot_be_called_again_is_left_to_peft(change):
    model = adapted(experts_of("qwen3_moe", torch.float32))
    change(block_of(model).get_base_layer())
    fast = copy.deepcopy(model)
    patch(fast)
    torch.manual_seed(3)
    theirs = results_of(model, an_input())
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="is random|has parameters that train"):
        ours = results_of(fast, an_input())
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_gradients_are_not_differentiated():
    """Not even where the loss is linear in the output, so that dy does not depend on anything."""
    model = adapted(experts_of("qwen3_moe", torch.float32))
    model.base_model.model.router.requires_grad_()
    patch(model)
    x = an_input().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_under_autocast(implementation):
    """The dtype in which experts are computed is that of transformers' implementation."""
    model = adapted(experts_of("qwen3_moe", torch.float32, implementation))
    fast = copy.deepcopy(model)
    patch(fast)

    def run(each):
        with torch.autocast("cpu", BF16):
            return each(an_input())

    ours, theirs = (results_of(each, an_input(), lambda _, each=each: run(each)) for each in (fast, model))
    assert ours["y"].dtype == theirs["y"].dtype
    truth = results_of(in_fp64(model), an_input())
    del truth["dx"], ours["dx"], theirs["dx"]
    check_model(ours, theirs, truth, LONGEST, BF16)
    assert all_fused(fast)


def test_adapters_are_disabled_merged_and_unloaded():
    model = adapted(experts_of("gpt_oss", torch.float32))
    fast, x = copy.deepcopy(model), an_input()
    patch(fast)
    with torch.no_grad():
        with model.disable_adapter(), fast.disable_adapter():
            assert same(fast(x), model(x), longest=LONGEST)
        for each in (model, fast):
            each.merge_adapter()
        assert same(fast(x), model(x), longest=LONGEST)
        for each in (model, fast):
            each.unmerge_adapter()
        assert same(fast(x), model(x), longest=LONGEST)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(copy.deepcopy(fast).unload()(x), copy.deepcopy(model).unload()(x), longest=LONGEST)
        assert same(fast.merge_and_unload()(x), model.merge_and_unload()(x), longest=LONGEST)


def test_saved_and_loaded(tmp_path):
    model = adapted(experts_of("qwen3_moe", torch.float32))
    patch(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(experts_of("qwen3_moe", torch.float32)), tmp_path)
    again.base_model.model.router.load_state_dict(model.base_model.model.router.state_dict())
    patch(again)
    with torch.no_grad():
        assert torch.equal(again(an_input()), model(an_input()))


def hooked(model):
    block_of(model).base_layer.register_forward_hook(lambda *_: None)


def hooked_experts(model):
    block_of(model).get_base_layer().register_forward_hook(lambda *_: None)


def trained_base(model):
    block_of(model).get_base_layer().down_proj.requires_grad_()


def own_implementation(model):
    block_of(model).get_base_layer().config._experts_implementation = "deepgemm"


LEFT_TO_PEFT = {
    hooked: "a wrapper inside has hooks",
    hooked_experts: "the experts have hooks",
    trained_base: "down_proj of its experts trains",
    own_implementation: "computed by another implementation, 'deepgemm'",
}


@pytest.mark.parametrize("change", LEFT_TO_PEFT, ids=lambda change: change.__name__)
def test_left_to_peft_with_the_reason(change):
    model = adapted(experts_of("qwen3_moe", torch.float32))
    change(model)
    report = patch(model)
    assert len(report.skipped) == 2 and not report.fused
    assert all(LEFT_TO_PEFT[change] in reason for reason in report.skipped.values())
    if change is not own_implementation:  # which this machine may not have
        with pytest.warns(UserWarning, match="runs its own forward"):
            model(an_input())
        assert calls_of(block_of(model)).own == 1


def test_an_activation_that_is_replaced_is_seen():
    model = adapted(experts_of("qwen3_moe", torch.float32))
    fast = copy.deepcopy(model)
    patch(fast)
    for act in (nn.GELU(), nn.Tanh(), nn.ReLU()):
        for each in (model, fast):
            block_of(each).get_base_layer().act_fn = act
        results = [results_of(each, an_input()) for each in (fast, model, in_fp64(model))]
        check_model(*results, LONGEST, torch.float32)
    assert all_fused(fast)


def test_a_router_is_left_to_peft():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(E, K), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.t()

    model = get_peft_model(
        nn.ModuleDict({"router": Router()}), LoraConfig(target_modules=[], target_parameters=["router.weight"])
    )
    report = patch(model)
    assert list(report.skipped.values()) == [
        "a Router is adapted, not experts that transformers' ExpertsInterface computes"
    ]
    assert "0 LoRA layers" not in str(report) or report.skipped
    x = an_input()
    with pytest.warns(UserWarning):
        assert model.base_model.model["router"](x).shape == (2, 20, E)


def test_experts_of_no_one():
    """Numbers beyond the experts, as expert parallelism gives them, add nothing."""
    routing = Routing.of(torch.tensor([[0, 3], [1, 3], [3, 0]]), 3)
    assert routing.offs.tolist() == [2, 3, 3]
    assert routing.token.tolist() == [0, 2, 1, 0, 1, 2]
    assert routing.token[routing.rows].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_report_counts_the_block():
    model = adapted(experts_of("qwen3_moe", torch.float32))
    patch(model)
    model(an_input())
    report = fastlora.report(model)
    assert [calls.fused for calls in report.mlps.values()] == [1] and not report.layers
    assert unpatch(model) and not fastlora.report(model).mlps
