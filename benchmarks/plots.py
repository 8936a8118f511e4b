"""The rows of `fastlora bench` as pictures: speed-up against tokens, time against the roofline, memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fastlora.benchmarks import pictures
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.providers import PROVIDERS
from fastlora.benchmarks.records import Rows, to_csv

# For print without colours. Those of one kind share a marker.
MARKERS = {
    "frozen": "s", "peft": "o", "peft+compile": "o", "addmm": "^", "bitsandbytes": "v", "torchtune": "P",
    "unsloth": "X", "liger": "<", "fastlora": "D", "fastlora+compile": "D",
}  # fmt: skip
NAMES = {name: provider.label for name, provider in PROVIDERS.items()}


def draw(rows: Rows, report: dict, path: Path) -> None:
    """Write the picture of a verb's rows."""
    measured = [row for row in rows if row["p50"] is not None]
    figure = _decode(measured) if report["verb"] == "decode" else _layers(measured)
    shapes = ", ".join(dict.fromkeys(row["shape"] for row in rows))
    what = {
        "linear": "the seven adapted linear layers of a block",
        "block": "an adapted decoder block",
        "model": "a model with adapters",
        "decode": "decoding 4-bit weights",
    }[report["verb"]]
    figure.suptitle(f"{what}: {shapes}\n{report['environment']['device']}", fontsize=12.5)
    pictures.save(figure, path, to_csv(rows))


