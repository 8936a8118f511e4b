"""LoRA on a whole model without PEFT: add adapters, merge them, take them apart again."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.fuse import fuse_mlps, unfuse_mlps
from fastlora.nn import LoRALinear, unchanged_on_error
from fastlora.nn_experts import LoRAExperts
from fastlora.siblings import siblings_among


def add_lora(
    model: nn.Module,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Iterable[str] = "all-linear",
    *,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    bias: str = "none",
    init_lora_weights: bool | str = True,
    layers_to_transform: int | Iterable[int] | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    adapter_dtype: torch.dtype | None = None,
    use_dora: bool = False,
    target_parameters: Iterable[str] = (),
) -> nn.Module:
    """Freeze a model and adapt its linear layers, in place: the `LoRALinear` of PEFT's ``get_peft_model``.

    Args:
        model: any module; bitsandbytes' 4-bit layers stay 4-bit.
        target_modules: names, or ends of dotted names (``["q_proj", "v_proj"]``); a regular expression that matches
            whole dotted names; or ``"all-linear"``, every linear layer but the output head.
        layers_to_transform: only these indices of repeated blocks (the number in ``layers.3.``).
        rank_pattern, alpha_pattern: r and lora_alpha for modules whose name ends in a match of the key.
        bias: which biases train: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        target_parameters: dotted names of stacks of weights of experts, or ends of such names
            (``["experts.gate_up_proj", "experts.down_proj"]``): see `LoRAExperts`. With them ``target_modules`` may be
            empty.
        r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights, adapter_dtype: see `LoRALinear`.

    Returns:
        The model. Nothing is changed if an error is raised.

    Raises:
        ValueError: nothing matches target_modules or target_parameters (near matches are named), the model has adapters
            already, or a value is out of range. TypeError: a target is not a linear layer, or not of experts that
            `LoRAExperts` takes.
    """
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", got {bias!r}')
    require_no_adapters(model)
    target_parameters = [target_parameters] if isinstance(target_parameters, str) else list(target_parameters)
    target_modules = target_modules if isinstance(target_modules, str) else list(target_modules)
    experts = experts_of(model, target_parameters)
    experts = {name: found for name, found in experts.items() if _is_in(layers_to_transform, f"{name}.")}
    if target_parameters and not experts:
        raise ValueError(f"target_parameters={target_parameters!r} matches no parameter")
    names = _match_targets(model, target_modules, layers_to_transform) if target_modules or not experts else []
    with unchanged_on_error(model):
        layers: dict[str, LoRALinear | LoRAExperts] = {
            name: LoRALinear.from_linear(
                model.get_submodule(name),
                r=from_pattern(rank_pattern, name, r),
                lora_alpha=from_pattern(alpha_pattern, name, lora_alpha),
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                init_lora_weights=init_lora_weights,
                adapter_dtype=adapter_dtype,
                use_dora=use_dora,
            )
            for name in names
        }
        for name, parameters in experts.items():
            layers[name] = LoRAExperts(
                model.get_submodule(name),
                parameters,
                r=r,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                init_lora_weights=init_lora_weights,
                adapter_dtype=adapter_dtype,
            )
        put_layers(model, layers)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and (bias == "all" or (bias == "lora_only" and owner.removesuffix(".base_layer") in layers)):
            parameter.requires_grad_(True)
    return model


def merge(model: nn.Module, unload: bool = False) -> nn.Module:
    """Fold every adapter into its base weight: ``weight += scaling * lora_B @ lora_A``, in place. With DoRA the rows of
    the sum get their trained norms.

    The sum is made in fp32 and rounded once; 4-bit weights are decoded, summed and quantised again (lossy, as with
    PEFT). The old weights are kept so that `unmerge` is exact, which costs their memory; ``unload=True`` drops them and
    the adapters and leaves the plain layers, as PEFT's ``merge_and_unload``. A merged model trains no adapters.

    Returns the model. Raises ValueError if it has no adapters of `add_lora` or one is not finite, TypeError if a base
    layer cannot be merged into; the model is then as it was.
    """
    layers = dict(lora_layers(model))
    require_layers(layers, model)
    done = []
    try:
        for layer in layers.values():
            if not layer.merged:
                layer.merge()
                done.append(layer)
    except (TypeError, ValueError):
        for layer in done:
            layer.unmerge()
        raise
    if unload:
        unfuse_mlps(model)
        for name, layer in layers.items():
            model.set_submodule(name, layer.base_layer)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, bit for bit. Returns the model. Raises ValueError if it has no adapters of `add_lora`."""
    layers = dict(lora_layers(model))
    require_layers(layers, model)
    for layer in layers.values():
        layer.unmerge()
    return model


