"""What `fastlora tune` measures, and how: turns, tiles, and cases of the real kernels, untimed."""

from functools import partial

import interpreter
import pytest
import torch

from fastlora import kernel_ops, plans
from fastlora.benchmarks import tuning
from fastlora.benchmarks.accuracy import inexact
from fastlora.benchmarks.cases.ops import kernels, op_cases
from fastlora.benchmarks.cases.shapes import SHAPES

pytest.importorskip("triton")

from fastlora.kernels import tiles

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="makes a CPU pass for a GPU"),
    pytest.mark.usefixtures("bitsandbytes_eager", "cache"),
]


class TestMeasure:
    def test_ways_take_turns_and_the_first_rotates(self):
        calls = []
        ways = {name: partial(calls.append, name) for name in "abc"}
        times = tuning.measure(ways, lambda run: run() or float(len(calls)), rounds=4)
        assert "".join(calls) == "abcbcacababc"
        assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}

    def test_of_nothing_is_nothing(self):
        assert tuning.measure({}, lambda run: 1.0) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_case_is_right_by_every_plan_of_the_real_kernels(dtype):
    interpreter.repair()
    device = torch.device("cpu")
    problems = op_cases([(17, 48, 64)], [4], dtype, True, [(17, (48, 32, 32), 64)])
    assert {case.op for case in problems} == {"shrink", "shrink_group", "lora_matmul", "lora_grad", "linear_4bit"}
    assert {case.problem.parts for case in problems} == {1, 3}
    with kernels(device):
        for case in problems:
            run, eager, truth = case.make(device)
            for plan in case.plans:
                assert inexact(run(plan), eager(), truth(), case.longest) is None, f"{case.op} {plan}"


def test_a_group_is_measured_as_it_is_called(cache):
    """The entry that tuning writes is the one that a call looks up."""
    interpreter.repair()
    (case,) = (c for c in op_cases([], [4], torch.bfloat16, False, [(17, (48, 32, 32), 64)]) if c.op == "lora_matmul")
    asked = []
    choose = kernel_ops.choose
    with pytest.MonkeyPatch.context() as patch, kernels(torch.device("cpu")):
        patch.setattr(
            kernel_ops, "choose", lambda op, problem, device: asked.append((op, problem)) or choose(op, problem)
        )
        case.make(torch.device("cpu"))[0]("tail")
    ((op, problem),) = asked
    assert plans.key(op, problem) == plans.key(case.op, case.problem)


def test_neighbours_differ_in_one_size():
    tile = tiles.Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)
    found = tuning.neighbours(tile)
    assert len(set(found)) == len(found) >= 9 and tile not in found
    for other in found:
        assert sum(a != b for a, b in zip(tile, other, strict=True)) == 1
        assert sorted((other.BLOCK_M, other.BLOCK_N, other.BLOCK_K))[1:] <= [128, 256]
    assert all(t.BLOCK_N == 0 and t.GROUP_M == 0 for t in tuning.neighbours(tiles.Tile(BLOCK_M=64, BLOCK_K=32)))


def test_models_have_the_parameters_they_are_known_for():
    weights = {name: sum(n * k for n, k in shape.linears().values()) for name, shape in SHAPES.items()}
    assert weights["llama-3-8b"] * 32 == 6_979_321_856
    assert weights["llama-2-7b"] * 32 == 6_476_005_376
    assert weights["mistral-7b"] == weights["llama-3-8b"]
    assert weights["smollm2-135m"] * 30 == 106_168_320
    assert weights["qwen2.5-7b"] * 28 == 6_525_288_448
