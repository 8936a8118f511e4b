"""``fastlora compare``: the same fine-tuning with PEFT and with PEFT + fastlora, step by step in turn."""

import contextlib
import gc
import importlib.util
import io
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from fastlora.cli import INTERRUPTED, models, training
from fastlora.cli.arguments import UsageError
from fastlora.cli.figure import draw
from fastlora.cli.info import environment
from fastlora.cli.report import NAMES, VERSION, WARMUP, case_name, provider_records, table, to_json, write_report


def run(args: Namespace) -> int:
    """Measure every case, keeping DIR/report.json up to date; then draw DIR/compare.png and print the tables."""
    device = _device(args.device)
    text = _read_text(args.text)
    if any(base not in models.DENSE for base in args.base) and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--base nf4 and fp4 need bitsandbytes, which is not installed")
    _make_folder(args.out)

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
        with _progress(notes) as progress:
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
        console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
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
        model, data, label = _load(args, base, text, device)
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
            _free(args.compile)
        del model
        _free(args.compile)


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


def _load(args: Namespace, base: str, text: str | None, device: torch.device) -> tuple[nn.Module, list[Tensor], str]:
    """The model in the form of the base, the batches to train on, and the model's label."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bar
            loaded = models.load_model(args.model, models.DENSE.get(base, torch.bfloat16))
        data = models.batches(loaded, text, args.batch, args.tokens, args.steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return models.to_base(loaded.model.to(device), base), data, loaded.label


def _free(compiled: bool) -> None:
    """Let go of the trainers and models that nothing refers to any more: they are full of reference cycles."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--text {path} cannot be read: {reason}") from error


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be used: {error.strerror}") from error


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


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, refresh_per_second=2, speed_estimate_period=300)
