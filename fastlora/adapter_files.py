"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from fastlora.adapter_config import AdapterConfig, describe
from fastlora.base_experts import is_turned_in_peft
from fastlora.files import is_still_at, replace_together
from fastlora.model import lora_layers, put_layers, require_layers, require_no_adapters, unchanged_on_error
from fastlora.nn import LoRALinear
from fastlora.nn_experts import LoRAExperts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"  # DoRA's, which PEFT saves without ".weight"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_READS = 100  # of a folder that is replaced while it is read


class _Weights(NamedTuple):
    """What a folder holds for one layer."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


class _Adapter(NamedTuple):
    """What a folder holds: weights by the name of their layer, and biases by the name of theirs."""

    config: AdapterConfig
    layers: dict[str, _Weights]
    biases: dict[str, Tensor]


def save_adapter(model: nn.Module, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
    """Write the adapters of a model made by `add_lora` so that PEFT's ``PeftModel.from_pretrained`` loads them.

    PEFT then adapts exactly these layers, with their ranks, alphas and dropout. Tensors keep their dtype bit for bit;
    trained biases are saved with them.

    Both files are replaced in one instant: whoever loads the folder, also after a save was killed or while several
    run, finds the config and the weights of one save. What a killed save leaves is cleared away by the next one; other
    files of the folder stay. (PEFT reads the config first and the weights a moment later: if a save ends between the
    two, it gets one of each. `load_adapter` sees that and reads again.)

    Raises ValueError, and writes nothing, if the model has no adapters of `add_lora`, or PEFT's format cannot say what
    they are: dropouts that differ, use_rslora or use_dora on some layers only, a scaling that is not that of lora_alpha
    and r. The dropout of a model with `LoRAExperts` is saved as zero, since PEFT has none with them.
    Raises OSError, and leaves the old files, if the new ones cannot be written.
    """
    layers = dict(lora_layers(model))
    require_layers(layers, model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if isinstance(layer, LoRAExperts):
            tensors |= _tensors_of_experts(name, layer)
            continue
        _require_whole(name, layer)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.lora_magnitude_vector is not None:
            tensors[f"{_PREFIX}{name}.{_MAGNITUDE}"] = layer.lora_magnitude_vector
    biases = {n: p for n, p in model.named_parameters() if p.requires_grad and n.rpartition(".")[2] == "bias"}
    tensors |= {_PREFIX + name: parameter for name, parameter in biases.items()}
    only_adapted = all(name.endswith(".base_layer.bias") for name in biases)
    config = describe(model, layers, "none" if not biases else "lora_only" if only_adapted else "all")
    base = base_model_name_or_path or getattr(model, "name_or_path", None) or None
    config["base_model_name_or_path"] = base if base is None else os.fspath(base)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # Copied, as safetensors refuses tensors that share memory.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    replace_together(
        Path(folder),
        {
            WEIGHTS: lambda path: save_file(copies, path, metadata={"format": "pt"}),
            CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        },
    )


def load_adapter(model: nn.Module, folder: str | Path, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    """Load an adapter that `save_adapter` or PEFT wrote, into the layers that it names.

    A model without adapters gets them, as by `add_lora`; in one that has them they are overwritten, with their scaling
    and dropout, and must be for the same layers with the same ranks. ``adapter_dtype`` is that of new adapters (see
    `LoRALinear`). Layers, ranks and scalings are those that PEFT reads from the config, and the weights must be those
    of exactly these layers. NaN and infinite weights are loaded as they are; alpha and dropout must be finite.

    Returns the model. Raises ValueError, and leaves the model as it was, if a file is missing, corrupt, a pickle (only
    safetensors is read: a pickle can run code), of another PEFT method, or does not fit the model. Raises OSError, and
    leaves the model as it was, if the system refuses to read a file.
    """
    if adapter_dtype is not None and not adapter_dtype.is_floating_point:
        raise ValueError(f"adapter_dtype must be a floating-point dtype, got {adapter_dtype}")
    adapter = _read(Path(folder))
    existing = dict(lora_layers(model))
    if not existing:
        require_no_adapters(model)
    experts = _take_experts(model, adapter, existing)
    linear = {name: layer for name, layer in existing.items() if isinstance(layer, LoRALinear)}
    _check_layers(model, adapter, linear)
    biases = _find_biases(model, adapter, existing)
    with unchanged_on_error(model), torch.no_grad():
        layers: dict[str, Any] = existing or {
            **{name: _new_layer(model, name, adapter.config, adapter_dtype) for name in adapter.layers},
            **{name: _new_experts(model, name, list(found), adapter, adapter_dtype) for name, found in experts.items()},
        }
        if not existing:
            put_layers(model, layers)
        for name, weights in experts.items():
            _load_experts(layers[name], weights, adapter.config)
        for name, (a, b, magnitude) in adapter.layers.items():
            layer = layers[name]
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
            if layer.lora_magnitude_vector is not None and magnitude is not None:
                layer.lora_magnitude_vector.copy_(magnitude)
            layer.set_scaling(adapter.config.alpha(name), adapter.config.use_rslora)
            layer.lora_dropout = adapter.config.lora_dropout
        for parameter, value in biases:
            parameter.copy_(value).requires_grad_(True)
    return model


def _tensors_of_experts(name: str, layer: LoRAExperts) -> dict[str, Tensor]:
    """In PEFT's layout: a [E · r, K] and b [N, r · E], or each in the place of the other (`is_turned_in_peft`). The
    last weight of the experts is under their own name and others each one ``base_layer`` further in."""
    tensors = {}
    for weight, path in _paths_of_experts(name, list(layer.lora_A)).items():
        a, b = layer.lora_A[weight], layer.lora_B[weight]
        if not name or a.is_meta or not a.numel():
            raise ValueError(
                f"the adapter of {name!r} has no values here (meta, sharded or empty), or is not in a model"
            )
        if is_turned_in_peft(layer.base_layer):
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a.flatten(0, 1)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    return tensors


def _paths_of_experts(name: str, weights: list[str]) -> dict[str, str]:
    """Where PEFT keeps the adapter of each of these weights, which are in the order of the module's parameters."""
    return {weight: name + ".base_layer" * (len(weights) - 1 - i) for i, weight in enumerate(weights)}


