"""Time and memory against sequence length, and how long a sequence fits into a budget."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from fastlora.benchmarks.commands import common
from fastlora.benchmarks.tables import NAMES, ends_at, megabytes, size, terminal
from fastlora.benchmarks.training import Measurements, Trainer, rotated

ROUNDS = 3  # timed steps of each length
STRAIGHT = 0.01  # of the memory: how far a point may be from a straight line that is called one
COLUMN_HEADS = ("saved,\nMB", "peak,\nMB", "in all,\nMB")
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
    """A row per length; the caption says where the budget ends."""
    part = report["length"]
    providers = part["providers"]
    heads = [f"sequence\n(x {part['batch']})"]
    heads += [head for name in providers for head in (f"{NAMES[name]}\ntokens/s", *COLUMN_HEADS)]
    by_length = {name: {p["sequence"]: p for p in each["points"]} for name, each in providers.items()}
    cells = []
    for sequence in sorted({sequence for points in by_length.values() for sequence in points}):
        row = [f"{sequence:,}"]
        for points in by_length.values():
            p = points.get(sequence)
            if p is None or p["total"] is None:
                row += ["out of memory", "-", "-", "-"]
            else:
                row += [f"{p['tokens_per_second']:,.0f}", *(megabytes(p[key]) for key in ("saved", "peak", "total"))]
        cells.append(row)
    lines = ["in all: weights, adapters, optimizer state, and the peak of forward and backward. MB = 10^6 bytes."]
    if part["budget"] is not None:
        lines.append(f"{size(part['budget'])} hold sequences of (x {part['batch']}):")
        lines += [f"  {NAMES[name]}: {ends_at(report, name)}" for name in providers]
    return terminal("time and memory against sequence length", heads, cells, "\n".join(lines), words=0)


def rows(part: dict) -> list[dict]:
    """A row per provider and length."""
    return [
        {"provider": name, "batch": part["batch"], **point}
        for name, provider in part["providers"].items()
        for point in provider["points"]
    ]
