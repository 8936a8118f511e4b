"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlora.files import replace_file
from fastlora.model import from_pattern, lora_layers, put_layers, require_layers, unchanged_on_error
from fastlora.nn import LoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Settings of PEFT under which an adapter is more, or other, than lora_A and lora_B of plain linear layers.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
)


def save_adapter(model: nn.Module, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
    """Write the adapters of a model made by `add_lora` so that PEFT's ``PeftModel.from_pretrained`` loads them.

    Tensors keep their dtype bit for bit; trained biases are saved with them. Each file is written beside its place,
    synced and renamed: an interrupted save leaves the old file.

    Raises ValueError if the model has no adapters of `add_lora`, or some but not all use rank-stabilised scaling.
    """
    layers = dict(lora_layers(model))
    require_layers(layers, model)
    if len({layer.use_rslora for layer in layers.values()}) > 1:
        raise ValueError("PEFT's format has one use_rslora for all layers; this model has both")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    biases = {n: p for n, p in model.named_parameters() if p.requires_grad and n.rpartition(".")[2] == "bias"}
    tensors |= {_PREFIX + name: parameter for name, parameter in biases.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    only_adapted = all(name.endswith(".base_layer.bias") for name in biases)
    config = _config(model, layers, "none" if not biases else "lora_only" if only_adapted else "all")
    config["base_model_name_or_path"] = base_model_name_or_path or getattr(model, "name_or_path", None) or None
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder = Path(folder)
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    replace_file(folder / CONFIG, lambda path: path.write_text(text))


def load_adapter(model: nn.Module, folder: str | Path, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    """Load an adapter that `save_adapter` or PEFT wrote, into the layers that it names.

    A model without adapters gets them, as by `add_lora`; in one that has them they are overwritten, and must be for the
    same layers with the same ranks. ``adapter_dtype`` is that of new adapters (see `LoRALinear`).

    Returns the model. Raises ValueError, and leaves the model as it was, if a file is missing, corrupt, a pickle (only
    safetensors is read: a pickle can run code), of another PEFT method, or does not fit the model.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    adapters, biases = _parse(tensors)
    existing = dict(lora_layers(model))
    with unchanged_on_error(model):
        layers = existing or {
            name: _new_layer(model, name, a, b, config, adapter_dtype) for name, (a, b) in adapters.items()
        }
        _check_fit(model, layers, existing, adapters, biases)
    if not existing:
        put_layers(model, layers)
    with torch.no_grad():
        for name, (a, b) in adapters.items():
            layer = layers[name]
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
            layer.set_scaling(from_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]), _rslora(config))
        for name, value in biases.items():
            model.get_parameter(name).copy_(value).requires_grad_(True)
    return model


def _config(model: nn.Module, layers: dict[str, LoRALinear], bias: str) -> dict[str, Any]:
    ranks = Counter(layer.r for layer in layers.values())
    alphas = Counter(layer.lora_alpha for layer in layers.values())
    r, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "rank_pattern": {name: layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {name: layer.lora_alpha for name, layer in layers.items() if layer.lora_alpha != alpha},
        "target_modules": sorted(layers),
        "bias": bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _rslora(config: dict[str, Any]) -> bool:
    return bool(config.get("use_rslora"))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if folder.suffix in _PICKLES:
        raise ValueError(f"{folder.name} looks like a pickle, which can run code and is never loaded; give a folder")
    if not folder.is_dir():
        raise ValueError(f"an adapter is a folder with {CONFIG} and {WEIGHTS}; {folder} is not a folder")
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} has only {', '.join(pickles)}, a pickle, which can run code and is never loaded; "
                f"save the adapter again with PEFT, which writes {WEIGHTS}"
            )
        raise ValueError(f"{folder} has no {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / CONFIG} must describe a LORA adapter, got {kind!r}")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"{folder / CONFIG} must have a number {key!r}, got {config.get(key)!r}")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if used:
        raise ValueError(f"the adapter uses {', '.join(used)}: load it with PEFT and call fastlora.patch(model)")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is corrupt or not a safetensors file: {error}") from None


def _parse(tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Split an adapter file's tensors into (lora_A, lora_B) by layer name, and biases by parameter name."""
    stripped = {name.removeprefix(_PREFIX): t for name, t in tensors.items()}
    names = {name.removesuffix(".lora_A.weight") for name in stripped if name.endswith(".lora_A.weight")}
    adapters = {}
    for name in sorted(names):
        a, b = stripped.pop(f"{name}.lora_A.weight"), stripped.pop(f"{name}.lora_B.weight", None)
        if b is None:
            raise ValueError(f"the adapter has lora_A but no lora_B for {name}")
        adapters[name] = (a, b)
    if not adapters:
        raise ValueError("the adapter file has no lora_A weights")
    unknown = [name for name in stripped if name.rpartition(".")[2] != "bias" or ".lora_" in name]
    if unknown:
        raise ValueError(f"the adapter has tensors that are not LoRA weights or biases: {', '.join(unknown[:5])}")
    return adapters, stripped


def _new_layer(model: nn.Module, name: str, a: Tensor, b: Tensor, config: dict[str, Any], dtype) -> LoRALinear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the adapter is for {name!r}, which this model does not have") from None
    try:
        return LoRALinear.from_linear(
            module,
            r=a.shape[0],
            lora_alpha=from_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]),
            lora_dropout=config.get("lora_dropout") or 0.0,
            use_rslora=_rslora(config),
            adapter_dtype=dtype,
        )
    except TypeError as error:
        raise ValueError(f"the adapter does not fit {name!r}: {error}") from None


def _check_fit(model, layers, existing, adapters, biases) -> None:
    if existing and existing.keys() != adapters.keys():
        odd = sorted(existing.keys() ^ adapters.keys())
        raise ValueError(
            f"the adapter is for other layers than the model's adapters; they differ in {', '.join(odd[:5])}"
        )
    for name, (a, b) in adapters.items():
        layer = layers[name]
        if a.shape != layer.lora_A.shape or b.shape != layer.lora_B.shape:
            raise ValueError(
                f"the adapter for {name!r} has shapes {list(a.shape)}, {list(b.shape)}; "
                f"the layer needs {list(layer.lora_A.shape)}, {list(layer.lora_B.shape)}"
            )
    parameters = dict(model.named_parameters())
    for name, value in biases.items():
        # New layers are not in place yet, so their base_layer.bias is still the module's bias.
        parameter = parameters.get(name, parameters.get(name.replace(".base_layer.bias", ".bias")))
        if parameter is None or parameter.shape != value.shape:
            raise ValueError(f"the adapter has a bias {name!r} {list(value.shape)} that does not fit the model")
