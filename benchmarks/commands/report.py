"""From measurements to numbers: statistics, the JSON report, and the table of one case."""

import math
from pathlib import Path

import torch
from rich.table import Table

from fastlora.benchmarks.records import to_json
from fastlora.benchmarks.training import Measurements, speedup
from fastlora.files import replace_file

VERSION = 1
WARMUP = 1  # rounds that are not timed
NAMES = {
    "frozen": "frozen model (limit)",
    "peft": "PEFT",
    "fastlora": "PEFT + fastlora",
    "peft+compile": "PEFT, compiled",
    "fastlora+compile": "PEFT + fastlora, compiled",
}


def provider_records(results: dict[str, Measurements], tokens_per_step: int) -> dict[str, dict]:
    """What the report says of each provider of one case. What could not be measured yet is None."""
    peft = results["peft"]
    peft_p50 = quantiles(peft)["p50"]
    return {
        name: {
            **(times := quantiles(measured)),
            "tokens_per_second": _ratio(tokens_per_step, times["p50"]),
            "speedup": _ratio(peft_p50, times["p50"]),
            "speedup_paired": speedup(peft, measured, WARMUP),
            "saved_bytes": measured.saved_bytes or None,
            "saved_ratio": _ratio(measured.saved_bytes, peft.saved_bytes),
            "peak_bytes": measured.peak_bytes or None,
            "peak_ratio": _ratio(measured.peak_bytes, peft.peak_bytes),
            "final_loss": measured.losses[-1] if measured.losses else None,
            "max_loss_difference": None if name in ("frozen", "peft") else _max_difference(measured, peft),
            "step_seconds": list(measured.step_seconds),
            "losses": list(measured.losses),
        }
        for name, measured in results.items()
    }


def quantiles(measured: Measurements) -> dict[str, float | None]:
    """Seconds a step, linearly interpolated."""
    timed = torch.tensor(measured.step_seconds[WARMUP:], dtype=torch.float64)
    return {f"p{p}": torch.quantile(timed, p / 100).item() if timed.numel() else None for p in (20, 50, 80)}


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _max_difference(one: Measurements, other: Measurements) -> float | None:
    differences = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=False)]
    return max(differences) if differences and all(map(math.isfinite, differences)) else None


def write_report(report: dict, path: Path) -> None:
    """Replace the file at once: whatever happens meanwhile, it holds either the old report or the new one."""
    replace_file(path, lambda temporary: temporary.write_text(to_json(report) + "\n", encoding="utf-8"))


def case_name(case: dict) -> str:
    checkpointing = ", checkpointing" if case["checkpointing"] else ""
    return f"{case['base']}, dropout {case['dropout']:g}{checkpointing}"


def setting_line(settings: dict) -> str:
    return f"r = {settings['r']}, {settings['batch']} x {settings['tokens']} tokens a step"


def table(report: dict, case: dict) -> Table:
    """One case: a row per provider, ratios relative to PEFT."""
    result = Table(
        title=f"{report['model']}: {case_name(case)}\n{setting_line(report['settings'])}, "
        f"{report['environment']['device']}",
        caption=_caption(case),
        caption_justify="left",
    )
    result.add_column("provider", no_wrap=True)
    for heading in (
        "s/step p50\n(p20 - p80)",
        "tokens/s",
        "speed-up\n(paired)",
        "saved for\nbackward, MB",
        "peak, MB",
        "final\nloss",
        "largest loss\ndifference",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for name, p in case["providers"].items():
        spread = f"\n({p['p20']:.3f} - {p['p80']:.3f})" if p["p50"] else ""
        result.add_row(
            NAMES[name],
            _show(p["p50"], ".3f") + spread,
            _show(p["tokens_per_second"], ",.0f"),
            f"{_show(p['speedup'], '.2f', 'x')}\n({_show(p['speedup_paired'], '.2f', 'x')})",
            f"{megabytes(p['saved_bytes'])}\n{_show(p['saved_ratio'], '.2f', 'x')}",
            f"{megabytes(p['peak_bytes'])}\n{_show(p['peak_ratio'], '.2f', 'x')}",
            _show(p["final_loss"], ".4f"),
            _show(p["max_loss_difference"], ".4f"),
        )
    return result


def _caption(case: dict) -> str:
    lines = ["x: relative to PEFT (above 1 is faster, below 1 is less memory). MB = 10^6 bytes."]
    if case["dropout"]:
        lines.append("Each provider draws its own dropout masks, so losses differ by more than rounding.")
    return "\n".join(lines)


def megabytes(count: int | None) -> str:
    if not count:
        return "-"
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.2f}"


def _show(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{form}}{unit}"
