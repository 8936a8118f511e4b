"""What README.md says of measurements, from the results of one device.

Its measured parts stand between <!-- name --> and <!-- /name -->; `fastlora.benchmarks.report` rewrites them. What is
supported is such a part too, which the tests write (`tests/supported.py`)."""

import math
import re
import textwrap
from pathlib import Path
from statistics import median

from fastlora.benchmarks.records import Rows, read_json, read_rows
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.tables import (
    base_name,
    case_name,
    compare_table,
    date,
    markdown,
    megabytes,
    our_speedup,
    power,
    setting,
    verdict,
)

WIDTH = 120


def compare_fragment(folder: Path) -> str:
    report, checkpointing = read_json(folder / "report.json"), read_json(folder / "checkpointing" / "report.json")
    env, settings = report["environment"], report["settings"]
    text = (
        f"{setting(report)}, {env['cores']} cores of an {env['device']}, torch {env['torch'].partition('+')[0]}, PEFT "
        f"{env['peft']}, {date(env)}; medians of {settings['steps'] - settings['warmup']} interleaved steps, of "
        f"{checkpointing['settings']['steps'] - checkpointing['settings']['warmup']} with checkpointing "
        f"([report.json](benchmarks/results/{folder.name}/report.json), "
        f"[with checkpointing](benchmarks/results/{folder.name}/checkpointing/report.json)):"
    )
    return f"{_fill(text)}\n\n{compare_table([report, checkpointing])}"


def memory_fragment(folder: Path) -> str:
    providers = read_json(folder / "profile" / "profile.json")["memory"]
    frozen, ours = (providers[name]["saved for backward"] for name in ("frozen", "fastlora"))
    less = "less, since the MLP's inner activations are computed again" if ours < frozen else "no less"
    return _fill(
        f"The frozen model itself keeps {megabytes(frozen)} MB for backward; with fastlora, training adapters on it "
        f"keeps {megabytes(ours)} MB: {less} ([the ledger](benchmarks/results/{folder.name}/profile/profile.json), by "
        "`fastlora profile`):"
    )


def losses_fragment(folder: Path) -> str:
    report = read_json(folder / "report.json")
    cases = [case for case in report["cases"] if not case["dropout"]]
    bounds = [
        f"{math.ceil(100 * case['providers']['fastlora']['max_loss_difference']) / 100:.2f} on {base_name(case)}"
        for case in cases
    ]
    steps = report["settings"]["steps"]
    return _fill(f"Where dropout is off, the {steps} losses differ from PEFT's by at most {' and '.join(bounds)}.")


def overhead_fragment(folder: Path) -> str:
    report = read_json(folder / "host_overhead.json")
    modes = report["microseconds"]["bf16 base, dropout 0.0"]
    forward, both = (modes[mode]["fastlora / peft"] for mode in ("forward, no grad", "forward and backward"))
    return _fill(
        f"Where there is little to compute, little is gained or some is lost. On tensors too small to matter, one "
        f"thread of an {report['environment']['device']}, a forward without gradients takes {forward:.2f} of PEFT's "
        f"time ({verdict(1 / forward)}), forward and backward {both:.2f} ({verdict(1 / both)}; "
        f"[host_overhead.json](benchmarks/results/{folder.name}/host_overhead.json)). {few_tokens(folder)} "
        f"{lost(folder)}"
    )


def few_tokens(folder: Path) -> str:
    """How a layer's training step compares with PEFT's at the fewest tokens that were measured."""
    rows = [row for row in _our_rows(folder, "linear") if row["mode"] == "step"]
    fewest = min(row["M"] for row in rows)
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["M"] == fewest:
            found.setdefault(row["base"], []).append(row["speedup"])
    each = [f"{median(ratios):.2f} on {base} ({verdict(median(ratios))})" for base, ratios in found.items()]
    tokens = f"{fewest} token{'s' * (fewest != 1)}"
    return f"With {tokens} a training step of one layer runs at so much of PEFT's speed: {' and '.join(each)}."


