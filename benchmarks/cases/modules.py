"""What is measured: a linear layer, a block or a model, frozen and adapted by PEFT, with its inputs and its truth."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora.benchmarks.cases import models
from fastlora.benchmarks.cases.ops import decoded
from fastlora.benchmarks.cases.shapes import EXPERTS, SHAPES
from fastlora.benchmarks.training import copy_sharing_frozen
from fastlora.fourbit import is_4bit, weight_4bit

SCALING = 2  # lora_alpha / r
PROMPT = 8  # tokens that generation reads, and writes


@dataclass(frozen=True)
class Case:
    """One point of a sweep. ``layer`` is one of q, k, v, o, gate, up, down; a block or a model is of its shape's name.

    N and K are the layer's, 0 where there are several; ``count`` is how many layers of this size a block has.
    """

    verb: str  # linear, block, experts, model or generate
    shape: str
    layer: str
    M: int  # tokens; of generate, how many texts are written at once
    r: int
    base: str  # bf16, fp16, fp32, nf4 or fp4
    dropout: float = 0.0
    checkpointing: bool = False
    N: int = 0
    K: int = 0
    count: int = 1
    compute: str = "bf16"  # what a 4-bit base computes in

    def __str__(self) -> str:
        more = f" dropout={self.dropout:g}" if self.dropout else ""
        return f"{self.shape} {self.layer} {self.base} M={self.M} r={self.r}{more}{' ckpt' * self.checkpointing}"

    def row(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def dtype(self) -> torch.dtype:
        return models.DENSE[self.base if self.base in models.DENSE else self.compute]

    @property
    def of_a_model(self) -> bool:
        return self.verb in ("model", "generate")

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """(M, N, K) of every linear layer of a linear or a block, or of every expert that has tokens if all have
        equally many."""
        if self.verb == "experts":
            of = EXPERTS[self.shape]
            used = min(of.experts, self.M * of.top)
            return [(self.M * of.top // used, N, K) for N, K in of.linears()] * used
        layers = [(self.N, self.K)] if self.verb == "linear" else SHAPES[self.shape].linears().values()
        return [(self.M, N, K) for N, K in layers]

    @property
    def terms_and_elements(self) -> tuple[int, int]:
        """Of the longest sum, and of the smallest tensor on the way: what `accuracy.floor` asks for."""
        widths = [size for layer in self.sizes for size in layer]
        return max(self.M, self.r, *widths), self.r * min(self.M, *widths)


def linear_cases(shape: str, **fields: Any) -> list[Case]:
    """A case for each distinct size among the seven linear layers of a block, named after the layers that have it."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, size in SHAPES[shape].linears().items():
        found.setdefault(size, []).append(name)
    return [
        Case("linear", shape, ",".join(names), N=N, K=K, count=len(names), **fields) for (N, K), names in found.items()
    ]


@dataclass
class Subject:
    """A case as modules and tensors. ``base`` is frozen; ``adapted`` is PEFT's and shares its weights."""

    case: Case
    base: nn.Module
    adapted: nn.Module
    x: Tensor  # an activation, or a model's ids
    dy: Tensor | None  # None: the output is a loss

    def forward(self, module: nn.Module) -> Tensor:
        if self.dy is None:
            return module(input_ids=self.x, labels=self.x, use_cache=False).loss
        if self.case.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, self.x, use_reentrant=False)  # type: ignore[return-value]
        return module(self.x)

    def generate(self, module: Any) -> Tensor:
        """Greedy decoding with a cache: `PROMPT` tokens of M texts are read, as many written."""
        training = module.training
        try:
            with torch.no_grad():
                sizes = {"min_new_tokens": PROMPT, "max_new_tokens": PROMPT}
                return module.eval().generate(input_ids=self.x, do_sample=False, use_cache=True, **sizes)
        finally:
            module.train(training)

    def leaves(self, module: nn.Module) -> dict[str, Tensor]:
        """What gets a gradient: x, unless it is ids, and the adapters by their places in the module."""
        found = {"x": self.x} if self.dy is not None else {}
        return found | {name: p for name, p in module.named_parameters() if p.requires_grad}

    def gradients(self, module: nn.Module, y: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        if self.dy is None and not any(p.requires_grad for p in module.parameters()):  # the frozen model
            y.backward(retain_graph=retain_graph)
            return ()
        return torch.autograd.grad(y, tuple(self.leaves(module).values()), self.dy, retain_graph=retain_graph)

    def results(self, module: nn.Module) -> dict[str, Tensor]:
        """y and all gradients, by name."""
        y = self.forward(module)
        return {"y": y.detach()} | dict(zip(self.leaves(module), self.gradients(module, y), strict=False))


def make_subject(case: Case, device: torch.device, seed: int = 0) -> Subject:
    """Weights, adapters (B as after some training, not zero) and inputs, from the seed."""
    torch.manual_seed(seed)
    if case.of_a_model:
        base: nn.Module = _language_model(case, device)
        size = (case.M, PROMPT) if case.verb == "generate" else (1, case.M)
        tokens = torch.randint(base.config.vocab_size, size, device=device)  # type: ignore[union-attr, arg-type]
        if case.checkpointing:
            base.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        base.enable_input_require_grads()  # type: ignore[operator]
        return Subject(case, base.train(), adapt(base, case).train(), tokens, None)
    shape = (1, case.M) if case.verb == "block" else (case.M,)
    N, K = (case.N, case.K) if case.verb == "linear" else ((SHAPES | EXPERTS)[case.shape].hidden,) * 2  # type: ignore[operator]
    x = torch.randn(*shape, K, device=device).to(case.dtype).requires_grad_()
    dy = torch.randn(*shape, N, device=device).to(case.dtype)
    if case.verb == "linear":
        base = _Linear(N, K)
    else:
        base = _Moe(case.shape) if case.verb == "experts" else _Block(case.shape)
    base = models.to_base(base.to(case.dtype).to(device), case.base, case.dtype).train()
    return Subject(case, base, adapt(base, case).train(), x, dy)


def with_other_inputs(subject: Subject, seed: int) -> Subject:
    """The same modules, with an x of other numbers or tokens."""
    x, generator = subject.x, torch.Generator(subject.x.device).manual_seed(seed)
    if subject.dy is None:
        config: Any = subject.base.config
        return replace(subject, x=torch.randint(config.vocab_size, x.shape, generator=generator, device=x.device))
    other = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
    return replace(subject, x=other.requires_grad_())


def adapt(base: nn.Module, case: Case) -> nn.Module:
    """A copy of the module with PEFT's adapters, its weights shared."""
    import peft

    of_experts = case.verb == "experts"
    config = peft.LoraConfig(
        r=case.r,
        lora_alpha=SCALING * case.r,
        lora_dropout=case.dropout,
        target_modules=[] if of_experts else _targets(base),
        target_parameters=[f"experts.{name}" for name in WEIGHTS_OF_EXPERTS] if of_experts else None,
    )
    wrapped = peft.get_peft_model(copy_sharing_frozen(base), config)  # type: ignore[arg-type]
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1 * case.r**-0.5)
    return wrapped if case.of_a_model else wrapped.base_model.model  # type: ignore[return-value]


