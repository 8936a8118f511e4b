"""Decoding 4-bit weights, alone and with an adapter merged in: memory-bound work, so its limit is a copy."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora import costs
from fastlora.benchmarks import accuracy
from fastlora.benchmarks.cases.modules import SCALING, Case
from fastlora.benchmarks.cases.ops import decoded, random_weight_4bit
from fastlora.benchmarks.protocol import (
    COLUMNS,
    ROUNDS,
    Clock,
    Way,
    clock_of,
    free,
    interleave,
    quantiles,
    ratio,
)
from fastlora.costs import Problem, Rates
from fastlora.fourbit import Weight4bit

MODES = ("decode", "merge")  # the weight; the weight and s·b·a


@dataclass(frozen=True)
class Candidate:
    """A way to something of one weight. ``baseline`` has the errors that are the bar, ``bytes`` cannot be spared."""

    provider: str
    mode: str
    bytes: int
    call: Callable[[], Tensor]
    baseline: Callable[[], Tensor]
    truth: Callable[[], Tensor]


@dataclass(frozen=True)
class Operands:
    """A random 4-bit weight and an adapter of it, and what it decodes to, with and without the adapter, in fp32."""

    w: Weight4bit
    a: Tensor
    b: Tensor
    s: float
    exact: Tensor
    merged: Tensor


def operands(case: Case, device: torch.device) -> Operands:
    torch.manual_seed(0)
    w, s = random_weight_4bit(case.N, case.K, device, case.base), float(SCALING)
    a = torch.randn(case.r, case.K, device=device) / case.K
    b = torch.randn(case.N, case.r, device=device)
    exact = decoded(w, torch.float32)
    return Operands(w, a, b, s, exact, exact + s * b @ a)


def candidates(case: Case, t: Operands) -> Iterator[Candidate]:
    """fastlora's ways and bitsandbytes', which has to add the adapter to the decoded weight."""
    c = Problem(0, case.N, case.K, case.r)
    moved = int(costs.packed_bytes(c)) + 2 * case.N * case.K
    whole = moved + 4 * case.r * (case.N + case.K)
    dtype = torch.bfloat16
    theirs = _bitsandbytes(t.w)

    def baseline() -> Tensor:
        return t.exact.to(dtype)

    def merged_baseline() -> Tensor:
        return baseline().addmm_(t.b.to(dtype), t.a.to(dtype), alpha=t.s)

    found = {
        ("fastlora", "decode"): lambda: t.w.decode(dtype),
        ("fastlora", "merge"): lambda: t.w.decode_merged(dtype, t.a, t.b, t.s),
        ("bitsandbytes", "decode"): theirs,
        ("bitsandbytes", "merge"): lambda: theirs().addmm_(t.b.to(dtype), t.a.to(dtype), alpha=t.s),
    }
    for (provider, mode), call in found.items():
        if mode == "decode":
            yield Candidate(provider, mode, moved, call, baseline, lambda: t.exact)
        else:
            yield Candidate(provider, mode, whole, call, merged_baseline, lambda: t.merged)


def _bitsandbytes(w: Weight4bit) -> Callable[[], Tensor]:
    """Raises ImportError when it is called, if bitsandbytes is missing."""

    def decode() -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        assert w.code2 is not None and w.absmax2 is not None
        nested = QuantState(absmax=w.absmax2, code=w.code2, blocksize=w.blocksize2, dtype=torch.float32)
        state = QuantState(
            absmax=w.absmax, shape=torch.Size((w.N, w.K)), dtype=torch.bfloat16, blocksize=w.blocksize,
            code=get_4bit_type(w.quant_type, device=w.packed.device), quant_type=w.quant_type,
            offset=w.offset, state2=nested,
        )  # fmt: skip
        return dequantize_4bit(w.packed, state)

    return decode


def run(
    case: Case,
    found: Iterable[Candidate],
    device: torch.device,
    rates: Rates,
    rounds: int = ROUNDS,
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Time the candidates that are exact enough, and a copy of as many bytes as decoding moves."""
    rows, right = [], {}
    for each in found:
        row = case.row() | dict.fromkeys(COLUMNS) | {"provider": each.provider, "mode": each.mode, "bytes": each.bytes}
        rows.append(row)
        try:
            with accuracy.poisoned():
                result = each.call()
        except ImportError as missing:
            row["error"] = f"missing: {missing.name or missing} is not installed"
            continue
        truth = each.truth()
        reason = accuracy.inexact([result], [each.baseline()], [truth], case.K)
        row |= {"relative_error": accuracy.relative_error(result, truth), "error": reason and f"wrong: {reason}"}
        if row["error"] is None:
            right[each.provider, each.mode] = each, row
        del result, truth
    moved = next((each.bytes for each, _ in right.values()), 2)
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    free()
    ways = {key: Way.of(each.call) for key, (each, _) in right.items()}
    turns = interleave(
        ways | {("copy", "copy"): Way.of(lambda: target.copy_(source))}, clock or clock_of(device), rounds
    )
    limit = turns["copy", "copy"]
    rows.insert(0, case.row() | dict.fromkeys(COLUMNS) | {"provider": "copy", "mode": "copy", "bytes": moved})
    for row in rows:
        key = row["provider"], row["mode"]
        if key in turns:
            own, theirs = turns[key], turns.get(("bitsandbytes", row["mode"]))
            row |= {**quantiles(own), "calls": sum(map(len, own)), "of_limit": ratio(own, limit)}
            row |= {"speedup": ratio(theirs, own) if theirs else None, "gbytes": row["bytes"] / row["p50"] / 1e9}
            row["roofline"] = row["bytes"] / rates.copy / row["p50"]
    return rows
