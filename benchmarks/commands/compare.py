"""``fastlora compare``: the same fine-tuning with PEFT and with PEFT + fastlora, step by step in turn."""

import sys
from argparse import Namespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor, nn

from fastlora.benchmarks import training
from fastlora.benchmarks.arguments import INTERRUPTED
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.commands import common
from fastlora.benchmarks.commands.figure import draw
from fastlora.benchmarks.commands.report import (
    NAMES,
    VERSION,
    WARMUP,
    case_name,
    provider_records,
    table,
    to_json,
    write_report,
)
from fastlora.benchmarks.environment import environment


def run(args: Namespace) -> int:
    """Measure every case, keeping DIR/report.json up to date; then draw DIR/compare.png and print the tables."""
    device = common.device_of(args.device)
    args.base = args.base or models.default_bases(device)
    text = common.read_text(args.text)
    common.check_bases(args.base)
    common.make_folder(args.out)

    training.keep_freed_memory()
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
    write_report(report, args.out / "report.json")
    if not interrupted:
        draw(report, args.out / "compare.png")

    if args.json:
        print(to_json(report))
    else:
        console = common.console(130)
        for case in filter(lambda case: case["providers"], report["cases"]):
            console.print(table(report, case), "")
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
            progress.update(task, advance=1, description=f"{case_name(case)}: {phase}, {NAMES[name]}")
            if i % len(trainers) == 0:
                case["providers"] = provider_records(results, data[0].numel())
                write_report(report, args.out / "report.json")
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
        "warmup": WARMUP,
        "checkpointing": args.checkpointing,
        "compile": args.compile,
        "text": args.text.name if args.text else "Python documentation (pydoc_data.topics)",
        "seed": args.seed,
        "device": device.type,
    }
