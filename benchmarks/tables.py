"""Results in words: names of providers, numbers with their units, tables for a terminal and in Markdown."""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.table import Table

NAMES = {  # of providers that train a whole model
    "frozen": "frozen model",
    "peft": "PEFT",
    "fastlora": "PEFT + fastlora",
    "peft+compile": "PEFT, compiled",
    "fastlora+compile": "PEFT + fastlora, compiled",
}
TIE = 0.02  # two medians of interleaved rounds that are closer than this are as fast


def terminal(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[str] | None], caption: str | None = None, words: int = 1
) -> Table:
    """A table whose first columns hold words and the others numbers; None as a row draws a line."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < words else "right", no_wrap=i > 0)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    return table


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def verdict(speedup: float) -> str:
    """Whether this is a gain, a loss, or, within what repeated measurements differ by, a tie."""
    return "a tie" if abs(speedup - 1) <= TIE else "a gain" if speedup > 1 else "a loss"


def our_speedup(speedup: float, unit: str = "") -> str:
    """A speed-up of fastlora's, with the word for it where it is no gain."""
    word = verdict(speedup)
    return f"{speedup:.2f}{unit}" + ("" if word == "a gain" else f" ({word})")


def case_name(case: dict) -> str:
    return f"{case['base']}, dropout {case['dropout']:g}{', checkpointing' * case['checkpointing']}"


def setting_line(settings: dict) -> str:
    return f"r = {settings['r']}, {settings['batch']} x {settings['tokens']} tokens a step"


def base_name(case: dict) -> str:
    return case["base"].upper() if case["base"].endswith("4") else case["base"]


def compare_table(reports: list[dict]) -> str:
    head = ["base, dropout", "seconds a step: frozen model", "PEFT", "PEFT + fastlora", "faster"]
    head += ["saved for backward: PEFT", "PEFT + fastlora", "ratio"]
    rows = []
    for case in (case for report in reports for case in report["cases"]):
        frozen, peft, fast = (case["providers"][name] for name in ("frozen", "peft", "fastlora"))
        rows.append(
            [
                f"{base_name(case)}, {case['dropout']:g}{', checkpointing' * case['checkpointing']}",
                *(f"{p['p50']:.3f}" for p in (frozen, peft, fast)),
                our_speedup(fast["speedup"], "×"),
                *(f"{megabytes(p['saved_bytes'])} MB" for p in (peft, fast)),
                f"{fast['saved_ratio']:.2f}",
            ]
        )
    return markdown(head, rows)


def setting(report: dict) -> str:
    settings = report["settings"]
    return (
        f"{report['model']}, r={settings['r']} on every linear layer, fp32 adapters, {settings['batch']} × "
        f"{settings['tokens']} tokens a step"
    )


def where(env: dict) -> str:
    """The environment in a line."""
    libraries = ", ".join(f"{name} {env[name]}" for name in ("torch", "peft", "bitsandbytes", "transformers"))
    commit = f", commit {env['commit'][:10]}{'-dirty' * env['commit'].endswith('dirty')}" if env["commit"] else ""
    return f"{env['device']}, {env['threads']} threads, {libraries}{commit}, {date(env)}."


def megabytes(count: float | None) -> str:
    """MB are 10^6 bytes."""
    if not count:
        return "-"
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.2f}"


def size(count: int) -> str:
    """In the decimal unit that says it shortest."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, scale = next(((unit, scale) for unit, scale in units if count >= scale), ("B", 1))
    return f"{count / scale:.4g} {unit}"


def ends_at(report: dict, name: str) -> str:
    """Where the budget ends, in words."""
    found = report["length"]["providers"][name]["longest"]
    if found is None:
        return "unknown: fewer than two lengths were measured"
    if found["sequence"] is None:
        return "any length (the fit does not grow)"
    positions = report["length"].get("positions")
    beyond = f", beyond the model's {positions:,} positions" if positions and found["sequence"] > positions else ""
    return f"{found['sequence']:,} tokens ({found['how']}{beyond})"


def date(env: dict) -> str:
    day = datetime.fromisoformat(env["date"])
    return f"{day.day} {day:%B %Y}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 0.01 else f"{seconds * 1e3:,.1f} ms"


def number(value: float | None, form: str | None = None, unit: str = "") -> str:
    """To three digits or so unless the format is given; a dash for nothing, and for what is not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:{form or (',.0f' if abs(value) >= 100 else '.2f')}}{unit}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")
