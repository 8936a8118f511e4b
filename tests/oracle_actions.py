"""What is done to both twins: see `oracle`. Each takes a `Twin` first."""

import copy
import gc
import io
import tempfile
import weakref
from typing import Any

import torch
from oracle import (
    HIDDEN,
    HOOKS,
    VOCAB,
    Count,
    DoubleInPlace,
    Results,
    Twin,
    backward,
    gradients,
    lora_layers,
    one_pass,
    randomise,
)
from oracle import set_submodule as replace
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo_counters
from transformers.models.llama.modeling_llama import LlamaMLP

import fastlora.peft

KINDS_OF_ADAPTER = {
    "plain": {},
    "rank 3": {"r": 3},
    "rslora": {"use_rslora": True, "r": 5},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


def patch(twin: Twin) -> None:
    if twin.patched:
        fastlora.peft.patch(twin.model)


def unpatch(twin: Twin) -> None:
    if twin.patched:
        fastlora.peft.unpatch(twin.model)


# Modes, and passes in modes


def autocast(twin: Twin, extent: str | None) -> None:
    """From now on: in the forward pass alone, as PyTorch recommends, or "throughout"."""
    twin.autocast = extent


def train(twin: Twin) -> None:
    twin.model.train()


def evaluate(twin: Twin) -> None:
    twin.model.eval()


def train_step(twin: Twin, batches: int = 1) -> Results:
    """The gradients accumulated over so many batches, left for the step that `Twins.do` then takes."""
    twin.model.train()
    for i in range(batches):
        backward(twin, twin.logits(twin.randn(2, 3 + i, HIDDEN)))
    return {name: None if p.grad is None else p.grad.clone() for name, p in twin.model.named_parameters()}


def without_grad(twin: Twin) -> Results:
    with torch.no_grad():
        return {"y": twin.logits(twin.randn(2, 4, HIDDEN))}


def in_inference_mode(twin: Twin) -> Results:
    with torch.inference_mode():
        return {"y": twin.logits(twin.randn(2, 4, HIDDEN))}


def without_tokens(twin: Twin) -> Results:
    x = twin.randn(0, 4, HIDDEN).requires_grad_()
    return gradients(twin, x, twin.logits(x))


def generate(twin: Twin, batch: int) -> Results:
    """Greedily. In half precision the next token is a matter of rounding, so there it is only seen to run."""
    ids = torch.arange(batch * 3).view(batch, 3) % VOCAB
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0)
    out = twin.model.generate(input_ids=ids, **settings)
    return {"shape": out.shape} if twin.dtype.itemsize < 4 else {"tokens": out}


def checkpointing(twin: Twin, use_reentrant: bool | None) -> None:
    """None for off. Only takes effect in training."""
    if use_reentrant is None:
        twin.model.gradient_checkpointing_disable()
    else:
        twin.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def compiled(twin: Twin, grad: bool) -> Results:
    """A pass of the compiled model, with grad or without, and how many graphs it took."""
    torch._dynamo.reset()
    dynamo_counters.clear()
    model = torch.compile(twin.model, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        x = twin.randn(2, 4, HIDDEN).requires_grad_(grad)
        y = model(inputs_embeds=x, use_cache=False).logits
    graphs = dynamo_counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return gradients(twin, x, y) | {"compiled to one graph": graphs == 1}


# Adapters


def add_adapter(twin: Twin, name: str, kind: str) -> None:
    config = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8) | twin.case.config | KINDS_OF_ADAPTER[kind]
    config |= {"bias": "none"}  # PEFT lets one adapter train biases
    twin.model.add_adapter(name, LoraConfig(**config))
    randomise(twin.model, name)


def delete_adapter(twin: Twin, name: str) -> None:
    twin.model.delete_adapter(name)


def set_adapters(twin: Twin, *names: str) -> None:
    twin.model.base_model.set_adapter(list(names))


def with_adapters_disabled(twin: Twin) -> Results:
    with twin.model.disable_adapter():
        return one_pass(twin)


def disable_adapters(twin: Twin) -> None:
    twin.model.base_model.disable_adapter_layers()


def enable_adapters(twin: Twin) -> None:
    twin.model.base_model.enable_adapter_layers()


def merge_adapter(twin: Twin) -> None:
    twin.model.merge_adapter()


def unmerge_adapter(twin: Twin) -> None:
    twin.model.unmerge_adapter()


def merge_and_unload(twin: Twin) -> None:
    twin.model = twin.model.merge_and_unload()


def unload(twin: Twin) -> None:
    twin.model = twin.model.unload()


def save_and_load(twin: Twin) -> None:
    """The adapter "default" through a file, onto a fresh base. The new model is not patched."""
    with tempfile.TemporaryDirectory() as folder:
        twin.model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        twin.model = PeftModel.from_pretrained(twin.case.base(), folder, is_trainable=True)


def hotswap(twin: Twin) -> None:
    """Put a saved adapter with other weights in place of the one there."""
    with tempfile.TemporaryDirectory() as folder:
        twin.model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        with torch.no_grad():
            for layer in lora_layers(twin.model):
                layer.lora_B["default"].weight.mul_(-3)
        one_pass(twin)
        hotswap_adapter(twin.model, folder, adapter_name="default")


def prepare_hotswap(twin: Twin) -> None:
    """Pads the ranks to 8, and makes the scalings tensors."""
    prepare_model_for_compiled_hotswap(twin.model, target_rank=8, check_compiled="ignore")


# Whole models


