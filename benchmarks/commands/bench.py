"""``fastlora bench``: adapted layers, blocks, experts, models and decoding, by every provider."""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastlora.benchmarks import against, decode, pictures, protocol, records
from fastlora.benchmarks.arguments import INTERRUPTED, UsageError
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.cases.modules import Case, linear_cases
from fastlora.benchmarks.cases.shapes import EXPERTS, SHAPES
from fastlora.benchmarks.commands import common
from fastlora.benchmarks.environment import environment, keep_freed_memory
from fastlora.benchmarks.providers import PROVIDERS, Provider
from fastlora.benchmarks.tables import duration, megabytes, number, percent, terminal, verdict

# What is measured unless the arguments say otherwise: on a CPU in minutes, quickly in two, on a GPU at real sizes.
_SMALL, _LARGE = "smollm2-135m", "llama-3.2-1b"
_TOKENS = [1, 16, 64, 256, 1024]
DEFAULTS: dict[str, dict[str, dict[str, list]]] = {
    "linear": {
        "cpu": {"shapes": [_SMALL, _LARGE], "m": [*_TOKENS, 2048]},
        "quick": {"shapes": [_SMALL, _LARGE], "m": _TOKENS},
        "cuda": {"shapes": ["llama-3-8b"], "m": [1, 16, 256, 1024, 4096, 8192, 16384]},
    },
    "block": {
        "cpu": {"shapes": [_SMALL, _LARGE], "m": [*_TOKENS, 2048]},
        "quick": {"shapes": [_SMALL, _LARGE], "m": _TOKENS},
        "cuda": {"shapes": ["llama-3-8b"], "m": [1024, 4096, 8192, 16384]},
    },
    "experts": {
        "cpu": {"shapes": ["moe-64", "moe-128"], "m": [*_TOKENS[1:]]},
        "quick": {"shapes": ["moe-64"], "m": [16, 512]},
        "cuda": {"shapes": ["qwen3-30b-a3b", "mixtral-8x7b"], "m": [16, 256, 1024, 4096, 8192]},
    },
    "model": {
        "cpu": {"shapes": [_SMALL], "m": [128, 512]},
        "quick": {"shapes": [_SMALL], "m": [128]},
        "cuda": {"shapes": ["llama-3-8b"], "m": [1024, 8192]},
    },
    "generate": {
        "cpu": {"shapes": [_SMALL, _LARGE], "m": [1, 4, 16]},
        "quick": {"shapes": [_LARGE], "m": [1, 16]},
        "cuda": {"shapes": ["llama-3-8b"], "m": [1, 4, 16, 64]},
    },
    "decode": {
        "cpu": {"shapes": [_SMALL, _LARGE, "llama-3-8b"], "m": [0], "base": ["nf4", "fp4"]},
        "quick": {"shapes": [_SMALL, _LARGE], "m": [0], "base": ["nf4"]},
        "cuda": {"shapes": ["llama-3-8b"], "m": [0], "base": ["nf4", "fp4"]},
    },
}  # bases: `models.default_bases`
QUICK_ROUNDS = 5


def run(args: Namespace) -> int:
    """Measure every case, keeping VERB.csv and VERB.json up to date; then draw VERB.png and print the table.

    The exit code is 1 if a provider failed or was wrong.
    """
    device = common.device_of(args.device)
    cases = cases_of(args, device)
    common.check_bases([case.base for case in cases])
    out = args.out or records.default_folder(device)
    common.make_folder(out)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else protocol.ROUNDS)
    if args.against:
        return _run_against(args, device, cases, out, rounds)
    providers = providers_of(args)
    keep_freed_memory()
    notes = Console(file=sys.stderr, highlight=False)
    report: dict[str, Any] = {
        "version": 1,
        "complete": False,
        "verb": args.verb,
        "environment": environment(device) | {"clocks": records.clocks(device)},
        "settings": {"rounds": rounds, "turn_seconds": protocol.TURN, "providers": [p.name for p in providers]},
        "rates": {},
    }
    rows: records.Rows = []
    (out / f"{args.verb}.png").unlink(missing_ok=True)  # of another run
    try:
        with common.progress(notes) as progress:
            task = progress.add_task("rates of the device", total=len(cases))
            rates = protocol.measure_rates(device, cases[0].dtype)
            report["rates"] = rates.to_json()
            for case in cases:
                for text, found in measure(case, providers, modes_of(args), device, rates, rounds):
                    progress.update(task, description=f"{case}: {text}")
                    rows += found
                write(out, args.verb, report, rows)
                progress.update(task, advance=1)
                protocol.free()
        report["complete"] = True
    except KeyboardInterrupt:
        pass
    write(out, args.verb, report, rows)
    if report["complete"]:
        pictures.bench(rows, report, out / f"{args.verb}.png")
    show(args, report, rows)
    if not report["complete"]:
        notes.print(f"Interrupted. What was measured so far is in {out / f'{args.verb}.csv'}", soft_wrap=True)
        return INTERRUPTED
    notes.print("Written: " + ", ".join(str(out / f"{args.verb}.{end}") for end in ("csv", "json", "png")))
    return int(any(map(is_refused, rows)))


