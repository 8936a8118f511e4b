"""Timing on a device, and the sizes that are timed."""

import gc
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastlora import roofline, tuning
from fastlora.cases import MODELS, linears
from fastlora.roofline import Rates

TINY = (64, 128, 32)  # rows of whole 4-bit blocks: bitsandbytes on a CPU misreads others


def block(run: Any) -> dict[str, tuple[int, int, int]]:
    """The distinct linears of Llama-3-8B: their names, (N, K, how many there are)."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, shape in linears(*(TINY if run.tiny else MODELS["llama-3-8b"])).items():
        found.setdefault(shape, []).append(name)
    return {",".join(names): (*shape, len(names)) for shape, names in found.items()}


def samples(run: Any, call: Callable[[], Any]) -> list[float]:
    """Seconds of many calls: by the device's events, the L2 cache emptied before each."""
    if run.device.type == "cuda":
        from triton.testing import do_bench

        return [ms / 1e3 for ms in do_bench(call, warmup=10, rep=50, return_mode="all")]
    start = time.perf_counter()
    call()
    return [time.perf_counter() - start]


def measure(run: Any, ways: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 in seconds, of all rounds, in which the ways take turns."""
    times = tuning.measure(ways, partial(samples, run), rounds=1 if run.tiny else tuning.ROUNDS)  # type: ignore[arg-type]
    found = {}
    for name, rounds in times.items():
        pooled = torch.tensor([seconds for each in rounds for seconds in each], dtype=torch.float64)  # type: ignore[attr-defined]
        found[name] = {f"p{q}": torch.quantile(pooled, q / 100).item() for q in (20, 50, 80)}
    return found


def host_seconds(run: Any, call: Callable[[], Any], calls: int = 20) -> float:
    """What a call takes the host, which does not wait for the device."""
    synchronize(run)
    start = time.perf_counter()
    for _ in range(1 if run.tiny else calls):
        call()
    seconds = time.perf_counter() - start
    synchronize(run)
    return seconds / (1 if run.tiny else calls)


def synchronize(run: Any) -> None:
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rates(run: Any) -> Rates:
    """Those that the step `rates` measured, or the modelled ones."""
    found = {row["name"]: row["value"] for row in run.results.get("rates", [])}
    return Rates.from_json({**found, "measured": True}) if found else roofline.modelled(run.name)


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