def _take_experts(model: nn.Module, adapter: _Adapter, existing: dict[str, Any]) -> dict[str, dict[str, _Weights]]:
    """Take the weights of experts out of the adapter's layers: by module and name of the weight, in fastlora's layout.

    Raises ValueError unless they are those that the config names, and fit the model.
    """
    found: dict[str, dict[str, _Weights]] = {}
    modules, r = dict(model.named_modules()), adapter.config.r
    named = adapter.config.adapted_parameters(model)
    there = {name: list(layer.lora_A) for name, layer in existing.items() if isinstance(layer, LoRAExperts)}
    if existing and {name: set(weights) for name, weights in named.items()} != {n: set(w) for n, w in there.items()}:
        raise ValueError("the adapter is for the weights of other experts than the model's adapters")
    for name, weights in named.items():
        experts: Any = existing[name].base_layer if name in existing else modules[name]
        for weight, path in _paths_of_experts(name, weights).items():
            saved = adapter.layers.pop(path, None)
            stack = getattr(experts, weight)
            if saved is None or saved.magnitude is not None or stack.dim() != 3:
                raise ValueError(f"the adapter has no weights for {name}.{weight}, or it is not a stack of weights")
            E, N, K = stack.transpose(1, 2).shape if getattr(experts, "is_transposed", False) else stack.shape
            if list(saved.a.shape) != [E * r, K] or list(saved.b.shape) != [N, r * E]:
                raise ValueError(
                    f"the adapter for {name}.{weight} has shapes {list(saved.a.shape)}, {list(saved.b.shape)}; "
                    f"{E} experts need {[E * r, K]}, {[N, r * E]}"
                )
            if name in existing and (existing[name].merged or existing[name].r != r):
                raise ValueError(f"the adapter for {name!r} has rank {r}, the model's {existing[name].r} or is merged")
            a, b = saved.a.view(E, r, K), saved.b.view(N, r, E).permute(2, 0, 1)
            if is_turned_in_peft(experts):
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            weights_of = _Weights(a, b, None)
            found.setdefault(name, {})[weight] = weights_of
    return found


