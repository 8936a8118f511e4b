"""Prove that a module's forward is that of an MLP, by calling it with scripted layers in the place of its own.

A scripted layer returns numbers chosen beforehand and keeps what it was given. So each step of the forward is seen by
itself, exactly and in fp64, and no layer of the model is called: what gate and up are given must be x, what down is
given must be ``act(gate) * up``, and what the module returns must be what down returned.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.base_layers import is_hooked
from fastlora.compat import without_modes
from fastlora.kernels.limits import ACTIVATIONS
from fastlora.reference import halves, swiglu


class Block(NamedTuple):
    """The names of an MLP's layers, (gate, up, down) or (up, down), and its activation. ``gate_first``: one layer, in
    the place of up, gives gate and up side by side, in this order or, if False, in the other. ``inside`` and ``after``:
    the names of the ``nn.Dropout`` modules that down's input and its output go through."""

    layers: tuple[str, ...]
    activation: str
    gate_first: bool | None = None
    inside: str | None = None
    after: str | None = None


class Trial(NamedTuple):
    """One call of the forward: the leading dimensions of x, the mode, and whether layers have their own widths or,
    for speed, ``NARROW`` features."""

    shape: tuple[int, ...]
    training: bool = False
    grad: bool = False
    narrow: bool = True


NARROW = 16
_TRIALS = [
    Trial((1, 1), narrow=False),
    Trial((2, 3)),
    Trial((7,)),
    Trial((1, 2, 2, 2)),
    Trial((1, 1031)),
    Trial((2, 3), training=True),
    Trial((2, 3), grad=True),
    Trial((1, 1), training=True, grad=True),
]

# Activations are evaluated by formulas that differ in their last digits, and in how fast their tails vanish. The
# nearest function that is not the same, 1% off, is four orders away.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-12


def prove(module: nn.Module, layers: dict[str, Any]) -> Block | str:
    """The MLP that these two or three layers of the module make up, or why its forward is not known to be one.

    The numbers that stand for the layers' outputs have magnitudes from 1e-3 to 1e3, beyond any clamp in use; both
    modes, with and without gradients, several shapes and many tokens are tried.
    """
    for name, child in module.named_modules():
        if name and name.partition(".")[0] not in layers and is_hooked(child):
            return f"its {type(child).__name__} has hooks, which only run when it is called"
    try:
        with without_modes(), torch.random.fork_rng([]):  # such as those of tracing
            candidates: set[Block] | None = None
            for trial in _TRIALS:
                found = _matches(module, layers, trial)
                if candidates and not candidates & found:
                    return f"its forward is another one {_describe(trial)}"
                candidates = found if candidates is None else candidates & found
                if not candidates:
                    return f"its forward is not that of an MLP with one of the activations {', '.join(ACTIVATIONS)}"
    except Exception as error:  # of a forward that is not ours
        return f"a probe of its forward failed: {error}"
    assert candidates
    return candidates.pop()


def _describe(trial: Trial) -> str:
    modes = ["in training"] * trial.training + ["with gradients"] * trial.grad
    return " and ".join(modes) or f"for an x of {' x '.join(map(str, trial.shape))} tokens"


class _ScriptedDropout(nn.Module):
    """Stands in for a dropout: multiplies by a number of its own, and keeps what it was given and what it returned."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((x, x * self.number))
        return self.calls[-1][1]


class _Scripted(nn.Module):
    """Stands in for a linear layer: returns ``output`` whatever it is given, and keeps that as ``given``."""

    def __init__(self, layer: Any, output: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.output = layer.in_features, layer.out_features, output
        self.bias = None
        self.given: list[Tensor] = []

    @property
    def weight(self) -> Tensor:
        """For a forward that asks for its dtype or device."""
        return self.output.new_zeros(()).expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x)
        return self.output.clone()


OWN_CLASS = "_fastlora_own_class"


def own_class(module: nn.Module) -> Any:
    """The class of a module whose forward is its own; that of a block which is computed as one has another."""
    return getattr(type(module), OWN_CLASS, type(module))


def _matches(module: nn.Module, layers: dict[str, Any], trial: Trial) -> set[Block]:
    """The blocks that this call of the module's forward could be."""
    if not trial.narrow:
        widths = {layer.in_features for layer in layers.values()}
        return set().union(*_without_errors([partial(_call, module, layers, trial, K) for K in widths]))
    try:
        return _call(module, layers, trial, NARROW)
    except Exception:  # it depends on the widths of its layers
        return _matches(module, layers, trial._replace(narrow=False))


def _without_errors(calls: list[Callable[[], set[Block]]]) -> Iterator[set[Block]]:
    """What those of the calls return that do not raise. Raises the first error if all do."""
    errors = []
    for call in calls:
        try:
            yield call()
        except Exception as error:  # of a forward that is not ours
            errors.append(error)
    if len(errors) == len(calls):
        raise errors[0]


