"""Every picture, and how a picture knows which data it was drawn from.

Medians are bars or points, p20 to p80 whiskers; the frozen model or layer is a dashed black line.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastlora.benchmarks import timeline
from fastlora.benchmarks.providers import PROVIDERS
from fastlora.benchmarks.records import Rows, to_csv, to_json
from fastlora.benchmarks.tables import NAMES, TIE, case_name, ends_at, megabytes, setting_line, size
from fastlora.files import replace_file

GREY, ORANGE, YELLOW, GREEN, VERMILION = "#999999", "#E69F00", "#F0E442", "#009E73", "#D55E00"
PURPLE, BLUE, SKY = "#CC79A7", "#0072B2", "#56B4E9"  # Okabe and Ito's palette: told apart by the colour-blind
COLOURS = {  # of providers
    "frozen": GREY, "peft": ORANGE, "peft+compile": YELLOW, "addmm": GREEN, "bitsandbytes": VERMILION,
    "torchtune": PURPLE, "unsloth": "#000000", "liger": "#8C6D31", "fastlora": BLUE, "fastlora+compile": SKY,
}  # fmt: skip
MARKERS = {  # for print without colours; those of one kind share a marker
    "frozen": "s", "peft": "o", "peft+compile": "o", "addmm": "^", "bitsandbytes": "v", "torchtune": "P",
    "unsloth": "X", "liger": "<", "fastlora": "D", "fastlora+compile": "D",
}  # fmt: skip
MEMORY = {  # kinds of memory of a step, in the order in which they are stacked
    "weights": GREY, "adapters": PURPLE, "optimizer state": YELLOW, "gradients": GREEN, "saved for backward": BLUE,
    "scratch": SKY,
}  # fmt: skip
TIME = {  # and of time
    timeline.BASE: BLUE, timeline.ADAPTER: VERMILION, timeline.DECODE: YELLOW, timeline.ATTENTION: GREEN,
    timeline.ELEMENTWISE: SKY, timeline.LOSS: PURPLE, timeline.OPTIMIZER: ORANGE, timeline.GAPS: "#CCCCCC",
}  # fmt: skip
DARK = (BLUE, GREEN, VERMILION)  # on which text is white
LABELS = {name: provider.label for name, provider in PROVIDERS.items()}
LIMIT: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.3}
Providers = dict[str, dict[str, float]]


def save(figure: Figure, path: Path, data: str) -> None:
    """Write a PNG with the digest of the text of the results that it shows: a CSV's or a JSON's."""
    metadata = {"Description": _description(data)}
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", metadata=metadata))


def is_drawn_from(path: Path, data: Path) -> bool:
    """Whether the PNG shows what is in the file now."""
    from PIL import Image

    if not path.is_file() or not data.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == _description(data.read_text(encoding="utf-8"))


def _description(data: str) -> str:
    return f"drawn from data of sha256 {hashlib.sha256(data.strip().encode()).hexdigest()}"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=140, layout="constrained")


def _legend(figure: Figure, shown: Iterable[Axes], columns: int) -> None:
    """Below everything, each label once, what stands for a limit last."""
    labelled = [pair for axes in shown for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True)]
    entries = sorted(dict(labelled).items(), key=lambda entry: getattr(entry[1], "get_linestyle", str)() == "--")
    if entries:
        labels, handles = zip(*entries, strict=True)
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False
        )  # fmt: skip


def _bars(
    axes: Axes, values: Mapping[str, float], limit: float | None, label: str, text: Callable[[str], str],
    whiskers: Mapping[str, tuple[float, float]] | None = None,
) -> None:  # fmt: skip
    """A bar a provider with a text beside it, and the limit as a line."""
    axes.barh(list(values), list(values.values()), color=[COLOURS[name] for name in values])
    for y, (name, value) in enumerate(values.items()):
        end = value
        if whiskers is not None:
            low, end = whiskers[name]
            axes.errorbar(value, y, xerr=[[value - low], [end - value]], color="black", capsize=3)
        if limit is not None and end <= limit < 1.2 * end:
            end = limit  # the text begins beside the line, not under it
        axes.text(end, y, f"  {text(name)}", va="center")
    if limit is not None:
        axes.axvline(limit, **LIMIT, label="frozen")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max([*values.values(), limit or 0.0, 1e-9]))
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


# ---- fastlora compare


def compare(report: dict, path: Path) -> None:
    """A row a case: time, memory saved for backward, memory at the peak, and losses."""
    cases, names = report["cases"], list(report["cases"][0]["providers"])
    figure = _figure(15, 1.5 + len(cases) * (1.0 + 0.33 * len(names)))
    figure.suptitle(f"{report['model']}\n{setting_line(report['settings'])}, {report['environment']['device']}")
    grid = figure.subplots(len(cases), 4, squeeze=False, width_ratios=(1.3, 1, 1, 1))
    for case, (time, *memory, loss) in zip(cases, grid, strict=True):
        frozen = case["providers"]["frozen"]
        adapted = {name: p for name, p in case["providers"].items() if name != "frozen"}
        time.set_title(case_name(case), loc="left", fontweight="bold")

        def speed(name: str, adapted: dict = adapted) -> str:
            return f"{adapted[name]['p50']:.3g} s" + f",  {adapted[name]['speedup']:.2f}x as fast" * (name != "peft")

        label = "seconds per step (median, p20 to p80)"
        whiskers = {name: (p["p20"], p["p80"]) for name, p in adapted.items()}
        _bars(time, {name: p["p50"] for name, p in adapted.items()}, frozen["p50"], label, speed, whiskers)
        time.set_yticks(range(len(adapted)), [NAMES[name] for name in adapted])
        for axes, kind, what in zip(memory, ("saved", "peak"), ("saved for backward", "peak of a step"), strict=True):
            sizes = {name: p[f"{kind}_bytes"] / 1e6 for name, p in adapted.items()}

            def used(name: str, kind: str = kind, adapted: dict = adapted) -> str:
                p = adapted[name]
                return f"{megabytes(p[f'{kind}_bytes'])}" + f",  {p[f'{kind}_ratio']:.2f}x" * (name != "peft")

            _bars(axes, sizes, frozen[f"{kind}_bytes"] / 1e6, f"{what}, MB besides weights", used)
            axes.set_yticks([])
        for name, line in (("peft", {"linewidth": 5, "alpha": 0.6}), ("fastlora", {"linestyle": "--"})):
            losses = adapted[name]["losses"]
            loss.plot(range(1, len(losses) + 1), losses, color=COLOURS[name], **line)
        loss.set_xlabel("step")
        loss.set_ylabel("loss")
        loss.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        loss.spines[["top", "right"]].set_visible(False)
    _legend(figure, grid[:, 0], 3)
    save(figure, path, to_json(report))


# ---- fastlora profile


def memory(report: dict, path: Path) -> None:
    """A stacked bar a provider, a colour a kind of memory."""
    sizes = {name: {kind: p[kind] / 1e6 for kind in MEMORY} for name, p in report["memory"].items()}
    _stacked(report, sizes, MEMORY, "memory of a training step, MB", path)


def time(report: dict, path: Path) -> None:
    """A stacked bar a provider, a colour a category; a mark where the step ends without the profiler."""
    providers = report["time"]
    times = {name: {kind: 1e3 * p["seconds"][kind] for kind in TIME} for name, p in providers.items()}
    marks = [1e3 * p["p50"] for p in providers.values()]
    _stacked(report, times, TIME, "time of a training step under the profiler, ms", path, marks)


def _stacked(
    report: dict, values: Providers, colours: Mapping[str, str], label: str, path: Path, marks: Iterable[float] = ()
) -> None:
    figure = _figure(11, 2.1 + 0.55 * len(values))
    axes = figure.subplots()
    largest = max(sum(each.values()) for each in values.values())
    starts = np.zeros(len(values))
    for kind, colour in colours.items():
        sizes = np.array([each[kind] for each in values.values()])
        if sizes.any():
            bars = axes.barh(list(values), sizes, left=starts, color=colour, height=0.65, label=kind)
            inside = [f"{size:,.0f}" if size > 0.045 * largest else "" for size in sizes]
            axes.bar_label(bars, inside, label_type="center", color="white" if colour in DARK else "black", zorder=4)
            starts += sizes
    axes.axvline(starts[list(values).index("frozen")], **LIMIT, label="frozen model")
    for y, mark in enumerate(marks):
        label_once = None if y else "without the profiler (median)"
        axes.plot(mark, y - 0.4, "v", color="black", markersize=7, label=label_once)
    axes.set_yticks(range(len(values)), [NAMES[name] for name in values])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{report['model']}: {case_name(report['case'])}\n{setting_line(report['settings'])}"
    figure.suptitle(f"{title}, {report['environment']['device']}")
    _legend(figure, [axes], 5)
    save(figure, path, to_json(report))


def length(report: dict, path: Path) -> None:
    """Memory against sequence length with the budget as a line, and tokens a second."""
    part = report["length"]
    figure = _figure(12, 5.2)
    memory, speed = figure.subplots(1, 2, width_ratios=(1.35, 1))
    totals = (p["total"] or 0 for each in part["providers"].values() for p in each["points"])
    unit, scale = ("GB", 1e9) if max([part["budget"] or 0, *totals]) >= 1e9 else ("MB", 1e6)
    for name, provider in part["providers"].items():
        points = [p for p in provider["points"] if p["total"] is not None]
        lengths = [p["sequence"] for p in points]
        style: dict[str, Any] = {"color": COLOURS[name], "marker": "o", "markersize": 5, "linewidth": 2}
        label = NAMES[name] if part["budget"] is None else f"{NAMES[name]}: {ends_at(report, name)}"
        memory.plot(lengths, [p["total"] / scale for p in points], label=label, **style)
        speed.plot(lengths, [p["tokens_per_second"] for p in points], **style)
        if lengths and provider["longest"] and provider["longest"]["sequence"]:
            _end(memory, COLOURS[name], provider, lengths, scale)
    if part["budget"] is not None:
        memory.axhline(part["budget"] / scale, **LIMIT)
        beside = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points"}
        memory.annotate(f"budget: {size(part['budget'])}", (0.01, part["budget"] / scale), **beside)
    memory.set_title("memory of a step, weights and optimizer state included")
    memory.set_ylabel(unit)
    speed.set_title("throughput")
    speed.set_ylabel("tokens per second")
    for axes in (memory, speed):
        axes.set_xlabel(f"tokens in a sequence (x {part['batch']})")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    rank, device = report["settings"]["r"], report["environment"]["device"]
    figure.suptitle(f"{report['model']}: {case_name(report['case'])}, r = {rank}, {device}")
    _legend(figure, [memory], 3)
    save(figure, path, to_json(report))


def _end(axes: Axes, colour: str, provider: dict, lengths: list[int], scale: float) -> None:
    """Where the budget ends; dotted beyond the lengths that were measured."""
    end = provider["longest"]["sequence"]

    def fitted(at: Any) -> Any:
        return np.polynomial.polynomial.polyval(at, provider["fit"]) / scale

    if provider["longest"]["how"] == "extrapolated":
        reach = np.linspace(lengths[-1] if end > lengths[-1] else lengths[0], end, 50)
        axes.plot(reach, fitted(reach), color=colour, linestyle=":", linewidth=2)
    axes.plot([end, end], [0, fitted(end)], color=colour, linewidth=1, alpha=0.7)


# ---- fastlora bench


def bench(rows: Rows, report: dict, path: Path) -> None:
    """A verb's rows: speed-up against tokens, time against the roofline, memory; of decoding, bandwidths."""
    measured = [row for row in rows if row["p50"] is not None]
    figure = _decode(measured) if report["verb"] == "decode" else _layers(measured)
    shapes = ", ".join(dict.fromkeys(row["shape"] for row in rows))
    what = {
        "linear": "the seven adapted linear layers of a block",
        "block": "an adapted decoder block",
        "experts": "adapted experts",
        "model": "a model with adapters",
        "generate": "generation by a model with adapters",
        "decode": "decoding 4-bit weights",
    }[report["verb"]]
    figure.suptitle(f"{what}: {shapes}\n{report['environment']['device']}")
    save(figure, path, to_csv(rows))


