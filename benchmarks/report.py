"""Writes benchmarks/RESULTS.md, and what README.md says of measurements, from the files in benchmarks/results.

Pictures whose data have changed since they were drawn are drawn again. Nothing in RESULTS.md, or in the parts of
README.md that `fastlora.benchmarks.readme` writes, is typed."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from fastlora.benchmarks import gpu, pictures
from fastlora.benchmarks.arguments import VERBS
from fastlora.benchmarks.cases.shapes import SHAPES
from fastlora.benchmarks.commands import profile
from fastlora.benchmarks.pictures import MEMORY, TIME
from fastlora.benchmarks.providers import PROVIDERS
from fastlora.benchmarks.readme import readme_md
from fastlora.benchmarks.records import Rows, read_json, read_rows, write_json
from fastlora.benchmarks.roofline import GPUS, planned
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.tables import (
    NAMES,
    case_name,
    compare_table,
    markdown,
    megabytes,
    our_speedup,
    setting,
    setting_line,
    where,
)
from fastlora.files import replace_file

HERE = Path(__file__).resolve().parent
_EXAMPLE = """\
example:
  python -m benchmarks.report            write what is stale
  python -m benchmarks.report --check    only name it, and end with 1 if there is any"""
_HEAD = """\
# Results

Written by `python -m benchmarks.report` from the files in [results](results), which hold every row, the versions, the
device and the date; [README.md](README.md) is the protocol. MB are 10^6 bytes; *saved* is what is kept for backward,
weights not counted; *over frozen* is the median over rounds of a step's time over the frozen model's in the same round.
"""


class Picture(NamedTuple):
    path: Path
    data: Path
    draw: Callable[[], None]


def results_md(results: Path) -> str:
    """All results of all devices."""
    parts = [_HEAD]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        sections = [text for section in SECTIONS for text in section(folder, results)]
        if sections:
            parts += [f"## {folder.name}", *sections]
    return "\n\n".join(part.strip() for part in parts) + "\n"


# Sections of RESULTS.md: a folder of results to Markdown, nothing where there are none.


def compare_section(folder: Path, results: Path) -> Iterator[str]:
    paths = compare_reports(folder)
    if paths:
        yield "### Fine-tuning with PEFT and with PEFT + fastlora (`fastlora compare`)"
    for path in paths:
        report = read_json(path)
        yield setting(report) + "."
        yield compare_table([report])
        yield _image("time, memory and losses", path.with_name("compare.png"), results)
        yield where(report["environment"])


def profile_section(folder: Path, results: Path) -> Iterator[str]:
    report = _json(folder / "profile" / "profile.json")
    if report is None:
        return
    yield "### Where a step's memory and time go (`fastlora profile`)"
    yield f"{report['model']}, {case_name(report['case'])}, {setting_line(report['settings'])}."
    parts: dict[str, tuple[str, Iterable[str], Callable[[dict, str], str]]] = {
        "memory": ("MB", MEMORY, lambda record, kind: megabytes(record[kind])),
        "time": ("ms, under the profiler", TIME, lambda record, kind: f"{1e3 * record['seconds'][kind]:.0f}"),
    }
    for part, (picture, _) in profile.PICTURES.items():
        if part not in report:
            continue
        if part in parts:
            head, kinds, cell = parts[part]
            records = report[part]
            rows = [[kind, *(cell(record, kind) for record in records.values())] for kind in kinds]
            yield markdown([head, *(NAMES[name] for name in records)], rows)
        yield _image(f"{part} of a step", folder / "profile" / picture, results)
    yield where(report["environment"])


def overhead_section(folder: Path, results: Path) -> Iterator[str]:
    report = _json(folder / "host_overhead.json")
    if report is None:
        return
    yield "### What a layer costs the host"
    yield "Microseconds a call on tensors too small to matter, one thread."
    columns = ("frozen", "peft", "fastlora", "fastlora / peft")
    rows = [
        [case, mode, *(f"{found[name]:g}" for name in columns)]
        for case, modes in report["microseconds"].items()
        for mode, found in modes.items()
    ]
    yield markdown(["layer", "mode", "frozen", "PEFT", "PEFT + fastlora", "ratio"], rows)
    yield where(report["environment"])


def bench_section(folder: Path, results: Path) -> Iterator[str]:
    for data in bench_rows(folder):
        report = read_json(data.with_suffix(".json"))
        of = "" if data.parent.name == "bench" else f", {data.parent.name}"
        yield f"### `fastlora bench {report['verb']}`{of}"
        yield _image(f"bench {report['verb']}", data.with_suffix(".png"), results)
        yield f"Speed-up over {'bitsandbytes' if report['verb'] == 'decode' else 'PEFT'}, the median over layers:"
        yield speedups(read_rows(data))
        yield where(report["environment"])


def speedups(rows: Rows) -> str:
    """A row for each base and number of tokens, a column for each provider."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["speedup"] is not None and row["mode"] == rows[-1]["mode"]:
            case = f"{row['shape']}, {row['base']}, M={row['M']}" + f", dropout {row['dropout']}" * bool(row["dropout"])
            found.setdefault(case, {}).setdefault(row["provider"], []).append(row["speedup"])
    names = [name for name in PROVIDERS if any(name in each for each in found.values())]

    def cell(name: str, ratios: list[float] | None) -> str:
        if ratios is None:
            return "-"
        return our_speedup(median(ratios)) if name.startswith("fastlora") else f"{median(ratios):.2f}"

    body = [[case, *(cell(name, each.get(name)) for name in names)] for case, each in found.items()]
    return markdown(["case", *(PROVIDERS[name].label for name in names)], body)