def _call(module: nn.Module, layers: dict[str, Any], trial: Trial, K: int) -> set[Block]:
    generator = torch.Generator().manual_seed(0)
    scripted = {}
    for name, layer in layers.items():
        width = NARROW if trial.narrow else layer.out_features
        scripted[name] = _Scripted(layer, _magnitudes((*trial.shape, width), generator))
    dropouts = {name: _ScriptedDropout(1.5 + i) for i, name in enumerate(_dropouts_of(module))}
    replacements: dict[int, nn.Module] = {id(layers[name]): each for name, each in scripted.items()}
    replacements.update((id(module._modules[name]), each) for name, each in dropouts.items())
    twin = _with_layers(module, replacements)
    for each in twin.modules():
        each.training = trial.training
    x = torch.randn(*trial.shape, K, generator=generator, dtype=torch.float64)
    with torch.set_grad_enabled(trial.grad):
        y = own_class(module).forward(twin, x.clone())
    found = _read(x, y, scripted, dropouts)
    return {block for block in found if trial.narrow or layers[block.layers[0]].in_features == K}


def _dropouts_of(module: nn.Module) -> list[str]:
    """The children that drop elements. Those of p = 0 do nothing, wherever they are called."""
    children = module._modules.items()
    return [name for name, child in children if type(child) is nn.Dropout and 0.0 < child.p < 1.0 and not child.inplace]


def _read(x: Tensor, y: Any, scripted: dict[str, _Scripted], dropouts: dict[str, _ScriptedDropout]) -> set[Block]:
    """What was computed: y from x, by layers and dropouts that kept what they were given."""
    if any(len(layer.given) != 1 for layer in scripted.values()):
        return set()
    blocks = set()
    for down in scripted:
        first = [name for name in scripted if name != down]
        given, after = _before(y, dropouts)
        if not all(_same(scripted[name].given[0], x) for name in first) or not _same(given, scripted[down].output):
            continue
        h, inside = _before(scripted[down].given[0], dropouts)
        for (names, gate_first), (gate, up) in _gates_and_ups(first, scripted).items():
            for activation in ACTIVATIONS:
                if _is_activated(h, gate, up, activation):
                    blocks.add(Block((*names, down), activation, gate_first, inside, after))
    return blocks


def _before(t: Any, dropouts: dict[str, _ScriptedDropout]) -> tuple[Any, str | None]:
    """What became t by one of the dropouts, and its name; t itself if none returned it."""
    for name, dropout in dropouts.items():
        for given, returned in dropout.calls:
            if _same(t, returned):
                return given, name
    return t, None


def _gates_and_ups(first: list[str], scripted: dict[str, _Scripted]) -> dict[tuple, tuple[Tensor, Tensor | None]]:
    """What may be gate and up, by the names of the layers that give them and by `Block.gate_first`."""
    outputs = [scripted[name].output for name in first]
    if len(outputs) == 2:
        return {((first[i], first[1 - i]), None): (outputs[i], outputs[1 - i]) for i in range(2)}
    (z,) = outputs
    found: dict[tuple, tuple[Tensor, Tensor | None]] = {((first[0],), None): (z, None)}
    if z.shape[-1] % 2 == 0:
        found |= {((first[0],), gate_first): halves(z, gate_first) for gate_first in (True, False)}
    return found


def _is_activated(h: Any, gate: Tensor, up: Tensor | None, activation: str) -> bool:
    """Whether h is ``act(gate) * up``."""
    expected = swiglu(gate, up, activation)
    if type(h) is not Tensor or h.shape != expected.shape or h.dtype != expected.dtype:
        return False
    scale = gate.abs() if up is None else (gate * up).abs()
    return bool(((h - expected).abs() <= _RELATIVE * expected.abs() + _ABSOLUTE * scale).all())


def activation_of(act: Any) -> str | None:
    """The known activation that this function or module computes, for numbers of all magnitudes; None if it is none."""
    numbers = _magnitudes((1031,), torch.Generator().manual_seed(0))
    try:
        with without_modes(), torch.no_grad():
            h = copy.deepcopy(act)(numbers.clone())
    except Exception:  # of a function that is not ours
        return None
    return next((name for name in ACTIVATIONS if _is_activated(h, numbers, None, name)), None)


def _same(t: Any, expected: Tensor) -> bool:
    return type(t) is Tensor and t.dtype == expected.dtype and torch.equal(t, expected)


def _magnitudes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers of both signs between 1e-3 and 1e3, evenly spread over the orders of magnitude."""
    exponents = torch.empty(shape, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs * 10**exponents


def _with_layers(module: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """A copy of the module for one call on a CPU: some children, by id, replaced, the others and its buffers copied."""
    twin = object.__new__(own_class(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)
    twin.__dict__["_modules"] = {
        name: replacements[id(child)] if id(child) in replacements else _on_cpu(copy.deepcopy(child))
        for name, child in module._modules.items()
    }
    twin.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.detach().clone().cpu() for name, buffer in module._buffers.items()
    }
    return twin


def _on_cpu(child: nn.Module | None) -> nn.Module | None:
    return None if child is None else child.to("cpu")