def put_layers(model: nn.Module, layers: Mapping[str, LoRALinear | LoRAExperts]) -> None:
    """Freeze the model and put new adapted layers, which train, in the places of their base layers.

    If that fails, every base layer is back in its place; requires_grad is for `unchanged_on_error` to restore.
    """
    for name in layers:
        parts = name.split(".")
        if any(".".join(parts[:i]) in layers for i in range(1, len(parts))):
            raise ValueError(f"{name!r} is part of a layer that would be adapted too")
    try:
        model.requires_grad_(False)
        for name, layer in layers.items():
            layer.training = layer.base_layer.training
            model.set_submodule(name, layer)
        linear = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}
        for layer, siblings in siblings_among(linear):
            layer._siblings = siblings
        fuse_mlps(model, lambda module: isinstance(module, LoRALinear))
    except BaseException:
        unfuse_mlps(model)
        for name, layer in layers.items():
            model.set_submodule(name, layer.base_layer)
        raise


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers of a model, `LoRALinear` or `LoRAExperts`, with their names."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear | LoRAExperts))


def experts_of(model: nn.Module, target_parameters: Sequence[str]) -> dict[str, list[str]]:
    """The modules, by their plain names, that have parameters of these names or of names that end so, and which."""
    found: dict[str, list[str]] = {}
    plain = plain_names(model)
    for name, module in model.named_modules() if target_parameters else ():
        computed: Any = module._modules.get("parametrizations", ())
        for parameter in (*module._parameters, *computed):
            key = f"{plain[name]}.{parameter}"
            if any(key == target or key.endswith(f".{target}") for target in target_parameters):
                found.setdefault(plain[name], []).append(parameter)
    return found


def plain_names(model: nn.Module) -> dict[str, str]:
    """The names of a model's modules, each with the name that it has, or had, without adapters."""
    plain = {"": ""}
    adapted = {name for name, _ in lora_layers(model)}
    for name, _ in model.named_modules():
        owner, _, leaf = name.rpartition(".")
        if leaf == "base_layer" and owner in adapted:
            plain[name] = plain[owner]
        elif name:
            plain[name] = f"{plain[owner]}.{leaf}" if plain[owner] else leaf
    return plain


def all_linear(model: nn.Module) -> set[str]:
    """The plain names of the linear layers, adapted or not, less the output head: PEFT's ``"all-linear"``."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = (head, head.base_layer if isinstance(head, LoRALinear) else None)
    plain = plain_names(model)
    return {plain[n] for n, m in model.named_modules() if n and isinstance(m, nn.Linear) and m not in heads}


def require_no_adapters(model: nn.Module) -> None:
    if any(hasattr(m, "lora_A") for m in model.modules()):
        raise ValueError("the model has LoRA layers already; a PEFT model is made faster by fastlora.patch(model)")


def require_layers(layers: Mapping[str, Any], model: nn.Module) -> None:
    if layers:
        return
    if hasattr(model, "peft_config"):
        raise ValueError(
            "this is a PEFT model: use its own merge_adapter, unmerge_adapter, merge_and_unload and saving"
        )
    raise ValueError("the model has no LoRALinear layers: call fastlora.add_lora(model) first")


def _match_targets(model: nn.Module, target_modules, layers_to_transform) -> list[str]:
    modules = {name: m for name, m in model.named_modules() if name}
    if target_modules == "all-linear":
        plain = all_linear(model)
        names = [name for name in modules if name in plain]
    elif isinstance(target_modules, str):
        names = [name for name in modules if matches_whole(target_modules, name)]
    else:
        target_modules = list(target_modules)
        names = [n for n in modules if any(n == t or n.endswith(f".{t}") for t in target_modules)]
    names = [name for name in names if _is_in(layers_to_transform, name)]
    if names:
        return names
    linear = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    if layers_to_transform is not None:
        raise ValueError(f"no module matches target_modules={target_modules!r} in layers {layers_to_transform!r}")
    raise ValueError(f"target_modules={target_modules!r} matches no module; {_near_matches(target_modules, linear)}")


def _near_matches(target_modules: str | list[str], linear: list[str]) -> str:
    if not linear:
        return "the model has no linear layers"
    asked = [target_modules] if isinstance(target_modules, str) else target_modules
    known = sorted({name.rpartition(".")[2] for name in linear} | set(linear))
    near = [match for name in asked for match in difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    hint = f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
    return f"{hint}linear layers end in: {', '.join(leaves[:20])}"


def _is_in(layers_to_transform, name: str) -> bool:
    if layers_to_transform is None:
        return True
    wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    return _layer_index(name) in wanted


def _layer_index(name: str) -> int | None:
    """The index of the repeated block that a module is in: 3 for ``model.layers.3.mlp.up_proj``."""
    match = re.match(r"(?:.*?\.)?[^.]*\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def from_pattern(pattern: dict | None, name: str, default):
    """PEFT's rule: the value of the first key that matches the end of the name, from a dot on, or is the name."""
    pattern = pattern or {}
    key = next((key for key in pattern if match_regex(rf"(.*\.)?({key})$", name)), name)
    return pattern.get(key, default)


def matches_whole(regex: str, name: str) -> bool:
    return match_regex(regex, name, re.fullmatch) is not None


def match_regex(regex: str, name: str, match=re.match) -> re.Match[str] | None:
    """Raises ValueError if it is not a regular expression."""
    try:
        return match(regex, name)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{regex!r} is not a regular expression: {error}") from None
