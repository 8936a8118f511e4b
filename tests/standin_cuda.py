"""Launch kernels on a GPU that is not there: ``python -m tests.standin_cuda [--time] ["OP, CASE" ...]``.

Triton compiles for sm_90, packs the arguments and launches, all as it would there; the driver below it is a stand-in
(standin_cuda.c), which refuses what NVIDIA's would and runs nothing. It finds what neither the interpreter nor
compiling ahead of time does: arguments that Triton's launcher cannot pass on, and what a launch costs the host.
"""

import ctypes
import gc
import json
import os
import struct
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
from torch.utils._pytree import tree_map_only
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.benchmarks.commands import inspect
from fastlora.benchmarks.environment import keep_freed_memory
from fastlora.kernels.launch import Launch

MAP_OFFSET = 128  # of a tensor map in Triton's Python object
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
    """What is launched from now on: grid and arguments, addresses as the layouts of their tensors."""
    from triton.backends.nvidia import driver as nvidia

    given: list[Any] = []
    annotated: dict[int, Any] = {}  # a PyKernelArg shows nothing of itself
    layouts: dict[int, Any] = {}  # of the tensors of the launch and what they are for, by their addresses
    launch_by_name = Launch.__call__

    def call(self: Launch, **tensors: Any) -> None:
        layouts.clear()  # an address of an earlier launch is not known any more
        for name, value in tensors.items():
            for i, t in enumerate(_flat([value])):
                if isinstance(t, Tensor):
                    layouts[t.data_ptr()] = [*_described(t), name, i]
        launch_by_name(self, **tensors)

    def of_c(gridX: int, gridY: int, gridZ: int, *args: Any) -> None:
        annotations, _, arguments = args[-3:]
        given.append([gridX, gridY, gridZ, *(_described(each, layouts) for each in passed(annotations, arguments))])
        launch(gridX, gridY, gridZ, *args)

    def annotate(nested_tuple: Any, type: Any) -> Any:
        made = kernel_arg(nested_tuple=nested_tuple, type=type)
        annotated[id(made)] = made, nested_tuple, type
        return made

    def passed(annotations: Any, arguments: Any) -> list[Any]:
        found: list[Any] = []
        for annotation, value in zip(annotations, arguments, strict=True):
            _, nested, kind = annotated[id(annotation)]
            if nested is not None:
                found += passed(nested, value)
            elif kind != nvidia.ARG_CONSTEXPR:
                found.append(value)
        return found

    def of_python(self: Any, gridX: int, gridY: int, gridZ: int, stream: Any, function: Any, *args: Any) -> None:
        given.append([gridX, gridY, gridZ, *map(_described, args[4:])])  # after metadata and hooks
        launch(self, gridX, gridY, gridZ, stream, function, *args)

    utils = driver.active.utils
    if hasattr(utils, "launch"):
        Launch.__call__, launch, utils.launch = call, utils.launch, of_c
        kernel_arg, nvidia.PyKernelArg = nvidia.PyKernelArg, annotate
    else:  # before Triton 3.7 each signature has a C function of its own
        launch, nvidia.CudaLauncher.__call__ = nvidia.CudaLauncher.__call__, of_python
    return given


def refuse_direct_launches() -> None:
    """Of what has been launched: as if Triton's C function took something else."""

    def refuse(*args: Any) -> None:
        raise TypeError("another signature")

    for each in gc.get_objects():
        if isinstance(each, Launch) and each.compiled is not None and each.direct is not None:
            each.direct = each.direct._replace(call=refuse)


def with_other_tensors(function: Callable) -> Callable:
    """The function on tensors of the same layouts, at other addresses in every call than in the call before."""
    kept: list[Any] = []

    def call(*args: Any) -> Any:
        new = tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), args)
        result = function(*new)
        kept[:] = [new]
        return result

    return call


def _flat(values: Any) -> list[Any]:
    return [each for value in values for each in (_flat(value) if isinstance(value, tuple | list) else [value])]


def _described(arg: Any, layouts: dict[int, Any] | None = None) -> Any:
    if isinstance(arg, tuple | list):
        return [_described(each) for each in arg]
    if isinstance(arg, Tensor) and layouts is not None:
        return layouts[arg.data_ptr()]
    if isinstance(arg, Tensor):
        return ["tensor", list(arg.shape), list(arg.stride()), str(arg.dtype)]
    if isinstance(arg, TensorDescriptor):
        return ["descriptor", _described(arg.base), list(arg.shape), list(arg.strides), list(arg.block_shape)]
    if type(arg).__name__ == "PyCUtensorMap":
        address, *sizes = struct.unpack("QQQII", ctypes.string_at(id(arg) + MAP_OFFSET, 32))
        return ["map", layouts[address], sizes]
    if layouts is not None and type(arg) is int:
        return layouts.get(arg, arg)
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
        # A meta tensor's methods are Python, and it has no address. Of these no page is touched, and none given back.
        keep_freed_memory()
        inspect._meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype)
        if not timed:
            call, by_every_tile = inspect._call, inspect._by_every_tile
            inspect._call = lambda function, *args: call(with_other_tensors(function), *args)
            inspect._by_every_tile = lambda group, dropout, function, *args: by_every_tile(
                group, dropout, with_other_tensors(function), *args
            )
        for op, case, launch in inspect.cases():
            name = f"{op}, {case}"
            if wanted and name not in wanted:
                continue
            rows[name] = [launched(cuda, given, launch) for _ in range(3)]  # by Triton, then twice by a Launch
            if not timed:
                refuse_direct_launches()
                rows[name].append(launched(cuda, given, launch))
            if timed:
                microseconds = 1e6 * median(timeit.repeat(launch, number=1, repeat=300))
                print(f"{microseconds:6.1f} us  {rows[name][0]['launches']} launches  {name}", file=sys.stderr)
    if not timed:
        print(json.dumps(rows))


if __name__ == "__main__":
    main([arg for arg in sys.argv[1:] if arg != "--time"], "--time" in sys.argv)