def studies_section(folder: Path, results: Path) -> Iterator[str]:
    found = [(study, *common.paths(folder / "studies", study.name)) for study in map(common.load, common.STUDIES)]
    found = [entry for entry in found if entry[1].is_file()]
    if found:
        yield "### Studies (`python -m benchmarks.studies`)"
    for study, data, report_file, picture in found:
        rows, report = read_rows(data), _json(report_file) or {}
        yield f"#### {study.title}"
        yield study.finding(rows)
        yield _image(study.title, picture, results)
        body = [[common.cell(name, row[name]) for name in study.columns] for row in rows]
        yield "<details><summary>rows</summary>\n\n" + markdown(list(study.columns.values()), body) + "\n\n</details>"
        sizes = report["settings"]
        run = f"{sizes['model']}, {sizes['batch']} x {sizes['tokens']} tokens a step, {sizes['rounds']} rounds; "
        yield (run if study.needs_model else "") + where(report["environment"])


def gpu_section(folder: Path, results: Path) -> Iterator[str]:
    """What `gpu.py` measured: its goals, and a block's linear layers."""
    state = gpu.read_state(folder)
    if not state or any(entry["environment"]["tiny"] for entry in state.values()):
        return
    found = {step: read_rows(folder / f"{step}.csv") for step in gpu.STEPS}
    yield "### On a GPU (`make gpu`)"
    met = {True: "met", False: "missed", None: "not measured"}
    yield markdown(
        ["goal", "bar", "measured", ""],
        [
            [goal.text, f"{'≥' if goal.at_least else '≤'} {goal.target:.2f}", _ratio(goal.got), met[goal.met]]
            for goal in gpu.goals(found)
        ],
    )
    sweep = found["sweep"]
    points: dict[tuple[str, int, int], None] = {}
    for row in sweep:
        if row.get("base") and row.get("p50"):
            points[row["base"], row["M"], row["r"]] = None
    names = ("frozen", "peft", "addmm", "fastlora")
    rows = []
    for base, M, r in points:
        frozen, peft, addmm, ours = (gpu.block_seconds(sweep, base, name, M, r) for name in names)
        cells = ["–" if seconds is None else f"{seconds * 1e3:,.2f}" for seconds in (frozen, peft, addmm, ours)]
        rows.append([base, str(M), str(r), *cells, _ratio(gpu.ratio(peft, ours)), _ratio(gpu.ratio(ours, frozen))])
    yield "Forward and backward of the seven linear layers of a block of Llama-3-8B, one after the other, milliseconds:"
    heads = ["base", "tokens", "r", "frozen", "PEFT", "addmm style", "fastlora", "PEFT / ours", "ours / frozen"]
    yield markdown(heads, rows)
    yield "Training steps of models with random weights, milliseconds, and the peak of a step beyond the weights, GB:"
    yield markdown(["case", "", *heads[3:5], *heads[6:]], list(_model_rows(found["compare"])))
    yield where(next(iter(state.values()))["environment"])


def _model_rows(compare: list[dict]) -> Iterator[list[str]]:
    """Two rows for every case, of its times and of its peaks, and again where it was compiled too."""
    cases: dict[str, dict[str, dict]] = {}
    for row in compare:
        if row.get("p50"):
            cases.setdefault(row["case"], {})[row["provider"]] = row
    for case, found in cases.items():
        for peft, ours in (("peft", "fastlora"), ("peft+compile", "fastlora+compile")):
            if peft not in found or ours not in found:
                continue
            ways = [found.get("frozen"), found[peft], found[ours]]
            for text, name, unit in (("time", "p50", 1e3), ("peak", "peak_bytes", 1e-9)):
                values = [None if way is None else way[name] for way in ways]
                cells = ["–" if value is None else f"{value * unit:,.2f}" for value in values]
                ratios = gpu.ratio(values[1], values[2]), gpu.ratio(values[2], values[0])
                both = ", both compiled" * ours.endswith("+compile")
                yield [case + both, text, *cells, *map(_ratio, ratios)]


