"""The optional C++ extension: the CPU kernels of kernels/cpu. Everything static is in pyproject.toml.

It is built for the instruction set of this machine. FASTLORA_CPU_CAPABILITY=AVX2 (or AVX512, AVX512_BF16) builds for
another; a list such as AVX2,AVX512, or "all", builds one extension for each, and fastlora/extension.py loads the best
that the processor runs. Without torch or a C++ compiler, or on another kind of processor, the package is installed
without it and runs on torch's own ops.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import setup

# No contraction: decoding must round as bitsandbytes does. GCC warns of its own AVX-512 intrinsics.
ALWAYS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Every processor with AVX512-BF16 has VNNI, products of 16-bit integers.
FLAGS = {"AVX2": AVX2, "AVX512": AVX512, "AVX512_BF16": [*AVX512, "-mavx512vnni", "-mavx512bf16"]}


def cpu_kernels() -> dict:
    """The arguments of setup() that build the extensions, none if torch is not there to build with."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"fastlora: building without the CPU kernels ({error}); use --no-build-isolation", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        """A build that goes on without an extension that cannot be compiled."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                print(f"fastlora: building without the CPU kernels: {error}", file=sys.stderr)

        def build_extension(self, ext) -> None:
            folder = self.build_temp
            self.build_temp = os.path.join(folder, ext.name)  # all have the same sources, compiled with other flags
            try:
                super().build_extension(ext)
            except Exception as error:
                print(f"fastlora: building without {ext.name}: {error}", file=sys.stderr)
            finally:
                self.build_temp = folder

    capabilities = wanted(torch)
    if unknown := [name for name in capabilities if name not in FLAGS]:
        print(f"fastlora: building without the CPU kernels: there are none for {', '.join(unknown)}", file=sys.stderr)
        return {}
    folder = Path("kernels/cpu")
    # Which sources this is built from is its build id, a note that linkers write and `strip` leaves.
    sources = runpy.run_path("fastlora/extension.py")["fingerprint"](folder, Path("setup.py"))
    extensions = []
    for capability in capabilities:
        vectors = capability.removesuffix("_BF16")  # the name that ATen's headers know
        defines = [f"-DCPU_CAPABILITY={vectors}", f"-DCPU_CAPABILITY_{vectors}"]
        extension = CppExtension(
            f"fastlora._cpu_{capability.lower()}",
            sources=sorted(map(str, folder.glob("*.cpp"))),
            depends=["setup.py", *sorted(map(str, folder.glob("*.h")))],
            extra_compile_args=[*ALWAYS, *defines, *FLAGS[capability]],
            extra_link_args=["-fopenmp", f"-Wl,--build-id=0x{sources}"],
            optional=True,
        )
        extensions.append(extension)
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True)},
    }


def wanted(torch) -> list[str]:
    """The instruction sets to build for."""
    asked = os.environ.get("FASTLORA_CPU_CAPABILITY", "")
    if asked == "all":
        return list(FLAGS)
    if asked:
        return asked.split(",")
    here = torch.backends.cpu.get_cpu_capability()
    return ["AVX512_BF16" if here == "AVX512" and torch.cpu._is_avx512_bf16_supported() else here]


setup(**cpu_kernels())
