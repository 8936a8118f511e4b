"""What adapters on experts cost over the frozen experts, for 8 to 128 of them.

512 tokens, of which each has 8 experts of 1024 x 512 (gate and up side by side, and down), adapters of r = 8 on both
weights, every expert with equally many tokens: the work of the experts is the same for any number of them. PEFT adds
its adapters to the whole stack of weights at every call."""

import sys

from matplotlib.figure import Figure

from fastlora.benchmarks import protocol
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.cases.modules import Case, make_subject
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.protocol import Way
from fastlora.benchmarks.providers import PROVIDERS
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, column, pick
from fastlora.benchmarks.tables import NAMES
from fastlora.benchmarks.training import peak_bytes, saved_bytes

EXPERTS = (8, 16, 32, 64, 128)
M, R = 512, 8
NAMED = ("frozen", "peft", "fastlora")


def measure(setup: Setup) -> list[Row]:
    rows: list[Row] = []
    base = models.default_bases(setup.device)[0]
    for experts in setup.progress.track(EXPERTS[:2] if setup.quick else EXPERTS, description="experts"):
        case = Case("experts", f"moe-{experts}", "experts", M=64 if setup.quick else M, r=R, base=base)
        subject = make_subject(case, setup.device, setup.seed)
        modules = {name: PROVIDERS[name].build(subject) for name in NAMED}

        def step(name: str, subject=subject, modules=modules) -> object:
            return subject.gradients(modules[name], subject.forward(modules[name]))

        ways = {name: Way.of(lambda name=name, step=step: step(name)) for name in NAMED}  # type: ignore[misc]
        turns = protocol.interleave(ways, protocol.clock_of(setup.device), 3 if setup.quick else 7)
        for name in NAMED:
            module = modules[name]
            rows.append(
                {
                    "experts": experts,
                    "provider": name,
                    "base": base,
                    **common.step_seconds(turns[name]),
                    "over_frozen": protocol.ratio(turns[name], turns["frozen"]),
                    "saved_bytes": saved_bytes(module, lambda module=module: subject.forward(module)),  # type: ignore[misc]  # noqa: B023
                    "peak_bytes": peak_bytes(setup.device, ways[name]),
                }
            )
    return rows


def finding(rows: list[Row]) -> str:
    counts = column(rows, "experts")
    most, least = max(counts), min(counts)
    over = {(row["provider"], row["experts"]): f"{row['over_frozen']:.2f}" for row in rows}
    peaks = {row["provider"]: common.megabytes(row["peak_bytes"]) for row in pick(rows, experts=most)}
    return (
        f"With {most} experts a step takes {over['peft', most]} times the frozen experts' with PEFT and "
        f"{over['fastlora', most]} times with fastlora; with {least} it is {over['peft', least]} and "
        f"{over['fastlora', least]} times. At its peak PEFT's step needs {peaks['peft']} beside the weights, "
        f"fastlora's {peaks['fastlora']}."
    )


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(10.5, 4.4)
    most = max(column(rows, "experts"))
    over = {row["provider"]: row["over_frozen"] for row in pick(rows, experts=most)}
    times = f"{over['peft']:.2f} times the frozen step with PEFT, {over['fastlora']:.2f} times with fastlora"
    figure.suptitle(f"Adapters on {most} experts: {times}")
    time, memory = figure.subplots(1, 2)
    counts = list(dict.fromkeys(column(rows, "experts")))
    for name in ("peft", "fastlora"):
        style = {"color": COLOURS[name], "label": NAMES[name]}
        time.plot(counts, column(rows, "over_frozen", provider=name), "-o", **style)
        memory.plot(counts, [size / 1e6 for size in column(rows, "peak_bytes", provider=name)], "-o", **style)
    time.axhline(1, color="black", linestyle="--", label="frozen experts")
    time.set_ylabel("time of a step / the frozen experts'")
    memory.set_ylabel("peak beside the weights, MB")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("experts")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


STUDY = Study(
    name="experts",
    title="Adapters on experts",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "experts": "experts",
        "provider": "provider",
        "base": "base",
        "saved_bytes": "saved, MB",
        "peak_bytes": "peak, MB",
        "step_p50_seconds": "s a step",
        "over_frozen": "over frozen",
    },
    needs_model=False,
)

if __name__ == "__main__":
    sys.exit(common.main("experts"))