def _load_experts(layer: LoRAExperts, weights: dict[str, _Weights], config: AdapterConfig) -> None:
    for weight, (a, b, _) in weights.items():
        layer.lora_A[weight].copy_(a)
        layer.lora_B[weight].copy_(b)
    layer.set_scaling(config.lora_alpha, config.use_rslora)
    layer.lora_dropout = config.lora_dropout


def _new_experts(
    model: nn.Module, name: str, weights: list[str], adapter: _Adapter, dtype: torch.dtype | None
) -> LoRAExperts:
    try:
        return LoRAExperts(model.get_submodule(name), weights, r=adapter.config.r, adapter_dtype=dtype)
    except TypeError as error:
        raise ValueError(f"the adapter does not fit {name!r}: {error}") from None


def _require_whole(name: str, layer: LoRALinear) -> None:
    a, b = layer.lora_A, layer.lora_B
    if not name:
        raise ValueError("PEFT's format names layers within a model; this model is a single layer")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.numel() or not b.numel() or a.is_meta:
        raise ValueError(
            f"the adapter of {name!r} has no values here (meta, sharded or empty): {list(a.shape)}, {list(b.shape)}"
        )


def _read(folder: Path) -> _Adapter:
    if folder.suffix in _PICKLES and not folder.is_dir():
        raise ValueError(f"{folder.name} looks like a pickle, which can run code and is never loaded; give a folder")
    if not os.path.isdir(folder):
        raise ValueError(f"an adapter is a folder with {CONFIG} and {WEIGHTS}; {folder} is not a folder")
    for name in (CONFIG, WEIGHTS):
        if not os.path.isfile(folder / name):
            raise ValueError(_missing(folder, name))
    for _ in range(_READS):
        with (folder / CONFIG).open("rb") as file:
            text, tensors = file.read(), _read_tensors(folder / WEIGHTS)
            if is_still_at(file.fileno(), folder / CONFIG):  # so the weights are of the same save
                return _Adapter(AdapterConfig.from_json(text), *_parse(tensors))
    raise ValueError(f"{folder} is being replaced faster than it can be read")


def _missing(folder: Path, name: str) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if name == CONFIG or not pickles:
        return f"{folder} has no {name}"
    return (
        f"{folder} has only {', '.join(pickles)}, a pickle, which can run code and is never loaded; "
        f"save the adapter again with PEFT, which writes {WEIGHTS}"
    )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load(file.read_bytes())  # opened once: it may be replaced at any moment
    except OSError:
        raise
    except Exception as error:  # safetensors raises what it likes for types that torch does not have
        raise ValueError(f"{file} is corrupt or not a safetensors file: {error}") from None


def _parse(tensors: dict[str, Tensor]) -> tuple[dict[str, _Weights], dict[str, Tensor]]:
    """Split an adapter file's tensors into weights by layer name, and biases by parameter name."""
    foreign = [name for name, t in tensors.items() if not name.startswith(_PREFIX) or not t.is_floating_point()]
    if foreign:
        name = foreign[0]
        raise ValueError(f"expected floating-point tensors {_PREFIX}*, got {name!r} of {tensors[name].dtype}")
    stripped = {name.removeprefix(_PREFIX): t for name, t in tensors.items()}
    names = {name.removesuffix(".lora_A.weight") for name in stripped if name.endswith(".lora_A.weight")}
    adapters = {}
    for name in sorted(names):
        a, b = stripped.pop(f"{name}.lora_A.weight"), stripped.pop(f"{name}.lora_B.weight", None)
        if b is None:
            raise ValueError(f"the adapter has lora_A but no lora_B for {name}")
        adapters[name] = _Weights(a, b, stripped.pop(f"{name}.{_MAGNITUDE}", None))
    if not adapters:
        raise ValueError("the adapter file has no lora_A weights")
    unknown = [name for name in stripped if name.rpartition(".")[2] != "bias" or ".lora_" in name]
    if unknown:
        raise ValueError(f"the adapter has tensors that are not LoRA weights or biases: {', '.join(unknown[:5])}")
    return adapters, stripped


