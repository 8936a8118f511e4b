"""Which module keeps how many bytes for backward: a ledger of one training step of any model.

Two things are recorded. Every storage that an op allocates: if it is still alive after forward, something keeps it for
backward (autograd, checkpointing or a module). And every tensor that autograd saves, with the module whose forward is
running at that time. Neither needs hooks on single modules, which would change what runs.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora.fourbit import quantisation_tensors

_PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::_grouped_mm"),
    *("fastlora::lora_matmul", "fastlora::lora_matmul_4bit", "fastlora::nf4_matmul"),
    *("fastlora::lora_matmul_experts", "fastlora::lora_matmul_experts_4bit"),
)
_PARTS = re.compile(r"\.(base_layer|lora_A|lora_B|lora_dropout|lora_magnitude_vector)(\..*)?$")


@dataclass
class Kept:
    """One storage that is alive when forward has ended."""

    bytes: int
    made_by: str  # the module that ran, and the op
    op: str
    kept_by: list[str] = field(default_factory=list)  # modules that saved it for backward, in order; may be empty

    @property
    def owner(self) -> str:
        """The module it is counted for: the first that saved it, or, if autograd did not (checkpointing), the one that
        allocated it."""
        return self.kept_by[0] if self.kept_by else self.made_by


@dataclass
class Ledger:
    """What a step of a model keeps, in bytes."""

    kept: list[Kept]
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    recomputed: dict[str, int]  # products (GEMMs) that modules compute again in backward

    @property
    def saved(self) -> int:
        return sum(kept.bytes for kept in self.kept)

    def by_module(self) -> dict[str, int]:
        """Saved bytes of each module; what several keep is counted for the first."""
        total: Counter[str] = Counter()
        for kept in self.kept:
            total[kept.owner] += kept.bytes
        return dict(total)

    def shared(self) -> dict[str, int]:
        """Bytes that a module keeps too, but that are counted for another."""
        total: Counter[str] = Counter()
        for kept in self.kept:
            for module in dict.fromkeys(kept.kept_by[1:]):
                if module != kept.owner:
                    total[module] += kept.bytes
        return dict(total)


def record(model: nn.Module, forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None = None) -> Ledger:
    """Run a step, ``forward().backward()`` and the optimizer's, and count its bytes. Gradients are set to None.

    Args:
        forward: computes the loss and keeps nothing else.
        optimizer: if given, steps once; its state is counted.
    """
    names = {module: name_of(name) for name, module in model.named_modules()}
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    with _running(names) as stack:
        watch = _Watch(stack)
        with watch, torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda t: t):
            loss = forward()
        own.add(loss.untyped_storage()._cdata)
        kept = [entry for cdata, (ref, entry) in watch.storages.items() if not ref.expired() and cdata not in own]
        again = _Products(stack)
        with again:
            loss.backward()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return Ledger(
        kept=[entry for entry in kept if entry.bytes],
        weights=sum(t.nbytes for p in frozen for t in (p, *quantisation_tensors(p))),
        adapters=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        gradients=gradients,
        optimizer=state_bytes(optimizer),
        recomputed=dict(again.count),
    )


def name_of(module: str) -> str:
    """The layer that a module is a part of, by the name it has without PEFT."""
    return _PARTS.sub("", re.sub(r"^base_model(\.model)?(\.|$)", "", module)) or "the model"


def fold(module: str) -> str:
    """``layers.3.mlp`` is ``layers.*.mlp``, as all the others are."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Of all tensors that an optimizer keeps."""
    state = {} if optimizer is None else optimizer.state
    return sum(t.nbytes for values in state.values() for t in values.values() if isinstance(t, Tensor))


@contextmanager
def _running(names: dict[nn.Module, str]) -> Iterator[list[str]]:
    """The names of the modules that are being called, the innermost last."""
    stack = ["outside of modules"]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(*_: Any) -> None:
        stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchDispatchMode):
    """Records every new storage by its address, and the modules that save it."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.storages: dict[int, tuple[StorageWeakRef, Kept]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in old:
                storage = t.untyped_storage()
                entry = Kept(storage.nbytes(), self.stack[-1], func._schema.name)
                self.storages[storage._cdata] = StorageWeakRef(storage), entry
        return result

    def pack(self, t: Tensor) -> Tensor:
        known = self.storages.get(t.untyped_storage()._cdata)
        if known is not None:
            known[1].kept_by.append(self.stack[-1])
        return t


class _Products(TorchDispatchMode):
    """Matrix products that run inside a module."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack, self.count = stack, Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if len(self.stack) > 1 and func._schema.name in _PRODUCTS:
            self.count[self.stack[-1]] += 1
        return func(*args, **(kwargs or {}))
