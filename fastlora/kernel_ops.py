"""The Triton kernels as implementations of ``torch.ops.fastlora.*``.

PyTorch's dispatcher picks them for tensors on a GPU; ``plans.use(kernels="off")`` leaves the ops to torch there too. A
launch happens under the tensor's device, on the stream that is current at the call, and never waits for the device;
dropout's seed stays a tensor on it. So calls can be captured in a CUDA graph (after a first call outside it, which
compiles and copies code books) and replayed by checkpointing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastlora import checks, plans
from fastlora.plans import Problem, choose

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST = (8, 0)  # compute capability that Triton supports

compositions: dict[str, Callable] = {}  # the ops in plain torch, by name


@cache
def unsupported_reason(device: torch.device | None = None) -> str | None:
    """Why the kernels do not run on this GPU (without a device: on any GPU), None if they do."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device is None or device.type != "cuda" or torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(device)
    return None if found >= _OLDEST else f"compute capability {found[0]}.{found[1]}, Triton needs {_OLDEST[0]}.0"


def register_gpus(library: torch.library.Library, name: str, composition: Callable) -> None:
    """Let the kernel of this op, if it has one, implement it on every GPU that PyTorch and Triton share.

    ``composition``, the op in plain torch, keeps the calls that no kernel takes (fp64).
    """
    compositions[name] = composition
    if name in _LAUNCHERS and unsupported_reason() is None:
        for key in ("CUDA", "XPU"):  # AMD's is CUDA
            library.impl(name, _implementation(name), key)


def _implementation(name: str) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        operand = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
        if not isinstance(operand, Tensor) or unsupported_reason(operand.device) is not None or plans.kernels_are_off():
            return compositions[name](*args, **kwargs)
        for value in (*args, *kwargs.values()):
            for each in value if isinstance(value, list) else (value,):  # `_has_kernel`, without a call for each
                dtype = each.dtype if isinstance(each, Tensor) else each
                if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype not in _DTYPES:
                    if _has_kernel(args[_BASE.get(name, 0)]):  # fp64 adapters beside an x that has one
                        return _in_fp32(name, operand.device, *args, **kwargs)
                    return compositions[name](*args, **kwargs)
        guard = _guard(operand.device)
        if guard is None:
            return _LAUNCHERS[name](*args, **kwargs)
        with guard:
            return _LAUNCHERS[name](*args, **kwargs)

    return run


# The operand that says in which dtype is computed, if not the first
_BASE = {"lora_grad_a": 1, "lora_grad_experts": 1, "decode_4bit": 10}
_RESULTS_LIKE: dict[str, Callable] = {  # the adapters' dtype
    "shrink": lambda x, a, *_: [a],
    "shrink_group": lambda x, a, *_: a,
    "lora_grad": lambda dy, x, b, xa, *_: [xa if b is None else b] * 2 + [b if xa is None else xa],
    "lora_grad_a": lambda dxa, *_: [dxa],
    "shrink_experts": lambda x, a, *_: [a],
    "lora_grad_experts": lambda dxa, *_: [dxa],
}


def _in_fp32(name: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Launch with fp64 adapters converted to fp32: the composition would round them to x's dtype."""
    getattr(checks, name)(*args, **kwargs)
    narrow = tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.float64 else t, (args, kwargs))
    with _guard(device) or nullcontext():
        results: Any = _LAUNCHERS[name](*narrow[0], **narrow[1])
    if name not in _RESULTS_LIKE:
        return results
    one = isinstance(results, Tensor)
    likes: Any = _RESULTS_LIKE[name](*args)
    made: Any = [results] if one else results
    wide = [t.to(like.dtype) for t, like in zip(made, likes, strict=True)]
    return wide[0] if one else tuple(wide) if isinstance(results, tuple) else wide


def _has_kernel(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_has_kernel, value))
    dtype = value.dtype if isinstance(value, Tensor) else value
    return not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype in _DTYPES


@cache
def _use_measured_tiles() -> None:
    import_module("fastlora.kernels.tiles").measured_by(plans.table)


@cache
def launcher(module: str, name: str) -> Callable:
    """A function of `fastlora.kernels`. Triton is imported by the first call, not with fastlora."""
    _use_measured_tiles()
    return getattr(import_module(f"fastlora.kernels.{module}"), name)


def shrink(*args: Any) -> Tensor:
    return launcher("shrink", "shrink")(*args)


def shrink_group(*args: Any) -> list[Tensor]:
    return launcher("shrink", "shrink_group")(*args)


def lora_matmul(x: Tensor, w: Tensor, xa: Tensor, b: Tensor, *args: Any) -> Tensor:
    plan = choose("lora_matmul", _problem(x, w.shape[0], b.shape[1]), _name(x.device))
    return launcher("lora_matmul", "lora_matmul" if plan == "tail" else "lora_matmul_base_last")(x, w, xa, b, *args)