def _our_rows(folder: Path, verb: str) -> Rows:
    """What `fastlora bench` measured of fastlora beside PEFT."""
    rows = read_rows(folder / "bench" / f"{verb}.csv")
    return [row for row in rows if row["provider"] == "fastlora" and row["speedup"] is not None]


def lost(folder: Path) -> str:
    """The lowest speed of fastlora in each file of measurements that has one below PEFT's."""
    found = []
    for verb in ("linear", "block", "experts", "generate"):
        row = min(_our_rows(folder, verb), key=lambda row: row["speedup"])
        if verdict(row["speedup"]) == "a loss":
            what = f"{row['shape']} {row['layer']}".strip() if verb == "linear" else f"{verb} of {row['shape']}"
            found.append(f"{row['speedup']:.2f} ({what}, {row['base']}, M={row['M']}, {row['mode']})")
    return f"The lowest of all measured: {', '.join(found)}." if found else "No other result is below PEFT's."


def others_fragment(folder: Path) -> str:
    """In a sentence each, the same comparison on other devices."""
    paths = sorted(path for path in folder.parent.glob("*/report.json") if path.parent != folder)
    sentences = [_on_another(read_json(path), path) for path in paths]
    return _fill(" ".join(sentences) or "No other device has been measured.")


def _on_another(report: dict, path: Path) -> str:
    env = report["environment"]
    speeds = [
        f"{case_name(case)}: {our_speedup(case['providers']['fastlora']['speedup_paired'])}" for case in report["cases"]
    ]
    return (
        f"On {env['threads']} cores of an {env['device']} ({path.parent.name}), {date(env)}, such steps run at so many "
        f"times PEFT's speed: {'; '.join(speeds)} ([report.json](benchmarks/results/{path.parent.name}/report.json))."
    )


def experts_fragment(folder: Path) -> str:
    report = read_json(folder / "experts" / "report.json")
    (case,), env = report["cases"], report["environment"]
    theirs, ours = case["providers"]["peft"], case["providers"]["fastlora"]
    return _fill(
        f"On a mixture of experts ({setting(report)}; {env['cores']} cores of an {env['device']}, {date(env)}) a step "
        f"takes {theirs['p50']:.2f} s with PEFT and {ours['p50']:.2f} s with fastlora, "
        f"{our_speedup(ours['speedup_paired'])} times as fast, and keeps {ours['saved_ratio']:.2f} of the bytes for "
        f"backward; {case['providers']['frozen']['p50']:.2f} s with the frozen model "
        f"([report.json](benchmarks/results/{folder.name}/experts/report.json))."
    )


def small_updates_fragment(folder: Path) -> str:
    study = common.load("small_updates")
    rows = read_rows(folder / "studies" / "small_updates.csv")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    by_magnitude: dict[float, list[str]] = {}
    for row in rows:
        by_magnitude.setdefault(row["magnitude_of_B"], []).append(f"{row['share_kept']:.2f}")
    body = [[power(magnitude), *shares] for magnitude, shares in by_magnitude.items()]
    sentence, _, _ = study.finding(rows).partition(". ")
    head = ["magnitude of B", f"share of the adapter's contribution kept: {layers[0]}", *layers[1:]]
    return f"{_fill(f'{sentence}:')}\n\n{markdown(head, body)}"


FRAGMENTS = {
    "compare": compare_fragment,
    "memory": memory_fragment,
    "losses": losses_fragment,
    "others": others_fragment,
    "experts": experts_fragment,
    "overhead": overhead_fragment,
    "small updates": small_updates_fragment,
}


def readme_md(text: str, folder: Path) -> str:
    """README.md with its measured parts as the results in the folder have them.

    Raises ValueError if markers are missing, open or unknown.
    """
    names = [name for name in re.findall(r"<!-- ([^/].*?) -->", text) if name != "supported"]
    if sorted(names) != sorted(FRAGMENTS):
        raise ValueError(f"README.md must have the markers {', '.join(FRAGMENTS)}, each once, got {', '.join(names)}")
    for name, fragment in FRAGMENTS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"README.md must have {end} after {start}")
        text = f"{before}{start}\n{fragment(folder)}\n{end}{after}"
    return text


def _fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
