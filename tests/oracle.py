"""What plain PEFT does is what a patched model must do: two twins, one of them patched, go through the same actions.

An action is a function of a `Twin` and a few values. It changes the twin's model, or its results are compared, or both.
After each action `Twins.do` compares what the action gave, the state of the two models (parameters to the bit, modes,
calls of hooks), and then, in a pass forward and backward, the output and every gradient. Where plain PEFT raises, the
patched model has to raise, too.

What is computed in fp32 or fp64 is compared with plain PEFT's to `ROUNDINGS` eps. What is computed in half precision
anywhere (by bitsandbytes also where it is given fp32: see `Twin.repacked`) is judged by `accuracy.check_model`, the
truth being plain PEFT in fp64. Both take a training step with the gradients of plain PEFT, so that rounding never adds
up over steps.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accuracy import check_model, decoded, linear, linear_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fastlora.peft import unpatch

Results = dict[str, Any]

HIDDEN, MLP, VOCAB = 64, 128, 32  # whole blocks of 64 for 4-bit weights
LONGEST = MLP  # of all sums
HALF_EPS = 1e-4  # between those of half precision and that of fp32
# Of eps: a model adds up a few dozen products of at most 128 terms in another order, which is off by sqrt(128) eps a
# product. A term that is missing or wrong shows in the second digit.
ROUNDINGS = 1000
CANCELLED = 1e-3  # of the largest gradient: the terms of one that is nearly zero are as large as those of others
SHAPE = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_attention_heads=4, num_hidden_layers=1)
HOOKS = {"forward": "_forward_hooks", "forward_pre": "_forward_pre_hooks", "full_backward": "_backward_hooks"}


class Case(NamedTuple):
    """A tiny model: its frozen base, and by the ends of their names the adapted layers that are fed one x (or one of
    them twice), the MLP block and its activation."""

    base: Callable[[], nn.Module]
    siblings: tuple[str, str]
    mlp: str
    last: str  # of the MLP's layers
    activation: str
    config: dict[str, Any]


def llama(dtype: torch.dtype = torch.float32, layers: int = 1) -> nn.Module:
    shape = SHAPE | dict(num_key_value_heads=2, num_hidden_layers=layers)
    return with_biases(LlamaForCausalLM(LlamaConfig(**shape)).to(dtype))


def qwen2() -> nn.Module:
    return with_biases(Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)))


def qwen3_moe(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Four experts, of which a token has two. Their scores lie far apart: no rounding may choose another expert."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=HIDDEN // 2, norm_topk_prob=True)
    shape = SHAPE | dict(num_key_value_heads=2, head_dim=16)
    model = with_biases(Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)).to(dtype))
    model.model.layers[0].mlp.gate.weight.mul_(50)
    return model


def neox() -> nn.Module:
    return with_biases(GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)))


def gpt2() -> nn.Module:
    none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1)
    shape = dict(vocab_size=VOCAB, n_embd=HIDDEN, n_inner=MLP, n_head=4, n_layer=1)
    return with_biases(GPT2LMHeadModel(GPT2Config(**shape, **none)))


def nf4(loaded_in_4bit: bool, compute_dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """A Llama whose blocks have NF4 weights, which PEFT wraps in lora.bnb.Linear4bit only if it was loaded so."""
    model = llama()
    for name, layer in list(model.model.named_modules()):
        if type(layer) is nn.Linear:
            new = linear_4bit(layer.weight.detach())
            new.compute_dtype, new.compute_type_is_set = compute_dtype, compute_dtype is not None
            set_submodule(model.model, name, new)
    if loaded_in_4bit:
        model.is_loaded_in_4bit = True
    return model


def with_biases(model: nn.Module) -> nn.Module:
    """Frozen, with biases other than the zeros that they begin as."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.requires_grad_(False).named_parameters():
        if name.endswith("bias"):
            p.copy_(torch.randn(p.shape, generator=generator) / 10)
    return model


