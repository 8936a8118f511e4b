"""Time and memory against sequence length, and how long a sequence fits into a budget."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from fastlora.benchmarks import pictures
from fastlora.benchmarks.commands import common
from fastlora.benchmarks.commands.report import NAMES, case_name, megabytes
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.records import to_json
from fastlora.benchmarks.training import Measurements, Trainer, rotated

ROUNDS = 3  # timed steps of each length
STRAIGHT = 0.01  # of the memory: how far a point may be from a straight line that is called one
COLUMNS = ("sequence", "tokens_per_second", "step_seconds", "saved", "peak", "total")


def measure(
    args: Namespace, trainers: list[Trainer], ids: Tensor, fixed: dict[str, int], advance: Callable[[str], None]
) -> Iterator[dict]:
    """Points of every provider, more after every length. ``fixed``: bytes of weights, adapters and optimizer state.

    A length that does not fit on the device is a point too, and the last one of its provider.
    """
    points: dict[str, list[dict]] = {trainer.name: [] for trainer in trainers}
    for length in args.sequence:
        batch = ids[:, :length].contiguous()
        fits = [t for t in trainers if not (points[t.name] and points[t.name][-1]["total"] is None)]
        for trainer in fits:
            trainer.results = Measurements()
            points[trainer.name].append({"sequence": length} | dict.fromkeys(COLUMNS[1:]))
        for i in range(1 + ROUNDS):
            for trainer in rotated(trainers, i):
                if trainer in fits and (i == 0 or trainer.results.saved_bytes):
                    _step(trainer, batch, args.seed + i, measures_memory=i == 0)
                advance(f"sequences of {length}: {NAMES[trainer.name]}")
        for trainer in fits:
            if trainer.results.step_seconds:
                points[trainer.name][-1] |= _point(trainer.results, batch.numel(), fixed[trainer.name])
        providers = {
            name: {"points": list(p), "fixed": fixed[name], "fit": fit(p), "longest": longest(p, args.budget)}
            for name, p in points.items()
        }
        yield {"budget": args.budget, "batch": len(ids), "providers": providers}


def _step(trainer: Trainer, batch: Tensor, seed: int, measures_memory: bool) -> None:
    """Out of memory leaves the trainer's results empty."""
    try:
        if measures_memory:
            trainer.measure_memory(batch)
        else:
            trainer.timed_step(batch, seed)
    except torch.OutOfMemoryError:
        trainer.results = Measurements()
    if not trainer.results.saved_bytes:  # outside of the handler, whose traceback holds the step's tensors
        trainer.model.zero_grad(set_to_none=True)
        common.free(compiled=False)


def _point(results: Measurements, tokens: int, fixed: int) -> dict:
    seconds = median(results.step_seconds)
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "saved": results.saved_bytes,
        "peak": results.peak_bytes,
        "total": fixed + results.peak_bytes,
    }


def fit(points: list[dict]) -> list[float] | None:
    """Bytes in all as a polynomial of the length, constant first: straight if the points are, else a parabola.

    None if there are not two points. Three are on a parabola whatever they are: they get a line.
    """
    measured = [(p["sequence"], p["total"]) for p in points if p["total"] is not None]
    if len(measured) < 2:
        return None
    lengths, totals = np.array(measured, dtype=np.float64).T
    line = np.polynomial.Polynomial.fit(lengths, totals, 1)
    if len(measured) > 3 and (np.abs(line(lengths) - totals) / totals).max() > STRAIGHT:
        parabola = np.polynomial.Polynomial.fit(lengths, totals, 2).convert()
        if parabola.coef[-1] > 0:  # no step takes less for every token more
            return parabola.coef.tolist()
    return line.convert().coef.tolist()


def longest(points: list[dict], budget: int | None) -> dict | None:
    """The longest sequence whose step fits into the budget: between two measured lengths a straight line says it,
    beyond them the fit ("extrapolated"). None without budget, or with too few points to say."""
    measured = [(p["sequence"], p["total"]) for p in points if p["total"] is not None]
    coefficients = fit(points)
    if budget is None or coefficients is None:
        return None
    for (short, less), (long, more) in pairwise(measured):
        if less <= budget < more:
            return {"sequence": int(short + (long - short) * (budget - less) / (more - less)), "how": "interpolated"}
    if budget == measured[-1][1]:
        return {"sequence": measured[-1][0], "how": "measured"}
    found = _solve(coefficients, budget)
    if found is not None and budget > measured[-1][1]:
        found = max(found, measured[-1][0])  # the fit may pass a little above the last point
    return {"sequence": found, "how": "extrapolated"}


def _solve(coefficients: list[float], budget: int) -> int | None:
    """The length at which the polynomial reaches the budget: 0 if it begins above it, None if it never does."""
    constant, slope, bend = [*coefficients, 0.0][:3]
    inside = slope**2 + 4 * bend * (budget - constant)
    if constant >= budget:
        return 0
    if inside < 0 or slope + math.sqrt(inside) <= 0:
        return None
    return math.floor(2 * (budget - constant) / (slope + math.sqrt(inside)) + 1e-6)


