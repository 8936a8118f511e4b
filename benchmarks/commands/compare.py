"""``fastlora compare``: the same fine-tuning with PEFT and with PEFT + fastlora, step by step in turn."""

import math
import sys
from argparse import Namespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor, nn

from fastlora.benchmarks import pictures, protocol, tables, training
from fastlora.benchmarks.arguments import INTERRUPTED
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.commands import common
from fastlora.benchmarks.environment import environment, keep_freed_memory
from fastlora.benchmarks.records import to_json, write_json
from fastlora.benchmarks.tables import megabytes, number
from fastlora.benchmarks.training import Measurements

VERSION = 1  # of report.json


def run(args: Namespace) -> int:
    """Measure every case, keeping DIR/report.json up to date; then draw DIR/compare.png and print the tables."""
    device = common.device_of(args.device)
    with_experts = models.has_experts(args.model)
    args.base = args.base or models.default_bases(device, with_experts)
    text = common.read_text(args.text)
    common.check_bases(args.base)
    if with_experts:
        common.check_experts(f"--model {args.model} has experts", args.base, args.dropout)
    common.make_folder(args.out)

    keep_freed_memory()
    report: dict[str, Any] = {
        "version": VERSION,
        "complete": False,
        "environment": environment(device),
        "settings": _settings(args, device),
        "model": None,
        "cases": [],
    }
    notes = Console(file=sys.stderr, highlight=False)
    interrupted = False
    try:
        with common.progress(notes) as progress:
            _measure(args, device, text, report, progress)
        report["complete"] = True
    except KeyboardInterrupt:
        interrupted = True
    write_json(args.out / "report.json", report)
    if not interrupted:
        pictures.compare(report, args.out / "compare.png")

    if args.json:
        print(to_json(report))
    else:
        console = common.console(130)
        for case in filter(lambda case: case["providers"], report["cases"]):
            console.print(_table(report, case), "")
    if interrupted:
        notes.print(f"Interrupted. What was measured so far is in {args.out / 'report.json'}", soft_wrap=True)
        return INTERRUPTED
    notes.print(f"Written: {args.out / 'report.json'}, {args.out / 'compare.png'}", soft_wrap=True)
    return 0


def _measure(args: Namespace, device: torch.device, text: str | None, report: dict, progress: Progress) -> None:
    """Fill in report["model"] and report["cases"], writing the report after every round."""
    providers = 5 if args.compile else 3
    task = progress.add_task("", total=len(args.base) * len(args.dropout) * providers * (1 + args.steps))
    for base in args.base:
        progress.update(task, description=f"{base}: loading the model")
        model, data, label = common.load(args, base, text, device, args.steps)
        if report["model"] is None:
            report["model"] = label
            picture = args.out / "compare.png"
            picture.unlink(missing_ok=True)  # one of another run must not stand beside this report
            if label.startswith("RANDOM"):
                progress.console.print(f"No trained weights: {label}", style="bold red")
        for dropout in args.dropout:
            case = {"base": base, "dropout": dropout, "checkpointing": args.checkpointing}
            report["cases"].append({**case, "trainable_parameters": None, "providers": {}})
            _run_case(args, model, data, report, progress, task)
            common.free(args.compile)
        del model
        common.free(args.compile)


