"""What is fused, by feature and base layer: a table in README.md, each of whose cells a test has seen.

A feature is used on a tiny model by plain PEFT and by the patched model; the cell is what the calls of the patched one
were counted as. ``python tests/supported.py`` writes the table anew, for which DeepSpeed has to be importable (see
``make test-deepspeed``); `test_supported` and `test_sharding` compare.
"""

import copy
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import oracle
import peft
import torch
from accuracy import check_model, linear_4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import Tensor, nn

import fastlora

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- supported -->", "<!-- /supported -->"
FUSED, BY_LAYER, ADDED, PEFT, NONE = "fused", "layers fused", "added", "PEFT", "–"
PRODUCTS = ("lora_matmul", "lora_matmul_4bit")  # of which a layer in a graph has one
OF_EXPERTS = ("gate_up_proj", "down_proj")  # the weights that are adapted
NAMES = ["default", "other"]  # of the adapters of two texts

Results = dict[str, Tensor]


def with_layers(new: Callable[[nn.Linear], nn.Module], loaded_in: str) -> nn.Module:
    """A Llama with other layers in its blocks, as transformers loads it."""
    model = oracle.llama()
    for name, layer in list(model.model.named_modules()):
        if type(layer) is nn.Linear:
            oracle.set_submodule(model.model, name, new(layer))
    setattr(model, loaded_in, True)
    return model


def in_8_bits(layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def in_4_bits(quant_type: str) -> Callable[[], nn.Module]:
    return lambda: with_layers(lambda layer: linear_4bit(layer.weight.detach(), None, quant_type), "is_loaded_in_4bit")


def experts_in_4_bits(quant_type: str) -> nn.Module:
    model = oracle.qwen3_moe()
    for name in OF_EXPERTS:
        replace_parameter_4bit(model.model.layers[0].mlp.experts, name, quant_type=quant_type)
    return model


COLUMNS: dict[str, Callable[[], nn.Module]] = {
    "fp32": oracle.llama,
    "bf16": lambda: oracle.llama(torch.bfloat16),
    "fp16": lambda: oracle.llama(torch.float16),
    "`Conv1D`": oracle.gpt2,
    "NF4": in_4_bits("nf4"),
    "FP4": in_4_bits("fp4"),
    "8 bits": lambda: with_layers(in_8_bits, "is_loaded_in_8bit"),
}


def input_of(model: Any) -> Tensor:
    return oracle.Twin(oracle.CASES["llama"], model).randn(2, 4, oracle.HIDDEN)


def training_step(model: Any, logits: Callable[[Tensor], Tensor] | None = None, autocast: bool = False) -> Results:
    """The logits, and the gradients of the input and of every parameter that has one."""
    twin = oracle.Twin(oracle.CASES["llama"], model)
    x = input_of(model).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = oracle.gradients(twin, x, (logits or twin.logits)(x))
    return {name: t for name, t in results.items() if isinstance(t, Tensor)}


def inference(model: Any, **kwargs: Any) -> Results:
    with torch.no_grad():
        return {"y": model(inputs_embeds=input_of(model), use_cache=False, **kwargs).logits}


def generated(model: Any) -> Results:
    x = input_of(model)
    options = dict(do_sample=False, max_new_tokens=3, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    found = model.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), **options)
    return {"logits of the first token": found.logits[0].to(x.dtype)}


def by_torch_func(model: Any) -> Results:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    arguments = dict(inputs_embeds=input_of(model), use_cache=False)

    def loss(trained: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(model, trained, (), arguments).logits
        return (y * torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape)).sum()

    return torch.func.grad(loss)(trained)


def compiled(model: Any) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    return lambda x: graph(inputs_embeds=x, use_cache=False).logits


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).logits


def exported(model: Any) -> Callable[[Tensor], Tensor]:
    return torch.export.export(Logits(model), (input_of(model),)).module()


def checkpointing(reentrant: bool) -> Callable[[Any], None]:
    return lambda model: model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})