def draw_against(rows: Rows, report: dict, path: Path) -> None:
    """How many times as fast this code is as another revision's: a bar a case and mode, equal speed as a line."""
    shown = [row for row in rows if not row["error"]]
    figure = Figure(figsize=(10, 1.6 + 0.3 * len(shown)), dpi=130, layout="constrained")
    axes = figure.subplots()
    values = [row["speedup"] for row in shown]
    axes.barh(range(len(shown)), values, color=[COLOURS["fastlora"] if v >= 1 else "#D55E00" for v in values])
    for y, value in enumerate(values):
        axes.text(value, y, f" {value:.2f}", va="center")
    axes.axvline(1, color="black", linestyle="--", label="as fast")
    names = [f"{row['layer']} {row['base']} M={row['M']} r={row['r']}: {row['mode']}" for row in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max([1.0, *values]))
    axes.set_xlabel("times as fast (line: as fast)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"fastlora against {report['settings']['against']}: {report['verb']}")
    pictures.save(figure, path, to_csv(rows))


def totals(rows: Rows, mode: str) -> dict[tuple, dict[str, dict[str, float]]]:
    """(shape, base, r, dropout, checkpointing) and tokens -> provider -> sums over a block's layers of what adds up.

    A provider that was not measured on every layer is left out.
    """
    found: dict[tuple, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["mode"] != mode:
            continue
        key = tuple(row[name] for name in ("shape", "base", "r", "dropout", "checkpointing", "M"))
        sums = found.setdefault(key, {}).setdefault(row["provider"], dict.fromkeys(("layers", *_ADD), 0))
        sums["layers"] += row["count"]
        for name in _ADD:
            value = row["roofline"] and row["roofline"] * row["p50"] if name == "floor" else row[name]
            sums[name] += row["count"] * (value or 0)
    for providers in found.values():
        whole = max(sums["layers"] for sums in providers.values())
        for name in [name for name, sums in providers.items() if sums["layers"] < whole]:
            del providers[name]
    return found


_ADD = ("p50", "saved_bytes", "peak_bytes", "floor")  # floor: the least seconds by the roofline


def _layers(rows: Rows) -> Figure:
    mode = next((m for m in ("step", "backward", "forward") if any(row["mode"] == m for row in rows)), "step")
    by_case: dict[tuple, dict[int, dict[str, dict[str, float]]]] = {}
    for key, providers in totals(rows, mode).items():
        by_case.setdefault(key[:-1], {})[key[-1]] = providers
    figure = Figure(figsize=(15, 1.6 + 3.7 * len(by_case)), dpi=130, layout="constrained")
    grid = figure.subplots(max(1, len(by_case)), 3, squeeze=False)
    for (case, by_m), (speed, time, memory) in zip(by_case.items(), grid, strict=False):
        shape, base, r, dropout, checkpointing = case
        more = f", dropout {dropout:g}" * bool(dropout) + ", checkpointing" * bool(checkpointing)
        names = [n for n in NAMES if any(n in providers for providers in by_m.values())]
        title = f"{base}, r = {r}{more} ({shape})"
        if len(by_m) > 1:
            _speed(speed, by_m, names, mode)
            _time(time, by_m, names, mode)
        else:
            providers = next(iter(by_m.values()))
            _bars(speed, providers, [n for n in names if n != "frozen"], "speed-up")
            _bars(time, providers, names, "p50")
        speed.set_title(title, loc="left", fontweight="bold")
        largest = max(by_m)
        _bars(memory, by_m[largest], names, "saved_bytes")
        memory.set_title(f"M = {largest} tokens", loc="left")
    handles, labels = [], []
    for axes in grid[:, :2].flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _speed(axes: Axes, by_m: dict, names: Iterable[str], mode: str) -> None:
    for name in names:
        points = [(M, p["peft"]["p50"] / p[name]["p50"]) for M, p in sorted(by_m.items()) if name in p and "peft" in p]
        if points and name != "peft":
            _line(axes, points, name)
    axes.axhline(1, color=COLOURS["peft"], label="PEFT", linewidth=2)
    axes.set_ylabel(f"speed-up of a {mode} over PEFT")
    axes.set_ylim(bottom=0)
    _tokens(axes, by_m)


def _time(axes: Axes, by_m: dict, names: Iterable[str], mode: str) -> None:
    for name in names:
        _line(axes, [(M, 1e3 * p[name]["p50"]) for M, p in sorted(by_m.items()) if name in p], name)
    floor = [(M, 1e3 * p["frozen"]["floor"]) for M, p in sorted(by_m.items()) if p.get("frozen", {}).get("floor")]
    if floor:
        axes.plot(*zip(*floor, strict=True), color="black", linestyle="--", label="roofline of the frozen layer")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(f"milliseconds a {mode}")
    _tokens(axes, by_m)


def _line(axes: Axes, points: list[tuple[int, float]], name: str) -> None:
    style: dict[str, Any] = {"linestyle": ":" if name == "frozen" else "-", "linewidth": 2}
    axes.plot(*zip(*points, strict=True), color=COLOURS[name], marker=MARKERS[name], label=NAMES[name], **style)


def _tokens(axes: Axes, by_m: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(by_m), [f"{M:,}" for M in sorted(by_m)])
    axes.minorticks_off()
    axes.set_xlabel("tokens M")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


_UNITS = {
    "p50": ("milliseconds", 1e3),
    "saved_bytes": ("kept for backward, MB", 1e-6),
    "speed-up": ("speed-up over PEFT", 1.0),
}


def _bars(axes: Axes, providers: dict[str, dict[str, float]], names: list[str], what: str) -> None:
    """A bar a provider; the frozen layer, the limit, as a line."""
    label, unit = _UNITS[what]

    def value(name: str) -> float:
        if what == "speed-up":
            return providers["peft"]["p50"] / providers[name]["p50"] if "peft" in providers else 0.0
        return providers[name][what] * unit

    shown = [name for name in names if name in providers]
    values = [value(name) for name in shown]
    axes.barh(shown, values, color=[COLOURS[name] for name in shown])
    limit = value("frozen") if "frozen" in providers else 0.0
    for y, number in enumerate(values):
        beside_line = number <= limit < 1.2 * number
        axes.text(limit if beside_line else number, y, f" {number:.3g}", va="center")
    if "frozen" in providers:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1.3)
    axes.set_yticks(range(len(shown)), [NAMES[name] for name in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max([*values, limit, 1e-9]))
    axes.set_xlabel(f"{label} (line: the frozen layer, the limit)" if "frozen" in providers else label)
    axes.spines[["top", "right"]].set_visible(False)


def _decode(rows: Rows) -> Figure:
    """GB/s of each weight: a group of bars a weight, the copy as the limit."""
    weights = list(dict.fromkeys((row["shape"], row["base"], row["N"], row["K"]) for row in rows))
    ways = [("fastlora", "decode"), ("fastlora", "merge"), ("bitsandbytes", "decode"), ("bitsandbytes", "merge")]
    figure = Figure(figsize=(11, 1.8 + 0.9 * len(weights)), dpi=130, layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(ways)
    for i, (provider, mode) in enumerate(ways):
        own = [
            (at + (i - 1.5) * height, row["gbytes"])
            for at, weight in enumerate(weights)
            for row in rows
            if (row["shape"], row["base"], row["N"], row["K"]) == weight
            and (row["provider"], row["mode"]) == (provider, mode)
        ]
        if own:
            what = "decoded" if mode == "decode" else "decoded with the adapter merged"
            places, rates = zip(*own, strict=True)
            axes.barh(
                places, rates, height=height, color=COLOURS[provider],
                alpha=1.0 if mode == "decode" else 0.55, label=f"{NAMES[provider].split(' +')[0]}: {what}",
            )  # fmt: skip
    for at, weight in enumerate(weights):
        copies = [
            row["gbytes"]
            for row in rows
            if (row["shape"], row["base"], row["N"], row["K"]) == weight and row["provider"] == "copy"
        ]
        axes.plot(
            copies * 2, [at - 0.45, at + 0.45][: 2 * len(copies)], color="black", linestyle="--",
            label="a copy of as many bytes: the limit" if at == 0 else None,
        )  # fmt: skip
    axes.set_yticks(range(len(weights)), [f"{shape}\n{base} [{N}, {K}]" for shape, base, N, K in weights])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of bytes that have to be moved")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
