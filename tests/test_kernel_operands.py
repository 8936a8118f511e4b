"""What the kernels refuse, and what they take: operands that do not fit together, any stride, nothing at all."""

import re

import accuracy
import interpreter
import pytest
import torch
from test_ops import weight_4bit
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import kernel_ops, plans
from fastlora.benchmarks.accuracy import same

interpreter.repair()

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU"),
    pytest.mark.usefixtures("bitsandbytes_eager", "in_interpreter"),
]


@pytest.fixture
def in_interpreter():
    with interpreter.kernels():
        yield


class TestRefusals:
    """Operands that do not fit together never reach a kernel, which would read beyond them."""

    M, K, N, r = 5, 128, 48, 6

    def operands(self):
        M, K, N, r = self.M, self.K, self.N, self.r
        return tuple(torch.randn(s) for s in ((M, K), (N, K), (r, K), (N, r), (M, r), (M, N), (N,)))

    def calls(self):
        x, w, a, b, xa, dy, bias = self.operands()
        op, seed = torch.ops.fastlora, torch.tensor([1, 2])
        offs, index = torch.tensor([5], dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64)
        w4, _ = weight_4bit(self.N, self.K)
        short = {name: getattr(w4, name)[:-1] for name in ("packed", "absmax", "code2", "absmax2")}
        flat = weight_4bit(self.N, self.K, nested=False)[0]
        return {
            "x of the wrong width": (lambda: op.shrink(x[:, 1:], a, 1.0), "a must be [6, 127]"),
            "one a of a group": (
                lambda: op.shrink_group(x, [a, a[:, 2:]], [1.0] * 2, [0.0] * 2, [None] * 2),
                "a must be [6, 128] on cpu, got [6, 126]",
            ),
            "w": (lambda: op.lora_matmul(x, w[:, 1:], xa, b), "w must be [48, 128]"),
            "xa": (lambda: op.lora_matmul(x, w, xa[1:], b), "xa must be [5, 6]"),
            "b": (lambda: op.lora_matmul(x, w, xa, b[:, 1:]), "xa must be [5, 5]"),
            "bias": (lambda: op.lora_matmul(x, w, xa, b, bias[1:]), "bias must be [48]"),
            "a group's x": (
                lambda: op.lora_matmul_group([x, x[1:]], [w, w], [xa, xa], [b, b], [0.0] * 2, [None] * 2),
                "x must be [5, 128]",
            ),
            "dropout without a seed": (lambda: op.shrink(x, a, 1.0, 0.1), "dropout needs a seed"),
            "two seeds": (lambda: op.lora_matmul(x, w, xa, b, None, 0.1, seed), "dropout needs a seed"),
            "dy": (lambda: op.lora_grad(dy[:, 1:], x, b, xa, 1.0), "b must be [47, 6]"),
            "xa of lora_grad": (lambda: op.lora_grad(dy, x, b, xa[:, 1:], 1.0), "xa must be [5, 6]"),
            "x of lora_grad": (lambda: op.lora_grad(dy, x[1:], b, xa, 1.0), "x must be [5, 128]"),
            "dxa": (lambda: op.lora_grad_a(xa[1:], x), "dxa must be [5, 6]"),
            "scale": (lambda: op.lora_matmul(x, w, xa, b, None, 0.0, None, bias[1:]), "scale must be [48]"),
            "y of dora_grad": (lambda: op.dora_grad(dy, dy[1:], bias), "y must be [5, 48]"),
            "scale of dora_grad": (lambda: op.dora_grad(dy, dy, bias[1:]), "scale must be [48]"),
            "a of experts": (lambda: op.shrink_experts(x, a[None, :, 1:], offs, 1.0), "a must be [1, 6, 128]"),
            "offs": (lambda: op.shrink_experts(x, a[None], offs[:0], 1.0), "offs must be [1]"),
            "w of experts": (lambda: op.lora_matmul_experts(x, w[None, :, 1:], xa, b[None], offs), "w must be [1, 48,"),
            "b of experts": (lambda: op.lora_matmul_experts(x, w[None], xa, b[None, 1:], offs), "b must be [1, 48, 6]"),
            "dxa of experts": (lambda: op.lora_grad_experts(xa[1:], x, offs), "dxa must be [5, 6]"),
            "weights of experts": (lambda: op.combine_experts(x, index, x[:2, :2]), "weights must be [1, 2]"),
            "up": (lambda: op.swiglu(x, x[1:], "silu"), "up must be [5, 128]"),
            "dh": (lambda: op.swiglu_backward_(x[1:], x, x, "silu"), "dh must be [5, 128]"),
            "activation": (lambda: op.swiglu(x, x, "tanh"), "activation must be one of silu, gelu"),
            "quant_type": (lambda: w4._replace(quant_type="int4").decode(x.dtype), "quant_type must be nf4 or fp4"),
            "a of a merge": (lambda: w4.decode_merged(x.dtype, a[:, 1:], b, 1.0), "a must be [6, 128]"),
            "x of nf4_matmul": (lambda: op.nf4_matmul(x[:, 64:], *w4, a, b, 1.0), "x must be [5, 128]"),
            "bias of nf4_matmul": (lambda: op.nf4_matmul(x, *w4, a, b, 1.0, bias[1:]), "bias must be [48]"),
            "scales apart": (lambda: flat._replace(absmax=flat.absmax[::2]).decode(x.dtype), "absmax of a 4-bit"),
            **{
                f"short {name}": (
                    lambda name=name, t=t: op.nf4_matmul(x, *w4._replace(**{name: t}), a, b, 1.0),
                    f"{name} of a 4-bit weight [48, 128] must be",
                )
                for name, t in short.items()
            },
        }  # fmt: skip

    @pytest.mark.parametrize(
        "case",
        (
            "x of the wrong width", "one a of a group", "w", "xa", "b", "bias", "a group's x", "dropout without a seed",
            "two seeds", "dy", "xa of lora_grad", "x of lora_grad", "dxa", "a of experts", "offs",
            "w of experts", "b of experts", "dxa of experts", "weights of experts", "up", "dh", "activation",
            "quant_type", "a of a merge", "x of nf4_matmul", "bias of nf4_matmul", "scales apart", "short packed",
            "short absmax", "short code2", "short absmax2",
        ),
    )  # fmt: skip
    def test_operands_that_do_not_fit_together(self, case):
        call, message = self.calls()[case]
        with pytest.raises(ValueError, match=re.escape(message)):
            call()

    def test_an_operand_on_another_device(self):
        from fastlora.kernels.operands import check_operands

        with pytest.raises(ValueError, match=re.escape("a must be [6, 128] on cpu, got [6, 128] on meta")):
            check_operands(torch.empty(5, 128), a=(torch.empty(6, 128, device="meta"), (6, 128)))