def _targets(base: nn.Module) -> list[str]:
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return [name for name, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head]


def truth(subject: Subject, adapted: bool) -> dict[str, Tensor]:
    """`Subject.results` in fp32, or in fp64 if the case is in fp32: of the same weights, decoded, without dropout.

    Decoded weights are not rounded to the compute dtype: those who do that, as bitsandbytes does, have the error.
    """
    wide = torch.float64 if subject.case.dtype == torch.float32 else torch.float32
    dense: Any = copy.deepcopy(subject.base)
    if subject.case.verb == "experts":
        dense.experts.config._experts_implementation = "eager"  # torch's grouped products take no fp64
    for name, m in [(n, m) for n, m in dense.named_modules() if isinstance(m, nn.Linear)]:
        if is_4bit(m.weight):
            linear = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None, device="meta")
            linear.weight = nn.Parameter(decoded(weight_4bit(m.weight), wide), requires_grad=False)
            linear.bias = m.bias
            dense.set_submodule(name, linear)
    dense = dense.to(wide)
    dense.is_loaded_in_4bit = False
    x = subject.x if subject.dy is None else subject.x.detach().to(wide).requires_grad_()
    dy = None if subject.dy is None else subject.dy.to(wide)
    exact = replace(subject, x=x, dy=dy)
    module = dense
    if adapted:
        module = adapt(dense, replace(subject.case, dropout=0.0))
        theirs = {name: p for name, p in subject.adapted.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, p in module.named_parameters():
                if p.requires_grad:
                    p.copy_(theirs[name])
    return exact.results(module.to(wide))


class _Linear(nn.Module):
    def __init__(self, N: int, K: int) -> None:
        super().__init__()
        self.layer = nn.Linear(K, N, bias=False)
        nn.init.normal_(self.layer.weight, std=K**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


WEIGHTS_OF_EXPERTS = ("gate_up_proj", "down_proj")


class _Moe(nn.Module):
    """Experts of Qwen3-MoE behind a router whose choice depends on the number of a token alone: all experts get
    equally many tokens, and no rounding of x sends one elsewhere."""

    def __init__(self, shape: str) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        self.of = of = EXPERTS[shape]
        config = Qwen3MoeConfig(
            num_experts=of.experts,
            num_experts_per_tok=of.top,
            hidden_size=of.hidden,
            moe_intermediate_size=of.intermediate,
        )
        config._experts_implementation = "grouped_mm"  # the default of transformers
        self.experts = Qwen3MoeExperts(config)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        M, (experts, top) = len(x), (self.of.experts, self.of.top)
        chosen = (torch.arange(M, device=x.device)[:, None] * top + torch.arange(top, device=x.device)) % experts
        weights = x[:, :top].softmax(-1)
        return self.experts(x, chosen, weights)


class _Block(nn.Module):
    """One decoder block: attention, MLP, both norms and both residual sums."""

    def __init__(self, shape: str) -> None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        super().__init__()
        config = SHAPES[shape].config(attn_implementation="sdpa")
        self.block, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.block(x, position_embeddings=self.rotary(x, positions), attention_mask=None)


def _language_model(case: Case, device: torch.device) -> Any:
    """The real SmolLM2 where it is installed; others have random weights, two blocks and a vocabulary of 512."""
    if case.shape == "smollm2-135m":
        model = models.load_model("smollm2", case.dtype).model.to(device)
    else:
        model = models.random_model(case.shape, case.dtype, device, num_hidden_layers=2, vocab_size=512)
    return models.to_base(model, case.base, case.dtype)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that have a gate, an up and a down projection."""
    return (m for m in model.modules() if all(hasattr(m, f"{name}_proj") for name in ("gate", "up", "down")))
