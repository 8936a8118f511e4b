"""Which modules to adapt: q and v, the attention, the MLP, or all, in parameters, memory and time.

Adapters of one rank on the modules named, AdamW, the providers' steps in turn. Parameters are also counted for
Llama-2-7B, whose numbers are published; that model is made without its weights."""

import sys

import torch
from matplotlib.figure import Figure

from fastlora.benchmarks.cases.shapes import SHAPES
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import MODULES, Row, Setup, Study, column, megabytes, pick

R = 16
TARGETS = {
    "q, v": ("q_proj", "v_proj"),
    "attention": MODULES[:4],
    "MLP": MODULES[4:],
    "all": MODULES,
}


def measure(setup: Setup) -> list[Row]:
    targets = {name: TARGETS[name] for name in ("q, v", "all")} if setup.quick else TARGETS
    made = {name: setup.trainers(R, target_modules=list(modules)) for name, modules in targets.items()}
    frozen = made["all"]["frozen"]
    setup.train([frozen, *common.without_frozen(made)])
    counts = {"expected_parameters": 0, "llama_2_7b_r8_parameters": 0}
    rows = [{"targets": "none", "provider": "frozen", **counts, **common.measured(frozen, frozen)}]
    for target, trainers in made.items():
        counts = {
            "expected_parameters": common.expected_parameters(setup.model, targets[target], R),
            "llama_2_7b_r8_parameters": llama_2_7b_parameters(targets[target], r=8),
        }
        for name in ("peft", "fastlora"):
            rows.append({"targets": target, "provider": name, **counts, **common.measured(trainers[name], frozen)})
    return rows


def llama_2_7b_parameters(targets: tuple[str, ...], r: int) -> int:
    """How many parameters PEFT trains in Llama-2-7B, counted on a model whose tensors have sizes but no contents."""
    import peft
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(SHAPES["llama-2-7b"].config())
        config = peft.LoraConfig(r=r, target_modules=list(targets))
        adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def finding(rows: list[Row]) -> str:
    adapted = [row for row in rows if row["provider"] != "frozen"]
    exact = all(row["trainable_parameters"] == row["expected_parameters"] for row in adapted)
    peft, ours = pick(rows, provider="peft"), pick(rows, provider="fastlora")
    few, many = peft[0], peft[-1]
    slower, saved = (
        [f"from {form(found[0])} to {form(found[-1])}" for found in (peft, ours)]
        for form in (lambda row: f"{row['over_frozen']:.2f}", lambda row: megabytes(row["saved_bytes"]))
    )
    return (
        f"Adapting {many['targets']} linear layers instead of {few['targets']} trains "
        f"{many['trainable_parameters'] / few['trainable_parameters']:.1f} times the parameters, "
        f"{'exactly' if exact else 'NOT exactly'} r (in + out) a layer (in Llama-2-7B with r = 8: "
        f"{many['llama_2_7b_r8_parameters']:,} instead of {few['llama_2_7b_r8_parameters']:,}). A step's time over the "
        f"frozen model's goes {slower[0]} with PEFT and {slower[1]} with fastlora, and what is kept for backward "
        f"{saved[0]} with PEFT and {saved[1]} with fastlora."
    )


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(10.5, 4.4)
    last = column(rows, "targets")[-1]
    cost = {name: pick(rows, provider=name, targets=last)[0]["over_frozen"] for name in ("peft", "fastlora")}
    figure.suptitle(
        f"Adapters on {last} linear layers: {cost['peft']:.2f} times the frozen model's step with PEFT, "
        f"{cost['fastlora']:.2f} times with fastlora"
    )
    time, memory = figure.subplots(1, 2)
    targets = list(dict.fromkeys(column(rows, "targets", provider="peft")))
    counts = [count / 1e6 for count in column(rows, "trainable_parameters", provider="peft")]
    names = ("peft", "fastlora")
    saved = {name: [size / 1e6 for size in column(rows, "saved_bytes", provider=name)] for name in names}
    common.paired_bars(time, {name: column(rows, "over_frozen", provider=name) for name in names}, "%.2f")
    common.paired_bars(memory, saved, "%.0f")
    limit = column(rows, "saved_bytes", provider="frozen")[0] / 1e6
    for axes, level, label in (
        (time, 1, "time of a step / the frozen model's"),
        (memory, limit, "saved for backward, MB"),
    ):
        axes.axhline(level, color="black", linestyle="--", label="frozen model")
        axes.set_xticks(range(len(targets)), [f"{t}\n{count:.2g} M" for t, count in zip(targets, counts, strict=True)])
        axes.set_xlabel("layers with adapters, and parameters that train")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


STUDY = Study(
    name="targets",
    title="Which modules to adapt",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "targets": "adapted",
        "provider": "provider",
        "trainable_parameters": "parameters",
        "llama_2_7b_r8_parameters": "of Llama-2-7B, r = 8",
        "optimizer_bytes": "AdamW, MB",
        "saved_bytes": "saved, MB",
        "peak_bytes": "peak, MB",
        "step_p50_seconds": "s a step",
        "over_frozen": "over frozen",
    },
)

if __name__ == "__main__":
    sys.exit(common.main("targets"))
