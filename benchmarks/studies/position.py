"""Memory by the position of the one layer that trains, with and without checkpointing.

One block after another of the model gets adapters on its linear layers, and nothing else trains. Backward runs from
the loss down to that block, so what forward keeps is what stands above it; with checkpointing, as trainers switch it
on, the input of every block is kept wherever the adapters are."""

import sys

from matplotlib.figure import Figure

from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, column, megabytes, trend
from fastlora.benchmarks.tables import NAMES

R = 16


def measure(setup: Setup) -> list[Row]:
    last = setup.model.config.num_hidden_layers - 1
    steps = 2 if setup.quick else 4
    positions = sorted({round(i * last / steps) for i in range(steps + 1)})
    rows = []
    task = setup.progress.add_task("", total=4 * len(positions))
    for checkpointing in (False, True):
        for layer in positions:
            made = setup.trainers(
                R, checkpointing=checkpointing, target_modules=list(common.MODULES), layers_to_transform=[layer]
            )
            for name in ("peft", "fastlora"):
                setup.progress.update(task, description=f"layer {layer}{', checkpointing' * checkpointing}")
                setup.measure_memory(made[name])
                rows.append(
                    {
                        "checkpointing": "yes" if checkpointing else "no",
                        "layer": layer,
                        "provider": name,
                        **common.memory(made[name]),
                    }
                )
                setup.progress.update(task, advance=1)
    setup.progress.remove_task(task)
    return rows


def finding(rows: list[Row]) -> str:
    layers = column(rows, "layer", checkpointing="no", provider="peft")
    return (
        f"As the one block that trains moves up from {layers[0]} to {layers[-1]}, what is kept for backward without "
        f"checkpointing {_moves(rows, 'no')}. With checkpointing it {_moves(rows, 'yes')}."
    )


def _moves(rows: list[Row], checkpointing: str) -> str:
    words: dict[str, list[str]] = {}
    for provider, name in (("peft", "PEFT"), ("fastlora", "fastlora")):
        saved = column(rows, "saved_bytes", checkpointing=checkpointing, provider=provider)
        first, last = megabytes(saved[0]), megabytes(saved[-1])
        does = trend(saved)
        sizes = f"at {first}" if does == "is flat" else f"from {first} to {last}"
        words.setdefault(does, []).append(f"{sizes} with {name}")
    return " and ".join(f"{does} {' and '.join(sizes)}" for does, sizes in words.items())


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(10.5, 4.4)
    does = {c: trend(column(rows, "saved_bytes", checkpointing=c, provider="peft")) for c in ("no", "yes")}
    figure.suptitle(f"Memory {does['no']} with the position of the trained layer; with checkpointing it {does['yes']}")
    for axes, (kind, label) in zip(
        figure.subplots(1, 2),
        {"saved_bytes": "saved for backward", "peak_bytes": "peak of a step"}.items(),
        strict=True,
    ):
        for name in ("peft", "fastlora"):
            for checkpointing, line in (("no", "-o"), ("yes", "--s")):
                where = {"checkpointing": checkpointing, "provider": name}
                axes.plot(
                    column(rows, "layer", **where),
                    [size / 1e6 for size in column(rows, kind, **where)],
                    line,
                    color=COLOURS[name],
                    linewidth=3.5 if name == "peft" else 1.5,
                    alpha=0.7 if name == "peft" else 1,
                    markersize=7 if name == "peft" else 4,
                    label=f"{NAMES[name]}{', checkpointing' * (checkpointing == 'yes')}",
                )
        axes.set_xlabel("block that trains (0 is the first)")
        axes.set_ylabel(f"{label}, MB")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


STUDY = Study(
    name="position",
    title="Memory by position of the trained layer",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "checkpointing": "checkpointing",
        "layer": "layer",
        "provider": "provider",
        "trainable_parameters": "parameters",
        "saved_bytes": "saved, MB",
        "peak_bytes": "peak, MB",
    },
)

if __name__ == "__main__":
    sys.exit(common.main("position"))