def table(report: dict) -> Table:
    """A row per length, and one that says where the budget ends."""
    part = report["length"]
    providers = part["providers"]
    result = Table(title="time and memory against sequence length", caption=_caption(report), caption_justify="left")
    result.add_column(f"sequence\n(x {part['batch']})", justify="right")
    for name in providers:
        for column in (f"{NAMES[name]}\ntokens/s", "saved,\nMB", "peak,\nMB", "in all,\nMB"):
            result.add_column(column, justify="right")
    by_length = {name: {p["sequence"]: p for p in each["points"]} for name, each in providers.items()}
    for length in sorted({length for points in by_length.values() for length in points}):
        row = [f"{length:,}"]
        for points in by_length.values():
            p = points.get(length)
            if p is None or p["total"] is None:
                row += ["out of memory", "-", "-", "-"]
            else:
                row += [f"{p['tokens_per_second']:,.0f}", *(megabytes(p[key]) for key in ("saved", "peak", "total"))]
        result.add_row(*row)
    return result


def _caption(report: dict) -> str:
    lines = ["in all: weights, adapters, optimizer state, and the peak of forward and backward. MB = 10^6 bytes."]
    part = report["length"]
    if part["budget"] is not None:
        lines.append(f"{size(part['budget'])} hold sequences of (x {part['batch']}):")
        lines += [f"  {NAMES[name]}: {ends_at(report, name)}" for name in part["providers"]]
    return "\n".join(lines)


def ends_at(report: dict, name: str) -> str:
    """Where the budget ends, in words."""
    found = report["length"]["providers"][name]["longest"]
    if found is None:
        return "unknown: fewer than two lengths were measured"
    if found["sequence"] is None:
        return "any length (the fit does not grow)"
    positions = report["length"].get("positions")
    beyond = f", beyond the model's {positions:,} positions" if positions and found["sequence"] > positions else ""
    return f"{found['sequence']:,} tokens ({found['how']}{beyond})"


def size(count: int) -> str:
    """In the decimal unit that says it shortest."""
    unit, scale = next(
        ((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("B", 1)
    )
    return f"{count / scale:.4g} {unit}"


def rows(part: dict) -> list[dict]:
    """A row per provider and length."""
    return [
        {"provider": name, "batch": part["batch"], **point}
        for name, provider in part["providers"].items()
        for point in provider["points"]
    ]


def draw(report: dict, path: Path) -> None:
    """Memory against sequence length, the budget as a line; tokens a second beside it."""
    part = report["length"]
    figure = Figure(figsize=(12, 5.2), dpi=160, layout="constrained")
    memory, speed = figure.subplots(1, 2, width_ratios=(1.35, 1))
    largest = max(
        [part["budget"] or 0, *(p["total"] or 0 for each in part["providers"].values() for p in each["points"])]
    )
    unit, scale = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    for name, provider in part["providers"].items():
        points = [p for p in provider["points"] if p["total"] is not None]
        lengths = [p["sequence"] for p in points]
        style: dict[str, Any] = {"color": COLOURS[name], "marker": "o", "markersize": 5, "linewidth": 2}
        label = NAMES[name] if part["budget"] is None else f"{NAMES[name]}: {ends_at(report, name)}"
        memory.plot(lengths, [p["total"] / scale for p in points], label=label, **style)
        speed.plot(lengths, [p["tokens_per_second"] for p in points], **style)
        if lengths:
            _draw_end(memory, COLOURS[name], provider, lengths, scale)
    if part["budget"] is not None:
        memory.axhline(part["budget"] / scale, color="black", linestyle="--", linewidth=1.3)
        memory.annotate(
            f"budget: {size(part['budget'])}",
            (0.01, part["budget"] / scale),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
        )
    memory.set_title("memory of a step, weights and optimizer state included", fontsize=11.5)
    memory.set_ylabel(unit)
    speed.set_title("throughput", fontsize=11.5)
    speed.set_ylabel("tokens per second")
    for axes in (memory, speed):
        axes.set_xlabel(f"tokens in a sequence (x {part['batch']})")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{report['model']}: {case_name(report['case'])}, r = {report['settings']['r']}, "
        f"{report['environment']['device']}",
        fontsize=12,
    )
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    pictures.save(figure, path, to_json(report))


def _draw_end(axes: Axes, colour: str, provider: dict, lengths: list[int], scale: float) -> None:
    """Where the budget ends; dotted beyond the lengths that were measured."""
    found = provider["longest"]
    if found is None or not found["sequence"]:
        return
    end = found["sequence"]

    def fitted(at: Any) -> Any:
        return np.polynomial.polynomial.polyval(at, provider["fit"]) / scale

    if found["how"] == "extrapolated":
        reach = np.linspace(lengths[-1] if end > lengths[-1] else lengths[0], end, 50)
        axes.plot(reach, fitted(reach), color=colour, linestyle=":", linewidth=2)
    axes.plot([end, end], [0, fitted(end)], color=colour, linewidth=1, alpha=0.7)
