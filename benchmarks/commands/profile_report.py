"""The tables and pictures of `fastlora profile`: what a step keeps in memory, and where its time goes."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from fastlora.benchmarks import ledger, pictures, timeline
from fastlora.benchmarks.commands.report import NAMES, case_name, megabytes, setting_line
from fastlora.benchmarks.records import to_json

# Okabe and Ito's palette: told apart by the colour-blind
MEMORY = {
    "weights": "#999999",
    "adapters": "#CC79A7",
    "optimizer state": "#F0E442",
    "gradients": "#009E73",
    "saved for backward": "#0072B2",
    "scratch": "#56B4E9",
}
TIME = {
    timeline.BASE: "#0072B2",
    timeline.ADAPTER: "#D55E00",
    timeline.DECODE: "#F0E442",
    timeline.ATTENTION: "#009E73",
    timeline.ELEMENTWISE: "#56B4E9",
    timeline.LOSS: "#CC79A7",
    timeline.OPTIMIZER: "#E69F00",
    timeline.GAPS: "#CCCCCC",
}
DARK = ("#0072B2", "#009E73", "#D55E00")  # on which text is white
LEAST = 0.002  # of the total: what a module must keep to have a line of its own in the table


def _title(report: dict) -> str:
    return f"{report['model']}: {case_name(report['case'])}\n{setting_line(report['settings'])}"


def memory_table(report: dict) -> Table:
    """A row per kind of memory, a column per provider."""
    providers = report["memory"]
    table = Table(title=_title(report), caption="MB = 10^6 bytes; x: relative to PEFT", caption_justify="left")
    table.add_column("memory, MB")
    for name in providers:
        table.add_column(NAMES[name], justify="right")
    for category in MEMORY:
        cells = [megabytes(p[category]) for p in providers.values()]
        if category == "saved for backward":
            peft = providers["peft"][category]
            cells = [f"{megabytes(p[category])} ({p[category] / peft:.2f}x)" for p in providers.values()]
        table.add_row(category, *cells)
    table.add_section()
    table.add_row("in all", *(megabytes(sum(p[category] for category in MEMORY)) for p in providers.values()))
    products = [sum(p["recomputed_products"].values()) for p in providers.values()]
    if any(products):
        table.add_row("products computed again", *map(str, products))
    return table


def modules_table(report: dict) -> Table:
    """A row per module, those of repeated blocks as one, by name."""
    providers = report["memory"]
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


def time_table(report: dict) -> Table:
    """A row per category of time, then per phase; a column per provider, and what it takes over the frozen model."""
    providers = report["time"]
    table = Table(title=f"{_title(report)}\nwhere a step's time goes, ms", caption=_time_caption(providers))
    table.caption_justify = "left"
    table.add_column("")
    for name in providers:
        table.add_column(NAMES[name], justify="right")
        if name != "frozen":
            table.add_column("over frozen", justify="right")

    def add_row(label: str, seconds: dict[str, float]) -> None:
        cells = []
        for name, value in seconds.items():
            cells.append(f"{1e3 * value:,.1f}")
            if name != "frozen":
                cells.append(f"{1e3 * (value - seconds['frozen']):+,.1f}")
        table.add_row(label, *cells)

    for category in TIME:
        seconds = {name: p["seconds"][category] for name, p in providers.items()}
        if any(seconds.values()):
            add_row(category, seconds)
    table.add_section()
    add_row("a step under the profiler", {name: p["profiled_seconds"] for name, p in providers.items()})
    for phase in timeline.PHASES:
        add_row(f"  {phase}", {name: sum(p["phases"][phase].values()) for name, p in providers.items()})
    table.add_section()
    add_row("a step without it (median)", {name: p["p50"] for name, p in providers.items()})
    return table


def _time_caption(providers: dict) -> str:
    slower = ", ".join(f"{p['profiled_seconds'] / p['p50'] - 1:+.0%} ({NAMES[name]})" for name, p in providers.items())
    return (
        "base products: fastlora's hold the adapter's part of y and dx, and its decoding may merge the adapter.\n"
        "adapter: all else that adapted layers do: products, casts, sums. head and loss: the output head's products\n"
        "and the cross entropy. host gaps: nothing computes: Python, dispatcher, autograd; and the profiler, which\n"
        f"made steps longer: {slower}. Means over the faster half of the steps under the profiler."
    )


def draw_memory(report: dict, path: Path) -> None:
    """A stacked bar a provider, a colour a kind of memory."""
    providers = report["memory"]
    sizes = {name: {category: p[category] / 1e6 for category in MEMORY} for name, p in providers.items()}
    _draw_bars(report, sizes, MEMORY, "memory of a training step, MB", path)


def draw_time(report: dict, path: Path) -> None:
    """A stacked bar a provider, a colour a category; a mark where the step ends without the profiler."""
    providers = report["time"]
    times = {name: {c: 1e3 * p["seconds"][c] for c in TIME} for name, p in providers.items()}
    marks = {name: 1e3 * p["p50"] for name, p in providers.items()}
    _draw_bars(report, times, TIME, "time of a training step under the profiler, ms", path, marks)


def _draw_bars(
    report: dict,
    values: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
    label: str,
    path: Path,
    marks: Mapping[str, float] | None = None,
) -> None:
    figure = Figure(figsize=(11, 2.1 + 0.55 * len(values)), dpi=160, layout="constrained")
    axes = figure.subplots()
    largest = max(sum(each.values()) for each in values.values())
    starts = dict.fromkeys(values, 0.0)
    for category, colour in colours.items():
        sizes = [each[category] for each in values.values()]
        if not any(sizes):
            continue
        axes.barh(list(values), sizes, left=list(starts.values()), color=colour, height=0.65, label=category)
        for y, (name, size) in enumerate(zip(values, sizes, strict=True)):
            if size > 0.045 * largest:
                text = "white" if colour in DARK else "black"
                axes.text(starts[name] + size / 2, y, f"{size:,.0f}", ha="center", va="center", color=text, zorder=4)
            starts[name] += size
    axes.axvline(starts["frozen"], color="black", linestyle="--", label="frozen model: the limit")
    if marks is not None:
        axes.plot(
            list(marks.values()), [y - 0.4 for y in range(len(marks))], "v", color="black", markersize=7,
            label="without the profiler (median)",
        )  # fmt: skip
    axes.set_yticks(range(len(values)), [NAMES[name] for name in values])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{_title(report)}, {report['environment']['device']}", fontsize=12)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in colours)  # lines and marks last
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=5, frameon=False
    )
    pictures.save(figure, path, to_json(report))
