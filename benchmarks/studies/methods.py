"""Ways to fine-tune with few parameters, trained on the same text for the same steps: time, memory and loss.

LoRA, rsLoRA and DoRA on every linear layer, by PEFT and by PEFT + fastlora; parallel adapters there, by PyTorch and by
fastlora's ParallelAdapter; bottleneck adapters behind the attention and the MLP, prefix and prompt tuning, IA3, and
norms alone (BitFit trains biases, of which a Llama has none). As many parameters as LoRA's where a method can have
them. The loss is that of text that follows the text of training."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastlora import ParallelAdapter
from fastlora.benchmarks import training
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, megabytes, pick
from fastlora.benchmarks.tables import NAMES

R = 4
STEPS = 12
LONGEST_PROMPT = 64  # tokens: as many parameters as LoRA's would be thousands of tokens
RATES = {
    "LoRA": 1e-3,
    "rsLoRA": 1e-3,
    "DoRA": 1e-3,
    "parallel": 1e-3,
    "adapters": 1e-3,
}  # of AdamW; what starts at random is slower
RATE = 1e-2  # of the others, which start at random
TORCH = "PEFT or PyTorch"  # the provider of what is not PEFT's LoRA


class Bottleneck(nn.Module):
    """A layer and behind it ``y + up(relu(down(y)))``: the adapter of Houlsby et al., arXiv:1902.00751."""

    def __init__(self, layer: nn.Linear, width: int) -> None:
        super().__init__()
        self.layer = layer
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.down, self.up = nn.Linear(layer.out_features, width, **like), nn.Linear(width, layer.out_features, **like)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.up(torch.relu(self.down(y)))


def measure(setup: Setup) -> list[Row]:
    *texts, last = setup.data
    halves = [half for ids in texts for half in ids.split(-(-ids.shape[1] // 2), dim=1)]
    steps = 4 if setup.quick else STEPS
    setup = replace(setup, data=[halves[i % len(halves)] for i in range(steps)])
    lora = setup.trainers(R, lr=RATES["LoRA"])
    parameters = sum(p.numel() for p in lora["peft"].model.parameters() if p.requires_grad)
    made = {
        "LoRA": lora,
        "rsLoRA": setup.trainers(R, lr=RATES["rsLoRA"], use_rslora=True),
        "DoRA": setup.trainers(rank_of_dora(setup.model, parameters), lr=RATES["DoRA"], use_dora=True),
        "parallel": {name: other(setup, "parallel", parallel(name), parameters, name) for name in (TORCH, "fastlora")},
        **{name: {TORCH: other(setup, name, make, parameters)} for name, make in OTHERS.items()},
    }
    frozen = lora["frozen"]
    setup.train([frozen, *common.without_frozen(made)])
    rows = [{"method": "none", "provider": "frozen", "loss": loss(frozen, last), **common.measured(frozen, frozen)}]
    for method, trainers in made.items():
        for name in ("peft", TORCH, "fastlora"):
            if name in trainers:
                found = {"loss": loss(trainers[name], last), **common.measured(trainers[name], frozen)}
                rows.append({"method": method, "provider": name, **found})
    return rows


def rank_of_dora(model: Any, parameters: int) -> int:
    """The rank at which DoRA, with a magnitude for every output, has about so many parameters."""
    layers = [m for name, m in model.named_modules() if name.split(".")[-1] in common.MODULES]
    magnitudes = sum(layer.out_features for layer in layers)
    return max(1, round((parameters - magnitudes) / common.expected_parameters(model, common.MODULES, 1)))


def bottlenecks(model: Any, parameters: int) -> nn.Module:
    places = [name for name, _ in model.named_modules() if name.endswith((".o_proj", ".down_proj"))]
    each = sum(2 * model.get_submodule(name).out_features for name in places)
    for name in places:
        model.set_submodule(name, Bottleneck(model.get_submodule(name), max(1, round(parameters / each))))
    for name, p in model.named_parameters():
        p.requires_grad_(name.rpartition(".")[0].endswith((".up", ".down")))
    return model


class Parallel(nn.Module):
    """``layer(x) + up(relu(down(x)))``, as `fastlora.ParallelAdapter` has it: with its parameters, unfused."""

    def __init__(self, adapter: ParallelAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        h = torch.relu(F.linear(x.to(adapter.adapter_down.dtype), adapter.adapter_down))
        y = adapter.base_layer(x)
        return y + (adapter.scaling * F.linear(h, adapter.adapter_up)).to(y.dtype)


def parallel(provider: str) -> Callable[[Any, int], nn.Module]:
    def make(model: Any, parameters: int) -> nn.Module:
        for name in [name for name, _ in model.named_modules() if name.split(".")[-1] in common.MODULES]:
            adapter = ParallelAdapter(model.get_submodule(name), R, scaling=2.0)  # as LoRA here
            model.set_submodule(name, adapter if provider == "fastlora" else Parallel(adapter))
        return model

    return make


def prefix(model: Any, parameters: int) -> nn.Module:
    import peft

    heads = model.config.num_key_value_heads * model.config.head_dim
    tokens = max(1, round(parameters / (2 * model.config.num_hidden_layers * heads)))
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))


def prompt(model: Any, parameters: int) -> nn.Module:
    import peft

    tokens = min(LONGEST_PROMPT, max(1, round(parameters / model.config.hidden_size)))
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))


def ia3(model: Any, parameters: int) -> nn.Module:
    import peft

    modules = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=modules[2:])
    return peft.get_peft_model(model, config)


def norms(model: Any, parameters: int) -> nn.Module:
    for name, module in model.named_modules():
        if "norm" in name:  # of its own: all models share what is frozen
            module.weight = nn.Parameter(module.weight.detach().clone())
    return model


OTHERS: dict[str, Callable[[Any, int], nn.Module]] = {
    "adapters": bottlenecks,
    "prefix": prefix,
    "prompt": prompt,
    "IA3": ia3,
    "norms": norms,
}


def other(setup: Setup, name: str, make: Callable, parameters: int, provider: str = TORCH) -> training.Trainer:
    """A method that is not PEFT's LoRA."""
    torch.manual_seed(setup.seed)
    model = make(training.copy_sharing_frozen(setup.model), parameters).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return training.Trainer(provider, model, training.adamw(trained, RATES.get(name, RATE)), setup.device)


