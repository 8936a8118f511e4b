"""``fastlora profile``: where the memory and the time of a step go, frozen, with PEFT, and with PEFT + fastlora."""

import gzip
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastlora.benchmarks import ledger, pictures, timeline, training
from fastlora.benchmarks.arguments import INTERRUPTED, UsageError
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.commands import common, length
from fastlora.benchmarks.environment import environment, keep_freed_memory
from fastlora.benchmarks.pictures import MEMORY, TIME
from fastlora.benchmarks.records import to_json, write_json, write_rows
from fastlora.benchmarks.tables import NAMES, case_name, megabytes, setting_line, terminal
from fastlora.files import replace_file

PICTURES = {  # of the parts of a report
    "memory": ("memory.png", pictures.memory),
    "time": ("time.png", pictures.time),
    "length": ("sequence.png", pictures.length),
}
PROVIDERS = 3
LEAST = 0.002  # of the total: what a module must keep to have a row of its own
Advance = Callable[[str], None]


def run(args: Namespace) -> int:
    """Measure part by part, keeping DIR/profile.json up to date; then draw the pictures and print the tables."""
    device = common.device_of(args.device)
    if args.memory_snapshot and device.type != "cuda":
        raise UsageError("--memory-snapshot needs a CUDA device: it is the record of torch's CUDA allocator")
    _set_defaults(args)
    text = common.read_text(args.text)
    common.check_bases([args.base])
    if models.has_experts(args.model):
        common.check_experts(f"--model {args.model} has experts", [args.base], [args.dropout])
    common.make_folder(args.out)

    keep_freed_memory()
    report: dict[str, Any] = {
        "version": 2,
        "complete": False,
        "environment": environment(device),
        "model": None,
        "settings": {name: getattr(args, name) for name in ("r", "batch", "tokens", "steps", "seed")},
        "case": {"base": args.base, "dropout": args.dropout, "checkpointing": args.checkpointing},
    }
    notes = Console(file=sys.stderr, highlight=False)
    interrupted = False
    try:
        with common.progress(notes) as progress:
            steps = PROVIDERS * (1 + 2 * args.steps + len(args.sequence) * (1 + length.ROUNDS))
            task = progress.add_task(f"{args.base}: loading the model", total=steps)

            def advance(done: str) -> None:
                progress.update(task, advance=1, description=done)

            model, ids, label = _load(args, text, device)
            report["model"] = label
            if label.startswith("RANDOM"):
                progress.console.print(f"No trained weights: {label}", style="bold red")
            _measure(args, model, ids, report, advance)
        report["complete"] = True
    except KeyboardInterrupt:
        interrupted = True
    write_json(args.out / "profile.json", report)
    written = [args.out / "profile.json", *_draw(report, args.out)]
    if args.json:
        print(to_json(report))
    else:
        _print(report, common.console(150))
    if interrupted:
        notes.print(f"Interrupted. What was measured so far is in {written[0]}", soft_wrap=True)
        return INTERRUPTED
    notes.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def _set_defaults(args: Namespace) -> None:
    if args.steps is None:
        args.steps = 2 if args.quick else 7
    if args.sequence is None:
        short, usual = [64, 128, 256], [128, 256, 512, 1024]
        args.sequence = [] if args.budget is None else short if args.quick else usual
    args.sequence.sort()


def _load(args: Namespace, text: str | None, device: torch.device) -> tuple[nn.Module, Tensor, str]:
    """The model, ids as long as the longest sequence, and the model's label."""
    longest = max([args.tokens, *args.sequence])
    option = "--tokens" if longest == args.tokens else "--sequence"
    try:
        sizes = Namespace(**{**vars(args), "tokens": longest})
        model, data, label = common.load(sizes, args.base, text, device, steps=1)
    except UsageError as error:
        raise UsageError(str(error).replace("--tokens", option)) from error
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UsageError(f"{option} {longest} is more than the {positions} positions that the model has")
    return model, data[0].to(device), label