LLAMA = ("self_attn.q_proj", "self_attn.k_proj"), "mlp", "mlp.down_proj", "mlp.act_fn"
NEOX = ("attention.query_key_value",) * 2, "mlp", "mlp.dense_4h_to_h", "mlp.act"
GPT2 = ("attn.c_attn",) * 2, "mlp", "mlp.c_proj", "mlp.act"
EXPERTS = LLAMA[0], "mlp", "mlp.experts", "mlp.experts.base_layer.base_layer.act_fn"
OF_EXPERTS = {
    "target_modules": ["q_proj", "k_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
ALL, DORA = {"target_modules": "all-linear"}, {"use_dora": True}
CASES = {
    "llama": Case(llama, *LLAMA, ALL),
    "qwen2, biases trained": Case(qwen2, *LLAMA, ALL | {"bias": "lora_only"}),
    "neox, biases trained": Case(neox, *NEOX, ALL | {"bias": "all"}),
    "gpt2": Case(gpt2, *GPT2, ALL | {"fan_in_fan_out": True}),
    "nf4 in lora.Linear": Case(lambda: nf4(False), *LLAMA, ALL),
    "nf4 in lora.Linear4bit": Case(lambda: nf4(True), *LLAMA, ALL),
    "llama bf16": Case(lambda: llama(torch.bfloat16), *LLAMA, ALL),
    "qwen3_moe": Case(qwen3_moe, *EXPERTS, OF_EXPERTS),
    "qwen3_moe bf16": Case(lambda: qwen3_moe(torch.bfloat16), *EXPERTS, OF_EXPERTS),
    "qwen2, dora": Case(qwen2, *LLAMA, ALL | DORA),
    "gpt2, dora": Case(gpt2, *GPT2, ALL | DORA | {"fan_in_fan_out": True}),
    "nf4, dora": Case(lambda: nf4(True), *LLAMA, ALL | DORA),
    "llama bf16, dora": Case(lambda: llama(torch.bfloat16), *LLAMA, ALL | DORA),
}


@dataclass
class Twin:
    """One of the models."""

    case: Case
    model: nn.Module
    patched: bool = False  # whether it is the one that patch patches
    autocast: str | None = None  # to bf16: "forward" only, or "throughout"
    repacked: bool = False  # whether bitsandbytes computed the last action in bf16, as it does with repacked weights

    def at(self, end: str) -> nn.Module:
        """The first module whose name ends so."""
        return self.model.get_submodule(self.name_of(end))

    def name_of(self, end: str) -> str:
        return next(name for name, _ in self.model.named_modules() if f".{name}".endswith(f".{end}"))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def logits(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).logits

    def randn(self, *shape: int) -> Tensor:
        """The same for every twin, a value of bf16 so that every dtype has it."""
        t = torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16()
        return t.to(self.dtype)


def adapted(case: Case, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    config = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8) | case.config | config
    return randomise(get_peft_model(case.base(), LoraConfig(**config)), "default")


def randomise(model: nn.Module, adapter: str) -> nn.Module:
    """Give this adapter the weights that it has after some training."""
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                p.copy_(torch.randn(p.shape, generator=generator) / 10)
            if f"lora_magnitude_vector.{adapter}." in name:
                p.mul_(1 + torch.randn(p.shape, generator=generator) / 10)
    return model


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def in_fp64(model: nn.Module) -> nn.Module:
    """A copy without fastlora, in fp64, its 4-bit layers decoded."""
    model = copy.deepcopy(model)
    unpatch(model)
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "has_gate"):  # experts: torch's grouped products take no fp64
            layer.config._experts_implementation = "eager"
        if isinstance(layer, Linear4bit):
            new = linear(decoded(layer))
            new.bias = layer.bias  # which may train
            new._forward_hooks.update(layer._forward_hooks)
            set_submodule(model, name, new)
    return model.double()


class Count:
    """A hook of any kind that counts its calls."""

    calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


class DoubleInPlace(Count):
    """A forward hook that changes the output of its module, as in-place ops of a model do."""

    def __call__(self, module: nn.Module, args: Any, y: Tensor) -> None:
        super().__call__()
        y.mul_(2)


def counters(model: nn.Module) -> dict[str, Count]:
    """Every counting hook, by the module and the kind of hook that it is."""
    found = {}
    for name, module in model.named_modules():
        for kind, attribute in HOOKS.items():
            hooks = [hook for hook in getattr(module, attribute).values() if isinstance(hook, Count)]
            found.update({f"{kind} hook {i} of {name}": hook for i, hook in enumerate(hooks)})
    return found


class Twins:
    """Two models that are the same but for being patched: see the top of this file."""

    def __init__(self, case: Case, model: nn.Module | None = None) -> None:
        model = adapted(case) if model is None else model
        self.plain, self.fast = Twin(case, model), Twin(case, copy.deepcopy(model), patched=True)
        self.passes = 0  # forward and backward, of both

    def do(self, action: Callable, *args: Any) -> None:
        """The action and then a pass by both, compared after each."""
        self._act(action, args)
        self._step()
        self.passes += self._act(one_pass, ())

    def _act(self, action: Callable, args: tuple) -> bool:
        """Whether the action did not raise, which both have to do, or neither."""
        eps = precision(self.plain.model)
        in_half, truth = self.plain.autocast or eps > HALF_EPS, None
        if in_half or weights_to_repack(self.plain.model):
            truth = Twin(self.plain.case, in_fp64(self.plain.model))
        plain, fast = (outcome(twin, action, args) for twin in (self.plain, self.fast))
        what = f"in {action.__name__}{args}:"
        if isinstance(plain, Exception):
            may_run = has_pickled_4bit(self.plain.model)
            assert may_run or isinstance(fast, Exception), f"{what} PEFT raises {plain!r}, the patched model does not"
            for p in (*self.plain.model.parameters(), *self.fast.model.parameters()):
                p.grad = None
        elif isinstance(fast, Exception):
            raise AssertionError(f"{what} the patched model raises, plain PEFT does not") from fast
        elif not (in_half or self.plain.repacked):
            compare(what, plain, fast, eps=eps)
        else:
            compare(what, plain, fast, truth=outcome(truth, action, args))
        self._compare_state(what, called=not isinstance(plain, Exception))
        return not isinstance(plain, Exception)

    def _step(self) -> None:
        """If the action left gradients: one step of SGD, of both twins with those of plain PEFT."""
        for theirs, ours in zip(self.plain.model.parameters(), self.fast.model.parameters(), strict=True):
            if theirs.grad is not None:
                with torch.no_grad():
                    theirs -= 0.01 * theirs.grad / theirs.grad.norm().clamp_min(1e-3)
                    ours.copy_(theirs)
                theirs.grad = ours.grad = None

    def _compare_state(self, what: str, called: bool) -> None:
        plain, fast = self.plain.model, self.fast.model
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), what
        modules = zip(plain.named_modules(), fast.named_modules(), strict=True)
        for (name, theirs), (same_name, ours) in modules:
            assert (name, theirs.training) == (same_name, ours.training), f"{what} mode of {name}"
            assert isinstance(ours, type(theirs)), f"{what} {name} is a {type(ours)}, in plain PEFT a {type(theirs)}"
        assert list(plain.state_dict()) == list(fast.state_dict()), what
        parameters = zip(plain.named_parameters(), fast.named_parameters(), strict=True)
        for (name, theirs), (same_name, ours) in parameters:
            assert (name, theirs.requires_grad) == (same_name, ours.requires_grad), f"{what} {name}"
            assert same_bits(ours.data, theirs.data), f"{what} the values of {name} differ"
            assert (ours.grad is None) == (theirs.grad is None), f"{what} .grad of {name}"
        calls = zip(counters(plain).items(), counters(fast).items(), strict=True)
        for (name, theirs), (same_name, ours) in calls:
            assert name == same_name
            assert not called or ours.calls == theirs.calls, f"{what} {name}: {ours.calls} calls, PEFT {theirs.calls}"
            ours.calls = theirs.calls = 0


