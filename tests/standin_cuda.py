"""Launch kernels on a GPU that is not there: ``python -m tests.standin_cuda [--time] ["OP, CASE" ...]``.

Triton compiles for sm_90, packs the arguments and launches, all as it would there; the driver below it is a stand-in
(standin_cuda.c), which refuses what NVIDIA's would and runs nothing. It finds what neither the interpreter nor
compiling ahead of time does: arguments that Triton's launcher cannot pass on, and what a launch costs the host.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.benchmarks.commands import inspect
from fastlora.benchmarks.environment import keep_freed_memory

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"


def install(folder: Path) -> ctypes.CDLL:
    """Make the stand-in Triton's driver library, and its one device the current one."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_suffix(".c")
    command = ["cc", "-shared", "-fPIC", f"-I{NVIDIA / 'include'}", "-Wl,-soname,libcuda.so.1", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    cuda = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its soname from now on

    from triton.backends.nvidia.driver import CudaDriver

    found = CudaDriver()
    found.get_device_capability = lambda device=0: (9, 0)
    found.get_current_device = lambda: 0
    found.get_current_stream = lambda device: 0
    driver.set_active(found)
    return cuda


def refuse_nested_descriptors() -> None:
    """As Triton's launcher does until 3.7: it finds descriptors only where they are arguments of their own."""

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            nested = arg if isinstance(arg, tuple) else ()
            assert not any(isinstance(each, TensorDescriptor) for each in nested), f"{self.__name__}: in a tuple"
        return launch(self, *args, **kwargs)

    launch = JITFunction.run
    JITFunction.run = run


def watch_launches() -> list[Any]:
    """What Triton's launcher is given from now on: grid and arguments, tensors as their layouts."""

    def call(self: Any, gridX: int, gridY: int, gridZ: int, stream: Any, function: Any, *args: Any) -> None:
        given.append([gridX, gridY, gridZ, *map(_described, args[4:])])  # after metadata and hooks
        launch(self, gridX, gridY, gridZ, stream, function, *args)

    from triton.backends.nvidia.driver import CudaLauncher

    given: list[Any] = []
    launch = CudaLauncher.__call__
    CudaLauncher.__call__ = call
    return given


def _described(arg: Any) -> Any:
    if isinstance(arg, tuple | list):
        return [_described(each) for each in arg]
    if isinstance(arg, Tensor):
        return ["tensor", list(arg.shape), list(arg.stride()), str(arg.dtype)]
    if isinstance(arg, TensorDescriptor):
        return ["descriptor", _described(arg.base), list(arg.shape), list(arg.strides), list(arg.block_shape)]
    return arg if isinstance(arg, int | float | str | None) else str(arg)


def launched(cuda: ctypes.CDLL, given: list[Any], launch: Callable[[], Any]) -> dict[str, Any]:
    """What the driver was asked for, and the error if there was one."""
    counters = {name: ctypes.c_int.in_dll(cuda, name) for name in ("launches", "tensor_maps")}
    for counter in counters.values():
        counter.value = 0
    given.clear()
    error = None
    try:
        launch()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {name: counter.value for name, counter in counters.items()} | {"given": list(given), "error": error}


def main(wanted: list[str], timed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cuda = install(Path(folder))
        refuse_nested_descriptors()
        given = [] if timed else watch_launches()
        rows = {}
        if timed:  # a meta tensor's methods are Python; of these no page is touched, and none is given back
            keep_freed_memory()
            inspect._meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype)
        for op, case, launch in inspect.cases():
            name = f"{op}, {case}"
            if wanted and name not in wanted:
                continue
            rows[name] = [launched(cuda, given, launch) for _ in range(2)]  # by Triton, and by a Launch
            if timed:
                microseconds = 1e6 * median(timeit.repeat(launch, number=1, repeat=300))
                print(f"{microseconds:6.1f} us  {rows[name][0]['launches']} launches  {name}", file=sys.stderr)
    if not timed:
        print(json.dumps(rows))


if __name__ == "__main__":
    main([arg for arg in sys.argv[1:] if arg != "--time"], "--time" in sys.argv)
