"""The report as one picture: a row per case; time, memory and loss side by side."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fastlora.benchmarks import pictures
from fastlora.benchmarks.commands.report import NAMES, case_name, megabytes, setting_line
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.records import to_json

_STYLE: dict[str, Any] = {"fontsize": 10.5, "va": "center"}


def draw(report: dict, path: Path) -> None:
    """Draw the report of a finished run to a PNG."""
    cases = report["cases"]
    names = list(cases[0]["providers"])
    height = 0.95 + len(cases) * (0.95 + 0.33 * len(names))
    figure = Figure(
        figsize=(11.5, height + 0.6),
        dpi=160,
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, hspace=0.04, wspace=0.03),
    )
    figure.suptitle(
        f"{report['model']}\n{setting_line(report['settings'])}, {report['environment']['device']}", fontsize=12.5
    )
    rows = figure.subplots(len(cases), 3, squeeze=False, width_ratios=(1.3, 1.3, 1))
    for case, (time, memory, loss) in zip(cases, rows, strict=True):
        time.set_title(case_name(case), loc="left", fontweight="bold", fontsize=11.5)
        _draw_time(time, case["providers"])
        _draw_memory(memory, case["providers"])
        _draw_loss(loss, case["providers"])
        for axes in (time, memory, loss):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=10.5)
            axes.xaxis.label.set_size(10.5)
            axes.yaxis.label.set_size(10.5)
    handles = [Patch(color=COLOURS[name], label=NAMES[name]) for name in names if name != "frozen"]
    limit = Line2D([], [], color="black", linestyle="--", label="frozen model: the limit")
    figure.legend(handles=[*handles, limit], loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    pictures.save(figure, path, to_json(report))


def _draw_time(axes: Axes, providers: dict[str, dict]) -> None:
    bars = {name: p for name, p in providers.items() if name != "frozen"}
    limit = providers["frozen"]["p50"]
    end = max(limit, *(p["p80"] for p in bars.values()))
    for y, (name, p) in enumerate(bars.items()):
        axes.barh(y, p["p50"], color=COLOURS[name], height=0.7)
        whiskers = [[p["p50"] - p["p20"]], [p["p80"] - p["p50"]]]
        axes.errorbar(p["p50"], y, xerr=whiskers, color="black", capsize=3, linewidth=1.2)
        text = f"{p['p50']:.3g} s" + ("" if name == "peft" else f",  {p['speedup']:.2f}x as fast")
        axes.text(max(p["p80"], limit) + 0.03 * end, y, text, **_STYLE)
    axes.axvline(limit, color="black", linestyle="--", linewidth=1.3)
    axes.set_xlim(0, 1.7 * end)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds per step (median, p20 to p80; limit {limit:.3g})")


def _draw_memory(axes: Axes, providers: dict[str, dict]) -> None:
    end = max(p["peak_bytes"] for p in providers.values()) / 1e6
    step = 1 / (len(providers) - 0.2)
    for group, kind in enumerate(("saved", "peak")):
        for i, (name, p) in enumerate((n, p) for n, p in providers.items() if n != "frozen"):
            size = p[f"{kind}_bytes"] / 1e6
            y = group + (i - (len(providers) - 2) / 2) * step
            axes.barh(y, size, color=COLOURS[name], height=0.88 * step)
            text = f"{megabytes(p[f'{kind}_bytes'])} MB"
            text += "" if name == "peft" else f",  {p[f'{kind}_ratio']:.2f}x"
            axes.text(size + 0.03 * end, y, text, **_STYLE)
        half = step * (len(providers) - 1) / 2
        limit = providers["frozen"][f"{kind}_bytes"] / 1e6
        axes.plot([limit, limit], [group - half, group + half], color="black", linestyle="--", linewidth=1.3)
    axes.set_xlim(0, 1.5 * end)
    axes.set_yticks([0, 1], ["saved for\nbackward", "peak of\na step"])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("memory besides weights, MB")


def _draw_loss(axes: Axes, providers: dict[str, dict]) -> None:
    for name, line in (
        ("peft", {"linewidth": 5, "alpha": 0.6}),
        ("fastlora", {"linewidth": 1.6, "linestyle": "--"}),
    ):
        losses = providers[name]["losses"]
        axes.plot(range(1, len(losses) + 1), losses, color=COLOURS[name], **line)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
