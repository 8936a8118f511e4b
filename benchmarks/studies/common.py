"""What the studies share: the command, the model that they train, rows of measurements, and the files they write."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fastlora.benchmarks import pictures, protocol, training
from fastlora.benchmarks.arguments import INTERRUPTED, UsageError, _integer, _Parser, quieten
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.commands import common
from fastlora.benchmarks.environment import environment, keep_freed_memory
from fastlora.benchmarks.ledger import state_bytes
from fastlora.benchmarks.records import default_folder, read_rows, to_json, write_json, write_rows
from fastlora.benchmarks.tables import NAMES, power, terminal

STUDIES = (
    *("position", "rank", "many_adapters", "targets", "bases", "optimizers", "small_updates", "methods"),
    *("experts", "mixed_batch", "architectures"),
)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # a Llama block's linear layers
VERSION = 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A question, how it is measured, and what is made of the rows: words, a picture, a table."""

    name: str
    title: str
    doc: str
    measure: Callable[["Setup"], list[Row]]
    finding: Callable[[list[Row]], str]  # two sentences that follow from the rows, whatever they say
    draw: Callable[[list[Row], Figure], None]
    columns: dict[str, str]  # of the table: column of the CSV, heading
    needs_model: bool = True


def load(name: str) -> Study:
    return importlib.import_module(f"fastlora.benchmarks.studies.{name}").STUDY


@dataclass
class Setup:
    """What a study is given: the frozen bf16 model, batches of text, and how thorough to be."""

    model: Any  # None for a study that needs none
    label: str
    data: list[Tensor]  # a batch a round
    device: torch.device
    environment: dict  # as it was before the first result was written, which changes the checkout
    quick: bool
    seed: int
    progress: Progress

    def trainers(self, r: int, *, base: nn.Module | None = None, **more: Any) -> dict[str, training.Trainer]:
        """The frozen model, PEFT and PEFT + fastlora; further arguments as `training.make_trainers` takes them."""
        defaults = {"dropout": 0.0, "checkpointing": False, "compiled": False, "lr": 1e-4, "seed": self.seed}
        made = training.make_trainers(self.model if base is None else base, r, **{**defaults, **more})
        return {trainer.name: trainer for trainer in made}

    def train(self, trainers: list[training.Trainer]) -> None:
        """Measure the memory of each, then take a step of each in turn, a round for every batch; one is warm-up."""
        task = self.progress.add_task("", total=len(trainers) * (1 + len(self.data)))
        for i, _ in enumerate(training.train(trainers, self.data, self.seed)):
            round = i // len(trainers)
            phase = f"round {round}/{len(self.data)}" if round else "memory"
            self.progress.update(task, advance=1, description=phase)
        self.progress.remove_task(task)

    def measure_memory(self, trainer: training.Trainer) -> None:
        torch.manual_seed(self.seed)
        trainer.measure_memory(self.data[0].to(self.device))


def without_frozen(made: dict[Any, dict[str, training.Trainer]]) -> list[training.Trainer]:
    """PEFT's and fastlora's of every case: they all share one frozen model."""
    return [trainer for trainers in made.values() for name, trainer in trainers.items() if name != "frozen"]


def measured(trainer: training.Trainer, frozen: training.Trainer) -> Row:
    return {**memory(trainer), **times(trainer, frozen)}


