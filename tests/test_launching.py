"""Every kernel launched as on an H100, on a stand-in for NVIDIA's driver: in a process of its own, here kernels are
interpreted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlora.benchmarks.accuracy import same
from fastlora.benchmarks.commands.inspect import cases

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as Triton's launchers do")


@pytest.fixture(scope="module")
def launches():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.standin_cuda"]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_driver_refuses_none(launches):
    assert launches.keys() == {f"{op}, {case}" for op, case, _ in cases()}
    for case, (first, *others) in launches.items():
        assert all(each["error"] is None for each in (first, *others)), case
        assert first["launches"] == len(first["given"]) > 0, case


def test_what_is_launched_again_is_what_triton_launched_first(launches):
    for case, (first, second, third, by_python) in launches.items():
        assert second["given"] == first["given"], case
        assert third["given"] == first["given"], f"{case}: with other tensors than the second"
        assert by_python["given"] == first["given"], f"{case}: by Triton's launcher in Python"
        assert third["tensor_maps"] <= first["tensor_maps"], f"{case}: one is encoded once for each address"


def test_tiles_that_the_hardware_copies(launches):
    maps = {}
    for case, (first, *_) in launches.items():
        kinds = [each[0] for given in first["given"] for each in given if isinstance(each, list)]
        maps[case.removeprefix("lora_matmul, ")] = kinds.count("map") + kinds.count("descriptor")
    assert maps["r=16, bf16 adapters"] == maps["r=512, fp32 adapters, dx, dropout"] == 3
    assert (maps["every tile"], maps["every tile, dropout"]) == (4 * 3, 3 * 3)
    assert (maps["dx of gate, up"], maps["dx of gate, up, dropout"]) == (3 * 5, 2 * 5), "by three tiles, and by two"
    assert (maps["dx of q, k, v"], maps["dx of q, k, v, dropout"]) == (3 * 7, 2 * 7)
    assert maps["rows of odd length"] == maps["fp32"] == maps["the adapter's product alone"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches in Triton's interpreter")
def test_a_launch_is_worked_out_once_for_a_layout(monkeypatch):
    from fastlora.kernels import shrink, tiles
    from fastlora.kernels.launch import Launch

    made = []
    monkeypatch.setattr(shrink, "Launch", lambda *args, **fixed: made.append(args) or Launch(*args, **fixed))

    def misses(x, a):
        before = len(made)
        result = shrink.shrink(x, a, 1.0)
        assert same(result, x.to(a.dtype) @ a.t(), torch.bfloat16)  # the kernel keeps 16 bits of a
        return len(made) - before

    x, a = torch.randn(9, 80), torch.randn(5, 80)
    misses(x, a)
    assert misses(x.clone(), a.clone()) == 0
    shifted = torch.empty(9 * 80 + 1)[1:].view(9, 80).copy_(x)  # Triton compiles for addresses of whole 16 bytes
    others = (x[:8], x.t().contiguous().t(), shifted, torch.randn(9, 160)[:, ::2])
    assert [misses(other, a) for other in others] == [1] * len(others)
    assert misses(x, torch.randn(80, 5).t()) == 1
    with tiles.use("shrink fp32", tiles.Tile(BLOCK_M=16, BLOCK_K=16)):
        assert misses(x, a) == 1
