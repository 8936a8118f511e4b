"""How many floating-point operations the products of an op take, for ``torch.utils.flop_counter.FlopCounterMode``.

Two for each multiplication and its addition, as PyTorch counts its own. A formula gets the op's arguments with shapes
in place of tensors.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def shrink(x, a, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * a[0]


def shrink_group(x, a, *_: Any, **__: Any) -> int:
    return sum(shrink(x, each) for each in a)


def lora_matmul(x, w, xa, b, *_: Any, **__: Any) -> int:
    return 2 * x[0] * w[0] * (x[1] + b[1])


def lora_matmul_group(x, w, xa, b, *_: Any, **__: Any) -> int:
    return sum(lora_matmul(*part) for part in zip(x, w, xa, b, strict=True))


def lora_grad(dy, x, b, xa, *_: Any, **__: Any) -> int:
    M, N = dy
    dxa = 0 if b is None else 2 * M * N * b[1]
    da = 0 if x is None or b is None else 2 * M * x[1] * b[1]
    return dxa + da + (0 if xa is None else 2 * M * N * xa[1])


def lora_grad_a(dxa, x, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * dxa[1]


def shrink_experts(x, a, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * a[1]


def lora_matmul_experts(x, w, xa, *_: Any, **__: Any) -> int:
    return 2 * x[0] * w[1] * (x[1] + xa[1])


def lora_matmul_experts_4bit(x, *args: Any, **__: Any) -> int:
    xa, b = args[10:12]
    return 2 * x[0] * b[1] * (x[1] + xa[1])


def lora_grad_experts(dxa, x, *_: Any, **__: Any) -> int:
    return lora_grad_a(dxa, x)


def decode_4bit(*args: Any, **__: Any) -> int:
    N, K, a = args[8], args[9], args[11]
    return 0 if a is None else 2 * N * K * a[0]


def lora_matmul_4bit(x, weights, sizes, quant_types, xa, b, *_: Any, **__: Any) -> int:
    return sum(2 * M * each[0] * (K + each[1]) for (M, K), each in zip(x, b, strict=True))


def nf4_matmul(x, *args: Any, **__: Any) -> int:
    N, K, a = args[8], args[9], args[10]
    return 2 * x[0] * N * K + (0 if a is None else 2 * N * K * a[0])


FORMULAS: dict[str, Callable[..., int]] = {
    function.__name__: function
    for function in (
        shrink,
        shrink_group,
        lora_matmul,
        lora_matmul_group,
        lora_grad,
        lora_grad_a,
        shrink_experts,
        lora_matmul_experts,
        lora_matmul_experts_4bit,
        lora_grad_experts,
        decode_4bit,
        lora_matmul_4bit,
        nf4_matmul,
    )
}
_waiting: list[str] = []


def register(name: str) -> None:
    """Let PyTorch count this op, if it has products: now, or when its counter is imported."""
    if name not in FORMULAS:
        return
    if _COUNTER in sys.modules:
        _register(name)
    else:
        _waiting.append(name)
        if _when_imported not in sys.meta_path:
            sys.meta_path.insert(0, _when_imported)


def _register(name: str) -> None:
    counter = sys.modules[_COUNTER]
    counter.register_flop_formula(getattr(torch.ops.fastlora, name))(FORMULAS[name])


class _WhenImported(MetaPathFinder):
    """Registers what waits when the counter is imported. To import it with fastlora would take 0.3 s and Triton."""

    def find_spec(self, name, path, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            while _waiting:
                _register(_waiting.pop())

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_when_imported = _WhenImported()
