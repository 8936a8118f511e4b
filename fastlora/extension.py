"""The optional C++ extension, the CPU kernels of ``kernels/cpu``: found, checked and loaded, or a reason why not."""

import hashlib
import warnings
from pathlib import Path

import torch

_CAPABILITIES = ("AVX2", "AVX512", "AVX512_BF16")  # each runs what is built for those before it


def load() -> str | None:
    """Load the extension, which registers its kernels with ``torch.ops.fastlora``. Returns why it is not loaded.

    One that is there and cannot be used is warned of: the ops would silently be slower than they were.
    """
    library = _find()
    if library is None:
        return "not built for this processor: there was no C++ compiler or no torch when fastlora was installed"
    reason = _why_not(library)
    if reason is not None:
        warnings.warn(f"fastlora runs without its CPU kernels: {reason}", stacklevel=2)
    return reason


def _why_not(library: Path) -> str | None:
    package = Path(__file__).parent
    sources, setup = package / "kernels" / "cpu", package.parent / "setup.py"
    in_checkout = setup.exists() and sources.is_dir()  # what is installed comes without sources
    if in_checkout and bytes.fromhex(fingerprint(sources, setup)) not in library.read_bytes():
        return "out of date: their sources are not those they were built from; install fastlora again"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built against another version of torch
        return f"cannot be loaded: {error}"
    return None


def fingerprint(folder: Path, setup: Path) -> str:
    """A hash of what the extension is built from: the sources in this folder, and the flags in setup.py."""
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    found = hashlib.sha256()
    for path in (*sources, setup):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _find() -> Path | None:
    """The extension built for the best instruction set that this processor has."""
    mine = torch.backends.cpu.get_cpu_capability()
    if mine == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        mine = "AVX512_BF16"
    usable = _CAPABILITIES[: _CAPABILITIES.index(mine) + 1] if mine in _CAPABILITIES else ()
    candidates = (Path(__file__).parent / f"_cpu_{name.lower()}.so" for name in reversed(usable))
    return next((path for path in candidates if path.exists()), None)
