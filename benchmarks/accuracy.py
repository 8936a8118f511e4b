"""The one judge of accuracy, for tests, benchmarks and tuning: no result may be less exact than plain torch's.

    error(t) = ‖t - truth‖ / ‖truth‖                       (Frobenius, for every result)
    error    <= 1.5 · error of the baseline + floor

The baseline is the same computation in eager torch, for a layer that of PEFT. The floor is there because the baseline's
error is a sample, and on a few elements often zero by luck. A result takes at most four roundings to the compute dtype
one after the other (adapter, xa, adapter's product, sum), of half an ulp each, and sums of at most L terms in fp32,
whose errors walk randomly. Over n independent elements they average out:

    floor = (2 eps(compute dtype) + sqrt(L) eps(fp32)) / sqrt(n)
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

FACTOR = 1.5
FACTOR_OF_ONE = 3.0  # of one among many results of a kind, which are judged by their root mean square
ROUNDINGS = 2  # in the Frobenius norm one rounding is a quarter of eps, so this allows for several on either way


def floor(dtype: torch.dtype, longest: int, elements: int = 1) -> float:
    """What is added to the bar: ``longest`` is L of the module's docstring, ``elements`` is n."""
    return (2 * torch.finfo(dtype).eps + math.sqrt(longest) * torch.finfo(torch.float32).eps) / math.sqrt(elements)


def relative_error(t: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm; where the truth is zero, or empty, the norm of t."""
    return (t.to(truth.dtype) - truth).norm().item() / (truth.norm().item() or 1.0)


def judge(
    errors: Mapping[str, float],
    bars: Mapping[str, float],
    floors: Mapping[str, float],
    kind: Callable[[str], str] = str,
    singly: Collection[str] | None = None,
) -> str | None:
    """Why results with these errors are not exact enough beside the baseline's (``bars``), None if they are.

    Results of one ``kind``, such as dA of all layers, are judged by the root mean square of their errors, and none of
    them (of ``singly``, if it is given) may be `far_off`.
    """
    alone = [name for name in far_off(errors, bars, floors, kind) if singly is None or name in singly]
    for what, names in _kinds(errors, kind).items():
        for name in names:
            if name in alone:
                return _reason(name, errors[name], bars[name])
        error, bar, least = (math.sqrt(sum(e[n] ** 2 for n in names) / len(names)) for e in (errors, bars, floors))
        if not error <= FACTOR * bar + least:
            return _reason(names[0] if len(names) == 1 else what, error, bar)
    return None


def far_off(
    errors: Mapping[str, float],
    bars: Mapping[str, float],
    floors: Mapping[str, float],
    kind: Callable[[str], str],
) -> list[str]:
    """Which of several results of one kind are further off than twice as much as a result that is the only one."""
    several = (name for names in _kinds(errors, kind).values() if len(names) > 1 for name in names)
    return [n for n in several if not errors[n] <= FACTOR_OF_ONE * bars[n] + floors[n]]  # so that NaN is


def _kinds(names: Iterable[str], kind: Callable[[str], str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind(name), []).append(name)
    return kinds


def _reason(name: str, error: float, bar: float) -> str:
    return f"error of {name} {error:.1e}, the baseline's is {bar:.1e}"


def inexact(
    ours: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor], longest: int, least: float = 0.0
) -> str | None:
    """Why the results of an op are not exact enough, None if they are.

    Args:
        longest: terms in the op's longest sum.
        least: an error that is allowed however exact eager torch is.
    """
    for i, (t, theirs, exact) in enumerate(zip(ours, eager, truth, strict=True)):
        if t.shape != exact.shape:
            return f"shape {list(t.shape)} instead of {list(exact.shape)}"
        dtype = max(t.dtype, theirs.dtype, key=lambda each: torch.finfo(each).eps)
        error, bar = relative_error(t, exact), max(least, relative_error(theirs, exact))
        name = f"result {i}"
        reason = judge({name: error}, {name: bar}, {name: floor(dtype, longest, max(1, exact.numel()))})
        if reason is not None:
            return reason
    return None


def same(t: Tensor, other: Tensor, dtype: torch.dtype | None = None, longest: int = 0) -> bool:
    """Whether one computation, done in two ways, differs by no more than the roundings of either.

    In the Frobenius norm, for elements may cancel.

    Args:
        dtype: what is computed in, if not the dtype of both, which has to be one without it.
        longest: terms in the longest sum, if the two ways add them up in another order: in fp32, or in ``dtype`` if
            that is finer.
    """
    if t.shape != other.shape or (dtype is None and t.dtype != other.dtype):
        return False
    eps = torch.finfo(dtype or t.dtype).eps
    allowed = ROUNDINGS * eps + math.sqrt(longest) * min(eps, torch.finfo(torch.float32).eps)
    return relative_error(t.double(), other.double()) <= allowed


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` returns NaN: an element that nobody writes cannot pass for what was in that memory before."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