def _measure(args: Namespace, model: nn.Module, ids: Tensor, report: dict, advance: Advance) -> None:
    """Fill in the report's parts. A part that is in it is one that can be shown."""
    for name in (*(name for name, _ in PICTURES.values()), "sequence.csv"):
        (args.out / name).unlink(missing_ok=True)  # one of another run must not stand beside this report
    trainers = training.make_trainers(model, args.r, args.dropout, args.checkpointing, False, 1e-4, args.seed)
    batch = ids[:, : args.tokens].contiguous()
    memory = {}
    for trainer in trainers:
        memory[trainer.name] = _memory(trainer, batch)
        advance(f"memory: {NAMES[trainer.name]}")
    report["memory"] = memory
    write_json(args.out / "profile.json", report)

    _time(args, trainers, batch, report, advance)
    for trainer in trainers:
        if args.trace:
            _write_trace(trainer, batch, args.out / f"trace-{trainer.name}.json.gz")
        if args.memory_snapshot:
            _write_snapshot(trainer, batch, args.out / f"memory-{trainer.name}.pickle")

    if args.sequence:
        kept = ("weights", "adapters", "optimizer state")
        fixed = {name: sum(books[kind] for kind in kept) for name, books in memory.items()}
        positions = getattr(model.config, "max_position_embeddings", None)
        for part in length.measure(args, trainers, ids, fixed, advance):
            report["length"] = part | {"positions": positions}
            write_json(args.out / "profile.json", report)


def _memory(trainer: training.Trainer, ids: Tensor) -> dict:
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


def _time(args: Namespace, trainers: list[training.Trainer], ids: Tensor, report: dict, advance: Advance) -> None:
    """Steps without the profiler and steps with it, in turn, the order of the providers rotated every round."""
    lines: dict[str, list[timeline.Timeline]] = {trainer.name: [] for trainer in trainers}
    for trainer in trainers:
        trainer.step(ids)
    for i in range(args.steps):
        for trainer in training.rotated(trainers, i):
            what = f"time: round {i + 1}/{args.steps}, {NAMES[trainer.name]}"
            trainer.timed_step(ids, args.seed + i)
            advance(what)
            torch.manual_seed(args.seed + i)
            lines[trainer.name].append(_timeline(trainer, ids)[0])
            advance(f"{what}, profiled")
        report["time"] = {t.name: time_record(t.results.step_seconds, lines[t.name]) for t in trainers}
        write_json(args.out / "profile.json", report)


def _timeline(trainer: training.Trainer, ids: Tensor, shapes: bool = False) -> tuple[timeline.Timeline, dict]:
    return timeline.record(trainer.model, lambda: trainer.forward(ids), trainer.optimizer, shapes)


