"""The optimizer's memory: AdamW against SGD, with momentum and without, against the formula.

A step of training with adapters on every linear layer, then the bytes of the state. And the published case, the state
of Llama-2-7B's adapters at r = 8 on q and v in 16 bits: their tensors alone are made, and stepped once."""

import sys
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import nn

from fastlora.benchmarks import training
from fastlora.benchmarks.cases.shapes import SHAPES
from fastlora.benchmarks.ledger import state_bytes
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, column, pick

R = 16
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "AdamW": training.adamw,
    "SGD, momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
}
MOMENTS = {"AdamW": 2, "SGD, momentum": 1, "SGD": 0}  # copies of the parameters that the state holds
COUNTER = {"AdamW": 4, "SGD, momentum": 0, "SGD": 0}  # bytes of a tensor's own step count
PUBLISHED = 16.78e6  # AdamW's state for the 4,194,304 parameters of Llama-2-7B's adapters, r = 8 on q and v, 16 bits


def measure(setup: Setup) -> list[Row]:
    rows = []
    for name, make in OPTIMIZERS.items():
        trainer = setup.trainers(R, optimizer=make)["fastlora"]
        trainer.step(setup.data[0].to(setup.device))
        rows.append(_row(f"{setup.label}, all layers, r = {R}", trainer.optimizer, name))
    for name, make in OPTIMIZERS.items():
        parameters = llama_2_7b_adapters(8, setup.device)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer = make(parameters, 1e-4)
        optimizer.step()
        rows.append(_row("Llama-2-7B, q and v, r = 8", optimizer, name))
    return rows


def llama_2_7b_adapters(r: int, device: torch.device) -> list[nn.Parameter]:
    """A and B of q and v of every block, bf16."""
    shape = SHAPES["llama-2-7b"]
    hidden, blocks = shape.hidden, shape.model["num_hidden_layers"]
    shapes = [(r, hidden), (hidden, r)] * (2 * blocks)
    return [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device)) for shape in shapes]


def _row(model: str, optimizer: torch.optim.Optimizer | None, name: str) -> Row:
    assert optimizer is not None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "model": model,
        "optimizer": name,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "adapters_bytes": sum(p.nbytes for p in parameters),
        "optimizer_bytes": state_bytes(optimizer),
        "formula_bytes": sum(MOMENTS[name] * p.nbytes + COUNTER[name] for p in parameters),
    }


def finding(rows: list[Row]) -> str:
    wrong = sum(row["optimizer_bytes"] != row["formula_bytes"] for row in rows)
    formula = (
        "to the byte what the formula says" if not wrong else f"NOT what the formula says in {wrong} of {len(rows)}"
    )
    ours = pick(rows, model=rows[0]["model"])
    adamw, momentum, sgd = (f"{column(ours, 'optimizer_bytes', optimizer=name)[0] / 1e6:.2f} MB" for name in OPTIMIZERS)
    published = pick(rows, optimizer="AdamW")[-1]
    same = abs(published["optimizer_bytes"] / PUBLISHED - 1) < 0.001
    return (
        f"AdamW's state takes {adamw}, SGD's {momentum} with momentum and {sgd} without, {formula}: two, one and no "
        f"copies of the parameters, and 4 bytes a tensor for AdamW's count of steps. For the "
        f"{published['trainable_parameters']:,} adapter parameters of {published['model']}, in 16 bits, AdamW's is "
        f"{published['optimizer_bytes'] / 1e6:.2f} MB, "
        f"{'as' if same else f'NOT the {PUBLISHED / 1e6:.2f} MB that are'} published."
    )


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(9.5, 3.8)
    exact = all(row["optimizer_bytes"] == row["formula_bytes"] for row in rows)
    figure.suptitle(f"The optimizer's state is {'exactly' if exact else 'NOT'} what the formula says")
    names = list(dict.fromkeys(column(rows, "model")))
    for axes, model in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        found = pick(rows, model=model)
        sizes = [row["optimizer_bytes"] / 1e6 for row in found]
        bars = axes.bar(range(len(found)), sizes, color=COLOURS["fastlora"], width=0.6, label="measured")
        axes.bar_label(bars, fmt="%.2f", fontsize=9)
        for i, row in enumerate(found):
            level = row["formula_bytes"] / 1e6
            label = "formula: copies of the parameters + step counts" if i == 0 else None
            axes.plot([i - 0.4, i + 0.4], [level, level], color="black", linestyle="--", label=label)
        axes.set_xticks(range(len(found)), [row["optimizer"] for row in found])
        axes.set_title(f"{model}\n{found[0]['trainable_parameters']:,} parameters", fontsize=10)
        axes.set_ylabel("optimizer state, MB")
        axes.set_ylim(0, 1.15 * max(sizes))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


STUDY = Study(
    name="optimizers",
    title="The optimizer's memory",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "model": "adapters of",
        "optimizer": "optimizer",
        "trainable_parameters": "parameters",
        "tensors": "tensors",
        "optimizer_bytes": "state, MB",
        "formula_bytes": "formula, MB",
    },
)

if __name__ == "__main__":
    sys.exit(common.main("optimizers"))