def against(rows: Rows, report: dict, path: Path) -> None:
    """How many times as fast this code is as another revision's: a bar a case and mode, equal speed as a line."""
    shown = [row for row in rows if not row["error"]]
    values = [row["speedup"] for row in shown]
    figure = _figure(10, 1.6 + 0.3 * len(shown))
    axes = figure.subplots()
    colours = [GREY if abs(v - 1) <= TIE else BLUE if v > 1 else VERMILION for v in values]
    axes.bar_label(axes.barh(range(len(shown)), values, color=colours), fmt=" %.2f")
    axes.axvline(1, **LIMIT)
    names = [f"{row['layer']} {row['base']} M={row['M']} r={row['r']}: {row['mode']}" for row in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max([1.0, *values]))
    axes.set_xlabel("times as fast (line: as fast; grey: a tie)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"fastlora against {report['settings']['against']}: {report['verb']}")
    save(figure, path, to_csv(rows))


_ADD = ("p50", "saved_bytes", "peak_bytes", "floor")  # floor: the least seconds by the roofline


def totals(rows: Rows, mode: str) -> dict[tuple, Providers]:
    """(shape, base, r, dropout, checkpointing) and tokens -> provider -> sums over a block's layers of what adds up.

    A provider that was not measured on every layer is left out.
    """
    found: dict[tuple, Providers] = {}
    for row in (row for row in rows if row["mode"] == mode):
        key = tuple(row[name] for name in ("shape", "base", "r", "dropout", "checkpointing", "M"))
        sums = found.setdefault(key, {}).setdefault(row["provider"], dict.fromkeys(("layers", *_ADD), 0))
        sums["layers"] += row["count"]
        for name in _ADD:
            value = row["roofline"] and row["roofline"] * row["p50"] if name == "floor" else row[name]
            sums[name] += row["count"] * (value or 0)
    for key, providers in found.items():
        whole = max(sums["layers"] for sums in providers.values())
        found[key] = {name: sums for name, sums in providers.items() if sums["layers"] == whole}
    return found


def _layers(rows: Rows) -> Figure:
    mode = next((m for m in ("step", "backward", "forward") if any(row["mode"] == m for row in rows)), "step")
    by_case: dict[tuple, dict[int, Providers]] = {}
    for key, providers in totals(rows, mode).items():
        by_case.setdefault(key[:-1], {})[key[-1]] = providers
    figure = _figure(15, 1.6 + 3.7 * len(by_case))
    grid = figure.subplots(max(1, len(by_case)), 3, squeeze=False)
    for (case, by_m), (speed, time, saved) in zip(by_case.items(), grid, strict=False):
        shape, base, r, dropout, checkpointing = case
        more = f", dropout {dropout:g}" * bool(dropout) + ", checkpointing" * bool(checkpointing)
        largest = max(by_m)
        if len(by_m) > 1:
            _speed(speed, by_m, mode)
            _time(time, by_m, mode)
        else:
            peft = by_m[largest].get("peft", {}).get("p50", 0.0)
            _provider_bars(speed, {name: peft / p["p50"] for name, p in by_m[largest].items()}, "speed-up over PEFT")
            seconds = {name: 1e3 * p["p50"] for name, p in by_m[largest].items()}
            _provider_bars(time, seconds, f"milliseconds a {mode}")
        speed.set_title(f"{base}, r = {r}{more} ({shape})", loc="left", fontweight="bold")
        kept = {name: p["saved_bytes"] / 1e6 for name, p in by_m[largest].items()}
        _provider_bars(saved, kept, "kept for backward, MB")
        saved.set_title(f"M = {largest} tokens", loc="left")
    _legend(figure, grid[:, :2].flat, 6)
    return figure


def _provider_bars(axes: Axes, measured: dict[str, float], label: str) -> None:
    values = {name: measured[name] for name in LABELS if name in measured}
    _bars(axes, values, values.get("frozen"), label, lambda name: f"{values[name]:.3g}")
    axes.set_yticks(range(len(values)), [LABELS[name] for name in values])


def _speed(axes: Axes, by_m: dict[int, Providers], mode: str) -> None:
    for name in LABELS:
        points = [(M, p["peft"]["p50"] / p[name]["p50"]) for M, p in sorted(by_m.items()) if name in p and "peft" in p]
        if points and name != "peft":
            _line(axes, points, name)
    axes.axhline(1, color=COLOURS["peft"], label="PEFT", linewidth=2)
    axes.set_ylabel(f"speed-up of a {mode} over PEFT")
    axes.set_ylim(bottom=0)
    _tokens(axes, by_m)


def _time(axes: Axes, by_m: dict[int, Providers], mode: str) -> None:
    for name in LABELS:
        if any(name in p for p in by_m.values()):
            _line(axes, [(M, 1e3 * p[name]["p50"]) for M, p in sorted(by_m.items()) if name in p], name)
    floor = [(M, 1e3 * p["frozen"]["floor"]) for M, p in sorted(by_m.items()) if p.get("frozen", {}).get("floor")]
    if floor:
        axes.plot(*zip(*floor, strict=True), **LIMIT, label="roofline of the frozen layer")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(f"milliseconds a {mode}")
    _tokens(axes, by_m)


def _line(axes: Axes, points: list[tuple[int, float]], name: str) -> None:
    style: dict[str, Any] = {"linestyle": ":" if name == "frozen" else "-", "linewidth": 2}
    axes.plot(*zip(*points, strict=True), color=COLOURS[name], marker=MARKERS[name], label=LABELS[name], **style)


def _tokens(axes: Axes, by_m: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(by_m), [f"{M:,}" for M in sorted(by_m)])
    axes.minorticks_off()
    axes.set_xlabel("tokens M")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _decode(rows: Rows) -> Figure:
    """GB/s: a group of bars a weight, the copy as the limit."""

    def weight(row: dict) -> str:
        return f"{row['shape']}\n{row['base']} [{row['N']}, {row['K']}]"

    places = {name: at for at, name in enumerate(dict.fromkeys(map(weight, rows)))}
    figure = _figure(11, 1.8 + 0.9 * len(places))
    axes = figure.subplots()
    ways = [(provider, mode) for provider in ("fastlora", "bitsandbytes") for mode in ("decode", "merge")]
    for i, (provider, mode) in enumerate(ways):
        own = [row for row in rows if (row["provider"], row["mode"]) == (provider, mode)]
        at = [places[weight(row)] + 0.2 * (i - 1.5) for row in own]
        what = "decoded" if mode == "decode" else "decoded with the adapter merged"
        style: dict[str, Any] = {"color": COLOURS[provider], "alpha": 1.0 if mode == "decode" else 0.55}
        label = f"{provider}: {what}"
        axes.barh(at, [row["gbytes"] for row in own], height=0.2, label=label if own else None, **style)
    for i, row in enumerate(row for row in rows if row["provider"] == "copy"):
        y, label = places[weight(row)], "a copy of as many bytes: the limit"
        axes.plot([row["gbytes"]] * 2, [y - 0.45, y + 0.45], **LIMIT, label=None if i else label)
    axes.set_yticks(list(places.values()), list(places))
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of bytes that have to be moved")
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, [axes], 2)
    return figure