def time_record(step_seconds: list[float], lines: list[timeline.Timeline]) -> dict:
    """The median of the steps without the profiler. Means over the faster half of those with it, which add up as every
    step's do; the slower ones are slow for reasons of the machine."""
    usual = sorted(lines, key=lambda line: line.wall)[: (len(lines) + 1) // 2]

    def mean(pick: Callable[[timeline.Timeline], int]) -> float:
        return fmean(map(pick, usual)) / 1e9

    return {
        "p50": median(step_seconds),
        "step_seconds": list(step_seconds),
        "profiled_seconds": mean(lambda line: line.wall),
        "profiled_step_seconds": [line.wall / 1e9 for line in lines],
        "seconds": {c: mean(lambda line, c=c: line.by_category()[c]) for c in timeline.CATEGORIES},  # type: ignore[misc]
        "phases": {
            phase: {c: mean(lambda line, p=phase, c=c: line.spent[p][c]) for c in timeline.CATEGORIES}  # type: ignore[misc]
            for phase in timeline.PHASES
        },
        "ops": _ops(usual),
    }


def _ops(lines: list[timeline.Timeline]) -> dict:
    """Calls and seconds of the ops of a step by category, those that took longest first."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for category, ops in lines[0].ops.items():
        rows = {
            op: {"calls": calls, "seconds": fmean(line.ops[category].get(op, [0, 0])[1] for line in lines) / 1e9}
            for op, (calls, _) in ops.items()
        }
        found[category] = dict(sorted(rows.items(), key=lambda row: -row[1]["seconds"]))
    return found


def _write_trace(trainer: training.Trainer, ids: Tensor, path: Path) -> None:
    """A step of its own, with the shapes of every op's inputs."""
    _, trace = _timeline(trainer, ids, shapes=True)
    content = gzip.compress(json.dumps(trace).encode(), compresslevel=5)
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def _write_snapshot(trainer: training.Trainer, ids: Tensor, path: Path) -> None:
    """The allocations of a step, in the format that pytorch.org/memory_viz opens."""
    torch.cuda.memory._record_memory_history()
    try:
        trainer.step(ids)
        replace_file(path, lambda temporary: torch.cuda.memory._dump_snapshot(str(temporary)))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _draw(report: dict, folder: Path) -> list[Path]:
    written = []
    for part, (name, draw) in PICTURES.items():
        if part in report:
            draw(report, folder / name)
            written.append(folder / name)
    if "length" in report:
        write_rows(folder / "sequence.csv", length.rows(report["length"]))
        written.append(folder / "sequence.csv")
    return written


def _print(report: dict, console: Console) -> None:
    tables = {"memory": (memory_table, modules_table), "time": (time_table,), "length": (length.table,)}
    for part, makes in tables.items():
        for make in makes if part in report else ():
            console.print(make(report), "")


def _title(report: dict) -> str:
    return f"{report['model']}: {case_name(report['case'])}\n{setting_line(report['settings'])}"


def memory_table(report: dict) -> Table:
    """A row per kind of memory, a column per provider."""
    providers = report["memory"]
    rows: list[list[str] | None] = []
    for kind in MEMORY:
        cells = [megabytes(p[kind]) for p in providers.values()]
        if kind == "saved for backward":
            cells = [f"{megabytes(p[kind])} ({p[kind] / providers['peft'][kind]:.2f}x)" for p in providers.values()]
        rows.append([kind, *cells])
    rows += [None, ["in all", *(megabytes(sum(p[kind] for kind in MEMORY)) for p in providers.values())]]
    products = [sum(p["recomputed_products"].values()) for p in providers.values()]
    if any(products):
        rows.append(["products computed again", *map(str, products)])
    heads = ["memory, MB", *(NAMES[name] for name in providers)]
    return terminal(_title(report), heads, rows, "MB = 10^6 bytes; x: relative to PEFT")


def modules_table(report: dict) -> Table:
    """A row per module, those of repeated blocks as one, by name."""
    providers = report["memory"]
    saved, shared = ({name: _folded(p[kind]) for name, p in providers.items()} for kind in ("saved", "shared"))
    least = LEAST * max(sum(p.values()) for p in saved.values())
    rows, rest = [], dict.fromkeys(providers, 0)
    for module in sorted({module for p in saved.values() for module in p}):
        if max(p.get(module, 0) for p in saved.values()) < least:
            for name, p in saved.items():
                rest[name] += p.get(module, 0)
            continue
        more = [shared[name].get(module, 0) for name in providers]
        cells = [
            megabytes(p.get(module)) + (f" (+{megabytes(also)})" if also else "")
            for p, also in zip(saved.values(), more, strict=True)
        ]
        rows.append([module, *cells])
    rows.append(["all others", *map(megabytes, rest.values())])
    caption = (
        "(+ kept by this module too, but counted for the one that kept it first).\n"
        "A function that computes several layers saves for all of them, and counts for the layer that called it."
    )
    heads = ["module (* stands for every block)", *(NAMES[name] for name in providers)]
    return terminal("saved for backward, MB", heads, rows, caption)


def _folded(by_module: dict[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for module, count in by_module.items():
        name = ledger.fold(module)
        total[name] = total.get(name, 0) + count
    return total


def time_table(report: dict) -> Table:
    """A row per category of time, then per phase; a column per provider, and what it takes over the frozen model."""
    providers = report["time"]

    def row(label: str, seconds: dict[str, float]) -> list[str]:
        cells = []
        for name, value in seconds.items():
            over = [] if name == "frozen" else [f"{1e3 * (value - seconds['frozen']):+,.1f}"]
            cells += [f"{1e3 * value:,.1f}", *over]
        return [label, *cells]

    by_category = {kind: {name: p["seconds"][kind] for name, p in providers.items()} for kind in TIME}
    rows: list[list[str] | None] = [row(kind, each) for kind, each in by_category.items() if any(each.values())]
    rows += [None, row("a step under the profiler", {name: p["profiled_seconds"] for name, p in providers.items()})]
    for phase in timeline.PHASES:
        rows.append(row(f"  {phase}", {name: sum(p["phases"][phase].values()) for name, p in providers.items()}))
    rows += [None, row("a step without it (median)", {name: p["p50"] for name, p in providers.items()})]
    slower = ", ".join(f"{p['profiled_seconds'] / p['p50'] - 1:+.0%} ({NAMES[name]})" for name, p in providers.items())
    caption = (
        "base products: fastlora's hold the adapter's part of y and dx, and its decoding may merge the adapter.\n"
        "adapter: all else that adapted layers do: products, casts, sums. head and loss: the output head's products\n"
        "and the cross entropy. host gaps: nothing computes: Python, dispatcher, autograd; and the profiler, which\n"
        f"made steps longer: {slower}. Means over the faster half of the steps under the profiler."
    )
    heads = [head for name in providers for head in (NAMES[name], "over frozen")]
    heads.remove("over frozen")  # of the frozen model itself
    return terminal(f"{_title(report)}\nwhere a step's time goes, ms", ["", *heads], rows, caption)
