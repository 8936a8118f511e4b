"""Products with 4-bit weights on a CPU: every way of `lora_matmul_4bit`, alone and under a layer."""

import pytest
import torch
from accuracy import check, linear_4bit
from test_accuracy import X_LAYOUTS, problem
from test_ops import weight_4bit
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

from fastlora import fourbit, kernel_ops, ops, reference
from fastlora.benchmarks.accuracy import inexact, same
from fastlora.benchmarks.cases.ops import decoded
from fastlora.functional import lora_linear
from fastlora.ops_4bit import lora_matmul_4bit

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor(7)

pytestmark = [
    pytest.mark.usefixtures("nan_in_empty", "bitsandbytes_eager"),
    pytest.mark.skipif(ops.NO_CPU_KERNELS is not None, reason=f"no CPU kernels: {ops.NO_CPU_KERNELS}"),
]

TOKENS = (1, 3, 8, 9, 15, 16, 17, 31, 32, 130)  # few enough for no panel or matrix instruction, remainders of tiles
SHAPES = {  # N, K, block size
    "one element": (1, 1, 64),
    "an odd number": (5, 7, 64),
    "a block a row": (40, 64, 64),
    "whole blocks": (300, 256, 128),
    "an odd number of rows of whole blocks": (35, 128, 64),
    "blocks cross rows": (33, 96, 64),
    "odd rows of several panels": (290, 333, 256),
    "no outputs": (0, 64, 64),
}


def check_product(M, shape, dtype, transposed=False, p=0.0, quant_type="nf4", nested=True, rank=5, parts=1):
    """Assert that the op is as exact as torch in fp32, rounded once."""
    N, K, blocksize = shape
    depth, width = (N, K) if transposed else (K, N)
    made = [weight_4bit(N, K, blocksize, quant_type, nested) for _ in range(parts)] if N else [_empty(K, blocksize)]
    weights, ws = zip(*made, strict=True)
    x = [torch.randn(M, depth).to(dtype) for _ in ws]
    xa, b = [torch.randn(M, rank) for _ in ws], [torch.randn(width, rank) for _ in ws]
    bias = None if transposed else torch.randn(width).to(dtype)
    seeds = [SEED + i if p else None for i in range(parts)]
    y = lora_matmul_4bit(x, weights, xa, b, bias, [p] * parts, seeds, transposed)
    assert (y.shape, y.dtype) == ((M, width), dtype)

    def in_torch(dtype):
        total = torch.zeros(M, width, dtype=dtype) if bias is None else bias.to(dtype).expand(M, width)
        for x_i, w, xa_i, b_i, seed in zip(x, ws, xa, b, seeds, strict=True):
            w = w.to(dtype) if transposed else w.to(dtype).t()
            total = total + x_i.to(dtype) @ w + reference.dropout(xa_i.to(dtype) @ b_i.to(dtype).t(), p, seed)
        return total

    reason = inexact([y], [in_torch(FP32).to(dtype)], [in_torch(torch.float64)], parts * (depth + rank))
    assert reason is None, f"{reason}, M = {M}"


def _empty(K, blocksize):
    weight, w = weight_4bit(2, K, blocksize, nested=False)
    return weight._replace(N=0), w[:0]


DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)


@DTYPES
@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dx"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_the_product_with_the_decoded_weight(shape, transposed, dtype):
    for M in TOKENS:
        check_product(M, shape, dtype, transposed)
        check_product(M, shape, dtype, transposed, 0.3, "fp4", nested=False)


@DTYPES
@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dx"])
def test_groups_are_summed_before_they_are_rounded(transposed, dtype):
    for M in (1, 17, 130):
        for p in (0.0, 0.3):
            check_product(M, SHAPES["odd rows of several panels"], dtype, transposed, p, parts=3)


@DTYPES
def test_without_an_adapter_and_without_tokens(dtype):
    for M in (1, 40):
        check_product(M, SHAPES["whole blocks"], dtype, rank=0)
    check_product(0, SHAPES["whole blocks"], dtype)


