"""The optional C++ extension: the CPU kernels of kernels/cpu. Everything static is in pyproject.toml.

It is built for the instruction set of this machine; FASTLORA_CPU_CAPABILITY=AVX2 (or AVX512, AVX512_BF16) builds for
another. Without torch or a C++ compiler, or on another kind of processor, the package is installed without it and runs
on torch's own ops.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import setup

# No contraction: decoding must round as bitsandbytes does.
ALWAYS = ["-O3", "-g0", "-fopenmp", "-ffp-contract=off", "-Wno-unknown-pragmas"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS = {"AVX2": AVX2, "AVX512": AVX512, "AVX512_BF16": [*AVX512, "-mavx512bf16"]}


def cpu_kernels() -> dict:
    """The arguments of setup() that build the extension, none if torch is not there to build with."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"fastlora: building without the CPU kernels ({error}); use --no-build-isolation", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        """A build that goes on without the extension if it cannot be compiled."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                print(f"fastlora: building without the CPU kernels: {error}", file=sys.stderr)

    capability = os.environ.get("FASTLORA_CPU_CAPABILITY") or torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        capability = "AVX512_BF16"
    if capability not in FLAGS:
        print(f"fastlora: building without the CPU kernels: there are none for {capability}", file=sys.stderr)
        return {}
    vectors = capability.removesuffix("_BF16")  # the name that ATen's headers know
    defines = [f"-DCPU_CAPABILITY={vectors}", f"-DCPU_CAPABILITY_{vectors}"]
    folder = Path("kernels/cpu")
    # Which sources this is built from is its build id, a note that linkers write and `strip` leaves.
    sources = runpy.run_path("fastlora/extension.py")["fingerprint"](folder, Path("setup.py"))
    extension = CppExtension(
        f"fastlora._cpu_{capability.lower()}",
        sources=sorted(map(str, folder.glob("*.cpp"))),
        depends=["setup.py", *sorted(map(str, folder.glob("*.h")))],
        extra_compile_args=[*ALWAYS, *defines, *FLAGS[capability]],
        extra_link_args=["-fopenmp", f"-Wl,--build-id=0x{sources}"],
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True)},
    }


setup(**cpu_kernels())
