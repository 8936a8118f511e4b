"""Hundreds of random layers, and the chosen ones that broke others', all judged by `accuracy.check`."""

import math

import pytest
import torch
from accuracy import LayerCase, check, decoded, linear, linear_4bit, peft_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora import ops
from fastlora.functional import lora_linear

pytestmark = pytest.mark.usefixtures("nan_in_empty", "bitsandbytes_eager")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {  # of x and the base, of the adapters
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "fp32": (FP32, FP32),
    "fp32 adapters on bf16": (BF16, FP32),
    "fp32 adapters on fp16": (FP16, FP32),
}
# The adapter's part of y against the base's. Without the CPU kernels adapters in fp32 are converted to x's dtype, which
# PEFT does not do: where their part outweighs the base's, PEFT is then up to 2.3 times as accurate.
SHARES = (1e-3, 0.05, 0.5, 5.0)
SHARES_OF_FP32_ADAPTERS = SHARES if ops.NO_CPU_KERNELS is None else (1e-3, 0.05, 0.5)

X_LAYOUTS = {
    "contiguous": lambda make, shape: make(*shape),
    "transposed": lambda make, shape: make(*shape[::-1]).permute(*reversed(range(len(shape)))),
    "every other column": lambda make, shape: make(*shape[:-1], 2 * shape[-1])[..., ::2],
    "rows of a wider matrix": lambda make, shape: make(*shape[:-1], shape[-1] + 3)[..., 3:],
    "expanded": lambda make, shape: make(shape[-1]).expand(shape),
}
DY_LAYOUTS = X_LAYOUTS | {"of a sum": lambda make, shape: make().expand(shape)}

sizes = st.one_of(st.integers(1, 40), st.integers(1, 40), st.integers(1, 700))
ranks = st.one_of(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 24, 32, 64]), st.integers(1, 512))
scalings = st.sampled_from([1.0, 2.0, 0.5, 1 / 3, 0.7, 16 / math.sqrt(12), -1.7, 0.0])


