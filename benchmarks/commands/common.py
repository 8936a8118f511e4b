"""What commands that run a model have in common: the model, the text, the device, the progress bar."""

import gc
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from fastlora.benchmarks.arguments import UsageError
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.environment import refuse_changed_code


def load(
    args: Namespace, base: str, text: str | None, device: torch.device, steps: int
) -> tuple[nn.Module, list[Tensor], str]:
    """The model in the form of the base, the batches to train on, and the model's label."""
    compute = models.compute_dtype(device)
    try:
        loaded = models.load_model(args.model, models.DENSE.get(base, compute))
        data = models.batches(loaded, text, args.batch, args.tokens, steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return models.to_base(loaded.model.to(device), base, compute), data, loaded.label


def check_bases(bases: list[str]) -> None:
    if any(base not in models.DENSE for base in bases) and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--base nf4 and fp4 need bitsandbytes, which is not installed")


def check_experts(of: str, bases: list[str], dropouts: list[float]) -> None:
    """Only what PEFT trains too can be compared on experts; the error begins with ``of``, which says where they are."""
    if any(dropouts) or any(base not in models.DENSE for base in bases):
        reason = "PEFT has no dropout there, and leaves out an adapter of 4-bit experts"
        raise UsageError(f"{of}: --dropout must be 0 and --base dense: {reason}")


def free(compiled: bool) -> None:
    """Free the trainers and models that nothing refers to any more, which reference cycles would keep."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--text {path} cannot be read: {reason}") from error


def make_folder(path: Path) -> None:
    refuse_changed_code(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be used: {error.strerror}") from error


def console(width: int) -> Console:
    """For results: as wide as the terminal, of this width elsewhere."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, refresh_per_second=2, speed_estimate_period=300)