def _run_against(args: Namespace, device: torch.device, cases: list[Case], out: Path, rounds: int) -> int:
    """Measure fastlora at another revision and here; write VERB-against.csv, .json and .png; print the table."""
    if args.verb in ("generate", "decode") or args.providers:
        raise UsageError("--against compares linear, block, experts and model with those of another revision")
    notes = Console(file=sys.stderr, highlight=False)
    name = f"{args.verb}-against"
    settings = {"rounds": rounds, "turn_seconds": protocol.TURN, "against": args.against}
    report = {"version": 1, "verb": args.verb, "environment": environment(device), "settings": settings}
    rows: records.Rows = []
    try:
        with common.progress(notes) as progress:
            task = progress.add_task("", total=len(cases))
            for text, found in against.run(args.against, cases, device, rounds, modes_of(args)):
                rows += found
                progress.update(task, description=text, advance=bool(found))
    except against.RevisionError as error:
        raise UsageError(str(error)) from error
    write(out, name, report, rows)
    pictures.against(rows, report, out / f"{name}.png")
    if args.json:
        print(records.to_json(report | {"rows": rows}))
    elif args.csv:
        print(records.to_csv(rows), end="")
    else:
        common.console(150).print(against_table(rows, args.against))
    notes.print("Written: " + ", ".join(str(out / f"{name}.{end}") for end in ("csv", "json", "png")))
    return int(any(map(is_refused, rows)))


def against_table(rows: records.Rows, revision: str) -> Table:
    heads = ("case", "mode", revision, "here", "faster", f"saved MB, {revision}", "here", "")
    cells = [
        (case_title(row), "", "", "", "", "", "", f"[bold red]{row['provider']}: {row['error']}")
        if row["error"]
        else (
            case_title(row), row["mode"], duration(row["other_p50"]), duration(row["this_p50"]),
            number(row["speedup"], unit="x"), megabytes(row["other_saved_bytes"]), megabytes(row["this_saved_bytes"]),
            verdict(row["speedup"]),
        )
        for row in rows
    ]  # fmt: skip
    caption = "Faster: above 1 this code is; the median of ratios of interleaved rounds."
    return terminal(f"fastlora here and at {revision}", heads, cells, caption)


def measure(
    case: Case, providers: list[Provider], modes: list[str], device: torch.device, rates: Any, rounds: int
) -> Iterator[tuple[str, records.Rows]]:
    if case.verb == "decode":
        names = {provider.name for provider in providers}
        wanted = (c for c in decode.candidates(case, decode.operands(case, device)) if c.provider in names)
        yield "timing", []
        yield "done", decode.run(case, wanted, device, rates, rounds)
    else:
        yield from protocol.run(case, providers, device, rates, rounds, modes)


def cases_of(args: Namespace, device: torch.device) -> list[Case]:
    default = DEFAULTS[args.verb]["quick" if args.quick else device.type]
    shapes, m = args.model_shape or default["shapes"], args.m or default["m"]
    usual = models.default_bases(device, args.verb == "experts")
    bases, compute = args.base or default.get("base") or usual, usual[0]
    known = EXPERTS if args.verb == "experts" else SHAPES
    if odd := [shape for shape in shapes if shape not in known]:
        raise UsageError(f"bench {args.verb}: --model-shape must be of {', '.join(known)}, got {', '.join(odd)}")
    if args.verb == "experts":
        common.check_experts("bench experts", bases, args.dropout)
    if args.verb == "decode":
        m = [0]
        if any(base not in ("nf4", "fp4") for base in bases):
            raise UsageError("bench decode: --base must be nf4 or fp4")
    found: list[Case] = []
    for shape in shapes:
        for base in bases:
            for r in args.r:
                for dropout in args.dropout:
                    for M in m:
                        fields: dict[str, Any] = {"M": M, "r": r, "base": base, "dropout": dropout}
                        fields |= {"checkpointing": args.checkpointing, "compute": compute}
                        found += _cases(args.verb, shape, fields)
    return found