@st.composite
def leading_shapes(draw) -> tuple[int, ...]:
    """x has 2 to 4 dimensions, with at most 700 tokens."""
    M = draw(sizes)
    parts = draw(st.lists(st.integers(1, 6), max_size=2))
    while math.prod(parts) > M:
        parts.pop()
    return (*parts, M // math.prod(parts))


@st.composite
def problems(draw, dtypes, kind) -> LayerCase:
    """A random layer; its tensors are drawn by torch from a seed, as Hypothesis would take minutes."""
    dtype, adapter_dtype = dtypes
    leading, K, N, r = draw(leading_shapes()), draw(sizes), draw(sizes), draw(ranks)
    s, p, seed = draw(scalings), draw(st.sampled_from([0.0, 0.0, 0.05, 0.5])), draw(st.integers(0, 2**31))
    share = draw(st.sampled_from(SHARES if adapter_dtype == dtype else SHARES_OF_FP32_ADAPTERS))
    with_bias, train_bias = draw(st.sampled_from([(False, False), (True, False), (True, True)]))
    x_layout, dy_layout = draw(st.sampled_from(sorted(X_LAYOUTS))), draw(st.sampled_from(sorted(DY_LAYOUTS)))
    quantised = {}
    if kind != "dense":
        blocksize = draw(st.sampled_from([64, 128, 256, 512, 1024, 2048, 4096]))
        quantised = {"quant_type": kind, "blocksize": blocksize, "nested": draw(st.booleans())}
    return problem(
        leading, K, N, r, dtype, adapter_dtype, s, share, p, with_bias, train_bias, x_layout, dy_layout, seed, quantised
    )


def problem(
    leading=(64,),
    K=48,
    N=40,
    r=4,
    dtype=BF16,
    adapter_dtype=None,
    s=2.0,
    share=0.05,
    p=0.0,
    with_bias=False,
    train_bias=False,
    x_layout="contiguous",
    dy_layout="contiguous",
    seed=0,
    quantised=None,
) -> LayerCase:
    """The layer of these sizes with random tensors, the adapter's part of y being ``share`` of the base's."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, dtype=dtype, std=1.0):
        return torch.randn(shape, generator=generator).mul_(std).to(dtype)

    w, bias = make(N, K, std=K**-0.5), make(N) if with_bias else None
    return LayerCase(
        x=X_LAYOUTS[x_layout](make, (*leading, K)),
        base=linear_4bit(w, bias, **quantised) if quantised else linear(w, bias),
        a=make(r, K, dtype=adapter_dtype or dtype, std=K**-0.5),
        b=make(N, r, dtype=adapter_dtype or dtype, std=share / (abs(s) or 1.0) * r**-0.5),
        s=s,
        # small enough for the sums over tokens to stay within fp16
        dy=DY_LAYOUTS[dy_layout](lambda *shape: make(*shape, std=2**-5), (*leading, N)),
        p=p,
        train_bias=train_bias,
        seed=seed,
    )


@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_random_layers(dtypes, kind):
    @settings(max_examples=12 if ops.NO_CPU_KERNELS is None else 8)
    @given(problems(dtypes, kind))
    def run(problem):
        check(problem)

    run()


CHOSEN = {
    "one element": dict(leading=(1,), K=1, N=1, r=1),
    "one token": dict(leading=(1,), K=512, N=320),
    "no tokens": dict(leading=(0,)),
    "no tokens in a batch": dict(leading=(3, 0)),
    "no tokens, dropout": dict(leading=(0, 4), p=0.5),
    "K no multiple of any tile": dict(K=333),
    "N no multiple of any tile": dict(N=333),
    "rank 1": dict(r=1),
    "rank 5, no power of two": dict(r=5),
    "rank above 256": dict(r=300),
    "rank above K and N": dict(r=96),
    "prime sizes": dict(leading=(61,), K=101, N=211, r=13),
    "scaling 0": dict(s=0.0),
    "scaling negative": dict(s=-2.0),
    "no dropout after all": dict(p=0.0),
    "dropout": dict(p=0.1),
    "nearly everything dropped": dict(p=0.9),
    "dropout, odd sizes": dict(leading=(61,), K=101, N=211, p=0.5),
    "sum of y": dict(leading=(4, 16), dy_layout="of a sum"),
    "sum of y, dropout": dict(leading=(4, 16), dy_layout="of a sum", p=0.1),
    "dy transposed": dict(leading=(4, 16), dy_layout="transposed"),
    "dy expanded": dict(leading=(4, 16), dy_layout="expanded"),
    "x transposed": dict(leading=(4, 16), x_layout="transposed"),
    "x transposed, dropout": dict(leading=(4, 16), x_layout="transposed", p=0.1),
    "x expanded": dict(leading=(4, 16), x_layout="expanded"),
    "x expanded, dropout": dict(leading=(4, 16), x_layout="expanded", p=0.5),
    "x of four dimensions": dict(leading=(2, 3, 10)),
    "bias trained": dict(with_bias=True, train_bias=True),
    "bias trained, dropout": dict(with_bias=True, train_bias=True, p=0.1),
}
QUANTISED = {
    "dense": None,
    "nf4": dict(quant_type="nf4"),
    "fp4, blocks cross rows": dict(quant_type="fp4", blocksize=256, nested=False),
}


@pytest.mark.parametrize("quantised", QUANTISED.values(), ids=QUANTISED)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CHOSEN.values(), ids=CHOSEN)
def test_chosen_layers(case, dtypes, quantised):
    check(problem(**case, dtype=dtypes[0], adapter_dtype=dtypes[1], quantised=quantised))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, BF16, FP32], ids=["bytes", "bf16", "fp32"])
def test_quant_storage_and_dtype(storage, dtype):
    """fp32 layers on 4-bit weights too, which have given others garbage."""
    check(problem(dtype=dtype, quantised=dict(quant_type="nf4", storage=storage)))


def delta_kept(y: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> float:
    """How much of the adapter's true contribution is in y: the regression of y - base on it, which averages rounding
    errors out."""
    return ((y.double() - base) * delta).sum().item() / delta.square().sum().item()


@pytest.mark.parametrize("fourbit", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_small_updates_survive(fourbit, p):
    M, K, N, r = 512, 4096, 1024, 16
    w = (torch.randn(N, K) / K**0.5).to(BF16)
    base = linear_4bit(w) if fourbit else linear(w)
    x, a = torch.randn(M, K).to(BF16), (torch.randn(r, K) / K**0.5).to(BF16)
    b = (1e-4 * torch.randn(N, r)).to(BF16)
    with torch.no_grad():
        base_truth = x.double() @ decoded(base).t()
        expected = x.double() @ a.double().t() @ b.double().t()
        ours = lora_linear(x, base.weight, a, b, 1.0, None, p)
        peft = peft_layer(base, a, b, 1.0)(x)
    assert 0.95 <= delta_kept(ours, base_truth, expected) <= 1.05
    assert delta_kept(peft, base_truth, expected) < 0.5
