"""A small fixed set for regressions, with pytest-benchmark's own options to keep and compare what was measured.

    pytest benchmarks --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

The unit is the time of the frozen layer, measured in turn with the adapted one in the same rounds: 1.25 is a layer that
takes a quarter longer than the frozen one, and means the same on a machine that is busy or slow.
"""

import pytest
import torch

from fastlora.benchmarks import protocol
from fastlora.benchmarks.cases.modules import Case, linear_cases, make_subject
from fastlora.benchmarks.environment import keep_freed_memory
from fastlora.benchmarks.providers import PROVIDERS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 15


class FrozenTime:
    """A clock that counts in times of the frozen layer."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


frozen_time = FrozenTime()


@pytest.fixture(scope="module", params=["bf16", "nf4", "bf16 dropout", "bf16 block", "nf4 block"])
def subject(request):
    base, *what = request.param.split()
    shape, M = request.config.getoption("--model-shape"), request.config.getoption("--m")
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    keep_freed_memory()
    fields = {"M": M, "r": 16, "base": base, "dropout": 0.05 if "dropout" in what else 0.0}
    case = Case("block", shape, "block", **fields) if "block" in what else linear_cases(shape, **fields)[0]
    subject = make_subject(case, DEVICE)
    return subject, protocol.Gate(subject)


@pytest.mark.parametrize("name", ["peft", "addmm", "fastlora"])
@pytest.mark.benchmark(timer=frozen_time, warmup=False)
def test_step(benchmark, subject, name):
    subject, gate = subject
    if name == "addmm" and subject.case.dropout:
        pytest.skip("the addmm style has no dropout")
    provider, frozen = PROVIDERS[name], PROVIDERS["frozen"]
    module = provider.build(subject)
    error, reason = gate.judge(provider, module)
    assert reason is None, reason
    ways = {
        "frozen": protocol.ways_of(subject, frozen, frozen.build(subject))["step"],
        name: protocol.ways_of(subject, provider, module)["step"],
    }
    turns = protocol.interleave(ways, protocol.clock_of(DEVICE), ROUNDS)
    ratios = [protocol.ratio([own], [limit]) for own, limit in zip(turns[name], turns["frozen"], strict=True)]
    taken = iter(ratios)

    def adapted() -> None:
        frozen_time.now += next(taken)

    benchmark.group = str(subject.case)
    benchmark.extra_info = {
        "relative_error": error,
        "frozen_seconds": protocol.quantiles(turns["frozen"])["p50"],
        "adapted_seconds": protocol.quantiles(turns[name])["p50"],
    }
    benchmark.pedantic(adapted, rounds=ROUNDS)
