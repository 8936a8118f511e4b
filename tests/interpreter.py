"""Triton's interpreter for the tests: kernels run on a CPU, and their bf16 arithmetic is that of a GPU.

The interpreter holds bf16 as raw uint16. It multiplies these integers in ``tl.dot``, and truncates fp32 to bf16 where a
GPU rounds to the nearest. It also searches the language for functions to wrap at each call within a kernel, a third of
its time. `repair` does all that right. It repairs the interpreter; no kernel works around it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def enable() -> None:
    """Make kernels that are imported from now on run in the interpreter, where there is no GPU to run them."""
    if not torch.cuda.is_available():
        assert "triton" not in sys.modules, "too late: triton reads TRITON_INTERPRET when it is imported"
        os.environ.setdefault("TRITON_INTERPRET", "1")


def compositions() -> dict[str, Callable]:
    """The ops in plain torch that a kernel can implement, by name."""
    from fastlora import kernel_ops, ops, ops_4bit

    return {name: getattr(ops, name, None) or getattr(ops_4bit, name) for name in kernel_ops._LAUNCHERS}


@contextmanager
def kernels() -> Iterator[None]:
    """Within this context the ops on CPU tensors run the kernels that a GPU would launch."""
    from fastlora import kernel_ops

    repair()
    with kernel_ops.in_interpreter(compositions()):
        yield


def repair() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    dot, cast, search = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpretedFunction.__call__
    if getattr(dot, "repaired", False):
        return

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *args):
        return dot(self, widen(a), widen(b), *args)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(rounded.view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    def call(self, *args, **kwargs):
        if tl.core.is_builtin(tl.core.full):  # not wrapped yet, as the launch wraps only triton.language
            return search(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
    create_dot.repaired = True
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