def outcome(twin: Twin, action: Callable, args: tuple) -> Any:
    """What the action gives, or the exception that it raises."""
    torch.manual_seed(0)
    weights = weights_to_repack(twin.model)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=twin.autocast is not None):
            return action(twin, *args) or {}
    except Exception as error:
        return error
    finally:
        twin.repacked = undo_repacking(weights)


def weights_to_repack(model: nn.Module) -> list[tuple]:
    """The 4-bit layers that bitsandbytes may repack for inference, and what their weights are before."""
    layers = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    states = [getattr(layer.weight, "quant_state", None) for layer in layers]  # which a pickled one has lost
    return [(layer, layer.weight.data, copy.copy(s)) for layer, s in zip(layers, states, strict=True) if s is not None]


def has_pickled_4bit(model: nn.Module) -> bool:
    """Whether a 4-bit weight was pickled, which makes it a plain parameter. bitsandbytes and fastlora take it for
    what it is; PEFT's DoRA reads its bytes as numbers."""
    return any(isinstance(m, Linear4bit) and not isinstance(m.weight, Params4bit) for m in model.modules())


def undo_repacking(weights: list[tuple]) -> bool:
    """Whether bitsandbytes has repacked any. Plain PEFT would train with wrong gradients then, and bitsandbytes' own
    way back rounds the statistics, so that the twins would no longer be the same model."""
    now = [getattr(layer.weight, "quant_state", None) for layer, *_ in weights]
    repacked = [each for each, s in zip(weights, now, strict=True) if getattr(s, "packing_format_for_cpu", False)]
    for layer, data, state in repacked:
        layer.weight.data, layer.weight.quant_state = data, state
        layer.quant_state = state
    return bool(repacked)


