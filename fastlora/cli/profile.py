"""``fastlora profile``: who keeps how many bytes for backward, with PEFT and with PEFT + fastlora."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fastlora import ledger
from fastlora.benchmarks import training
from fastlora.cli import common
from fastlora.cli.report import NAMES, case_name, megabytes, setting_line, to_json, write_report
from fastlora.environment import environment
from fastlora.files import replace_file

CATEGORIES = {  # Okabe and Ito's palette: told apart by the colour-blind
    "weights": "#999999",
    "adapters": "#CC79A7",
    "optimizer state": "#F0E442",
    "gradients": "#009E73",
    "saved for backward": "#0072B2",
    "scratch": "#56B4E9",
}
LEAST = 0.002  # of the total: what a module must keep to have a line of its own in the table


def run(args: Namespace) -> int:
    """Record a step of every provider; write DIR/profile.json and DIR/memory.png; print two tables."""
    device = common.device_of(args.device)
    text = common.read_text(args.text)
    common.check_bases([args.base])
    common.make_folder(args.out)
    notes = Console(file=sys.stderr, highlight=False)
    with common.progress(notes) as progress:
        task = progress.add_task(f"{args.base}: loading the model", total=3)
        model, data, label = common.load(args, args.base, text, device, steps=1)
        report: dict[str, Any] = {
            "version": 1,
            "environment": environment(device),
            "model": label,
            "settings": {"r": args.r, "batch": args.batch, "tokens": args.tokens, "seed": args.seed},
            "case": {"base": args.base, "dropout": args.dropout, "checkpointing": args.checkpointing},
            "providers": {},
        }
        if label.startswith("RANDOM"):
            progress.console.print(f"No trained weights: {label}", style="bold red")
        ids = data[0].to(device)
        trainers = training.make_trainers(model, args.r, args.dropout, args.checkpointing, False, 1e-4, args.seed)
        for trainer in trainers:
            progress.update(task, description=NAMES[trainer.name])
            report["providers"][trainer.name] = _record(trainer, ids)
            progress.update(task, advance=1)
    write_report(report, args.out / "profile.json")
    draw(report, args.out / "memory.png")
    if args.json:
        print(to_json(report))
    else:
        console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
        console.print(categories_table(report), "", modules_table(report))
    notes.print(f"Written: {args.out / 'profile.json'}, {args.out / 'memory.png'}", soft_wrap=True)
    return 0


def _record(trainer: training.Trainer, ids: Any) -> dict:
    def forward() -> Any:
        return trainer.forward(ids)

    forward().backward()  # libraries allocate what they keep
    trainer.model.zero_grad(set_to_none=True)
    peak = training.peak_bytes(trainer.device, lambda: forward().backward())
    trainer.model.zero_grad(set_to_none=True)
    books = ledger.record(trainer.model, forward, trainer.optimizer)
    return {
        "weights": books.weights,
        "adapters": books.adapters,
        "optimizer state": books.optimizer,
        "gradients": books.gradients,
        "saved for backward": books.saved,
        "scratch": max(0, peak - books.saved - books.gradients),  # the rest of forward's and backward's peak
        "saved": books.by_module(),
        "shared": books.shared(),
        "recomputed_products": books.recomputed,
    }


def _title(report: dict) -> str:
    return f"{report['model']}: {case_name(report['case'])}\n{setting_line(report['settings'])}"


def categories_table(report: dict) -> Table:
    """A row per kind of memory, a column per provider."""
    providers = report["providers"]
    table = Table(title=_title(report), caption="MB = 10^6 bytes; x: relative to PEFT", caption_justify="left")
    table.add_column("memory, MB")
    for name in providers:
        table.add_column(NAMES[name], justify="right")
    for category in CATEGORIES:
        cells = [megabytes(p[category]) for p in providers.values()]
        if category == "saved for backward":
            peft = providers["peft"][category]
            cells = [f"{megabytes(p[category])} ({p[category] / peft:.2f}x)" for p in providers.values()]
        table.add_row(category, *cells)
    table.add_section()
    table.add_row("in all", *(megabytes(sum(p[category] for category in CATEGORIES)) for p in providers.values()))
    products = [sum(p["recomputed_products"].values()) for p in providers.values()]
    if any(products):
        table.add_row("products computed again", *map(str, products))
    return table


def modules_table(report: dict) -> Table:
    """A row per module, those of repeated blocks as one, by name."""
    providers = report["providers"]
    saved = {name: _folded(p["saved"]) for name, p in providers.items()}
    shared = {name: _folded(p["shared"]) for name, p in providers.items()}
    table = Table(
        title="saved for backward, MB",
        caption="(+ kept by this module too, but counted for the one that kept it first). Who saves is who runs: a\n"
        "function that computes several layers saves for all of them.",
        caption_justify="left",
    )
    table.add_column("module (* stands for every block)")
    for name in providers:
        table.add_column(NAMES[name], justify="right")
    modules = {module for p in saved.values() for module in p}
    least = LEAST * max(sum(p.values()) for p in saved.values())
    rest = dict.fromkeys(providers, 0)
    for module in sorted(modules):
        if max(p.get(module, 0) for p in saved.values()) < least:
            for name, p in saved.items():
                rest[name] += p.get(module, 0)
            continue
        cells = []
        for name in providers:
            more = shared[name].get(module, 0)
            cells.append(megabytes(saved[name].get(module)) + (f" (+{megabytes(more)})" if more else ""))
        table.add_row(module, *cells)
    table.add_row("all others", *map(megabytes, rest.values()))
    return table


def _folded(by_module: dict[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for module, count in by_module.items():
        name = ledger.fold(module)
        total[name] = total.get(name, 0) + count
    return total


def draw(report: dict, path: Path) -> None:
    """A stacked bar a provider, a colour a kind of memory."""
    providers = report["providers"]
    figure = Figure(figsize=(11, 1.9 + 0.55 * len(providers)), dpi=160, layout="constrained")
    axes = figure.subplots()
    starts = dict.fromkeys(providers, 0.0)
    for category, colour in CATEGORIES.items():
        sizes = [p[category] / 1e6 for p in providers.values()]
        axes.barh(list(providers), sizes, left=list(starts.values()), color=colour, height=0.65, label=category)
        for y, (name, size) in enumerate(zip(providers, sizes, strict=True)):
            if size > 0.06 * max(sum(p[c] for c in CATEGORIES) for p in providers.values()) / 1e6:
                dark = category in ("saved for backward", "gradients")
                colour = "white" if dark else "black"
                axes.text(starts[name] + size / 2, y, f"{size:,.0f}", ha="center", va="center", color=colour)
            starts[name] += size
    limit = starts["frozen"]
    axes.axvline(limit, color="black", linestyle="--", label="frozen model: the limit")
    axes.set_yticks(range(len(providers)), [NAMES[name] for name in providers])
    axes.invert_yaxis()
    axes.set_xlabel("memory of a training step, MB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{_title(report)}, {report['environment']['device']}", fontsize=12)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
