"""A bf16 base against NF4 and FP4: what 4 bits save in memory and cost in time, beside published figures.

Adapters of r = 8 on q and v, as in the published experiment, and of r = 16 on every linear layer, as QLoRA is mostly
used; AdamW, everyone's steps in turn, whatever the base. The published figures are another model's on another machine
(Llama-2-7B on one A100): what can be compared are ratios."""

import sys
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from fastlora.benchmarks import training
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, pick
from fastlora.benchmarks.tables import NAMES
from fastlora.fourbit import quantisation_tensors

BASES = ("bf16", "nf4", "fp4")
PUBLISHED = {  # one A100, Llama-2-7B, r = 8 on q and v: seconds of the whole training, bytes in all
    "bf16": (6685.75, 21.33e9),
    "nf4": (10059.53, 14.18e9),
    "fp4": (9334.45, 14.19e9),
}
ADAPTED: dict[str, dict[str, Any]] = {
    "q, v, r = 8": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "all, r = 16": {"r": 16},
}
HELD = ("weights_bytes", "adapters_bytes", "gradients_bytes", "optimizer_bytes", "saved_bytes")
PROVIDERS = ("peft", "fastlora")


def measure(setup: Setup) -> list[Row]:
    bases = {base: models.to_base(training.copy_sharing_frozen(setup.model), base) for base in BASES}
    made: dict[tuple[str, str, str], training.Trainer] = {}
    for adapted, options in ADAPTED.items():
        for base, model in bases.items():
            for name, trainer in setup.trainers(base=model, **options).items():
                if name == "frozen":
                    made.setdefault((base, name, "none"), trainer)
                else:
                    made[base, name, adapted] = trainer
    setup.train(list(made.values()))
    rows = []
    for (base, name, adapted), trainer in made.items():
        row: Row = {"adapted": adapted, "base": base, "provider": name}
        row |= {"weights_bytes": weights_bytes(bases[base]), **common.memory(trainer)}
        row["total_bytes"] = sum(row[kind] for kind in HELD)
        row |= common.times(trainer, made[base, "frozen", "none"])
        reference = made["bf16", "peft", next(iter(ADAPTED)) if name == "frozen" else adapted]
        rows.append({**row, "over_peft_bf16": common.ratio(trainer, reference)})
    return rows


def weights_bytes(model: nn.Module) -> int:
    """Of the frozen weights, with the statistics of those in 4 bits."""
    return sum(t.nbytes for p in model.parameters() for t in (p, *quantisation_tensors(p)))


def ratios(rows: list[Row], base: str, provider: str, adapted: str) -> tuple[float, float]:
    """Time and memory over PEFT's on bf16."""
    (row,) = pick(rows, base=base, provider=provider, adapted=adapted)
    (reference,) = pick(rows, base="bf16", provider="peft", adapted=adapted)
    return row["over_peft_bf16"], row["total_bytes"] / reference["total_bytes"]


def published(base: str) -> tuple[float, float]:
    """Time and memory over those on bf16."""
    seconds, total = (a / b for a, b in zip(PUBLISHED[base], PUBLISHED["bf16"], strict=True))
    return seconds, total


def finding(rows: list[Row]) -> str:
    times, sizes = [], []
    for base in BASES[1:]:
        (peft, peft_size), (ours, our_size) = (ratios(rows, base, name, "q, v, r = 8") for name in PROVIDERS)
        peft_all, ours_all = (ratios(rows, base, name, "all, r = 16")[0] for name in PROVIDERS)
        seconds, total = published(base)
        times.append(
            f"{base.upper()} {peft:.2f} times as long with PEFT (published: {seconds:.2f}) and {ours:.2f} with "
            f"fastlora, or {peft_all:.2f} and {ours_all:.2f} where all linear layers are adapted"
        )
        sizes.append(f"{base.upper()} {peft_size:.2f} (published: {total:.2f}) and {our_size:.2f} times the memory")
    return (
        f"With adapters on q and v, and over PEFT's step on bf16, a step takes on {'; on '.join(times)}. "
        f"Weights, adapters, gradients, optimizer state and what is kept for backward take on {'; on '.join(sizes)}; "
        f"what is published is of Llama-2-7B on one A100."
    )


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(12.5, 4.8)
    peft, ours = (ratios(rows, "nf4", name, "all, r = 16")[0] for name in PROVIDERS)
    figure.suptitle(
        f"On NF4 a step takes {peft:.2f} times PEFT's on bf16 with PEFT, {ours:.2f} times with fastlora "
        "(adapters on all linear layers)"
    )
    panels = [(kind, adapted) for kind in (0, 1) for adapted in ADAPTED if kind == 0 or adapted == "q, v, r = 8"]
    for axes, (kind, adapted) in zip(figure.subplots(1, 3), panels, strict=True):
        offsets = (-0.27, 0) if adapted == "q, v, r = 8" else (-0.135, 0.135)
        for offset, name in zip(offsets, PROVIDERS, strict=True):
            own = [ratios(rows, base, name, adapted)[kind] for base in BASES]
            places = [place + offset for place in range(len(BASES))]
            bars = axes.bar(places, own, width=0.25, color=COLOURS[name], label=NAMES[name])
            color = "white" if name == "fastlora" else "black"
            axes.bar_label(bars, fmt="%.2f", fontsize=9, label_type="center", color=color)
        if adapted == "q, v, r = 8":
            places = [place + 0.27 for place in range(len(BASES))]
            style = {"width": 0.25, "color": "white", "edgecolor": "#CC79A7", "hatch": "///"}
            label = "published: Llama-2-7B on one A100"
            bars = axes.bar(places, [published(base)[kind] for base in BASES], label=label, **style)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.bar_label(bars, fmt="%.2f", fontsize=9, label_type="center", bbox=box)
        axes.axhline(1, color="black", linestyle="--", linewidth=1, label="PEFT on bf16")
        axes.set_xticks(range(len(BASES)), ["bf16", "NF4", "FP4"])
        axes.set_xlabel(f"base weights (adapters: {adapted})")
        axes.set_ylabel(("time of a step / PEFT's on bf16", "memory in all / PEFT's on bf16")[kind])
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


STUDY = Study(
    name="bases",
    title="bf16, NF4 and FP4",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "adapted": "adapted",
        "base": "base",
        "provider": "provider",
        "weights_bytes": "weights, MB",
        "saved_bytes": "saved, MB",
        "total_bytes": "in all, MB",
        "step_p50_seconds": "s a step",
        "over_frozen": "over frozen",
        "over_peft_bf16": "over PEFT's bf16",
    },
)

if __name__ == "__main__":
    sys.exit(common.main("bases"))
