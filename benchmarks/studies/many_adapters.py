"""Many small adapters against one large one with as many parameters.

Every linear layer has k active adapters of rank R/k, as PEFT allows, for k from 1 to R. PEFT computes them one after
another, each with its own passes over x and y; fastlora computes them as one adapter of rank R."""

import sys

from matplotlib.figure import Figure

from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, change, column, pick
from fastlora.benchmarks.tables import NAMES

R = 16


def measure(setup: Setup) -> list[Row]:
    counts = (1, 4) if setup.quick else (1, 2, 4, 8, 16)
    made = {k: setup.trainers(R // k, adapters=k) for k in counts}
    frozen = made[1]["frozen"]
    setup.train([frozen, *common.without_frozen(made)])
    rows = [{"adapters": 0, "r": 0, "provider": "frozen", **common.measured(frozen, frozen), "over_one": None}]
    for k, trainers in made.items():
        for name in ("peft", "fastlora"):
            over_one = common.ratio(trainers[name], made[1][name])
            row = {
                "adapters": k,
                "r": R // k,
                "provider": name,
                **common.measured(trainers[name], frozen),
                "over_one": over_one,
            }
            rows.append(row)
    return rows


def finding(rows: list[Row]) -> str:
    (peft, peft_one), (ours, ours_one) = (_most_and_one(rows, name) for name in ("peft", "fastlora"))
    k, r, equal = peft["adapters"], peft["r"], len(set(column(rows, "trainable_parameters")) - {0}) == 1
    theirs, own = peft["over_one"] - 1, ours["over_one"] - 1
    if theirs <= 0:
        less = "so that many are no slower than one with PEFT"
    elif own < theirs:
        less = f"{max(0, own) / theirs:.0%} of PEFT's slowdown"
    else:
        less = "no less a slowdown than PEFT's"
    return (
        f"With {k} adapters of r = {r} on every layer a step takes {peft['over_one']:.2f} times as long as with one of "
        f"r = {peft_one['r']} and {'as many' if equal else 'NOT as many'} parameters with PEFT, and "
        f"{ours['over_one']:.2f} times with fastlora, {less}. What is kept for backward "
        f"{change(peft_one['saved_bytes'], peft['saved_bytes'])} with PEFT, and "
        f"{change(ours_one['saved_bytes'], ours['saved_bytes'])} with fastlora."
    )


def _most_and_one(rows: list[Row], provider: str) -> tuple[Row, Row]:
    found = pick(rows, provider=provider)
    return max(found, key=lambda row: row["adapters"]), pick(found, adapters=1)[0]


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(10.5, 4.4)
    (peft, _), (ours, _) = (_most_and_one(rows, name) for name in ("peft", "fastlora"))
    figure.suptitle(
        f"{peft['adapters']} small adapters instead of one with as many parameters: {peft['over_one']:.2f} times the "
        f"step with PEFT, {ours['over_one']:.2f} times with fastlora"
    )
    time, memory = figure.subplots(1, 2)
    for name in ("peft", "fastlora"):
        counts = column(rows, "adapters", provider=name)
        style = {"color": COLOURS[name], "label": NAMES[name]}
        time.plot(counts, column(rows, "over_frozen", provider=name), "-o", **style)
        memory.plot(counts, [size / 1e6 for size in column(rows, "saved_bytes", provider=name)], "-o", **style)
    limit = column(rows, "saved_bytes", provider="frozen")[0] / 1e6
    for axes, level, label in (
        (time, 1, "time of a step / the frozen model's"),
        (memory, limit, "saved for backward, MB"),
    ):
        axes.axhline(level, color="black", linestyle="--", label="frozen model")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{k} x r={R // k}" for k in counts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("active adapters on every linear layer")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


STUDY = Study(
    name="many_adapters",
    title="Many small adapters against one large",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "adapters": "adapters",
        "r": "r of each",
        "provider": "provider",
        "trainable_parameters": "parameters",
        "saved_bytes": "saved, MB",
        "step_p50_seconds": "s a step",
        "over_frozen": "over frozen",
        "over_one": "over one",
    },
)

if __name__ == "__main__":
    sys.exit(common.main("many_adapters"))
