"""What the calls of a patched model ran: fastlora's functions, or the modules' own forward, and why.

Counted for eager calls only: a count that changed inside a compiled graph would make torch.compile start over.
"""

import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

ATTRIBUTE = "_fastlora_calls"  # of a module whose calls are counted


@dataclass
class Calls:
    """How often one layer or MLP block ran ``fused``; how often its base layer computed its own output, to which
    the adapter was ``added``; and how often its own forward ran (PEFT's, for a patched layer): ``own``, with the last
    ``reason``. ``strict``: raise instead of warning."""

    fused: int = 0
    added: int = 0
    own: int = 0
    reason: str | None = None
    strict: bool = False

    def ran(self, base_kind: str) -> None:
        """Count a call that fastlora computed, on a base layer of this `fastlora.base_layers.base_kind`."""
        if base_kind == "opaque":
            self.added += 1
        else:
            self.fused += 1

    def falls_back(self, reason: str, asked_for: bool = False) -> None:
        """Count a call of the module's own forward. Says so once per reason, unless the user ``asked_for`` it.

        Raises RuntimeError if ``strict``, unless the user asked for it.
        """
        self.own += 1
        if asked_for or reason == self.reason:
            self.reason = reason
            return
        self.reason = reason
        if self.strict:
            raise RuntimeError(f"fastlora: a module patched with strict=True cannot run fused: {reason}")
        message = f"fastlora: a patched module runs its own forward: {reason}"
        warnings.warn(message, stacklevel=_caller_of_the_model())


_LIBRARIES = ("fastlora", "torch", "peft", "transformers", "trl", "accelerate", "lightning")


def _caller_of_the_model() -> int:
    """The ``stacklevel``, for who calls this, of the innermost call that is made by none of the libraries between the
    user and a layer: `warnings` shows and filters by that line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


def calls_of(module: Any) -> Calls:
    """The record of this module's calls; created at the first use."""
    return module.__dict__.setdefault(ATTRIBUTE, Calls())


@dataclass
class Report:
    """By name, the `Calls` of every patched layer and of every fused MLP block."""

    layers: dict[str, Calls] = field(default_factory=dict)
    mlps: dict[str, Calls] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.layers and not self.mlps:
            return "fastlora: the model has no patched layers"
        kinds = {"layers": self.layers, "MLP blocks": self.mlps}
        lines = [_line(title, calls.values()) for title, calls in kinds.items() if calls]
        lines += grouped({name: calls.reason for name, calls in (self.layers | self.mlps).items() if calls.reason})
        return "\n".join(["fastlora, eager calls so far:", *lines])


def report(model: nn.Module) -> Report:
    """What the eager calls of a model patched by `patch` or made by `add_lora` ran so far, by layer and MLP block.

    A layer inside a fused MLP block counts as fused when the block ran fused. Counts start at `patch` and are kept by
    patching again. Raises TypeError if model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = Report()
    for name, module in model.named_modules():
        calls = module.__dict__.get(ATTRIBUTE)
        if calls is not None:
            is_layer = hasattr(module, "operands") or hasattr(module, "adapter_down")  # of a `ParallelAdapter`
            (found.layers if is_layer else found.mlps)[name] = calls
    return found


def _line(title: str, calls: Any) -> str:
    fused, added, own = (sum(getattr(c, kind) for c in calls) for kind in ("fused", "added", "own"))
    beside = f", {added} added to a base layer's own output" if added else ""
    return f"  {len(calls)} {title}: {fused} calls fused{beside}, {own} by the module's own forward"


def grouped(reasons: dict[str, str]) -> list[str]:
    """One line for every reason, with the modules that have it: repeated blocks are named once, by ``*``."""
    modules: dict[str, Counter] = {}
    for name, reason in reasons.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        modules.setdefault(reason, Counter())[pattern] += 1
    lines = []
    for reason, patterns in modules.items():
        names = [pattern if n == 1 else f"{pattern} ({n})" for pattern, n in patterns.items()]
        lines.append(f"  {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}: {reason}")
    return lines