@DTYPES
@pytest.mark.parametrize("M", [1, 40, 1100])
def test_deep_and_narrow(M, dtype):
    """More than one panel along the depth; few outputs, so that threads share rows; more rows than one pass takes."""
    check_product(M, (40, 4352, 64), dtype)


@DTYPES
@pytest.mark.parametrize("layout", X_LAYOUTS.values(), ids=X_LAYOUTS)
def test_any_strides(layout, dtype):
    weight, w = weight_4bit(96, 128)
    for M in (3, 40, 128):
        x = layout(lambda *shape: torch.randn(shape).to(dtype), (M, 128))
        y = product(x, weight, torch.randn(M, 0), torch.randn(96, 0))
        as_bitsandbytes = (x.float() @ w.to(dtype).float().t()).to(dtype)
        assert inexact([y], [as_bitsandbytes], [x.double() @ w.double().t()], 128) is None


@DTYPES
def test_few_rows_of_any_size_and_range(dtype):
    """Few rows of bf16 may be multiplied in integers, which have no exponents of their own."""
    weight, w = weight_4bit(96, 320)
    for size in (0.0, 1e-37, 1e-30, 1e-20, 1.0, 1e3, 1e35):
        if dtype == FP16 and not 1e-3 < size < 1e2:
            continue
        x = size * torch.randn(3, 320)
        x[:, ::7] *= 1e-2
        x[:, 5] *= 300.0  # as hidden states of language models have them
        x = x.to(dtype)
        y = product(x, weight, torch.randn(3, 0), torch.randn(96, 0))
        for row in range(3):
            truth, once = x[row].double() @ w.double().t(), (x[row].float() @ w.float().t()).to(dtype)
            assert inexact([y[row]], [once], [truth], 320) is None, size


@pytest.mark.parametrize("K", [128, 4096])
@pytest.mark.parametrize("outlier", [30.0, 300.0, 1e4, 1e6])
def test_an_outlier_that_no_weight_meets(outlier, K):
    """Integers have a scale in common: the numbers beside a large one must not be lost."""
    w = torch.randn(64, K)
    w[:, 5] = 0.0
    weight = fourbit.weight_4bit(linear_4bit(w).weight)
    w = decoded(weight, torch.float64)
    for M in (1, 31):
        x = torch.randn(M, K)
        x[:, 5] = outlier
        x = x.to(BF16)
        y = product(x, weight, torch.randn(M, 0), torch.randn(64, 0))
        assert inexact([y], [(x.double() @ w.t()).to(BF16)], [x.double() @ w.t()], K) is None


