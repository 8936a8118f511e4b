"""PEFT's ``adapter_config.json``: written so that it means the saved layers and no others; checked when it is read."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from fastlora.functional import is_finite_number
from fastlora.model import all_linear, experts_of, from_pattern, match_regex, matches_whole, plain_names
from fastlora.nn import LoRALinear
from fastlora.nn_experts import LoRAExperts

# Settings of PEFT under which an adapter is more, or other, than lora_A and lora_B of plain linear layers. So is every
# setting use_* and *_config, as PEFT names its variants of LoRA, but these:
_VARIANTS = (
    "lora_bias",
    "modules_to_save",
    "fan_in_fan_out",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
)
_NO_VARIANTS = (
    "use_rslora",
    "use_dora",
    "runtime_config",
    "megatron_config",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
)
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights when PEFT loads the adapter.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` says of the layers. Absent and null settings have PEFT's defaults.

    Raises ValueError for a setting of another type than PEFT's or out of range; numbers must be finite.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    target_modules: str | list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    exclude_modules: str | list[str] = field(default_factory=list)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(_is_rank(self.r), "r", "a positive integer", self.r)
        _check(is_finite_number(self.lora_alpha), "lora_alpha", "a finite number", self.lora_alpha)
        dropout = self.lora_dropout
        _check(is_finite_number(dropout) and 0 <= dropout < 1, "lora_dropout", "a number in [0, 1)", dropout)
        for name in ("use_rslora", "use_dora"):
            _check(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        _check(self.bias in _BIASES, "bias", f"one of {', '.join(_BIASES)}", self.bias)
        init = self.init_lora_weights
        known = isinstance(init, bool | str) and init in _INITIALISATIONS
        _check(known, "init_lora_weights", "true, false, gaussian, orthogonal or eva", init)
        parameters = self.target_parameters
        are_listed = isinstance(parameters, list) and _are_names(parameters)
        _check(are_listed, "target_parameters", "names", parameters)
        named = _are_names(self.target_modules) and len(self.target_modules) + len(parameters) > 0
        _check(named, "target_modules", "names or a regular expression", self.target_modules)
        for name in ("exclude_modules", "layers_pattern"):
            _check(_are_names(getattr(self, name)), name, "names or a regular expression", getattr(self, name))
        _check(
            all(map(_is_integer, self._layer_indices())), "layers_to_transform", "integers", self.layers_to_transform
        )
        if isinstance(self.target_modules, str) and (self.layers_pattern or self.layers_to_transform is not None):
            raise ValueError("layers_to_transform and layers_pattern need target_modules to be a list")
        for name, is_value in (("rank_pattern", _is_rank), ("alpha_pattern", is_finite_number)):
            pattern = getattr(self, name)
            valid = isinstance(pattern, dict) and all(is_value(value) for value in pattern.values())
            _check(
                valid, name, "names with positive integers" if is_value is _is_rank else "names with numbers", pattern
            )

    @classmethod
    def from_json(cls, data: bytes) -> "AdapterConfig":
        """Raises ValueError too if the data are not JSON in UTF-8, or describe another variant than LoRA or
        DoRA."""
        try:
            config = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the adapter's config is not valid JSON: {error}") from None
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"the adapter's config must describe a LORA adapter, got {kind!r}")
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "AdapterConfig":
        used = [key for key, value in config.items() if value and _is_variant(key)]
        if used:
            raise ValueError(f"the adapter uses {', '.join(used)}: load it with PEFT and call fastlora.patch(model)")
        names = [f.name for f in fields(cls) if config.get(f.name) is not None]
        return cls(**{name: config[name] for name in names})

    def adapted(self, model: nn.Module) -> set[str]:
        """The names of the modules that PEFT would adapt in this model, which may have its adapters already."""
        targets, excluded = self.target_modules, self.exclude_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = sorted(all_linear(model))
        is_target, is_excluded = _named_by(targets), _named_by(excluded)
        names = [name for name in plain_names(model).values() if name]
        return {n for n in names if is_target(n) and not is_excluded(n) and self._is_transformed(n)}

    def adapted_parameters(self, model: nn.Module) -> dict[str, list[str]]:
        """The modules whose parameters PEFT would adapt as stacks of weights, and which of their parameters."""
        return experts_of(model, self.target_parameters)

    def _is_transformed(self, name: str) -> bool:
        indices = self._layer_indices()
        if not indices or name in self.target_modules:  # a whole name is not asked for its index
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        wholes = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns if pattern]
        for whole in wholes or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
            if match := match_regex(whole, name):
                return int(match["index"]) in indices
        return False

    def _layer_indices(self) -> list[int]:
        indices = self.layers_to_transform
        return [] if indices is None else indices if isinstance(indices, list) else [indices]

    def rank(self, name: str) -> int:
        return from_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        return from_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """What PEFT multiplies the adapter of the module of this name with."""
        r = self.rank(name)
        return self.alpha(name) / (math.sqrt(r) if self.use_rslora else r)


def describe(model: nn.Module, adapted: dict[str, Any], bias: str) -> dict[str, Any]:
    """The config of a model's adapted layers, by which PEFT adapts exactly these with their ranks and scalings.

    With experts among them the dropout is zero, since PEFT has none there. Raises ValueError if PEFT's format has no
    such config.
    """
    layers = {name: layer for name, layer in adapted.items() if isinstance(layer, LoRALinear)}
    experts = {name: layer for name, layer in adapted.items() if name not in layers}
    for setting in ("use_rslora", "use_dora", "lora_dropout"):
        of = layers if setting == "use_dora" else adapted
        if len({getattr(layer, setting) for layer in of.values()}) > 1:
            raise ValueError(f"PEFT's format has one {setting} for all layers; these have different ones")
    return _described(model, layers, experts, bias)


def _described(
    model: nn.Module, layers: dict[str, LoRALinear], experts: dict[str, LoRAExperts], bias: str
) -> dict[str, Any]:
    every: list[Any] = [*(experts or layers).values()]
    if len({(layer.r, layer.lora_alpha) for layer in experts.values()}) > 1:
        raise ValueError("PEFT's format has one r and one lora_alpha for all experts; these have different ones")
    r = Counter(layer.r for layer in every).most_common(1)[0][0]
    alpha = Counter(layer.lora_alpha for layer in every).most_common(1)[0][0]
    first: Any = next(iter(layers.values()), every[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if experts else float(first.lora_dropout),
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "rank_pattern": {_only(name): layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {_only(name): la.lora_alpha for name, la in layers.items() if la.lora_alpha != alpha},
        "target_modules": sorted(layers),
        "target_parameters": sorted(f"{name}.{weight}" for name, each in experts.items() for weight in each.lora_A)
        or None,
        "bias": bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if AdapterConfig.from_dict(config).adapted(model) != layers.keys():  # a name is the end of another module's name
        config["target_modules"] = "|".join(map(re.escape, sorted(layers)))
    _require_meaning(AdapterConfig.from_dict(config), model, layers)
    found = AdapterConfig.from_dict(config).adapted_parameters(model)
    if {name: set(weights) for name, weights in found.items()} != {n: set(e.lora_A) for n, e in experts.items()}:
        raise ValueError("PEFT's format cannot name these weights of experts alone")
    return config


def _require_meaning(config: AdapterConfig, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    odd = sorted(config.adapted(model) ^ layers.keys())
    if odd:
        raise ValueError(f"PEFT's format cannot name these layers alone; it would differ in {', '.join(odd[:5])}")
    for name, layer in layers.items():
        if config.rank(name) != layer.r or config.scaling(name) != layer.scaling:
            raise ValueError(
                f"PEFT's format would give {name!r} rank {config.rank(name)} and scaling {config.scaling(name)}; "
                f"it has rank {layer.r} and scaling {layer.scaling} (set_scaling sets it by lora_alpha)"
            )


def _only(name: str) -> str:
    """The key of a pattern that means the module of this name: PEFT's keys are regular expressions of a name's end."""
    return f"^{re.escape(name)}"


def _named_by(names: str | list[str]) -> Callable[[str], bool]:
    """Whether a name matches a regular expression, or is or ends in (from a dot on) one of a list."""
    if isinstance(names, str):
        return lambda name: bool(names) and matches_whole(names, name)
    ends = set(names)
    return lambda name: any(name.split(".", i)[-1] in ends for i in range(name.count(".") + 1))


def _is_variant(key: str) -> bool:
    named_so = key.startswith("use_") or key.endswith("_config")
    return key in _VARIANTS or (named_so and key not in _NO_VARIANTS)


def _check(valid: bool, name: str, expected: str, value: Any) -> None:
    if not valid:
        raise ValueError(f"the adapter's {name} must be {expected}, got {str(value)[:200]}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))
