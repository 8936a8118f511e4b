"""``fastlora info``, and the description of the environment that goes into every report."""

import json
import os
import platform
import subprocess
from argparse import Namespace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastlora import __version__, ops

_LIBRARIES = ("torch", "triton", "bitsandbytes", "peft", "transformers")


def run(args: Namespace) -> int:
    found = {
        "versions": versions(),
        "devices": devices(),
        "cpu_kernels": ops.NO_CPU_KERNELS or "loaded",
        "implementations": implementations(),
    }
    print(json.dumps(found, indent=2) if args.json else _as_text(found))
    return 0


def versions() -> dict[str, str]:
    libraries = {name: _version(name, "missing") for name in _LIBRARIES}
    return {
        "fastlora": _version("fastlora-kernels", f"{__version__}, not installed"),
        "python": platform.python_version(),
        **libraries,
        "torch": torch.__version__,  # its own name for itself says which build it is
    }


def devices() -> dict:
    return {
        "cpu": {
            "name": cpu_name(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
        },
        "cuda": [
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
            for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
    }


def implementations() -> dict[str, dict[str, str]]:
    """What runs each op on each device: a kernel registered for that device, or the composition that serves all."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastlora::"))
    return {
        device: {
            op.removeprefix("fastlora::"): (
                "kernel" if torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper()) else "torch composition"
            )
            for op in names
        }
        for device in ("cpu", "cuda")
    }


def environment(device: torch.device) -> dict:
    """Where and with what a measurement was made. Holds no paths and no names of people or machines."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        **versions(),
        "cpu_kernels": ops.NO_CPU_KERNELS or "loaded",
        "commit": _commit(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def _commit() -> str | None:
    """The commit of the checkout that fastlora runs from, ``-dirty`` if it was changed, None if it runs from none."""
    module = Path(ops.__file__)
    if _git(module.parent, "ls-files", "--error-unmatch", module.name) is None:
        return None
    return _git(module.parent, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _git(folder: Path, *command: str) -> str | None:
    try:
        result = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _as_text(found: dict) -> str:
    cpu, gpus = found["devices"]["cpu"], found["devices"]["cuda"]
    abilities = [cpu["capability"], *(name for name in ("avx512_bf16", "amx") if cpu[name])]
    rows = list(found["versions"].items())
    rows.append(("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {', '.join(abilities)}"))
    rows += [
        (f"cuda:{i}", f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
        for i, gpu in enumerate(gpus)
    ] or [("cuda", "no device")]
    rows.append(("cpu kernels", found["cpu_kernels"]))
    for device, used in found["implementations"].items():
        for implementation in sorted(set(used.values())):
            names = ", ".join(op for op, runs in used.items() if runs == implementation)
            rows.append((f"ops on {device}", f"{implementation}: {names}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
