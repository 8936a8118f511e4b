"""What the ops refuse when called directly: whatever would read beyond an operand or compute something else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import weight_4bit
from torch.utils._pytree import tree_map_only

from fastlora import kernel_ops, ops_4bit

SEED = torch.tensor(5)
M, K, N, r = 12, 32, 24, 4
x, w, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
a, b, xa, bias = torch.randn(r, K), torch.randn(N, r), torch.randn(M, r), torch.randn(N)
flat, nested = weight_4bit(nested=False)[0], weight_4bit()[0]
weights, sizes, quant_types = ops_4bit.lists_of([flat, nested])

E = 3
w3, a3, b3, bias3 = torch.randn(E, N, K), torch.randn(E, r, K), torch.randn(E, N, r), torch.randn(E, N)
offs, index = torch.tensor([5, 5, M], dtype=torch.int32), torch.randint(0, M, (4, 2))
of_experts = weight_4bit(E * N, K)[0]

OPERANDS = {  # that every op takes, in the order of its schema
    "shrink": {"x": x, "a": a, "s": 2.0, "p": 0.3, "seed": SEED},
    "shrink_group": {"x": x, "a": [a, a], "s": [1.0, 2.0], "p": [0.3, 0.0], "seed": [SEED, None]},
    "lora_matmul": {"x": x, "w": w, "xa": xa, "b": b, "bias": bias, "p": 0.3, "seed": SEED, "scale": bias},
    "lora_matmul_group": {
        **{"x": [x, x], "w": [w, w], "xa": [xa, xa], "b": [b, b]},
        **{"p": [0.3, 0.0], "seed": [SEED, None]},
    },
    "lora_grad": {"dy": dy, "x": x, "b": b, "xa": xa, "s": 2.0, "p": 0.3, "seed": SEED},
    "lora_grad_a": {"dxa": xa, "x": x, "p": 0.3, "seed": SEED},
    "dora_grad": {"dy": dy, "y": dy, "scale": bias},
    "swiglu": {"gate": x, "up": x, "activation": "silu"},
    "swiglu_backward_": {"dh": x.clone(), "gate": x.clone(), "up": x.clone(), "activation": "silu"},
    "decode_4bit": {**flat._asdict(), "dtype": torch.float32, "a": a, "b": b, "s": 2.0},
    "nf4_matmul": {"x": x, **flat._asdict(), "a": a, "b": b, "s": 2.0, "bias": bias},
    "lora_matmul_4bit": {
        **{"x": [x, x], "weights": weights, "sizes": sizes, "quant_types": quant_types},
        **{"xa": [xa, xa], "b": [b, b], "bias": bias, "p": [0.3, 0.0], "seed": [SEED, None], "transposed": False},
        **{"scale": bias},
    },
    "shrink_experts": {"x": x, "a": a3, "offs": offs, "s": 2.0, "p": 0.3, "seed": SEED},
    "lora_matmul_experts": {
        **{"x": x, "w": w3, "xa": xa, "b": b3, "offs": offs, "bias": bias3},
        **{"p": 0.3, "seed": SEED},
    },
    "lora_matmul_experts_4bit": {
        **{"x": x, **of_experts._asdict(), "xa": xa, "b": b3, "offs": offs, "bias": bias3},
        **{"p": 0.3, "seed": SEED, "transposed": False},
    },
    "lora_grad_experts": {"dxa": xa, "x": x, "offs": offs, "p": 0.3, "seed": SEED},
    "combine_experts": {"rows": dy, "index": index, "weights": torch.rand(4, 2)},
}

P = [
    ({"p": 1.0}, "p must be in [0, 1), got 1"),
    ({"p": -0.5}, "p must be in [0, 1), got -0.5"),
    ({"p": float("nan")}, "p must be in [0, 1), got nan"),
    ({"seed": None}, "dropout needs a seed"),
    ({"seed": torch.tensor([1, 2])}, "seed must have 1 elements, got [2]"),
    ({"seed": torch.tensor(1.0)}, "seed must be "),
]
WEIGHT = [
    ({"blocksize": 0}, "blocksize must be a power of two"),
    ({"blocksize": -64}, "blocksize must be a power of two"),
    ({"blocksize": 48}, "blocksize must be a power of two"),
    ({"blocksize": 1 << 62}, "blocksize must be a power of two"),
    (nested._replace(blocksize2=0)._asdict(), "blocksize2 must be a power of two"),
    (nested._replace(absmax2=None)._asdict(), "all must be given, or none"),
    (nested._replace(offset=None)._asdict(), "all must be given, or none"),
    (nested._replace(code2=None)._asdict(), "all must be given, or none"),
    (nested._replace(code2=nested.code2[:-1])._asdict(), "code2 must have 256 elements"),
    (nested._replace(absmax2=nested.absmax2[:-1])._asdict(), "absmax2 must have at least 1"),
    (nested._replace(absmax=flat.absmax)._asdict(), "absmax must be "),
    ({"absmax": flat.absmax[:-1]}, "absmax must have at least 12"),
    ({"absmax": nested.absmax}, "absmax must be "),
    ({"packed": flat.packed[:-1]}, "packed must have at least 384"),
    ({"packed": flat.packed.bfloat16()}, "packed must be "),
    ({"quant_type": "int4"}, "quant_type must be nf4 or fp4, got int4"),
    ({"N": -1}, "a weight [-1, 32] cannot be"),
    ({"N": 1 << 62}, "cannot be"),
    ({"b": None}, "a and b must both be given"),
    ({"a": a[:, 1:]}, "a must be [*, 32], got [4, 31]"),
    ({"b": b[:, 1:]}, "b must be [24, 4], got [24, 3]"),
    ({"s": float("nan")}, "s must be finite"),
]
OFFS = [
    ({"offs": offs.long()}, "offs must be int32 ["),
    ({"offs": offs[None]}, "offs must be "),
    ({"offs": None}, "offs must be "),
]
REFUSALS = {
    "shrink": [
        *P,
        ({"x": x[0]}, "x must be [*, *], got [32]"),
        ({"x": x.int()}, "x must be "),
        ({"a": a[:, 1:]}, "a must be [*, 32], got [4, 31]"),
        ({"s": float("inf")}, "s must be finite"),
    ],
    "shrink_group": [
        ({"a": [a, a[:, 1:]]}, "a must be [*, 32], got [4, 31]"),
        ({"s": [1.0]}, "s must have 2 entries, got 1"),
        ({"p": []}, "p must have 2 entries, got 0"),
        ({"seed": [SEED] * 3}, "seed must have 2 entries, got 3"),
        ({"p": [0.0, 0.3]}, "dropout needs a seed"),
    ],
    "lora_matmul": [
        *P,
        ({"x": x[None]}, "x must be [*, *], got [1, 12, 32]"),
        ({"w": w[:, 1:]}, ", 32], got [24, 31]"),
        ({"w": w.bfloat16()}, "w must be "),
        ({"xa": xa[1:]}, "xa must be [12, *], got [11, 4]"),
        ({"b": b[1:]}, "b must be [24, 4], got [23, 4]"),
        ({"b": b.int()}, "b must be "),
        ({"bias": bias[1:]}, "bias must be [24], got [23]"),
        ({"bias": bias[None]}, "bias must be [24], got [1, 24]"),
        ({"scale": bias[1:]}, "scale must be [24], got [23]"),
        ({"scale": bias.int()}, "scale must be "),
    ],
    "lora_matmul_group": [
        ({name: [] for name in OPERANDS["lora_matmul_group"]}, "a group must have at least one x"),
        ({"w": [w]}, "w must have 2 entries, got 1"),
        ({"xa": [xa] * 3}, "xa must have 2 entries, got 3"),
        ({"b": []}, "b must have 2 entries, got 0"),
        ({"x": [x, x[1:]]}, " must be ["),
        ({"w": [w, w[1:]]}, " must be ["),
        ({"x": [x, x.bfloat16()]}, "x must be "),
    ],
    "lora_grad": [
        *P,
        ({"dy": dy[0]}, "dy must be [*, *], got [24]"),
        ({"x": x[1:]}, "x must be [12, *], got [11, 32]"),
        ({"x": x.bfloat16()}, "x must be "),
        ({"b": b[1:]}, "b must be [24, *], got [23, 4]"),
        ({"xa": xa[:, 1:]}, "xa must be [12, 4], got [12, 3]"),
        ({"b": None, "xa": None}, "needs b or xa"),
        ({"s": float("nan")}, "s must be finite"),
    ],
    "lora_grad_a": [*P, ({"dxa": xa[1:]}, "dxa must be [12, *], got [11, 4]"), ({"x": x.int()}, "x must be ")],
    "dora_grad": [
        ({"dy": dy[0]}, "dy must be [*, *], got [24]"),
        ({"y": dy[1:]}, "y must be [12, 24], got [11, 24]"),
        ({"y": dy.bfloat16()}, "y must be "),
        ({"scale": bias[1:]}, "scale must be [24], got [23]"),
        ({"scale": bias.int()}, "scale must be "),
    ],
    "swiglu": [
        ({"gate": x[0], "up": None}, "gate must be [*, *], got [32]"),
        ({"up": x[:, 1:]}, "up must be [12, 32], got [12, 31]"),
        ({"up": x.bfloat16()}, "up must be "),
        ({"activation": "tanh"}, "activation must be one of silu, gelu, gelu_tanh, quick_gelu, relu, relu2, got tanh"),
    ],
    "swiglu_backward_": [
        ({"dh": x[1:]}, "dh must be [12, 32], got [11, 32]"),
        ({"dh": x.double()}, "dh must be "),
        ({"up": x[:, 1:]}, "up must be [12, 32], got [12, 31]"),
        ({"gate": x[:1].expand(M, K)}, "elements of gate of strides"),
        ({"activation": ""}, "activation must be one of silu, gelu, gelu_tanh, quick_gelu, relu, relu2, got "),
    ],
    "decode_4bit": [*WEIGHT, ({"dtype": torch.int32}, "dtype must be"), ({"dtype": torch.float64}, "dtype must be")],
    "nf4_matmul": [
        *WEIGHT,
        ({"x": x[:, 1:]}, "x must be [*, 32], got [12, 31]"),
        ({"x": x.double()}, "the dtype of x must be"),
        ({"bias": bias[1:]}, "bias must be [24], got [23]"),
    ],
    "lora_matmul_4bit": [
        ({"x": []}, "x must have at least one entry"),
        ({"x": [x]}, "must have "),
        ({"weights": weights[:-1]}, "weights must have 10 entries, got 9"),
        ({"weights": [None, *weights[1:]]}, "packed"),
        ({"weights": [weights[0][:-1], *weights[1:]]}, "packed must have at least 384"),
        ({"sizes": sizes[:-1]}, "sizes must have 8 entries, got 7"),
        ({"sizes": [0, *sizes[1:]]}, "blocksize must be a power of two"),
        ({"sizes": [*sizes[:6], N - 2, K]}, "the weights must have the same outputs"),
        ({"quant_types": ["nf4", "int4"]}, "quant_type must be nf4 or fp4, got int4"),
        ({"scale": bias[1:]}, "scale must be [24], got [23]"),
        ({"x": [x, x[1:]]}, "x must be [12, 32], got [11, 32]"),
        ({"x": [x, x.bfloat16()]}, "x must be "),
        ({"x": [x.double()] * 2}, "the dtype of x must be float32, bfloat16 or float16"),
        ({"xa": [xa, xa[1:]]}, "xa must be [12, "),
        ({"b": [b[1:], b]}, "b must be [24, "),
        ({"bias": bias[1:]}, "bias must be [24], got [23]"),
        ({"p": [0.3, 0.3]}, "dropout needs a seed"),
        ({"transposed": True}, "must be [12, 24], got [12, 32]"),
    ],
    "shrink_experts": [
        *P,
        *OFFS,
        ({"offs": offs[1:]}, "offs must be int32 [3] on "),
        ({"a": a}, "a must be [*, *, 32], got [4, 32]"),
        ({"a": a3[..., 1:]}, "a must be [*, *, 32], got [3, 4, 31]"),
        ({"s": float("nan")}, "s must be finite"),
    ],
    "lora_matmul_experts": [
        *P,
        *OFFS,
        ({"w": w}, "w must be [*, *, 32], got [24, 32]"),
        ({"w": w3.bfloat16()}, "w must be "),
        ({"xa": xa[1:]}, "xa must be [12, *], got [11, 4]"),
        ({"b": b3[1:]}, "b must be [3, 24, 4], got [2, 24, 4]"),
        ({"bias": bias}, "bias must be [3, 24], got [24]"),
    ],
    "lora_matmul_experts_4bit": [
        *(each for each in WEIGHT if not {"a", "b", "s", "absmax", "packed"} & set(each[0]) or "blocksize2" in each[1]),
        *OFFS,
        ({"x": x[:, 1:]}, "x must be ["),
        ({"x": x.double()}, "the dtype of x must be"),
        ({"N": E * N - 1}, "must begin with a whole block of 64"),
        ({"blocksize": 4096}, "must begin with a whole block of 4096"),
        ({"xa": xa[1:]}, "xa must be [12, *], got [11, 4]"),
        ({"b": b3[:, 1:]}, "b must be [3, 24, 4], got [3, 23, 4]"),
        ({"bias": bias3[1:]}, "bias must be [3, 24], got [2, 24]"),
    ],
    "lora_grad_experts": [*P, *OFFS, ({"dxa": xa[1:]}, "dxa must be [12, *], got [11, 4]")],
    "combine_experts": [
        ({"rows": dy[0]}, "rows must be [*, *], got [24]"),
        ({"index": index.int()}, "index must be int64 [tokens, experts of a token]"),
        ({"index": index[0]}, "index must be int64 [tokens, experts of a token]"),
        ({"weights": torch.rand(2, 4)}, "weights must be [4, 2], got [2, 4]"),
    ],
}
CASES = [(name, changes, message) for name, cases in REFUSALS.items() for changes, message in cases]
RUNS = ["the implementation", "the composition", "the fake"]


def run(which: str, name: str, operands: dict):
    args, op = list(operands.values()), getattr(torch.ops.fastlora, name)
    if which == "the composition":
        return kernel_ops.compositions[name](*args)
    return op(*(tree_map_only(torch.Tensor, lambda t: t.to("meta"), args) if which == "the fake" else args))


@pytest.mark.parametrize("which", RUNS)
@pytest.mark.parametrize("name", OPERANDS)
def test_what_is_changed_below_is_taken_as_it_is(name, which, bitsandbytes_eager):
    run(which, name, OPERANDS[name])


@pytest.mark.parametrize("which", RUNS)
@pytest.mark.parametrize(
    "name,changes,message", CASES, ids=[f"{name} {i} {message}" for i, (name, _, message) in enumerate(CASES)]
)
def test_refused(which, name, changes, message):
    if which == "the fake" and "elements of" in message:
        pytest.skip("moved to meta, an expanded tensor has memory for every element")
    with pytest.raises((RuntimeError, TypeError), match=re.escape(message)):
        run(which, name, {**OPERANDS[name], **changes})


@pytest.mark.parametrize("which", RUNS[:2])
@pytest.mark.parametrize("ends", [(5, 4, 12), (-1, 5, 12), (5, 5, 13)], ids=str)
@pytest.mark.parametrize("name", [name for name, operands in OPERANDS.items() if "offs" in operands])
def test_rows_of_experts_are_in_order_and_there(name, ends, which):
    with pytest.raises(RuntimeError, match="offs must not decrease or exceed 12 rows"):
        run(which, name, OPERANDS[name] | {"offs": torch.tensor(ends, dtype=torch.int32)})


@pytest.mark.parametrize("which", RUNS[:2])
@pytest.mark.parametrize("row", [-1, 12])
def test_rows_to_combine_are_there(row, which):
    with pytest.raises((RuntimeError, IndexError), match="index"):
        run(which, "combine_experts", OPERANDS["combine_experts"] | {"index": torch.full((4, 2), row)})


@pytest.mark.parametrize("which", RUNS[:2])
@pytest.mark.parametrize("together", [("dh", "gate"), ("dh", "up"), ("gate", "up")], ids=" and ".join)
@pytest.mark.parametrize("columns", [0, 1, K - 1])
def test_what_swiglu_backward_writes_must_be_apart(which, together, columns):
    memory = torch.randn(M, 2 * K)
    views = dict(zip(together, (memory[:, :K], memory[:, columns : columns + K]), strict=True))
    operands, before = {**OPERANDS["swiglu_backward_"], **views}, memory.clone()
    with pytest.raises(RuntimeError, match="share memory, and it works in place"):
        run(which, "swiglu_backward_", operands)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("which", RUNS[:2])
def test_halves_of_rows_are_apart(which):
    memory = torch.randn(M, 2 * K)
    halves, copies = {"gate": memory[:, :K], "up": memory[:, K:]}, {"gate": memory[:, :K] + 0, "up": memory[:, K:] + 0}
    dh = {"dh": torch.randn(M, K)}
    run(which, "swiglu_backward_", {"dh": dh["dh"].clone(), **copies, "activation": "silu"})
    run(which, "swiglu_backward_", {**dh, **halves, "activation": "silu"})
    assert all(torch.equal(halves[name], copies[name]) for name in halves)


@pytest.mark.parametrize("which", ["dh", "gate", "up"])
def test_a_view_that_negates_when_read_is_not_written(which):
    operands = {name: torch.randn(M, K) for name in ("dh", "gate", "up")}
    before = {name: t.clone() for name, t in operands.items()}
    views = {**operands, which: torch._neg_view(operands[which])}
    with pytest.raises(RuntimeError, match="swiglu_backward_: operands must be resolved"):
        torch.ops.fastlora.swiglu_backward_(*views.values(), "silu")
    assert all(torch.equal(operands[name], t) for name, t in before.items())


def test_an_empty_result_of_very_many_rows_is_there_at_once():
    """A loop over its rows would run for hours."""
    rows, none = torch.empty(1 << 40, 0), torch.empty(0, 0)
    op = torch.ops.fastlora
    assert op.shrink(rows, none, 1.0).shape == rows.shape
    assert op.lora_matmul(rows, none, rows, none).shape == rows.shape
    assert op.lora_grad(rows, rows, none, rows, 1.0)[0].shape == rows.shape
    assert op.lora_grad_a(rows, rows).shape == none.shape


def test_random_calls():
    """In a process of its own, which a read beyond an operand may end."""
    command = [sys.executable, "-X", "faulthandler", Path(__file__).with_name("fuzz_ops.py"), "--calls", "400"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    taken = dict(re.findall(r"^(\w+) +(\d+) taken", done.stdout, flags=re.MULTILINE))
    assert set(taken) == set(kernel_ops.compositions)
    assert all(int(n) > 0 for n in taken.values()), done.stdout
