"""A batch of 16 texts that are trained with 1 to 16 adapters, each text with one of them.

Adapters of r = 8 on every linear layer. With fastlora all texts go through the model in one call
(`fastlora.adapters_of_rows`); PEFT trains one adapter after the other, each on its own texts."""

import sys
from typing import Any

import peft
import torch
from matplotlib.figure import Figure
from torch import nn

import fastlora
from fastlora.benchmarks import protocol
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.protocol import Way
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import MODULES, Row, Setup, Study, column, pick
from fastlora.benchmarks.tables import NAMES
from fastlora.benchmarks.training import copy_sharing_frozen

TEXTS, R = 16, 8
COUNTS = (1, 2, 4, 8, 16)


def measure(setup: Setup) -> list[Row]:
    counts = (1, 4) if setup.quick else COUNTS
    adapted = _with_adapters(setup, max(counts))
    models = {"peft": adapted, "fastlora": copy_sharing_frozen(adapted)}
    fastlora.patch(models["fastlora"])
    tokens = setup.data[0].flatten()
    tokens = tokens[: tokens.numel() // TEXTS * TEXTS].view(TEXTS, -1).to(setup.device)
    ways = {
        (name, k): Way.of(lambda model=model, k=k, step=step: step(model, tokens, k))  # type: ignore[misc]
        for name, model, step in (("peft", models["peft"], _one_by_one), ("fastlora", models["fastlora"], _together))
        for k in counts
    }
    turns = protocol.interleave(ways, protocol.clock_of(setup.device), 3 if setup.quick else 7)
    rows: list[Row] = []
    for (name, k), own in turns.items():
        over_one = protocol.ratio(own, turns[name, 1])
        rows.append({"adapters": k, "provider": name, **common.step_seconds(own), "over_one": over_one})
    return rows


def _with_adapters(setup: Setup, count: int) -> Any:
    config = peft.LoraConfig(r=R, target_modules=list(MODULES))
    model: Any = peft.get_peft_model(copy_sharing_frozen(setup.model), config, "0")  # type: ignore[arg-type]
    for i in range(1, count):
        model.add_adapter(str(i), config)
    torch.manual_seed(setup.seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1 * R**-0.5)
        p.requires_grad_("lora_" in name)
    return model.train()


def _one_by_one(model: Any, tokens: torch.Tensor, count: int) -> None:
    """An adapter after the other."""
    for i, texts in enumerate(tokens.chunk(count)):
        model.base_model.set_adapter(str(i))
        model(input_ids=texts, labels=texts).loss.backward()


def _together(model: Any, tokens: torch.Tensor, count: int) -> None:
    with fastlora.adapters_of_rows(model, [i * count // TEXTS for i in range(TEXTS)]):
        model(input_ids=tokens, labels=tokens).loss.backward()


def finding(rows: list[Row]) -> str:
    most = max(column(rows, "adapters"))
    found = {(row["provider"], row["adapters"]): row for row in rows}
    theirs, ours = found["peft", most], found["fastlora", most]
    faster, alone = (found["peft", k]["step_p50_seconds"] / found["fastlora", k]["step_p50_seconds"] for k in (most, 1))
    return (
        f"A batch of {TEXTS} texts with {most} adapters takes {ours['over_one']:.2f} times as long as with one when "
        f"fastlora trains them together, and {theirs['over_one']:.2f} times when PEFT trains one after the other. PEFT "
        f"then takes {faster:.2f} times as long as fastlora; with one adapter {alone:.2f} times."
    )


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(7, 4.4)
    most = max(column(rows, "adapters"))
    over = {row["provider"]: row["over_one"] for row in pick(rows, adapters=most)}
    figure.suptitle(
        f"{most} adapters in one batch: {over['fastlora']:.2f} times one (PEFT, in turn: {over['peft']:.2f})"
    )
    axes = figure.subplots()
    counts = list(dict.fromkeys(column(rows, "adapters")))
    for name in ("peft", "fastlora"):
        seconds = column(rows, "step_p50_seconds", provider=name)
        axes.plot(counts, seconds, "-o", color=COLOURS[name], label=NAMES[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"adapters in a batch of {TEXTS} texts")
    axes.set_ylabel("seconds a step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


STUDY = Study(
    name="mixed_batch",
    title="Several adapters in one batch",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "adapters": "adapters",
        "provider": "provider",
        "step_p50_seconds": "s a step",
        "over_one": "over one adapter",
    },
)

if __name__ == "__main__":
    sys.exit(common.main("mixed_batch"))
