"""The one judge of accuracy, `fastlora.benchmarks.accuracy`: what it lets pass, and that tests have no other one."""

import re
from pathlib import Path

import pytest
import torch

from fastlora.benchmarks.accuracy import inexact, same

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
TOLERANCE = re.compile(
    r"\b(atol|rtol)\s*=|\b(allclose|assert_close|isclose)\(|<=? *[\d.]+e-\d|<=? *[\d.]+ \* .*\bnorm\(\)"
)

TRUTH = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SPOILT = {
    "scaled": lambda t: t * 1.01,
    "a row of zeros": lambda t: t.clone().index_fill_(0, torch.tensor([3]), 0.0),
    "a row of NaN": lambda t: t.clone().index_fill_(0, torch.tensor([3]), float("nan")),
    "noise": lambda t: t + 0.01 * torch.randn_like(t),
}


def reason(ours):
    return inexact((ours,), (TRUTH.bfloat16(),), (TRUTH,), 64)


def test_what_is_as_exact_as_eager_is_right():
    assert reason(TRUTH.bfloat16()) is None
    assert reason(TRUTH.float()) is None


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_is_not_is_wrong(spoil):
    assert "the baseline's is" in reason(spoil(TRUTH).bfloat16())


def test_another_shape_is_wrong():
    assert reason(TRUTH[:, :63].bfloat16()) == "shape [64, 63] instead of [64, 64]"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_two_ways_are_the_same_to_their_roundings(dtype):
    t, eps = TRUTH.to(dtype), torch.finfo(dtype).eps
    assert same(t, t) and same(t.double() * (1 + eps), t, dtype)
    assert not same(t.double() * (1 + 3 * eps), t, dtype) and not same(t, t * float("nan"))
    assert not same(t, t[:63]) and not same(t, t.half()) and same(t, t.half(), torch.float16)
    assert not any(same(spoil(t), t, longest=64) for spoil in SPOILT.values() if dtype != torch.bfloat16)


def test_sums_in_another_order_are_the_same():
    t = TRUTH.float()
    one, other = t @ t, t.flip(1) @ t.flip(0)
    assert not torch.equal(one, other) and same(one, other, longest=64)
    assert not same(one, one * (1 + 1e-5), longest=64)
    bf16 = torch.finfo(torch.bfloat16).eps
    assert not same(TRUTH * (1 + 3 * bf16), TRUTH, torch.bfloat16, longest=64), "sums are in fp32, whatever the dtype"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_number_that_a_result_may_differ_by_stands_beside_a_comment(file):
    """Results are judged by `fastlora.benchmarks.accuracy`. What cannot be says why, on its line or the one above."""
    lines = file.read_text(encoding="utf-8").splitlines()
    before = ["", *lines]
    bare = [
        f"{number}: {line.strip()}"
        for number, (line, above) in enumerate(zip(lines, before, strict=False), 1)
        if TOLERANCE.search(line) and "#" not in line and not above.lstrip().startswith("#")
    ]
    assert not bare, f"use fastlora.benchmarks.accuracy, or say in a comment why not: {bare}"