def add_another(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    oracle.randomise(model, "other")


def activate_both(model: Any) -> None:
    add_another(model)
    model.base_model.set_adapter(NAMES)


def with_adapters_of_rows(model: Any) -> Results:
    with fastlora.adapters_of_rows(model, NAMES):
        return training_step(model)


def train_base_weights(model: Any) -> None:
    for layer in oracle.lora_layers(model):
        layer.base_layer.weight.requires_grad_()


def hook_parts(model: Any) -> None:
    for layer in oracle.lora_layers(model):
        layer.lora_A["default"].register_forward_hook(lambda *_: None)


def disabled(model: Any) -> Results:
    with model.disable_adapter():
        return inference(model)


def merged(model: Any) -> Results:
    model.merge_adapter()
    return inference(model)


@dataclass
class Feature:
    """``config`` is that of the adapter. ``prepare`` changes the model before it is patched, ``then`` replaces it
    afterwards, ``use`` runs it. ``graph`` is made of the model, and used by a training step or in inference; its calls
    are not counted, so that its ops are. In columns where it is not ``compared`` it draws other numbers than PEFT, or
    PEFT's are not to be trusted; ``in_peft`` is false of what only fastlora has."""

    use: Callable[[Any], Results] = training_step
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Any] = lambda model: None
    then: Callable[[Any], Any] = lambda model: model
    graph: Callable[[Any], Callable[[Tensor], Tensor]] | None = None
    models: dict[str, Callable[[], nn.Module]] = field(default_factory=lambda: COLUMNS)
    in_peft: bool = True
    compared: tuple[str, ...] = tuple(each for each in COLUMNS if each != "8 bits")  # of which there is no fp64 twin


ROWS: dict[str, Feature] = {
    "training": Feature(),
    "LoRA dropout": Feature(config={"lora_dropout": 0.5}, prepare=lambda model: model.train(), compared=()),
    "`lora_bias`": Feature(config={"lora_bias": True}),
    "rsLoRA": Feature(config={"use_rslora": True}),
    "DoRA": Feature(config={"use_dora": True}),
    "experts (`target_parameters`)": Feature(
        config=oracle.OF_EXPERTS | {"target_parameters": [f"model.layers.0.mlp.experts.{name}" for name in OF_EXPERTS]},
        models={
            "fp32": oracle.qwen3_moe,
            "bf16": lambda: oracle.qwen3_moe(torch.bfloat16),
            "fp16": lambda: oracle.qwen3_moe(torch.float16),
            "NF4": lambda: experts_in_4_bits("nf4"),
            "FP4": lambda: experts_in_4_bits("fp4"),
        },
        compared=("fp32", "bf16", "fp16"),  # of two 4-bit weights PEFT loses the adapters of one
    ),
    "base weights that train": Feature(prepare=train_base_weights),
    "two active adapters": Feature(prepare=activate_both),
    "`adapter_names`": Feature(lambda model: inference(model, adapter_names=NAMES), prepare=add_another),
    "`adapters_of_rows`": Feature(with_adapters_of_rows, prepare=activate_both, in_peft=False),
    "autocast": Feature(lambda model: training_step(model, autocast=True)),
    "checkpointing": Feature(prepare=checkpointing(reentrant=False)),
    "reentrant checkpointing": Feature(prepare=checkpointing(reentrant=True)),
    "`torch.compile`, one graph": Feature(graph=compiled),
    "`torch.export`": Feature(inference, graph=exported),
    "`torch.func.grad`": Feature(by_torch_func, prepare=lambda model: model.train()),
    "generation": Feature(generated),
    "deepcopy, pickle": Feature(then=lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model)))),
    "hooks on parts of a layer": Feature(prepare=hook_parts),
    "adapters disabled": Feature(disabled),
    "adapters merged": Feature(merged),
}


def adapted(feature: Feature, column: str) -> Any:
    """A model of this column in PEFT, in eval mode."""
    torch.manual_seed(0)
    config = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear") | feature.config
    config = peft.LoraConfig(**config, fan_in_fan_out=column == "`Conv1D`")
    return oracle.randomise(peft.get_peft_model(feature.models[column](), config), "default").eval()


