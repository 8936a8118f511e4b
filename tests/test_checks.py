"""What the ops refuse when called directly: whatever would read beyond an operand or compute something else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import tensors, weight_4bit

from fastlora import kernel_ops

op = torch.ops.fastlora
SEED = torch.tensor(5)
M, K, N = 12, 32, 24


def weight_refusals():
    flat, nested = weight_4bit(nested=False)[0], weight_4bit()[0]
    _, _, a, b, *_ = tensors()

    def decode(weight, dtype=torch.float32, a=None, b=None, s=1.0):
        return lambda: op.decode_4bit(*weight, dtype, a, b, s)

    return {
        "blocksize 0": (decode(flat._replace(blocksize=0)), "blocksize must be a power of two"),
        "blocksize negative": (decode(flat._replace(blocksize=-64)), "blocksize must be a power of two"),
        "blocksize 48": (decode(flat._replace(blocksize=48)), "blocksize must be a power of two"),
        "blocksize 2^62": (decode(flat._replace(blocksize=1 << 62)), "blocksize must be a power of two"),
        "blocksize2 0": (decode(nested._replace(blocksize2=0)), "blocksize2 must be a power of two"),
        "no absmax2": (decode(nested._replace(absmax2=None)), "all must be given, or none"),
        "no offset": (decode(nested._replace(offset=None)), "all must be given, or none"),
        "no code2": (decode(nested._replace(code2=None)), "all must be given, or none"),
        "code2 short": (decode(nested._replace(code2=nested.code2[:-1])), "code2 must have 256 elements"),
        "absmax2 short": (decode(nested._replace(absmax2=nested.absmax2[:-1])), "absmax2 must have at least 1"),
        "absmax short": (decode(flat._replace(absmax=flat.absmax[:-1])), "absmax must have at least 12"),
        "absmax of bytes": (decode(flat._replace(absmax=nested.absmax)), "absmax must be floating point"),
        "absmax not of bytes": (decode(nested._replace(absmax=flat.absmax)), "absmax must be "),
        "packed short": (decode(flat._replace(packed=flat.packed[:-1])), "packed must have at least 384"),
        "packed as bf16": (decode(flat._replace(packed=flat.packed.bfloat16())), "packed must be "),
        "quant_type": (decode(flat._replace(quant_type="int4")), "quant_type must be nf4 or fp4, got int4"),
        "N negative": (decode(flat._replace(N=-1)), "a weight [-1, 32] cannot be"),
        "N huge": (decode(flat._replace(N=1 << 62)), "cannot be"),
        "dtype": (decode(flat, torch.int32), "dtype must be"),
        "a alone": (decode(flat, a=a), "a and b must both be given"),
        "a": (decode(flat, a=a[:, 1:], b=b), "a must be [*, 32], got [4, 31]"),
        "b": (decode(flat, a=a, b=b[:, 1:]), "b must be [24, 4], got [24, 3]"),
        "s": (decode(flat, a=a, b=b, s=float("nan")), "s must be finite"),
    }


@pytest.mark.parametrize("case", weight_refusals())
def test_a_weight_that_cannot_be_decoded(case):
    call, message = weight_refusals()[case]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("which", ["dh", "gate", "up"])
def test_a_view_that_negates_when_read_is_not_written(which):
    operands = {name: torch.randn(M, K) for name in ("dh", "gate", "up")}
    before = {name: t.clone() for name, t in operands.items()}
    views = {**operands, which: torch._neg_view(operands[which])}
    with pytest.raises(RuntimeError, match="swiglu_backward_: operands must be resolved"):
        op.swiglu_backward_(*views.values(), "silu")
    assert all(torch.equal(operands[name], t) for name, t in before.items())


def test_random_calls():
    """In a process of its own, which a read beyond an operand may end."""
    command = [sys.executable, "-X", "faulthandler", Path(__file__).with_name("fuzz_ops.py"), "--calls", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    taken = dict(re.findall(r"^(\w+) +(\d+) taken", done.stdout, flags=re.MULTILINE))
    assert set(taken) == set(kernel_ops.compositions)
    assert all(int(n) > 0 for n in taken.values()), done.stdout