@pytest.mark.parametrize("p", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("fourbit", [False, True], ids=["dense", "nf4"])
def test_a_bias_of_any_stride(fourbit, p):
    x, w, a, b = (torch.randn(shape) for shape in ((23, 128), (48, 128), (6, 128), (48, 6)))
    w = accuracy.linear_4bit(w).weight if fourbit else w
    results = []
    for bias in (torch.randn(96)[::2], torch.randn(1).expand(48)):
        for each in (bias, bias.clone(memory_format=torch.contiguous_format)):
            torch.manual_seed(1)
            results.append(fastlora.lora_linear(x, w, a, b, 0.7, each, p))
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])


NOTHING = {
    "no rank": {"r": 0},
    "no tokens": {"M": 0},
    "no outputs": {"N": 0},
    "no inputs": {"K": 0},
    "nothing at all": {"M": 0, "N": 0, "K": 0, "r": 0},
}


@pytest.mark.parametrize("sizes", NOTHING.values(), ids=NOTHING)
def test_ops_on_nothing_are_those_of_torch(sizes):
    M, N, K, r = ({"M": 5, "N": 32, "K": 64, "r": 4} | sizes).values()
    x, w, a, b, xa, dy = (torch.randn(s) for s in ((M, K), (N, K), (r, K), (N, r), (M, r), (M, N)))
    op, seed = torch.ops.fastlora, torch.tensor(3)
    offs = torch.tensor([0, M], dtype=torch.int32)
    runs = {
        op.shrink: (x, a, 2.0, 0.1, seed),
        op.shrink_group: (x, [a, a], [1.0, 2.0], [0.0, 0.1], [None, seed]),
        op.lora_matmul: (x, w, xa, b, torch.randn(N)),
        op.lora_matmul_group: ([x, x], [w, w], [xa, xa], [b, b], [0.0, 0.1], [None, seed]),
        op.lora_grad: (dy, x, b, xa, 2.0),
        op.dora_grad: (dy, dy, torch.ones(N)),
        op.lora_grad_a: (xa, x),
        op.swiglu: (x, x + 1, "silu"),
        op.shrink_experts: (x, torch.stack([a, a]), offs, 2.0, 0.1, seed),
        op.lora_matmul_experts: (x, torch.stack([w, w]), xa, torch.stack([b, b]), offs, torch.randn(2, N)),
        op.lora_grad_experts: (xa, x, offs),
        op.combine_experts: (x, torch.zeros(0, 2, dtype=torch.int64)),
    }
    for op, args in runs.items():
        expected = tree_leaves(kernel_ops.compositions[op.__name__](*args))
        for ours, value in zip(tree_leaves(op(*args)), expected, strict=True):
            assert same(ours, value, longest=64)


@pytest.mark.parametrize("sizes", [(0, 64), (5, 0)], ids=["no outputs", "no tokens"])
@pytest.mark.parametrize("plan", ["fused", "merged"])
def test_a_4bit_product_of_nothing(plan, sizes):
    from fastlora.benchmarks.cases.ops import random_weight_4bit

    N, M = (0, 3) if not sizes[0] else (32, 0)
    w = random_weight_4bit(N, 64, torch.device("cpu"))
    with plans.use(linear_4bit=plan if M else "merged"):
        y = torch.ops.fastlora.nf4_matmul(torch.randn(M, 64), *w, torch.randn(4, 64), torch.randn(N, 4), 2.0)
    assert y.shape == (M, N)