def _check_layers(model: nn.Module, adapter: _Adapter, existing: dict[str, LoRALinear]) -> None:
    """Raise ValueError unless the config and the weights are for the same layers, which the model has, and fit them."""
    modules = dict(model.named_modules())
    odd = sorted(adapter.layers.keys() - modules.keys())
    if odd:
        raise ValueError(f"the adapter is for {odd[0]!r}, which this model does not have")
    if existing and (odd := sorted(existing.keys() ^ adapter.layers.keys())):
        raise ValueError(
            f"the adapter is for other layers than the model's adapters; they differ in {', '.join(odd[:5])}"
        )
    if odd := sorted(adapter.config.adapted(model) ^ adapter.layers.keys()):
        raise ValueError(
            f"the adapter's config and weights are for different layers; they differ in {', '.join(odd[:5])}"
        )
    for name, (a, b, magnitude) in adapter.layers.items():
        module = modules[name]
        r, K, N = adapter.config.rank(name), *(getattr(module, at, None) for at in ("in_features", "out_features"))
        if list(a.shape) != [r, K] or list(b.shape) != [N, r]:
            raise ValueError(
                f"the adapter for {name!r} has shapes {list(a.shape)}, {list(b.shape)}; "
                f"the layer needs {[r, K]}, {[N, r]}"
            )
        if adapter.config.use_dora != (magnitude is not None):
            has = "no magnitude" if magnitude is None else "a magnitude"
            raise ValueError(f"the adapter's config says use_dora={adapter.config.use_dora}; {name!r} has {has}")
        if magnitude is not None and list(magnitude.shape) != [N]:
            raise ValueError(f"the magnitude for {name!r} is {list(magnitude.shape)}; the layer needs {[N]}")
        if name in existing:
            _check_existing(name, existing[name], r, adapter.config.use_dora)
        elif any(p.is_meta for p in module.parameters()):
            raise ValueError(f"{name!r} is on the meta device, where an adapter has no values")


def _check_existing(name: str, layer: LoRALinear, r: int, use_dora: bool) -> None:
    if layer.merged:
        raise ValueError(f"the adapter of {name!r} is merged: call fastlora.unmerge(model) first")
    if layer.r != r:
        raise ValueError(f"the adapter for {name!r} has rank {r}; the model's has rank {layer.r}")
    if layer.use_dora != use_dora:
        raise ValueError(f"the adapter for {name!r} has use_dora={use_dora}; the model's has use_dora={layer.use_dora}")
    if layer.lora_A.is_meta or layer.lora_B.is_meta:
        raise ValueError(f"{name!r} is on the meta device, where an adapter has no values")


def _find_biases(
    model: nn.Module, adapter: _Adapter, existing: dict[str, LoRALinear]
) -> list[tuple[nn.Parameter, Tensor]]:
    """The model's parameters that the adapter's biases are for."""
    parameters, found = dict(model.named_parameters()), []
    for name, value in adapter.biases.items():
        owner = name.removesuffix(".bias")
        layer = owner.removesuffix(".base_layer")
        # New layers are not in place yet, so their base_layer.bias is still the module's bias.
        place = f"{layer}.bias" if layer in adapter.layers and layer != owner and not existing else name
        parameter = None if owner in adapter.layers else parameters.get(place)
        if (
            parameter is None
            or parameter.shape != value.shape
            or not parameter.is_floating_point()
            or parameter.is_meta
        ):
            raise ValueError(f"the adapter has a bias {name!r} {list(value.shape)} that does not fit the model")
        found.append((parameter, value))
    return found


def _new_layer(model: nn.Module, name: str, config: AdapterConfig, dtype: torch.dtype | None) -> LoRALinear:
    try:
        return LoRALinear.from_linear(
            model.get_submodule(name),
            r=config.rank(name),
            lora_alpha=config.alpha(name),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            adapter_dtype=dtype,
            use_dora=config.use_dora,
        )
    except TypeError as error:
        raise ValueError(f"the adapter does not fit {name!r}: {error}") from None