def _ratio(found: float | None) -> str:
    return "–" if found is None else f"{found:.2f}"


def plans_section(folder: Path, results: Path) -> Iterator[str]:
    """What is predicted for GPUs, beside what their compilers made of the kernels."""
    if folder.name != "inspect":
        return
    yield "### Plans and tiles of Llama-3-8B's layers, by the cost model"
    yield (
        "Nothing of this was measured: `fastlora tune` starts from it. In a cell the plan, and for `tail` its tile, "
        "the share of the multiprocessors that have a tile to work on, and what binds the kernel."
    )
    for device in GPUS:
        cells: dict[int, dict[str, str]] = {}
        for row in planned(device, SHAPES["llama-3-8b"]):
            tail = f"{row['tile']}, {row['busy']:.0%}, {row['bound']}"
            text = f"tail ({tail})" if row["plan"] == "tail" else row["plan"]
            cells.setdefault(row["M"], {})[f"{row['N']} x {row['K']}"] = f"{text}, {row['seconds'] * 1e6:.0f} µs"
        layers = list(next(iter(cells.values())))
        yield f"{device}:"
        yield markdown(["tokens", *layers], [[str(M), *by_layer.values()] for M, by_layer in cells.items()])


SECTIONS = (
    compare_section, profile_section, overhead_section, bench_section, studies_section, gpu_section, plans_section,
)  # fmt: skip


def compare_reports(folder: Path) -> list[Path]:
    return [path for path in (folder / "report.json", *sorted(folder.glob("*/report.json"))) if path.is_file()]


def bench_rows(folder: Path) -> list[Path]:
    # A study may have a verb's name.
    found = (path for verb in VERBS for path in sorted(folder.rglob(f"{verb}.csv")))
    return [path for path in found if path.parent.name != "studies"]


def drawings(results: Path) -> list[Picture]:
    """Every picture of the results."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        for data in compare_reports(folder):
            picture = data.with_name("compare.png")
            found.append(Picture(picture, data, partial(_draw, pictures.compare, data, picture.name)))
        data = folder / "profile" / "profile.json"
        parts = _json(data) or {}
        for name, draw in (picture for part, picture in profile.PICTURES.items() if part in parts):
            found.append(Picture(data.with_name(name), data, partial(_draw, draw, data, name)))
        for data in bench_rows(folder):
            found.append(Picture(data.with_suffix(".png"), data, partial(_draw_bench, data)))
        for name in common.STUDIES:
            data, _, picture = common.paths(folder / "studies", name)
            found.append(Picture(picture, data, partial(common.draw, common.load(name), folder / "studies")))
    return [picture for picture in found if picture.data.is_file()]


def _draw_bench(data: Path) -> None:
    pictures.bench(read_rows(data), read_json(data.with_suffix(".json")), data.with_suffix(".png"))


def _draw(draw: Callable[[dict, Path], None], data: Path, name: str) -> None:
    draw(read_json(data), data.with_name(name))


def study_reports(results: Path) -> Iterator[tuple[Path, dict]]:
    """Reports of studies whose finding no longer follows from their rows, with the finding that does."""
    for name in common.STUDIES:
        for data in sorted(results.glob(f"*/studies/{name}.csv")):
            report_file = data.with_suffix(".json")
            report, finding = read_json(report_file), common.load(name).finding(read_rows(data))
            if report["finding"] != finding:
                yield report_file, {**report, "finding": finding}


def stale(results: Path, readme: Path, device: str = "cpu") -> dict[Path, Callable[[], Any]]:
    """The files that are out of date with the results, each with the call that rewrites it."""
    found: dict[Path, Callable[[], Any]] = {
        picture.path: picture.draw
        for picture in drawings(results)
        if not pictures.is_drawn_from(picture.path, picture.data)
    }
    for report_file, report in study_reports(results):
        found[report_file] = partial(write_json, report_file, report)
    texts = {
        results.parent / "RESULTS.md": results_md(results),
        readme: readme_md(readme.read_text(encoding="utf-8"), results / device),
    }
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found[path] = partial(replace_file, path, partial(Path.write_text, data=text, encoding="utf-8"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if anything is stale")
    args = parser.parse_args(argv)
    try:
        found = stale(HERE / "results", HERE.parent / "README.md")
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for path, write in found.items():
        print(f"{'stale' if args.check else 'written'}: {path.relative_to(HERE.parent)}")
        if not args.check:
            write()
    return 1 if args.check and found else 0


def _json(path: Path) -> dict | None:
    return read_json(path) if path.is_file() else None


def _image(text: str, path: Path, results: Path) -> str:
    return f"![{text}]({path.relative_to(results.parent).as_posix()})"


if __name__ == "__main__":
    sys.exit(main())
