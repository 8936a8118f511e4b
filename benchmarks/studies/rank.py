"""Rank from 1 to 256: what it costs in parameters, in memory and in the time of a step.

Adapters of one rank on every linear layer, AdamW, the providers' steps in turn. Parameters, their gradients and the
optimizer's state are proportional to the rank; the activations kept for backward hardly depend on it."""

import sys

from matplotlib.figure import Figure

from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, column, megabytes, pick
from fastlora.benchmarks.tables import NAMES


def measure(setup: Setup) -> list[Row]:
    every = 16 if setup.quick else 2 if setup.device.type == "cuda" else 4
    ranks = [r for r in (every**i for i in range(9)) if r <= (16 if setup.quick else 256)]
    made = {r: setup.trainers(r) for r in ranks}
    frozen = made[ranks[0]]["frozen"]
    setup.train([frozen, *common.without_frozen(made)])
    rows = [{"r": 0, "provider": "frozen", "expected_parameters": 0, **common.measured(frozen, frozen)}]
    for r, trainers in made.items():
        expected = common.expected_parameters(setup.model, common.MODULES, r)
        rows += [
            {"r": r, "provider": name, "expected_parameters": expected, **common.measured(trainers[name], frozen)}
            for name in ("peft", "fastlora")
        ]
    return rows


def finding(rows: list[Row]) -> str:
    adapted = [row for row in rows if row["provider"] != "frozen"]
    exact = all(row["trainable_parameters"] == row["expected_parameters"] for row in adapted)
    peft, ours = pick(rows, provider="peft"), pick(rows, provider="fastlora")
    low, high = peft[0]["r"], peft[-1]["r"]
    states, saved, slower = (
        [f"from {form(found[0])} to {form(found[-1])}" for found in (peft, ours)]
        for form in (
            lambda row: megabytes(_state(row)),
            lambda row: megabytes(row["saved_bytes"]),
            lambda row: f"{row['over_frozen']:.2f}",
        )
    )
    return (
        f"From r = {low} to {high} adapters of {'exactly' if exact else 'NOT exactly'} r (in + out) parameters a "
        f"layer, with gradients and AdamW's state, go {states[0]}, and what is kept for backward goes {saved[0]} with "
        f"PEFT and {saved[1]} with fastlora. A step's time over the frozen model's goes {slower[0]} with PEFT and "
        f"{slower[1]} with fastlora."
    )


def _state(row: Row) -> int:
    """What is proportional to the rank."""
    return row["adapters_bytes"] + row["gradients_bytes"] + row["optimizer_bytes"]


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(11, 4.6)
    peft, ours = (column(rows, "over_frozen", provider=name) for name in ("peft", "fastlora"))
    ranks = column(rows, "r", provider="peft")
    figure.suptitle(
        f"From r = {ranks[0]} to {ranks[-1]} a step takes {peft[0]:.2f} to {peft[-1]:.2f} times the frozen model's "
        f"with PEFT, {ours[0]:.2f} to {ours[-1]:.2f} times with fastlora"
    )
    memory, time = figure.subplots(1, 2)
    for name in ("peft", "fastlora"):
        saved = [size / 1e6 for size in column(rows, "saved_bytes", provider=name)]
        memory.plot(ranks, saved, "-o", color=COLOURS[name], label=f"saved for backward, {NAMES[name]}")
        time.plot(ranks, column(rows, "over_frozen", provider=name), "-o", color=COLOURS[name], label=NAMES[name])
    states = [_state(row) / 1e6 for row in pick(rows, provider="peft")]
    memory.plot(ranks, states, "-^", color="#009E73", label="adapters, gradients, AdamW (both)")
    limit = column(rows, "saved_bytes", provider="frozen")[0] / 1e6
    memory.axhline(limit, color="black", linestyle="--", label="saved for backward, frozen model")
    time.axhline(1, color="black", linestyle="--", label="frozen model")
    memory.set_ylabel("memory, MB")
    memory.set_yscale("log")
    time.set_ylabel("time of a step / the frozen model's")
    time.set_ylim(bottom=0)
    for axes in (memory, time):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(r) for r in ranks])
        axes.set_xlabel("rank r of every adapter")
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)


STUDY = Study(
    name="rank",
    title="Rank from 1 to 256",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "r": "r",
        "provider": "provider",
        "trainable_parameters": "parameters",
        "gradients_bytes": "gradients, MB",
        "optimizer_bytes": "AdamW, MB",
        "saved_bytes": "saved, MB",
        "peak_bytes": "peak, MB",
        "step_p50_seconds": "s a step",
        "over_frozen": "over frozen",
    },
)

if __name__ == "__main__":
    sys.exit(common.main("rank"))