def precision(model: nn.Module) -> float:
    """The largest eps of the dtypes that anything is computed in."""
    dtypes = {p.dtype for p in model.parameters()} | {getattr(m, "compute_dtype", None) for m in model.modules()}
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None and dtype.is_floating_point)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def one_pass(twin: Twin, tokens: int = 4) -> Results:
    """The logits of the model as it is, and the gradients of its input and of every parameter that has one."""
    x = twin.randn(2, tokens, HIDDEN).requires_grad_()
    return gradients(twin, x, twin.logits(x))


def pass_of(model: nn.Module, tokens: int, autocast: bool = False) -> dict[str, Tensor]:
    """The tensors that `one_pass` gives for a model that is no twin."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = one_pass(Twin(CASES["llama"], model), tokens)
    return {name: t for name, t in results.items() if isinstance(t, Tensor)}


def backward(twin: Twin, y: Tensor) -> None:
    if y.requires_grad:
        with torch.autocast("cpu", torch.bfloat16, enabled=twin.autocast == "throughout"):
            y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape))


def gradients(twin: Twin, x: Tensor, y: Tensor) -> Results:
    """y, and the gradients of x and of the parameters, as backward leaves them."""
    wanted = {"x": x} | {name: p for name, p in twin.model.named_parameters() if p.requires_grad}
    results = {"y": y.detach().clone(), "requires grad": y.requires_grad}
    backward(twin, y)
    for name, t in wanted.items():
        results[f"d {name}"], t.grad = t.grad, None
    return results


def compare(what: str, plain: Results, fast: Results, eps: float = 0.0, truth: Results | None = None) -> None:
    """Results of one action: tensors as said at the top of this file, all else by equality. Where the fp64 model is at
    hand, tokens may be its: of two that score nearly the same, plain PEFT may choose the wrong one."""
    assert plain.keys() == fast.keys(), what
    inexact = [name for name, t in plain.items() if isinstance(t, Tensor) and t.is_floating_point()]
    for name in plain.keys() - set(inexact):
        ours, theirs = fast[name], plain[name]
        assert type(ours) is type(theirs), f"{what} {name} is {ours}, plain PEFT's {theirs}"
        same = torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
        if not same and name == "tokens" and isinstance(truth, dict):
            same = torch.equal(ours, truth[name])
        assert same, f"{what} {name} is {ours}, plain PEFT's {theirs}"
    plain, fast = ({name: results[name] for name in inexact} for results in (plain, fast))
    for name, t in plain.items():
        assert isinstance(fast[name], Tensor), f"{what} {name} is {fast[name]}"
        assert (fast[name].shape, fast[name].dtype) == (t.shape, t.dtype), f"{what} {name}"
        assert torch.equal(fast[name].isfinite(), t.isfinite()), f"{what} {name} is not finite elsewhere than in PEFT"
    if truth is not None:
        if not isinstance(truth, Exception):
            try:
                known = {name: truth[name] for name in inexact if isinstance(truth[name], Tensor)}
                ours, theirs = ({name: each[name] for name in known} for each in (fast, plain))
                check_model(ours, theirs, known, LONGEST, torch.bfloat16)
            except AssertionError as error:
                raise AssertionError(f"{what} {error}") from None
        return
    largest = max((t.nan_to_num().norm().item() for name, t in plain.items() if name != "y"), default=0.0)
    for name, t in plain.items():
        scale = t.nan_to_num().norm().item() + (0.0 if name == "y" else CANCELLED * largest)
        error = (fast[name] - t).nan_to_num().norm().item()
        assert error <= ROUNDINGS * eps * scale, (
            f"{what} {name} differs from plain PEFT's by {error:.1e} of {scale:.1e}"
        )
