"""``fastlora tune``: which plans and tiles are fastest on this GPU, for the layers of a model."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastlora import costs, plans
from fastlora.benchmarks import tuning
from fastlora.benchmarks.arguments import INTERRUPTED, UsageError
from fastlora.benchmarks.cases.ops import OpCase, op_cases
from fastlora.benchmarks.cases.shapes import SHAPES, Shape
from fastlora.benchmarks.commands import common
from fastlora.benchmarks.environment import environment
from fastlora.benchmarks.tables import terminal

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "nf4": torch.bfloat16}


def run(args: Namespace) -> int:
    problems = _problems(args)
    if args.dry_run:
        return _list(args, problems)
    device, name = gpu()
    path = args.out or plans.cache_file()
    notes = Console(file=sys.stderr, highlight=False)
    tables = _tables(path, notes)
    tuner = tuning.Tuner(device, tuning.gpu_clock, name)
    interrupted = False
    try:
        with _progress(notes) as progress:
            task = progress.add_task("", total=None)
            for done, total, text in tuner.run(problems):
                progress.update(task, completed=done, total=total, description=text)
    except KeyboardInterrupt:
        interrupted = True
    found = tuner.found
    found.table.environment = environment(device)
    try:
        plans.write_tables(path, tables | {name: found.table})
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error.strerror}") from error
    if args.json:
        print(json.dumps(_report(name, found), indent=1, allow_nan=False))
    else:
        _print(name, found)
    state = "Interrupted; what was measured so far is" if interrupted else "Written"
    notes.print(f"{state}: {path}", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


def gpu() -> tuple[torch.device, str]:
    """The GPU to measure, and its name."""
    if not torch.cuda.is_available():
        raise UsageError(
            "needs a GPU that torch sees (a CUDA or ROCm build of torch, and its driver); --dry-run does not"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_name(device)


def _problems(args: Namespace) -> list[OpCase]:
    if not args.model and not args.shape:
        raise UsageError("one of --model and --shape must say what to tune for")
    shapes, siblings = list(args.shape), []
    for name in args.model:
        shape = _shape(name)
        shapes += [(M, N, K) for M in args.tokens for N, K in dict.fromkeys(shape.linears().values())]
        siblings += [(M, Ns, K) for M in args.tokens for Ns, K in shape.groups()]
    found: list[OpCase] = []
    for dtype in dict.fromkeys(DTYPES[base] for base in args.base):
        four_bit = dtype == torch.bfloat16 and "nf4" in args.base
        found += op_cases(shapes, args.r, dtype, four_bit, siblings)
    return found


def _shape(name: str) -> Shape:
    """Of a model of this name, or of the config.json in this folder."""
    if name in SHAPES:
        return SHAPES[name]
    try:
        config = json.loads((Path(name) / "config.json").read_bytes())
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        shape = Shape(config["hidden_size"], config["intermediate_size"], heads, kv_heads, config.get("head_dim") or 0)
        shape.linears()  # fails unless all of them are numbers
        return shape
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = f"--model must be of {', '.join(SHAPES)}, or a folder with a config.json of a Llama-style model"
        raise UsageError(f"{known}, got {name!r}") from error


def _tables(path: Path, notes: Console) -> dict[str, plans.Table]:
    """What the file says of other devices, and of other problems."""
    try:
        return plans.read_tables(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.print(f"{error}; it will be replaced", soft_wrap=True)
        return {}


def _list(args: Namespace, problems: list[OpCase]) -> int:
    """What would be measured, and what the model predicts for it."""
    name = gpu()[1] if torch.cuda.is_available() else "H100"
    rates = plans.table(name).rates or costs.modelled(name)
    rows = []
    for case in problems:
        for plan in case.plans:
            cost = costs.predict(case.op, plan, case.problem, rates)
            chosen = len(case.plans) == 1 or plan == plans.choose(case.op, case.problem, name)
            rows.append({"op": case.op, "problem": case.name, "plan": plan, "chosen": chosen, **asdict(cost)})
    if args.json:
        print(json.dumps({"device": name, "rates": rates.to_json(), "plans": rows}, indent=1))
        return 0
    kind = "measured" if rates.measured else "modelled"
    heads, cells = ("op", "problem", "plan", "GFLOP", "MB", "µs", "bound"), []
    for row in rows:
        plan = f"{row['plan']} (chosen)" if row["chosen"] and row["plan"] else row["plan"]
        numbers = (
            f"{row['flops'] / 1e9:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds'] * 1e6:.1f}",
            row["bound"],
        )
        cells.append((row["op"], row["problem"], plan, *numbers))
    title = f"{name}, by {kind} rates: nothing was run"
    common.console(150).print(terminal(title, heads, cells, words=3))
    return 0


def _print(name: str, found: tuning.Tuning) -> None:
    rates = found.table.rates
    if rates is not None:
        print(
            f"{name}: copy {rates.copy / 1e12:.2f} TB/s, GEMM {rates.gemm / 1e12:.0f} TFLOP/s, "
            f"ours {rates.kernel_gemm / 1e12:.0f} TFLOP/s, a launch {rates.launch * 1e6:.1f} µs"
        )
    heads, cells = ("op", "problems", "before", "after", "µs before", "µs after", "faster"), []
    for change in found.changes:
        seconds = change.seconds_before, change.seconds_after
        times = (f"{s * 1e6:.1f}" if s < math.inf else "wrong" for s in seconds)
        faster = f"{seconds[0] / seconds[1]:.2f}x"
        cells.append((change.op, change.problems, change.before, change.after, *times, faster))
    if found.changes:
        common.console(150).print(terminal("What changed", heads, cells, words=4))
    else:
        print("Nothing changed: what is in use is fastest, or as fast.")
    wrong = [line for line in found.rejected if "error" in line.partition(": ")[2]]
    for line in wrong:
        print(f"not timed: {line}", file=sys.stderr)


def _report(name: str, found: tuning.Tuning) -> dict[str, Any]:
    def finite(change: tuning.Change) -> dict:
        slow = change.seconds_before == math.inf
        return asdict(replace(change, seconds_before=0.0) if slow else change) | (
            {"seconds_before": None} if slow else {}
        )

    return {
        "device": name,
        "environment": found.table.environment,
        "rates": found.table.rates and found.table.rates.to_json(),
        "changes": [finite(change) for change in found.changes],
        "rejected": found.rejected,
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
