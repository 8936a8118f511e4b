"""The optional C++ extension, the CPU kernels of ``kernels/cpu``: found, checked and loaded, or a reason why not."""

from pathlib import Path

import torch

_CAPABILITIES = ("AVX2", "AVX512", "AVX512_BF16")  # each runs what is built for those before it


def load() -> str | None:
    """Load the extension, which registers its kernels with ``torch.ops.fastlora``. Returns why it is not loaded."""
    library = _find()
    if library is None:
        return "not built for this processor: there was no C++ compiler or no torch when fastlora was installed"
    sources = [*Path(__file__).parent.glob("kernels/cpu/*"), *Path(__file__).parent.glob("../setup.py")]
    if any(source.stat().st_mtime > library.stat().st_mtime for source in sources):
        return "out of date: its sources changed since it was built; install fastlora again"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built against another version of torch
        return f"cannot be loaded: {error}"
    return None


def _find() -> Path | None:
    """The extension built for the best instruction set that this processor has."""
    mine = torch.backends.cpu.get_cpu_capability()
    if mine == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        mine = "AVX512_BF16"
    usable = _CAPABILITIES[: _CAPABILITIES.index(mine) + 1] if mine in _CAPABILITIES else ()
    candidates = (Path(__file__).parent / f"_cpu_{name.lower()}.so" for name in reversed(usable))
    return next((path for path in candidates if path.exists()), None)
