"""Where and with what a measurement is made: what every report says of its environment."""

import ctypes
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastlora import __version__, ops
from fastlora.benchmarks.arguments import UsageError

RESULTS = Path(__file__).resolve().parent / "results"
_allocator = "as it is"
_LIBRARIES = ("torch", "triton", "bitsandbytes", "peft", "transformers")


def environment(device: torch.device) -> dict:
    """Where and with what a measurement was made. Holds no paths and no names of people or machines."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        **versions(),
        "allocator": _allocator,
        "cpu_kernels": cpu_kernels(),
        "commit": commit(),
    }


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it to the system after every step; `environment` says so.

    Otherwise the page faults of the logits' buffers, which every provider has alike, come and go from step to step and
    drown what is measured. Does nothing with another C library.
    """
    global _allocator
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 2**31 - 1)
        _allocator = "glibc, freed memory kept (mallopt)"


def versions() -> dict[str, str]:
    libraries = {name: _version(name, "missing") for name in _LIBRARIES}
    return {
        "fastlora": _version("fastlora-kernels", f"{__version__}, not installed"),
        "python": platform.python_version(),
        **libraries,
        "torch": torch.__version__,  # its own name for itself says which build it is
    }


def cpu_kernels() -> str:
    """Whether the CPU kernels are loaded and what bf16 is multiplied by, or why they are not."""
    return ops.NO_CPU_KERNELS or f"loaded, bf16 by {torch.ops.fastlora._products_of_bf16()}"


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


def commit() -> str | None:
    """The commit of the checkout that fastlora runs from, ``-dirty`` if its code was changed since, None without one.

    Results and pages, which a measurement changes, are not its code.
    """
    module = Path(ops.__file__)
    if _git(module.parent, "ls-files", "--error-unmatch", module.name) is None:
        return None
    code = (":/", ":/!benchmarks/results", ":/!*.md")
    changed = _git(module.parent, "status", "--porcelain", "--untracked-files=no", "--", *code)
    return f"{_git(module.parent, 'rev-parse', 'HEAD')}{'-dirty' * bool(changed)}"


def refuse_changed_code(folder: Path) -> None:
    """Raise UsageError if results of record are to be written there, and no commit has the code that they are of."""
    if RESULTS in (folder.resolve(), *folder.resolve().parents) and (commit() or "").endswith("-dirty"):
        raise UsageError(
            f"{folder} is for results of record, and the code has changes that are in no commit: commit them, or write "
            "elsewhere with --out"
        )


def _git(folder: Path, *command: str) -> str | None:
    try:
        result = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