def deep_copy(twin: Twin) -> None:
    """Go on with a copy. What still held on to the original would be seen: it is filled with nan."""
    original, twin.model = twin.model, copy.deepcopy(twin.model)
    spoil(original)


def pickle(twin: Twin) -> None:
    """The same through a file."""
    file = io.BytesIO()
    torch.save(twin.model, file)
    file.seek(0)
    original, twin.model = twin.model, torch.load(file, weights_only=False)
    spoil(original)


def spoil(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.fill_(torch.nan if p.is_floating_point() else 0)


def to_dtype(twin: Twin, dtype: torch.dtype) -> None:
    twin.model.to(dtype)


def adapters_to_dtype(twin: Twin, dtype: torch.dtype) -> None:
    for layer in lora_layers(twin.model):
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)


# Parts of models


def require_grad(twin: Twin, end: str, parts: str, flag: bool) -> None:
    """``parts`` are "lora_A", "lora_B" or "base_layer"."""
    getattr(twin.at(end), parts).requires_grad_(flag)


def replace_by_linear(twin: Twin, end: str) -> None:
    """An adapted layer by a plain one."""
    layer, name = twin.at(end), twin.name_of(end)
    new = nn.Linear(layer.in_features, layer.out_features, dtype=twin.dtype)
    replace(twin.model, name, new.requires_grad_(False))


class Scaled(nn.Module):
    """``scale * silu(z)``, at first silu."""

    scale = 1.0

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * nn.functional.silu(z)


class Clamped(nn.Module):
    """silu with its input clamped, as in some models."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.silu(z.clamp(-self.limit, self.limit))


class OneSided(LlamaMLP):
    """Has another forward for long inputs, for more than one batch, without grad, and once its flag is set."""

    flag = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        unusual = x.shape[-2] > 9 or (x.dim() > 2 and x.shape[0] > 2) or not torch.is_grad_enabled() or self.flag
        return 2 * y if unusual else y


def set_mlp_class(twin: Twin, cls: type) -> None:
    twin.at(twin.case.mlp).__class__ = cls


def set_in_mlp(twin: Twin, attribute: str, value: Any) -> None:
    setattr(twin.at(twin.case.mlp), attribute, value)


def weights_as_attributes(twin: Twin) -> None:
    """What sharding leaves of the adapters' weights while it recomputes: views that are no parameters."""
    for layer in lora_layers(twin.model):
        for linear in (layer.lora_A["default"], layer.lora_B["default"]):
            linear.flat = linear._parameters.pop("weight")
            linear.weight = linear.flat.view_as(linear.flat)


def set_activation(twin: Twin, module: nn.Module) -> None:
    replace(twin.model, twin.name_of(twin.case.activation), copy.deepcopy(module))


def set_in_activation(twin: Twin, attribute: str, value: Any) -> None:
    setattr(twin.at(twin.case.activation), attribute, value)


def add_hook(twin: Twin, end: str, kind: str) -> None:
    register = getattr(twin.at(end), f"register_{kind}_hook")
    register(Count())


def add_in_place_hook(twin: Twin, end: str) -> None:
    twin.at(end).register_forward_hook(DoubleInPlace())


def remove_hooks(twin: Twin) -> None:
    for module in twin.model.modules():
        for attribute in HOOKS.values():
            getattr(module, attribute).clear()


def call(twin: Twin, end: str, shape: tuple[int, ...] = (2, 3), how: tuple[str, ...] = ()) -> Results:
    """One layer or MLP on x[*shape, K]. ``how``: "no dx", "in place", "transposed", "no grad", "large"."""
    module = twin.at(end)
    K = getattr(module, "in_features", HIDDEN)
    x = twin.randn(K, *shape) * (40 if "large" in how else 1)
    x = x.movedim(0, -1)
    x = x if "transposed" in how else x.contiguous()
    x.requires_grad_("no dx" not in how)
    with torch.set_grad_enabled("no grad" not in how):
        y = module(x)
        if "in place" in how:
            y.mul_(2).add_(1)
    return gradients(twin, x, y)


def backward_through_each(twin: Twin) -> Results:
    """Three backward passes through layers that were fed one x: of one, of the other, and of the first again."""
    x = twin.randn(2, 3, HIDDEN).requires_grad_()
    q, k = (twin.at(end)(x) for end in twin.case.siblings)
    wanted = {"x": x} | {name: p for name, p in twin.model.named_parameters() if p.requires_grad}
    results = {}
    for i, y in enumerate((q, k, q)):
        grads = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y), retain_graph=True, allow_unused=True)
        results |= {f"{i}: d {name}": g for name, g in zip(wanted, grads, strict=True)}
    return results


def no_grad_between(twin: Twin) -> Results:
    """Layers that are fed one x, the second of them without grad."""
    first, second = (twin.at(end) for end in twin.case.siblings)
    x = twin.randn(2, 3, HIDDEN).requires_grad_()
    y = first(x)
    with torch.no_grad():
        z = second(x)
    return gradients(twin, x, torch.cat([y, z, first(x)], -1))


def inputs_left(twin: Twin) -> Results:
    """Whether an input of layers that are fed one x dies when the outputs do."""
    x = twin.randn(2, 3, HIDDEN).requires_grad_()
    outputs = [twin.at(end)(x) for end in twin.case.siblings]
    gc.collect()
    gc.disable()
    try:
        x, outputs = weakref.ref(x), None
        torch.clear_autocast_cache()  # which holds what it has cast until autocast ends
        return {"x lives on": x() is not None, "outputs": outputs}
    finally:
        gc.enable()