def used(feature: Feature, model: Any, logits: Callable[[Tensor], Tensor] | None = None) -> Results:
    if logits is None:
        return feature.use(model)
    if feature.use is training_step:
        return training_step(model, logits)
    with torch.no_grad():
        return {"y": logits(input_of(model))}


def cell_of(row: str, column: str) -> str:
    """Use the feature, compare what it gives with plain PEFT's, and return what the patched model's calls ran."""
    feature = ROWS[row]
    if column not in feature.models:
        return NONE
    try:
        plain = adapted(feature, column)
        feature.prepare(plain)
        ours, truth = copy.deepcopy(plain), oracle.in_fp64(plain)
        graph = None if feature.graph is None else feature.graph(plain)
        theirs = used(feature, plain, graph) if feature.in_peft else None
    except (RuntimeError, AttributeError):  # PEFT does not do this, nor what it is made of
        return NONE
    fastlora.patch(ours)
    ours = feature.then(ours)
    graph = None if feature.graph is None else feature.graph(ours)
    results = used(feature, ours, graph)
    report = fastlora.report(ours)
    ran = what_ran(report.layers.values(), report.mlps.values()) if graph is None else in_graph(ours, graph)
    if theirs is None or column not in feature.compared:
        assert all(t.isfinite().all() for t in results.values())
    elif ran == PEFT:
        assert all(map(torch.equal, results.values(), theirs.values()))
    else:
        check_model(results, theirs, used(feature, truth), oracle.LONGEST, torch.bfloat16)
    return ran


def what_ran(layers: Iterable[Any], mlps: Iterable[Any]) -> str:
    """The cell of these `fastlora.calls.Calls`."""
    layers, mlps = list(layers), list(mlps)
    if any(each.own for each in layers):
        assert not any(each.fused or each.added for each in layers), layers
        return PEFT
    if any(each.added for each in layers):
        assert all(each.added and not each.fused for each in layers), layers
        return ADDED
    assert layers and all(each.fused for each in layers), layers
    return FUSED if mlps and all(each.fused and not each.own for each in mlps) else BY_LAYER


def in_graph(model: Any, graph: Callable[[Tensor], Tensor]) -> str:
    """The cell of a forward pass whose calls are not counted, by its ops."""
    x, layers = input_of(model), len(oracle.lora_layers(model))
    with torch.no_grad():
        for _ in range(2):  # which may compile, and so run the ops: 8 bits at the second call too
            graph(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            graph(x)
    ran = {event.key.removeprefix("fastlora::"): event.count for event in profile.key_averages()}
    if (products := sum(ran.get(name, 0) for name in PRODUCTS)) == 0:
        return ADDED if ran.get("shrink") == layers else PEFT
    assert products == layers, f"{products} of {layers} layers ran fused in a graph"
    return FUSED if ran.get("swiglu") else BY_LAYER


def read(text: str) -> dict[tuple[str, str], str]:
    """The cells of the table in README.md, by row and column."""
    lines = text.partition(START)[2].partition(END)[0].strip().splitlines()
    (_, *columns), _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    return {(row, column): cell for row, *cells in rows for column, cell in zip(columns, cells, strict=True)}


def table(cells: dict[tuple[str, str], str]) -> str:
    """As Markdown."""
    rows = [[row, *(cells.get((row, column), "") for column in COLUMNS)] for row in dict.fromkeys(r for r, _ in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [["", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *rows])


def main() -> None:
    from test_sharding import CELLS, cell, trained  # which compares its cells with the table

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cells = {}
    for row in ROWS:
        print(row, file=sys.stderr)
        cells |= {(row, column): cell_of(row, column) for column in COLUMNS}
    with tempfile.TemporaryDirectory() as folder:
        results = trained(list(CELLS.values()), Path(folder))
    cells |= {place: cell(results[str(case)]) for place, case in CELLS.items()}
    text = README.read_text()
    before, _, rest = text.partition(START)
    README.write_text(f"{before}{START}\n{table(cells)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