def _run_case(
    args: Namespace, model: nn.Module, data: list[Tensor], report: dict, progress: Progress, task: TaskID
) -> None:
    """Train with every provider, keeping the report's last case up to date, whatever ends the training."""
    case = report["cases"][-1]
    trainers = training.make_trainers(
        model, args.r, case["dropout"], args.checkpointing, args.compile, args.lr, args.seed
    )
    results = {trainer.name: trainer.results for trainer in trainers}
    adapted = next(trainer.model for trainer in trainers if trainer.name == "peft")
    case["trainable_parameters"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    try:
        for i, (name, _) in enumerate(training.train(trainers, data, args.seed), start=1):
            round = (i - 1) // len(trainers)
            phase = f"round {round}/{args.steps}" if round else "memory"
            progress.update(task, advance=1, description=f"{tables.case_name(case)}: {phase}, {tables.NAMES[name]}")
            if i % len(trainers) == 0:
                case["providers"] = provider_records(results, data[0].numel())
                write_json(args.out / "report.json", report)
    finally:
        case["providers"] = provider_records(results, data[0].numel())


def _settings(args: Namespace, device: torch.device) -> dict:
    """The arguments, without the folders of this machine."""
    return {
        "base": args.base,
        "dropout": args.dropout,
        "r": args.r,
        "lora_alpha": 2 * args.r,
        "target_modules": "all-linear",
        "optimizer": "AdamW",
        "lr": args.lr,
        "batch": args.batch,
        "tokens": args.tokens,
        "steps": args.steps,
        "warmup": training.WARMUP,
        "checkpointing": args.checkpointing,
        "compile": args.compile,
        "text": args.text.name if args.text else "Python documentation (pydoc_data.topics)",
        "seed": args.seed,
        "device": device.type,
    }


def provider_records(results: dict[str, Measurements], tokens_per_step: int) -> dict[str, dict]:
    """What the report says of each provider of one case. What could not be measured yet is None."""
    peft = results["peft"]
    peft_p50 = protocol.quantiles([peft.timed])["p50"]
    return {
        name: {
            **(times := protocol.quantiles([measured.timed])),
            "tokens_per_second": _ratio(tokens_per_step, times["p50"]),
            "speedup": _ratio(peft_p50, times["p50"]),
            "speedup_paired": training.speedup(peft, measured),
            "saved_bytes": measured.saved_bytes or None,
            "saved_ratio": _ratio(measured.saved_bytes, peft.saved_bytes),
            "peak_bytes": measured.peak_bytes or None,
            "peak_ratio": _ratio(measured.peak_bytes, peft.peak_bytes),
            "final_loss": measured.losses[-1] if measured.losses else None,
            "max_loss_difference": None if name in ("frozen", "peft") else _max_difference(measured, peft),
            "step_seconds": list(measured.step_seconds),
            "losses": list(measured.losses),
        }
        for name, measured in results.items()
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _max_difference(one: Measurements, other: Measurements) -> float | None:
    differences = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=False)]
    return max(differences) if differences and all(map(math.isfinite, differences)) else None


def _table(report: dict, case: dict) -> Table:
    """One case: a row per provider, ratios relative to PEFT."""
    caption = "x: relative to PEFT (above 1 is faster, below 1 is less memory). MB = 10^6 bytes."
    if case["dropout"]:
        caption += "\nEach provider draws its own dropout masks, so losses differ by more than rounding."
    sizes = f"{tables.setting_line(report['settings'])}, {report['environment']['device']}"
    heads = ["provider", "s/step p50\n(p20 - p80)", "tokens/s", "speed-up\n(paired)"]
    heads += ["saved for\nbackward, MB", "peak, MB", "final\nloss", "largest loss\ndifference"]
    rows = [
        (
            tables.NAMES[name],
            number(p["p50"], ".3f") + (f"\n({p['p20']:.3f} - {p['p80']:.3f})" if p["p50"] else ""),
            number(p["tokens_per_second"], ",.0f"),
            f"{number(p['speedup'], '.2f', 'x')}\n({number(p['speedup_paired'], '.2f', 'x')})",
            *(f"{megabytes(p[f'{k}_bytes'])}\n{number(p[f'{k}_ratio'], '.2f', 'x')}" for k in ("saved", "peak")),
            *(number(p[name], ".4f") for name in ("final_loss", "max_loss_difference")),
        )
        for name, p in case["providers"].items()
    ]
    title = f"{report['model']}: {tables.case_name(case)}\n{sizes}"
    return tables.terminal(title, heads, rows, caption)
