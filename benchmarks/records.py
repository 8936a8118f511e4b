"""Results as files: a tidy CSV, a row for each measurement, and beside it a JSON of where and how it was measured."""

import csv
import io
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastlora.files import replace_file

Rows = list[dict[str, Any]]


def folder_name(device: str) -> str:
    """``cpu``, or a GPU's name in lower case with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read_rows(path: Path) -> Rows:
    """The rows of a CSV; numbers as numbers, truths as truths, nothing as None."""
    try:
        with path.open(newline="") as file:
            return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(text: str | None) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for number in (int, float):
        try:
            return number(text)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            pass
    return text or None


def write_rows(path: Path, rows: Rows) -> None:
    replace_file(path, lambda temporary: temporary.write_text(to_csv(rows)))


def to_csv(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    replace_file(path, lambda temporary: temporary.write_text(to_json(value) + "\n", encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def to_json(value: Any) -> str:
    """JSON has no NaN and no infinity: null stands for them."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=1, allow_nan=False)


def default_folder(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Path("benchmarks") / "results" / folder_name(name)


def clocks(device: torch.device) -> dict[str, str]:
    """What the driver says of the device now. Read only."""
    wanted = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    )
    if device.type != "cuda":
        return {}
    index = torch.cuda.current_device()
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(wanted, (part.strip() for part in line.split(",")), strict=False))