def memory(trainer: training.Trainer) -> Row:
    """Exact bytes of what trains, and measured bytes of what a step keeps."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return {
        "trainable_parameters": sum(p.numel() for p in trained),
        "adapters_bytes": sum(p.nbytes for p in trained),
        "gradients_bytes": trainer.results.gradient_bytes,
        "optimizer_bytes": state_bytes(trainer.optimizer),
        "saved_bytes": trainer.results.saved_bytes,
        "peak_bytes": trainer.results.peak_bytes,
    }


def times(trainer: training.Trainer, frozen: training.Trainer) -> Row:
    """Seconds a step, and the median over rounds of the step's time over the frozen model's in the same round."""
    return {**step_seconds([trainer.results.timed]), "over_frozen": ratio(trainer, frozen)}


def step_seconds(turns: protocol.Turns) -> Row:
    return {f"step_{p}_seconds": seconds for p, seconds in protocol.quantiles(turns).items()}


def ratio(trainer: training.Trainer, reference: training.Trainer) -> float | None:
    """The median over rounds of the ratio of the two steps of one round."""
    return training.speedup(trainer.results, reference.results)


def expected_parameters(model: nn.Module, targets: Sequence[str], r: int) -> int:
    """r (in + out) for every layer of these names: what LoRA's definition says."""
    layers = [m for name, m in model.named_modules() if name.split(".")[-1] in targets]
    return sum(r * (layer.in_features + layer.out_features) for layer in layers)  # type: ignore[operator]


def pick(rows: list[Row], **where: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def column(rows: list[Row], name: str, **where: Any) -> list[Any]:
    return [row[name] for row in pick(rows, **where)]


def trend(values: Sequence[float], flat: float = 0.01) -> str:
    """What values do from first to last, in one word or two."""
    if max(values) <= (1 + flat) * min(values):
        return "is flat"
    pairs = list(pairwise(values))
    if all(a >= b for a, b in pairs):
        return "falls"
    return "rises" if all(a <= b for a, b in pairs) else "goes up and down"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.2g} MB"


def change(first: float, last: float) -> str:
    """What becomes of a number of bytes, to follow a subject."""
    if megabytes(first) == megabytes(last):
        return f"stays at {megabytes(first)}"
    return f"goes from {megabytes(first)} to {megabytes(last)}"


def paired_bars(axes: Axes, values: dict[str, list[float]], form: str) -> None:
    """For each place two bars side by side, PEFT's and fastlora's, with their values inside."""
    for offset, name in ((-0.2, "peft"), (0.2, "fastlora")):
        places = [i + offset for i in range(len(values[name]))]
        bars = axes.bar(places, values[name], width=0.38, color=pictures.COLOURS[name], label=NAMES[name])
        color = "white" if name == "fastlora" else "black"
        axes.bar_label(bars, fmt=form, label_type="center", fontsize=9, color=color)


def cell(name: str, value: Any) -> str:
    """A value of a CSV as a reader wants it; headings say MB for bytes."""
    if value is None:
        return "-"
    if name == "magnitude_of_B":
        return power(value)
    if name == "provider":
        return NAMES.get(value, value)
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.0f}" if value >= 1e7 or value == 0 else f"{value / 1e6:.2f}"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def paths(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """A study's rows, what is said of them, and their picture."""
    return folder / f"{name}.csv", folder / f"{name}.json", folder / f"{name}.png"


def draw(study: Study, folder: Path) -> None:
    """The picture of the rows that are in the folder."""
    data, _, picture = paths(folder, study.name)
    figure = Figure(dpi=150, layout="constrained")
    study.draw(read_rows(data), figure)
    pictures.save(figure, picture, data.read_text())


def main(*names: str, argv: Sequence[str] | None = None) -> int:
    """Run studies and return the exit code. Raises SystemExit for arguments that cannot be used."""
    studies = [load(name) for name in names]
    parser = _parser(studies)
    args = parser.parse_args(argv)
    quieten()
    keep_freed_memory()
    notes = Console(file=sys.stderr, highlight=False)
    try:
        device = common.device_of(args.device)
        folder = args.out or (Path("fastlora-studies") if args.quick else default_folder(device) / "studies")
        common.make_folder(folder)
        reports = []
        with common.progress(notes) as progress:
            task = progress.add_task("loading the model", total=len(studies))
            setup = _setup(args, device, progress, any(study.needs_model for study in studies))
            for study in studies:
                progress.update(task, description=study.name)
                reports.append(_run(study, setup, folder))
                progress.update(task, advance=1)
                common.free(compiled=False)
    except UsageError as error:
        return parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.exit(1, f"{parser.prog}: out of memory: try fewer --tokens, or a smaller --model\n")
    except KeyboardInterrupt:
        notes.print("Interrupted: studies that had not ended have written nothing.")
        return INTERRUPTED
    if args.json:
        print(to_json(reports[0] if len(reports) == 1 else {report["study"]: report for report in reports}))
    else:
        _print(studies, reports)
    notes.print(f"Written: {', '.join(names)} (.csv, .json, .png) in {folder}", soft_wrap=True)
    return 0


