"""What PyTorch's counter of floating-point operations sees of the ops."""

import subprocess
import sys

import accuracy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastlora

M, K, N, r = 12, 64, 48, 4


@pytest.mark.parametrize("fourbit", [False, True], ids=["dense", "nf4"])
def test_a_layer_forward_and_backward(fourbit):
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((M, K), (r, K), (N, r)))
    w = torch.randn(N, K)
    w = accuracy.linear_4bit(w).weight if fourbit else w
    with FlopCounterMode(display=False) as forward:
        y = fastlora.lora_linear(x, w, a, b, 0.5)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    product, at_a, at_b = 2 * M * N * K, 2 * M * r * K, 2 * M * r * N
    gradients = 2 * at_b + at_a  # dxa and db, da
    assert forward.get_total_flops() == product + at_a + at_b
    assert backward.get_total_flops() == product + at_a + gradients


@pytest.mark.slow
@pytest.mark.parametrize("first", ["fastlora", "torch.utils.flop_counter"])
def test_in_either_order_of_import(first):
    script = f"""
import {first}, sys, fastlora, torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
with FlopCounterMode(display=False) as counter:
    torch.ops.fastlora.shrink(torch.ones(3, 8), torch.ones(2, 8), 1.0)
assert counter.get_total_flops() == 2 * 3 * 8 * 2 and torch.ops.fastlora.nf4_matmul in flop_registry
"""
    subprocess.run([sys.executable, "-c", script], check=True)