def lora_matmul_group(x: Sequence[Tensor], w: Sequence[Tensor], xa: Any, b: Sequence[Tensor], *args: Any) -> Tensor:
    K = rank = 0
    for x_i, b_i in zip(x, b, strict=True):
        K, rank = K + x_i.shape[1], rank + b_i.shape[1]
    problem = _problem(x[0], w[0].shape[0], rank, K, len(x))
    plan = choose("lora_matmul", problem, _name(x[0].device))
    name = "lora_matmul_group" if plan == "tail" else "lora_matmul_group_base_last"
    return launcher("lora_matmul", name)(x, w, xa, b, *args)


def lora_grad(dy: Tensor, x: Any, b: Any, xa: Any, s: float, p: float = 0.0, seed: Tensor | None = None) -> Any:
    r = (b if xa is None else xa).shape[1]
    plan = choose("lora_grad", _problem(dy, 0, r), _name(dy.device))
    return launcher("lora_grad", "lora_grad")(dy, x, b, xa, s, p, seed, plan == "one_pass")


def lora_grad_a(*args: Any) -> Tensor:
    return launcher("lora_grad", "lora_grad_a")(*args)


def dora_grad(*args: Any) -> tuple[Tensor, Tensor]:
    return launcher("dora", "dora_grad")(*args)


def shrink_experts(*args: Any) -> Tensor:
    return launcher("experts", "shrink_experts")(*args)


def lora_matmul_experts(*args: Any) -> Tensor:
    return launcher("experts", "lora_matmul_experts")(*args)


def lora_grad_experts(*args: Any) -> Tensor:
    return launcher("experts", "lora_grad_experts")(*args)


def combine_experts(*args: Any) -> Tensor:
    return launcher("experts", "combine_experts")(*args)


def swiglu(*args: Any) -> Tensor:
    return launcher("swiglu", "swiglu")(*args)


def swiglu_backward_(*args: Any) -> None:
    launcher("swiglu", "swiglu_backward_")(*args)


def decode_4bit(*args: Any) -> Tensor:
    return launcher("nf4", "decode_4bit")(*args)


def nf4_matmul(x: Tensor, *args: Any) -> Tensor:
    weight, (a, b, s, *rest) = args[:10], args[10:]
    packed, blocksize, N = weight[0], weight[5], weight[8]
    bias, r = rest[0] if rest else None, 0 if a is None else a.shape[0]
    plan = choose("linear_4bit", _problem(x, N, r, blocksize=blocksize), _name(x.device))
    if plan == "fused" and packed.data_ptr() % 4 == 0:  # it reads whole words
        return launcher("nf4_matmul", "nf4_matmul")(x, *weight, a, b, s, bias)
    if plan == "decoded" and a is not None:
        return lora_matmul(x, decode_4bit(*weight, x.dtype, None, None, 1.0), shrink(x, a, s), b, bias)
    w = decode_4bit(*weight, x.dtype, a, b, s)
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())


_LAUNCHERS = {
    "shrink": shrink,
    "shrink_group": shrink_group,
    "lora_matmul": lora_matmul,
    "lora_matmul_group": lora_matmul_group,
    "lora_grad": lora_grad,
    "lora_grad_a": lora_grad_a,
    "dora_grad": dora_grad,
    "shrink_experts": shrink_experts,
    "lora_matmul_experts": lora_matmul_experts,
    "lora_grad_experts": lora_grad_experts,
    "combine_experts": combine_experts,
    "swiglu": swiglu,
    "swiglu_backward_": swiglu_backward_,
    "decode_4bit": decode_4bit,
    "nf4_matmul": nf4_matmul,
}


def _problem(x: Tensor, N: int, r: int, K: int | None = None, parts: int = 1, blocksize: int = 64) -> Problem:
    K = x.shape[1] if K is None else K
    return Problem(x.shape[0], N, K, r, itemsize=x.element_size(), parts=parts, blocksize=blocksize)


@cache
def _name(device: torch.device) -> str:
    return device.type if device.type in ("cpu", "meta") else torch.get_device_module(device).get_device_name(device)


def _guard(device: torch.device) -> AbstractContextManager | None:
    """Makes the tensor's device the current one, which Triton launches on; None if it is already."""
    if device.index is None or device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return None if device.index == module.current_device() else module.device(device)


_interpreted = False


def decodes_whole_weights(device: torch.device) -> bool:
    """Whether products with many tokens decode a 4-bit weight to memory first: GPUs do, a CPU decodes in cache."""
    return device.type != "cpu" or _interpreted


@contextmanager
def in_interpreter() -> Iterator[None]:
    """For tests: within this context the ops on CPU tensors run the kernels in Triton's interpreter.

    Whole layers, with their autograd and modules, then go through the kernels without a GPU. ``TRITON_INTERPRET=1``
    must have been set before Triton was imported. Within itself it changes nothing.
    """
    global _interpreted
    import triton

    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before triton is imported"
    if _interpreted:
        yield
        return
    _interpreted = True
    try:
        with on_cpu_tensors():
            yield
    finally:
        _interpreted = False


@contextmanager
def on_cpu_tensors() -> Iterator[None]:
    """For tests: within this context the ops launch their kernels for CPU tensors too, interpreted or on a stand-in."""
    library = torch.library.Library("fastlora", "IMPL")
    try:
        for name, composition in compositions.items():
            library.impl(name, _implementation(name) if name in _LAUNCHERS else composition, "CPU")
        yield
    finally:
        library._destroy()
