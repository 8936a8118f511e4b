"""Train the same adapted model with several providers, step by step in turn, and measure each."""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.fourbit import quantisation_tensors

WARMUP = 1  # steps that are not timed


@dataclass
class Measurements:
    """What one provider did in one case. Times in seconds, memory in bytes."""

    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    saved_bytes: int = 0  # kept for backward by autograd, weights not counted
    peak_bytes: int = 0  # most that was allocated during a step beyond what was there before it
    gradient_bytes: int = 0  # of the parameters that train

    @property
    def timed(self) -> list[float]:
        return self.step_seconds[WARMUP:]


@dataclass
class Trainer:
    """One provider: its model, its optimizer and its measurements."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    device: torch.device
    results: Measurements = field(default_factory=Measurements)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(self, ids: Tensor) -> float:
        loss = self.forward(ids)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def timed_step(self, ids: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        synchronize(self.device)
        start = time.perf_counter()
        loss = self.step(ids)
        synchronize(self.device)
        self.results.step_seconds.append(time.perf_counter() - start)
        self.results.losses.append(loss)

    def measure_memory(self, ids: Tensor) -> None:
        """Fill in what is kept in bytes, from forward and backward without an optimizer step.

        A first pass compiles, and lets libraries allocate the workspaces that they keep.
        """
        self.forward(ids).backward()
        self.results.gradient_bytes = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.model.zero_grad(set_to_none=True)
        self.results.saved_bytes = saved_bytes(self.model, lambda: self.forward(ids))
        self.results.peak_bytes = peak_bytes(self.device, lambda: self.forward(ids).backward())
        self.model.zero_grad(set_to_none=True)


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def make_trainers(
    base: nn.Module,
    r: int,
    dropout: float,
    checkpointing: bool,
    compiled: bool,
    lr: float,
    seed: int,
    *,
    adapters: int = 1,
    backend: str = "inductor",
    optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] = adamw,
    **lora: Any,
) -> list[Trainer]:
    """The frozen model, PEFT, and PEFT patched with fastlora; if compiled, the last two again compiled.

    All share the frozen weights of ``base`` and start from the same adapters.

    Args:
        adapters: how many of rank r every adapted layer has, all of them active.
        backend: of torch.compile.
        lora: further arguments of `peft.LoraConfig`, e.g. target_modules (unless given every linear layer; PEFT adds
            experts and their routers).
    """
    import peft

    from fastlora.peft import patch

    torch.manual_seed(seed)
    lora = {"lora_alpha": 2 * r, "target_modules": "all-linear", **lora}
    names = ["default", *(f"default_{i}" for i in range(1, adapters))]
    configs = [peft.LoraConfig(r=r, lora_dropout=dropout, task_type="CAUSAL_LM", **lora) for _ in names]
    reference: Any = peft.get_peft_model(copy_sharing_frozen(base), configs[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        reference.add_adapter(name, config)
    reference.base_model.set_adapter(names)
    models: dict[str, Any] = {
        "frozen": copy_sharing_frozen(base),
        "peft": reference,
        "fastlora": copy_sharing_frozen(reference),
    }
    if compiled:
        models["peft+compile"] = copy_sharing_frozen(reference)
        models["fastlora+compile"] = copy_sharing_frozen(reference)
    device = next(base.parameters()).device
    trainers = []
    for name, model in models.items():
        if name == "frozen" or checkpointing:
            model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if name.startswith("fastlora"):
            report = patch(model)
            with_experts = bool(reference.peft_config["default"].target_parameters)  # their routers stay PEFT's
            if not report.patched or (report.skipped and not with_experts):
                raise RuntimeError(f"not every layer was patched: {report}")
        trainable = [p for p in model.parameters() if p.requires_grad]
        model.train()
        trainers.append(
            Trainer(
                name,
                torch.compile(model, backend=backend) if name.endswith("+compile") else model,  # type: ignore[arg-type]
                optimizer(trainable, lr) if trainable else None,
                device,
            )
        )
    return trainers


def rotated(ways: list[Any], i: int) -> list[Any]:
    """The order of round i: the first is another one every time."""
    turn = i % max(1, len(ways))
    return ways[turn:] + ways[:turn]


def train(trainers: list[Trainer], data: list[Tensor], seed: int) -> Iterator[tuple[str, Measurements]]:
    """Take the steps of all trainers in turn, the order rotated every round. Yields after each trainer's step.

    All see the same batch and the same random state in a round; memory is measured before the first.
    """
    for trainer in trainers:
        torch.manual_seed(seed)
        trainer.measure_memory(data[0].to(trainer.device))
        yield trainer.name, trainer.results
    for i, ids in enumerate(data):
        for trainer in rotated(trainers, i):
            trainer.timed_step(ids.to(trainer.device), seed + i)
            yield trainer.name, trainer.results


def speedup(baseline: Measurements, other: Measurements) -> float | None:
    """How many times faster the other is: the median over rounds of the ratio of the two steps of one round."""
    pairs = list(zip(baseline.timed, other.timed, strict=False))
    return median(b / o for b, o in pairs) if pairs else None


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps alive for backward, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own |= {t.untyped_storage().data_ptr() for p in model.parameters() for t in quantisation_tensors(p)}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # a node that holds its own output would never be freed

    if "torch._dynamo" in sys.modules:  # a compiled model would trace it, into graphs that are not those of its steps
        pack = torch.compiler.disable(pack)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    del loss
    return sum(seen.values())


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most memory that torch's allocator handed out at once during work(), beyond what was in use before.

    On a GPU from the allocator's statistics; on a CPU from the profiler's record of every allocation.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_sharing_frozen(model: nn.Module) -> nn.Module:
    """A deep copy whose frozen parameters are the original's."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