@pytest.mark.parametrize("size", [0.3, 0.01, 1e-3, 1e-4])
def test_small_numbers_that_large_weights_meet(size):
    K = 1024
    sizes = torch.where(torch.arange(K) // 64 % 2 == 1, size, 1.0)
    weight = fourbit.weight_4bit(linear_4bit(torch.randn(64, K) / sizes).weight)
    w = decoded(weight, torch.float64)
    for M in (1, 31):
        x = (torch.randn(M, K) * sizes).to(BF16)
        y, in_bf16 = product(x, weight, torch.randn(M, 0), torch.randn(64, 0)), (x.float() @ w.to(BF16).float().t())
        assert inexact([y], [in_bf16.to(BF16)], [x.double() @ w.t()], K) is None


@DTYPES
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_few_rows_that_are_not_finite(number, dtype):
    weight, w = weight_4bit(96, 320)
    x = torch.randn(3, 320).to(dtype)
    x[1, 7] = number
    y = product(x, weight, torch.randn(3, 0), torch.randn(96, 0))
    expected = x.float() @ w.float().t()
    assert torch.equal(y[1].isnan(), expected[1].isnan()) and torch.equal(y[1].isinf(), expected[1].isinf())
    assert y[[0, 2]].isfinite().all()


def product(x, weight, xa, b):
    return lora_matmul_4bit([x], [weight], [xa], [b], None, [0.0], [None], False)


def gradient(dy, weight, dxa, a):
    return lora_matmul_4bit([dy], [weight], [dxa], [a.t()], None, [0.3], [SEED], True)


@DTYPES
@pytest.mark.parametrize("M", [2, 70])
def test_results_do_not_depend_on_the_number_of_threads(M, dtype):
    weight, _ = weight_4bit(170, 192)
    x, dy, xa = torch.randn(M, 192).to(dtype), torch.randn(M, 170).to(dtype), torch.randn(M, 6)
    a, b = torch.randn(6, 192), torch.randn(170, 6)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append((product(x, weight, xa, b), gradient(dy, weight, xa, a)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


LAYERS = {
    "few tokens": dict(leading=(3,), K=256, N=320),
    "too many for that": dict(leading=(9,), K=256, N=320),
    "one row more than a matrix instruction": dict(leading=(17,), K=256, N=320),
    "odd sizes": dict(leading=(13, 10), K=333, N=211),
}


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("share", [0.05, 5.0, 20.0])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_whatever_the_adapter_weighs(layer, share, dtypes):
    """Merged into the weight, an adapter that outweighs it cost up to three times PEFT's error on few tokens."""
    for seed in range(3):
        quantised = dict(quant_type="nf4", nested=seed > 0)
        check(
            problem(**layer, r=8, dtype=dtypes[0], adapter_dtype=dtypes[1], share=share, seed=seed, quantised=quantised)
        )


@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_weight_is_decoded_to_memory(M, p):
    """In forward, backward and generation nothing is allocated that is as large as a decoded weight."""
    N, K = 512, 1024
    base = linear_4bit(torch.randn(N, K).to(BF16))
    x, a, b = torch.randn(M, K, dtype=BF16, requires_grad=True), torch.randn(4, K), torch.randn(N, 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        lora_linear(x, base.weight, a, b, 0.5, None, p).sum().backward()
        with torch.no_grad():
            lora_linear(x, base.weight, a, b, 0.5, None, p)
    allocated = [event.cpu_memory_usage for event in run.events()]
    assert 0 < max(allocated) < N * K / 2


def test_opcheck_and_bad_calls():
    weight, _ = weight_4bit(24, 64)
    other, _ = weight_4bit(32, 64, nested=False, quant_type="fp4")
    x, b = torch.randn(3, 64), torch.randn(24, 2)
    args = [x], [*weight[:5]], [64, 256, 24, 64], ["nf4"], [torch.randn(3, 2)], [b], torch.randn(24), [0.0], [None]
    op = torch.ops.fastlora.lora_matmul_4bit
    opcheck(op.default, (*args, False))
    dys, at = [torch.randn(3, 24), torch.randn(3, 32)], [torch.randn(64, 2)] * 2
    sizes = [64, 256, 24, 64, 64, 0, 32, 64]
    group = dys, [*weight[:5], *other[:5]], sizes, ["nf4", "fp4"], [args[4][0]] * 2, at, None, [0.0, 0.2], [None, SEED]
    opcheck(op.default, (*group, True))
    for place, bad in ((0, [x[:, 1:]]), (0, [x, x]), (4, [torch.randn(2, 2)]), (5, [b[1:]]), (6, torch.randn(23))):
        with pytest.raises(RuntimeError, match="fastlora"):
            op(*args[:place], bad, *args[place + 1 :], False)


def test_the_kernel_is_what_the_composition_computes():
    weight, _ = weight_4bit(40, 192)
    x, xa, b = torch.randn(5, 192), torch.randn(5, 3), torch.randn(40, 3)
    args = [x], [*weight[:5]], [64, 256, 40, 192], ["nf4"], [xa], [b], None, [0.0], [None], False
    ours = torch.ops.fastlora.lora_matmul_4bit(*args)
    assert same(ours, kernel_ops.compositions["lora_matmul_4bit"](*args), longest=192)
