"""Train and serve several adapters of a PEFT model in one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastlora.fused_block import fusion_of
from fastlora.peft_experts import WRAPPER
from fastlora.peft_layers import mixed_batch
from fastlora.proof import own_class
from fastlora.row_adapters import BASE, RowAdapters


@contextmanager
def adapters_of_rows(model: nn.Module, adapters: Sequence[str] | Sequence[int] | Tensor) -> Iterator[None]:
    """Within the context, entry i of every batch goes through adapter ``adapters[i]`` of a PEFT model, whichever
    adapters are active: in training too, where each adapter that requires grad gets the gradient of its own entries.

    Equivalent, for each i: ``model.set_adapter(adapters[i]); model(batch[i : i + 1])``, in one call that reads the base
    weights once. Adapters may have different ranks, scalings and target modules. For inference PEFT's
    ``model(..., adapter_names=...)`` is the same.

    Args:
        model: a PEFT model; layers that `fastlora.patch` has patched are computed by fastlora, others by PEFT.
        adapters: for each entry of the batch the name of its adapter, or the number of it in the order of
            ``model.peft_config``; ``"__base__"`` or -1 stands for the model without an adapter.

    Call backward within the context if activations are checkpointed: layers are then computed again. With beam search a
    batch has an entry for each beam.

    Raises:
        TypeError, ValueError: the model has no LoRA layers of PEFT's, an adapter is not one of its own, or experts have
            adapters, which cannot differ by entry. A layer that is given a batch of another size raises ValueError when
            it is called.
    """
    rows = RowAdapters(_names(model, adapters))
    before: list[tuple[nn.Module, Any]] = []

    def replace(module: nn.Module, forward: Any) -> None:
        before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    try:
        for module in list(model.modules()):
            if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
                replace(module, partial(_forward, module, rows))
            elif fusion_of(module) is not None:  # its layers are computed one by one
                replace(module, partial(own_class(module).forward, module))
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _forward(layer: Any, rows: RowAdapters, x: Any, *args: Any, **kwargs: Any) -> Any:
    if hasattr(type(layer), "operands") and not args and not kwargs:
        return mixed_batch(layer, x, rows)
    return type(layer).forward(layer, x, *args, adapter_names=rows.names, **kwargs)


def _names(model: nn.Module, adapters: Any) -> list[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(isinstance(layer, WRAPPER) for layer in layers):
        raise ValueError("experts of the model have adapters, which cannot differ by entry of a batch")
    known = list(dict.fromkeys(name for layer in layers for name in layer.lora_A))
    if not known:
        raise ValueError("model must be a PEFT model with LoRA layers, got one without")
    order = list(getattr(model, "peft_config", known))
    if isinstance(adapters, str):
        raise TypeError(f"adapters must be a list with the adapter of each entry of the batch, got {adapters!r}")
    given = adapters.tolist() if isinstance(adapters, Tensor) else list(adapters)
    names = [each if isinstance(each, str) else _by_number(each, order) for each in given]
    for name in names:
        if name != BASE and name not in known:
            raise ValueError(f"adapters must be of {', '.join(known)}, or {BASE!r} for none, got {name!r}")
    return names


def _by_number(number: Any, order: list[str]) -> str:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"adapters must be names or numbers, got {number!r}")
    if not -1 <= number < len(order):
        raise ValueError(f"numbers of adapters must be from -1 (for none) to {len(order) - 1}, got {number}")
    return BASE if number == -1 else order[number]