def _run(study: Study, setup: Setup, folder: Path) -> dict:
    data, report_file, picture = paths(folder, study.name)
    rows = study.measure(setup)
    picture.unlink(missing_ok=True)  # one of another run must not stand beside these rows
    write_rows(data, rows)
    rows = read_rows(data)  # with the digits that the file has
    report = {
        "version": VERSION,
        "study": study.name,
        "environment": setup.environment,
        "settings": {
            "model": setup.label if study.needs_model else None,
            "batch": setup.data[0].shape[0] if study.needs_model else None,
            "tokens": setup.data[0].shape[1] if study.needs_model else None,
            "rounds": len(setup.data) if study.needs_model else None,
            "quick": setup.quick,
            "seed": setup.seed,
        },
        "finding": study.finding(rows),
    }
    write_json(report_file, report)
    draw(study, folder)
    return {**report, "rows": rows}


def _setup(args: argparse.Namespace, device: torch.device, progress: Progress, needs_model: bool) -> Setup:
    quick = args.quick
    setup = Setup(None, "", [], device, environment(device), quick, args.seed, progress)
    if not needs_model:
        return setup
    name = args.model or ("llama-2-7b" if device.type == "cuda" else "smollm2")
    common.check_bases(["nf4"])
    tokens = args.tokens or (64 if quick else 1024 if device.type == "cuda" else 256)
    try:
        loaded = models.load_model(name, device=device)
        setup.data = models.batches(loaded, None, 1, tokens, args.rounds or (3 if quick else 7))
    except ValueError as error:
        raise UsageError(str(error)) from error
    setup.model, setup.label = models.to_base(loaded.model, "bf16"), loaded.label
    return setup


def _print(studies: list[Study], reports: list[dict]) -> None:
    console = common.console(130)
    for study, report in zip(studies, reports, strict=True):
        rows = [[cell(name, row[name]) for name in study.columns] for row in report["rows"]]
        words = list(study.columns).index("provider") + 1 if "provider" in study.columns else 0
        console.print(terminal(study.title, list(study.columns.values()), rows, words=words), report["finding"], "")


def _parser(studies: list[Study]) -> argparse.ArgumentParser:
    alone = studies[0] if len(studies) == 1 else None
    program = f"python -m benchmarks.studies{f'.{alone.name}' if alone else ''}"
    parser = _Parser(
        prog=program,
        description=alone.doc if alone else "All studies: " + "; ".join(s.title for s in studies) + ".",
        epilog=f"example:\n  {program} --quick --out my-results",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    if any(study.needs_model for study in studies):
        add(
            "--model",
            help="smollm2, smollm2-random, llama-2-7b (random weights), or the folder of a causal language model whose "
            "layers have Llama's names (default: llama-2-7b on a GPU, otherwise smollm2)",
        )
        add("--tokens", type=_integer(2), help="tokens a step (default: 1024 on a GPU, otherwise 256; --quick: 64)")
        add("--rounds", type=_integer(2), help="steps of each; the first is not timed (default: 7; --quick: 3)")
    add("--quick", action="store_true", help="fewer cases, shorter sequences: to see that it works")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: benchmarks/results/<device>/studies; --quick: ./fastlora-studies",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--seed", type=_integer(0), default=0, help="of the adapters (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    return parser