def loss(trainer: training.Trainer, ids: Tensor) -> float:
    """Of text that it was not trained on."""
    with torch.no_grad():
        return trainer.forward(ids.to(trainer.device)).item()


def finding(rows: list[Row]) -> str:
    (none,), adapted = pick(rows, method="none"), rows[1:]
    best = min(adapted, key=lambda row: row["loss"])
    peft, ours = (pick(rows, method="DoRA", provider=name)[0] for name in ("peft", "fastlora"))
    lora = pick(rows, method="LoRA", provider="fastlora")[0]
    return (
        f"The loss of the text that follows is {none['loss']:.2f} before training and lowest, {best['loss']:.2f}, with "
        f"{best['method']}. DoRA's step takes {peft['over_frozen']:.2f} times the frozen model's with PEFT, "
        f"{ours['over_frozen']:.2f} with fastlora, and keeps {megabytes(peft['saved_bytes'])} and "
        f"{megabytes(ours['saved_bytes'])} for backward; LoRA's takes {lora['over_frozen']:.2f} with fastlora."
    )


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(10.5, 4.6)
    (none,), adapted = pick(rows, method="none"), rows[1:]
    methods = list(dict.fromkeys(row["method"] for row in adapted))
    peft, ours = (pick(rows, method="DoRA", provider=name)[0]["over_frozen"] for name in ("peft", "fastlora"))
    figure.suptitle(f"DoRA: {peft:.2f} times the frozen model's step with PEFT, {ours:.2f} times with fastlora")
    for axes, key, scale, label in zip(
        figure.subplots(1, 3),
        ("over_frozen", "saved_bytes", "loss"),
        (1, 1e-6, 1),
        ("time of a step / the frozen model's", "saved for backward, MB", "loss of the text that follows"),
        strict=True,
    ):
        for offset, name, colour in ((-0.2, "peft", "peft"), (0.2, "fastlora", "fastlora"), (0, TORCH, "peft")):
            found = pick(adapted, provider=name)
            places = [methods.index(row["method"]) + offset for row in found]
            lengths = [row[key] * scale for row in found]
            bars = axes.barh(places, lengths, 0.38, color=COLOURS[colour], label=NAMES.get(name))
            axes.bar_label(bars, fmt="%.0f" if key == "saved_bytes" else "%.2f", fontsize=7, padding=2)
        axes.axvline(none[key] * scale, color="black", linestyle="--", label="frozen model")
        axes.set_yticks(range(len(methods)), methods if axes is figure.axes[0] else [])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "loss":
            values = [row["loss"] for row in rows]
            axes.set_xlim(min(values) - 0.1, max(values) + 0.1)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


STUDY = Study(
    name="methods",
    title="Ways to fine-tune",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "method": "method",
        "provider": "provider",
        "trainable_parameters": "parameters",
        "saved_bytes": "saved, MB",
        "peak_bytes": "peak, MB",
        "step_p50_seconds": "s a step",
        "over_frozen": "over frozen",
        "loss": "loss",
    },
)

if __name__ == "__main__":
    sys.exit(common.main("methods"))
