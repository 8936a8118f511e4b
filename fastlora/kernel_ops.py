"""The Triton kernels as implementations of ``torch.ops.fastlora.*``.

PyTorch's dispatcher picks them for tensors on a GPU. A launch happens under the tensor's device, on the stream that is
current at the call, and never waits for the device; dropout's seed stays a tensor on it. So calls can be captured in a
CUDA graph and replayed by checkpointing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastlora.plans import Problem, choose

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def register(library: torch.library.Library, key: str, compositions: Mapping[str, Callable]) -> None:
    """Let the kernels implement these ops for a dispatch key (``"CUDA"`` is also AMD's).

    ``compositions`` are the ops in plain torch, by name; they keep the calls that no kernel takes (fp64).
    """
    for name, composition in compositions.items():
        if name in _LAUNCHERS:
            library.impl(name, _implementation(name, composition), key)


def _implementation(name: str, composition: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not all(_has_kernel(value) for value in (*args, *kwargs.values())):
            return composition(*args, **kwargs)
        with _device_of(args[0]):
            return _LAUNCHERS[name](*args, **kwargs)

    return run


def _has_kernel(value: Any) -> bool:
    dtype = value.dtype if isinstance(value, Tensor) else value
    return not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype in _DTYPES


@cache
def launcher(module: str, name: str) -> Callable:
    """A function of `fastlora.kernels`. Triton is imported by the first call, not with fastlora."""
    return getattr(import_module(f"fastlora.kernels.{module}"), name)


def shrink(*args: Any) -> Tensor:
    return launcher("shrink", "shrink")(*args)


def lora_matmul(x: Tensor, w: Tensor, xa: Tensor, b: Tensor, *args: Any) -> Tensor:
    plan = choose("lora_matmul", _problem(x, w.shape[0], b.shape[1]), _name(x.device))
    return launcher("lora_matmul", "lora_matmul" if plan == "tail" else "lora_matmul_base_last")(x, w, xa, b, *args)


def lora_grad(dy: Tensor, x: Any, b: Any, xa: Any, s: float, p: float = 0.0, seed: Tensor | None = None) -> Any:
    r = (b if xa is None else xa).shape[1]
    plan = choose("lora_grad", _problem(dy, 0, r), _name(dy.device))
    return launcher("lora_grad", "lora_grad")(dy, x, b, xa, s, p, seed, plan == "one_pass")


def decode_4bit(*args: Any) -> Tensor:
    return launcher("nf4", "decode_4bit")(*args)


_LAUNCHERS = {"shrink": shrink, "lora_matmul": lora_matmul, "lora_grad": lora_grad, "decode_4bit": decode_4bit}
OPS = tuple(_LAUNCHERS)


def _problem(x: Tensor, N: int, r: int) -> Problem:
    intensity = launcher("tiles", "intensity")()
    return Problem(x.shape[0], N, x.shape[1], r, itemsize=x.element_size(), intensity=intensity)


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _device_of(t: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if t.device.type == "cuda" and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return nullcontext()


@contextmanager
def in_interpreter(compositions: Mapping[str, Callable]) -> Iterator[None]:
    """For tests: within this context the ops on CPU tensors run the kernels in Triton's interpreter.

    Whole layers, with their autograd and modules, then go through the kernels without a GPU. ``TRITON_INTERPRET=1``
    must have been set before Triton was imported.
    """
    import triton

    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before triton is imported"
    library = torch.library.Library("fastlora", "IMPL")
    register(library, "CPU", compositions)
    try:
        yield
    finally:
        library._destroy()