def _cases(verb: str, shape: str, fields: dict[str, Any]) -> Iterable[Case]:
    if verb in ("linear", "decode"):
        return [replace(case, verb=verb) for case in linear_cases(shape, **fields)]
    return [Case(verb, shape, verb, **fields)]


def modes_of(args: Namespace) -> list[str]:
    """All, but backward alone if there is little time; generation has no backward."""
    if args.verb == "generate":
        return ["forward"]
    return args.modes or [mode for mode in protocol.MODES if not (args.quick and mode == "backward")]


def providers_of(args: Namespace) -> list[Provider]:
    """All, but those that compile only if they are asked for or there is time."""
    names = args.providers or [name for name in PROVIDERS if not (args.quick and name.endswith("+compile"))]
    return [PROVIDERS[name] for name in names]


def write(out: Path, verb: str, report: dict, rows: records.Rows) -> None:
    records.write_rows(out / f"{verb}.csv", rows)
    records.write_json(out / f"{verb}.json", report)


def show(args: Namespace, report: dict, rows: records.Rows) -> None:
    if args.json:
        print(records.to_json(report | {"rows": rows}))
        return
    if args.csv:
        print(records.to_csv(rows), end="")
        return
    console = common.console(150)
    if args.verb == "decode":
        console.print(decode_table(rows, report))
    else:
        for case in dict.fromkeys(map(case_key, rows)):
            console.print(table([row for row in rows if case_key(row) == case and not row["error"]]), "")
        console.print(CAPTION)
    for (provider, reason), row in {(row["provider"], row["error"]): row for row in rows if row["error"]}.items():
        console.print(f"not timed: {label(provider)}: {reason}", style="bold red" if is_refused(row) else None)


CAPTION = """\
Times are medians. Speed-up: over PEFT, and of frozen: relative to the frozen layer, both of the step (or of the last
mode measured), medians of ratios of interleaved rounds. Roofline: the least time possible by the rates measured in this
run, over the time. Launches: kernels; on a CPU, dispatched operators."""


def table(rows: records.Rows) -> Table:
    """Of one case: a row a provider with the times of all modes, and what its step says."""
    heads = ("provider", *protocol.MODES, "speed-up", "of frozen", "TFLOP/s", "GB/s", "roofline")
    cells = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        by_mode = {row["mode"]: row for row in rows if row["provider"] == name}
        last = by_mode.get("step") or next(reversed(by_mode.values()))
        times = [duration(by_mode[mode]["p50"]) if mode in by_mode else "-" for mode in protocol.MODES]
        ratios = [number(last[ratio], unit="x") for ratio in ("speedup", "of_limit")]
        rates = [number(last["tflops"]), number(last["gbytes"]), percent(last["roofline"])]
        memory = [megabytes(last["saved_bytes"]), megabytes(last["peak_bytes"])]
        cells.append((label(name), *times, *ratios, *rates, *memory, str(last["launches"] or "-")))
    title = case_title(rows[0]) if rows else "nothing was timed"
    return terminal(title, (*heads, "saved MB", "peak MB", "launches"), cells)


def decode_table(rows: records.Rows, report: dict) -> Table:
    heads = ("weight", "provider", "mode", "time", "GB/s", "speed-up", "of limit")
    cells = [
        (
            f"{row['shape']} {row['layer']} {row['base']} [{row['N']}, {row['K']}]", row["provider"], row["mode"],
            duration(row["p50"]), number(row["gbytes"]), *(number(row[x], unit="x") for x in ("speedup", "of_limit")),
        )
        for row in rows
        if not row["error"]
    ]  # fmt: skip
    caption = "Speed-up: against bitsandbytes. Of limit: against a copy of as many bytes."
    return terminal(f"decode, {report['environment']['device']}", heads, cells, caption, words=3)


def label(provider: str) -> str:
    return PROVIDERS[provider].label if provider in PROVIDERS else provider


def is_refused(row: dict) -> bool:
    """Whether a provider failed or was wrong, rather than missing or not meant for the case."""
    return bool(row["error"]) and row["error"].startswith(("wrong", "failed"))


def case_key(row: dict) -> tuple:
    return tuple(row[name] for name in ("shape", "layer", "M", "r", "base", "dropout", "checkpointing"))


def case_title(row: dict) -> str:
    size = f" [{row['N']}, {row['K']}]" if row["N"] else ""
    more = f", dropout {row['dropout']:g}" * bool(row["dropout"]) + ", checkpointing" * bool(row["checkpointing"])
    return f"{row['shape']} {row['layer']}{size}, {row['base']}, M={row['M']}, r={row['r']}{more}"
