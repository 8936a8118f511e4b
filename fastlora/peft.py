"""Swap fastlora into a PEFT model: in place, reversible, and exact.

A patched layer keeps its parameters, buffers and submodules; only its class changes, to a subclass that overrides
forward. State-dict keys, saving, set_adapter, disable_adapter, merging and isinstance checks are untouched. A call that
fastlora cannot compute (`fastlora.peft_reasons`) runs PEFT's own forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from peft.tuners.lora import LoraLayer
from torch import nn

from fastlora.base_layers import SHARDED
from fastlora.calls import ATTRIBUTE, calls_of, grouped
from fastlora.compat import exchanged
from fastlora.dependencies import is_adapted
from fastlora.fuse import fuse_mlps, unfuse_mlps
from fastlora.peft_experts import GATE, OUR_EXPERTS, known_gate, outermost_of, why_not_fused
from fastlora.peft_layers import OUR_LAYERS, SIBLINGS
from fastlora.peft_reasons import ASKED_FOR, why_peft
from fastlora.siblings import siblings_among

OURS = OUR_LAYERS | OUR_EXPERTS
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


@dataclass
class PatchReport:
    """What `patch` did, by name: layers ``patched``, of them those ``sharded`` now, which run fused when their weights
    are gathered for a call, and layers ``skipped`` with the reason why each is left to PEFT; MLP blocks ``fused`` into
    one function, and those ``not_fused`` with the reason why each runs its own forward."""

    patched: list[str] = field(default_factory=list)
    sharded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    not_fused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.patched and not self.skipped:
            return "fastlora: nothing to patch: the model has no PEFT LoRA layers"
        waiting = sum(name in self.skipped for name in self.patched)
        lines = [f"fastlora: {len(self.patched)} LoRA layers patched, {len(self.skipped) - waiting} left to PEFT"]
        if self.sharded:
            lines.append(f"{len(self.sharded)} of the patched layers are sharded now, and fused when they are gathered")
        if waiting:
            lines.append(f"{waiting} of the patched layers run PEFT's own forward for now")
        lines += grouped(self.skipped)
        if self.fused or self.not_fused:
            lines.append(f"{len(self.fused)} MLP blocks computed as one, {len(self.not_fused)} layer by layer")
        return "\n".join(lines + grouped(self.not_fused))


def patch(model: nn.Module, strict: bool = False) -> PatchReport:
    """Make the LoRA layers of a PEFT model compute with fastlora, in place.

    Equivalent: only speed, memory and rounding change, and which elements dropout drops. It can be called again at any
    time, such as after adding an adapter: patched layers stay patched, and the new report describes the model as it is
    then. `fastlora.report` says what ran; a layer or MLP block that cannot run fused runs its own forward and warns
    once, with the reason.

    Returns a `PatchReport`. A layer can be patched and named in ``skipped`` too: it then runs PEFT's own forward until
    the reason goes away (its adapters are merged or disabled, for example).

    With ``strict`` a layer that is left to PEFT now is a ValueError, and the model is as it was; one that cannot run
    fused later is a RuntimeError instead of a warning. Adapters that are merged or disabled are no error.

    Raises TypeError if model is not a module. Patch after anything that wraps forward methods (accelerate's hooks).
    """
    layers = dict(_lora_layers(model))
    experts = outermost_of(layers)
    report = PatchReport(patched=[name for name, layer in layers.items() if _cannot_swap(layer) is None])
    for name, layer in layers.items():
        outermost = experts.get(id(layer))
        reason = _cannot_swap(layer) or (why_peft(layer) if outermost is None else why_not_fused(outermost))
        if reason is not None and reason.endswith(SHARDED):
            report.sharded.append(name)
        elif reason is not None:
            report.skipped[name] = reason
    refused = {name: reason for name, reason in report.skipped.items() if reason not in ASKED_FOR}
    if strict and refused:
        title = "fastlora.patch(strict=True): layers that would run PEFT's own forward:"
        raise ValueError("\n".join([title, *grouped(refused)]))
    for name in report.patched:
        layer = layers[name]
        layer.__class__ = exchanged(type(layer), OURS.get) or type(layer)
        if experts.get(id(layer), layer) is layer:
            calls_of(layer).strict = strict
        if experts.get(id(layer)) is layer:
            known_gate(layer, layer.get_base_layer())
    for layer, siblings in siblings_among({name: layers[name] for name in report.patched}):
        layer.__dict__[SIBLINGS] = siblings
    fused, kept = fuse_mlps(model, is_adapted, strict)
    waiting = report.skipped.keys() | report.sharded
    report.fused.extend(fused)
    report.fused.extend(
        name for name in report.patched if experts.get(id(layers[name])) is layers[name] and name not in waiting
    )
    report.not_fused.update(kept)
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Undo `patch`: give every patched layer its PEFT class back. Returns the names of those layers."""
    names = []
    for name, layer in _lora_layers(model):
        theirs = exchanged(type(layer), THEIRS.get)
        if theirs is not None:
            layer.__class__ = theirs
            for attribute in (SIBLINGS, ATTRIBUTE, GATE):
                layer.__dict__.pop(attribute, None)
            names.append(name)
    unfuse_mlps(model)
    return names


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


def _cannot_swap(layer: LoraLayer) -> str | None:
    if exchanged(type(layer), THEIRS.get) is None and exchanged(type(layer), OURS.get) is None:
        return f"{type(layer).__module__}.{type(layer).__name__} is not a layer type that fastlora replaces"
    if "forward" in layer.__dict__:
        return "its forward was already wrapped on the instance (accelerate hooks?): patch before that"
    return None
