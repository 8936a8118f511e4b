"""Every kernel against fp64 truth, on the GPU where there is one and in Triton's interpreter elsewhere.

Judged by `fastlora.benchmarks.accuracy` beside the same product in eager torch. That computes adapters of another dtype
than x in the wider one, as PEFT does; the kernels keep 16 bits of them, so eager's error counts as no less than that.
"""

import math

import interpreter
import pytest
import torch

from fastlora import reference
from fastlora.benchmarks.accuracy import FACTOR, inexact, relative_error, same
from fastlora.kernels import dropout, limits, reduce, tiles
from fastlora.kernels import lora_grad as lora_grad_module
from fastlora.kernels.dora import dora_grad
from fastlora.kernels.experts import combine_experts, lora_grad_experts, lora_matmul_experts, shrink_experts
from fastlora.kernels.limits import ACTIVATIONS
from fastlora.kernels.lora_grad import lora_grad, lora_grad_a
from fastlora.kernels.lora_matmul import (
    lora_matmul,
    lora_matmul_base_last,
    lora_matmul_group,
    lora_matmul_group_base_last,
)
from fastlora.kernels.precision import dot_precision
from fastlora.kernels.shrink import shrink, shrink_group
from fastlora.kernels.swiglu import swiglu, swiglu_backward_

interpreter.repair()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

SEED = torch.tensor(-1234567890123456789, device=DEVICE)  # both words matter, and the sign
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32 adapters on bf16": (torch.bfloat16, torch.float32),
    "fp32 adapters on fp16": (torch.float16, torch.float32),
    "bf16 adapters on fp32": (torch.float32, torch.bfloat16),
    "bf16 adapters on fp16": (torch.float16, torch.bfloat16),
}
SIXTEEN_BITS = 2**-17  # the error of rounding to them
RANKS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 64, 96, 128, 256, 512]
SHAPES = [  # M, K, N
    (1, 1, 1),
    (3, 17, 65),  # smaller than any tile, and odd
    (17, 64, 32),  # K and N whole tiles, M not
    (65, 127, 17),
    (33, 252, 96),  # many steps of K
    (127, 35, 252),
    (5, 507, 127),  # nothing is a multiple of anything
]


@pytest.fixture(autouse=True)
def poisoned(nan_in_empty):
    pass


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def strided(t, how):
    """The same values in another layout."""
    if how == "transposed":
        return t.t().contiguous().t()
    if how == "strided":
        wide = torch.full((2 * t.shape[0], 3 * t.shape[1]), float("nan"), dtype=t.dtype, device=DEVICE)
        wide[::2, ::3] = t
        return wide[::2, ::3]
    return t


def wide(x, a):
    """x in the dtype that PEFT multiplies it with a in."""
    return x.to(torch.promote_types(x.dtype, a.dtype))


def check(ours, eager, truth, longest, least=0.0):
    """Assert that ours is as accurate as eager torch, or in error by ``least``; ``longest`` is how many terms its
    longest sum adds up."""
    reason = inexact([ours], [eager.to(ours.dtype)], [truth], longest, least)
    assert reason is None, reason


def philox(seed, K, M):
    """Philox4x32-7 in plain torch for counter (k // 8, m, 0, 0): the four words, each int64[M, K]."""

    def mulhilo(a, b):
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        low = low + ((high & 0xFFFF) << 16)
        return (high >> 16) + (low >> 32), low & 0xFFFFFFFF

    zero = torch.zeros(M, K, dtype=torch.int64)
    c0, c1, c2, c3 = zero + torch.arange(K) // 8, zero + torch.arange(M)[:, None], zero, zero
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(7):
        (h0, l0), (h1, l1) = mulhilo(c0, 0xD2511F53), mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def mask(M, K, p, seed=SEED):
    """The scaled dropout mask in fp64, from nothing but its definition."""
    words = torch.stack(philox(int(seed), K, M), dim=-1)
    k = torch.arange(K)
    word = words.gather(-1, (k % 8 // 2).expand(M, K)[..., None]).squeeze(-1)
    lane = torch.where(k % 2 == 0, word & 0xFFFF, word >> 16)
    dropped = min(round(p * 65536), 65535)
    return ((lane >= dropped).double() * 65536 / (65536 - dropped)).to(DEVICE)


class TestDropout:
    def test_keep_rate_and_independence(self):
        M, K = 256, 512
        for p in (0.01, 0.1, 0.5, 0.9):
            keep = (mask(M, K, p) != 0).double()
            spread = math.sqrt(p * (1 - p) / (M * K))
            assert abs(keep.mean().item() - (1 - p)) < 5 * spread
            centred = keep - (1 - p)
            for other in (centred.roll(1, 1), centred.roll(2, 1), centred.roll(8, 1), centred.roll(1, 0)):
                assert abs((centred * other).mean().item()) < 5 * p * (1 - p) / math.sqrt(M * K)

    @pytest.mark.parametrize("seed", [0, 1, -1, 1 << 32, (1 << 63) - 1, -(1 << 63)])
    def test_kernel_draws_the_mask_of_its_definition(self, seed):
        M, K, p = 35, 72, 0.3
        seed = torch.tensor(seed, dtype=torch.int64, device=DEVICE)
        dropped = shrink(torch.ones(M, K, device=DEVICE), torch.eye(K, device=DEVICE), 1.0, p, seed)
        assert torch.equal(dropped, mask(M, K, p, seed).float())

    def test_scale_is_that_of_the_mask(self):
        for p in (1e-9, 0.1, 0.5, 1 - 1e-9):
            expected = 65536 / (65536 - min(round(p * 65536), 65535))
            assert dropout.dropout_scale(p) == expected


@pytest.mark.one_case_in(3)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestShrink:
    def test_is_that_of_the_reference(self, shape, dtypes, p):
        (M, K, _), (dtype, adapter_dtype) = shape, dtypes
        check_shrink(normal(M, K, dtype=dtype), normal(5, K, dtype=adapter_dtype), 0.7, p)


def check_shrink(x, a, s, p):
    D = mask(*x.shape, p) if p else torch.ones_like(x, dtype=torch.float64)
    xa = shrink(x, a, s, p, SEED if p else None)
    assert xa.dtype == a.dtype
    eager = reference.shrink(wide(x, a) * D.to(wide(x, a).dtype), a, s)
    check(
        xa,
        eager,
        reference.shrink(x.double() * D, a.double(), s),
        x.shape[1],
        0.0 if a.dtype == x.dtype else SIXTEEN_BITS,
    )


@pytest.mark.parametrize("r", RANKS)
def test_shrink_takes_any_rank(r):
    check_shrink(normal(19, 40), normal(r, 40), 2.0, 0.2)


GROUPS = {  # (r, dtype of the adapter, s, p) of each
    "q, k, v": [(16, torch.float32, 2.0, 0.0)] * 3,
    "q, k, v, dropout": [(16, torch.float32, 2.0, 0.1)] * 3,
    "gate, up of large rank": [(150, torch.float32, 2.0, 0.1)] * 2,
    "no two alike": [
        (4, torch.float32, 0.3, 0.0),
        (1, torch.float16, 2.0, 0.3),
        (40, torch.bfloat16, -1.0, 0.0),
        (6, torch.float32, 1.0, 0.6),
    ],
}


@pytest.mark.one_case_in(2)
@pytest.mark.parametrize("M", [3, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_shrink_group_is_each_by_itself(group, dtype, M):
    x = normal(M, 168, dtype=dtype)
    a = [normal(r, 168, dtype=adapter_dtype) for r, adapter_dtype, _, _ in group]
    s, p = ([each[i] for each in group] for i in (2, 3))
    seeds = [SEED + i if each else None for i, each in enumerate(p)]
    for ours, *adapter in zip(shrink_group(x, a, s, p, seeds), a, s, p, seeds, strict=True):
        alone = shrink(x, *adapter)
        assert ours.dtype == alone.dtype and ours.shape == alone.shape
        assert same(ours, alone)


def test_shrink_group_of_nothing():
    for shape in ((0, 8), (8, 0)):
        group = shrink_group(
            normal(*shape), [normal(3, shape[1]), normal(1, shape[1])], [1.0] * 2, [0.0] * 2, [None] * 2
        )
        assert [t.shape for t in group] == [(shape[0], 3), (shape[0], 1)] and not any(t.any() for t in group)


@pytest.mark.parametrize("how", ["transposed", "strided"])
def test_shrink_takes_any_strides(how):
    check_shrink(strided(normal(37, 72), how), strided(normal(6, 72), how), 2.0, 0.2)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=["no tokens", "no features"])
def test_shrink_of_nothing(shape):
    check_shrink(normal(*shape), normal(3, shape[1]), 2.0, 0.0)


def test_shrink_split_along_k_adds_in_a_fixed_order():
    x, a = normal(8, 1024), normal(4, 1024)  # few tokens: K is cut so that every multiprocessor has work
    check_shrink(x, a, 1.0, 0.2)
    assert torch.equal(shrink(x, a, 1.0), shrink(x, a, 1.0))


def test_counters_of_arrivals_are_left_at_zero():
    x, a = normal(8, 1024), normal(4, 1024)
    assert reduce.counters(x, 5000).shape[0] >= 5000
    shrink(x, a, 1.0)
    lora_grad(x, x, a.t(), normal(8, 4), 1.0)
    assert not any(counted.any() for counted in reduce._counters.values())


def check_lora_matmul(x, w, xa, b, bias=None, p=0.0, scale=None):
    D = mask(x.shape[0], w.shape[0], p) if p else x.new_ones(x.shape[0], w.shape[0], dtype=torch.float64)
    y = lora_matmul(x, w, xa, b, bias, p, SEED if p else None, scale)
    assert y.dtype == x.dtype
    adapter = D.to(wide(x, xa).dtype) * (wide(xa, x) @ wide(b, x).T)
    eager = (x @ w.T + adapter + (0 if bias is None else bias)).to(x.dtype)
    truth = x.double() @ w.double().T + D * (xa.double() @ b.double().T) + (0 if bias is None else bias.double())
    if scale is not None:
        eager, truth = (eager * scale).to(x.dtype), truth * scale.double()
    check(y, eager, truth, x.shape[1] + b.shape[1])


@pytest.fixture(params=["pointers", "tensor descriptors"])
def copies(request, monkeypatch):
    """Both ways to copy tiles; descriptors, where a shape allows them."""
    descriptors = request.param == "tensor descriptors"
    if descriptors and DEVICE == "cuda" and not tiles.has_tma():
        pytest.skip("this GPU copies no tiles by itself")
    monkeypatch.setattr(tiles, "has_tma", lambda: descriptors)


@pytest.mark.usefixtures("copies")
class TestLoRAMatmul:
    @pytest.mark.one_case_in(6)
    @pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
    @pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_is_that_of_the_reference(self, shape, dtypes, p):
        (M, K, N), (dtype, adapter_dtype) = shape, dtypes
        x, w, xa, b = normal(M, K), normal(N, K), normal(M, 5, dtype=adapter_dtype), normal(N, 5, dtype=adapter_dtype)
        check_lora_matmul(x.to(dtype), w.to(dtype), xa, b, None if p else normal(N, dtype=adapter_dtype), p)

    @pytest.mark.one_case_in(2)
    @pytest.mark.parametrize("r", RANKS)
    def test_any_rank(self, r):
        check_lora_matmul(normal(40, 48).half(), normal(72, 48).half(), normal(40, r), normal(72, r))

    @pytest.mark.parametrize("how", ["transposed", "strided"])
    def test_any_strides(self, how):
        operands = (normal(40, 72).half(), normal(96, 72).half(), normal(40, 6), normal(96, 6))
        check_lora_matmul(*(strided(t, how) for t in operands), normal(96), 0.2)

    @pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
    def test_dx_is_the_same_call_with_transposed_strides(self, p):
        dy, w, dxa, a = normal(40, 96).half(), normal(96, 72).half(), normal(40, 6), normal(6, 72)
        check_lora_matmul(dy, w.t(), dxa, a.t(), None, p)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_columns_are_scaled_before_they_are_rounded(self, dtype):
        x, w, scale = normal(40, 48).to(dtype), normal(72, 48).to(dtype), normal(72)
        check_lora_matmul(x, w, normal(40, 6), normal(72, 6), scale=scale)
        check_lora_matmul(x, w, normal(40, 6), normal(72, 6), normal(72), 0.2, scale.double())
        one, other = (f(x, w, x[:, :6], w[:, :6], scale=scale) for f in (lora_matmul, lora_matmul_base_last))
        assert same(other, one)

    def test_more_tiles_than_programs(self):
        check_lora_matmul(normal(120, 40).half(), normal(200, 40).half(), normal(120, 4), normal(200, 4))

    @pytest.mark.parametrize("launcher", [lora_matmul_group, lora_matmul_group_base_last], ids=["tail", "base last"])
    @pytest.mark.parametrize("ps", [(0.0, 0.0), (0.3, 0.3, 0.3), (0.3, 0.0, 0.6)], ids=str)
    def test_dx_of_a_group_is_one_product(self, ps, launcher):
        M, K = 40, 72
        parts = len(ps)
        seeds = tuple(SEED + i if p else None for i, p in enumerate(ps))
        widths, ranks = (96, 24, 32)[:parts], (6, 16, 40)[:parts]
        dys, ws = ([normal(rows, n).half() for n in widths] for rows in (M, K))
        dxas, ats = [normal(M, r) for r in ranks], [normal(r, K).t() for r in ranks]
        dxas[0], ats[0] = dxas[0].half(), ats[0].half()
        truth = eager = 0
        for dy, w, dxa, at, p, seed in zip(dys, ws, dxas, ats, ps, seeds, strict=True):
            D = mask(M, K, p, seed) if p else torch.ones(M, K, dtype=torch.float64, device=DEVICE)
            truth = truth + dy.double() @ w.double().T + D * (dxa.double() @ at.double().T)
            eager = eager + dy @ w.T + D.half() * (dxa.half() @ at.half().T)
        ws = [w.t().contiguous().t() for w in ws]  # the strides of w.t() for a layer's weight
        check(launcher(dys, ws, dxas, ats, ps, seeds), eager, truth, sum(widths) + sum(ranks))

    def test_base_last_is_the_same_product(self):
        x, w, xa, b, bias = normal(40, 48), normal(72, 48), normal(40, 6), normal(72, 6), normal(72)
        one, other = (f(x, w, xa, b, bias, 0.3, SEED) for f in (lora_matmul, lora_matmul_base_last))
        assert same(other, one)

    @pytest.mark.parametrize("shape", [(0, 8, 8), (8, 8, 0), (8, 0, 16)], ids=["no tokens", "no columns", "no base"])
    def test_of_nothing(self, shape):
        M, K, N = shape
        check_lora_matmul(normal(M, K).half(), normal(N, K).half(), normal(M, 3), normal(N, 3), normal(N), 0.2)


def check_lora_grad(dy, x, b, xa, s, p=0.0, one_pass=True):
    D = mask(*x.shape, p) if p else torch.ones_like(x, dtype=torch.float64)
    ours = lora_grad(dy, x, b, xa, s, p, SEED if p else None, one_pass)
    assert [t.dtype for t in ours] == [b.dtype, b.dtype, xa.dtype]
    assert all(t.is_contiguous() for t in ours)
    eager = reference.lora_grad(wide(dy, b), wide(x, b) * D.to(wide(x, b).dtype), b, wide(xa, dy), s)
    truth = reference.lora_grad(dy.double(), x.double() * D, b.double(), xa.double(), s)
    M, N = dy.shape
    for t, bar, expected, longest in zip(ours, eager, truth, (N, M + N, M), strict=True):
        check(t, bar, expected, longest, 0.0 if b.dtype == x.dtype else SIXTEEN_BITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9], ids=str)
def test_fp32_adapters_keep_sixteen_bits(dtype, size):
    """Also far outside fp16's range."""
    x, dy = normal(64, 128, dtype=dtype), normal(64, 96, dtype=dtype)
    a, b = size * normal(8, 128), size * normal(96, 8)
    xa = shrink(x, a, 2.0)
    ours = xa, *lora_grad(dy, x, b, xa, 2.0)
    x, dy, a, b = (t.double() for t in (x, dy, a, b))
    truth = reference.shrink(x, a, 2.0), *reference.lora_grad(dy, x, b, xa.double(), 2.0)
    for value, expected in zip(ours, truth, strict=True):
        assert relative_error(value, expected) <= FACTOR * SIXTEEN_BITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["xa", "b"])
def test_both_factors_of_the_adapter_keep_more_than_half_precision(which, dtype):
    """1 + 2^-12 is 1 in fp16 and bf16: a sum in which the ones cancel out shows what was kept of it."""
    fine, ones = torch.tensor([[1 + 2**-12, 1.0]], device=DEVICE), torch.tensor([[1.0, -1.0]], device=DEVICE)
    xa, b = (fine, ones) if which == "xa" else (ones, fine)
    x = torch.zeros(64, 32, dtype=dtype, device=DEVICE)
    y = lora_matmul(x, x[:48], xa.expand(64, 2).contiguous(), b.expand(48, 2).contiguous())
    assert torch.equal(y, torch.full_like(y, 2**-12))


class TestLoRAGrad:
    @pytest.mark.one_case_in(6)
    @pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
    @pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_is_that_of_the_reference(self, shape, dtypes, p):
        (M, K, N), (dtype, adapter_dtype) = shape, dtypes
        dy, x, b, xa = normal(M, N), normal(M, K), normal(N, 5, dtype=adapter_dtype), normal(M, 5, dtype=adapter_dtype)
        check_lora_grad(dy.to(dtype), x.to(dtype), b, xa, 0.7, p)

    @pytest.mark.one_case_in(2)
    @pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
    @pytest.mark.parametrize("r", RANKS)
    def test_any_rank(self, r, one_pass):
        check_lora_grad(normal(40, 72), normal(40, 48), normal(72, r), normal(40, r), 2.0, 0.2, one_pass)

    @pytest.mark.parametrize("added", [0, 1 << 30], ids=["in a launch of their own", "in the launch"])
    def test_parts_of_slabs_are_added_up(self, added, monkeypatch):
        monkeypatch.setattr(limits, "ADDED_BYTES", added)
        lora_grad_module._calls.cache_clear()
        check_lora_grad(normal(300, 200), normal(300, 48), normal(200, 40), normal(300, 40), 2.0)
        lora_grad_module._calls.cache_clear()

    @pytest.mark.parametrize("how", ["transposed", "strided"])
    def test_any_strides(self, how):
        operands = (normal(40, 72), normal(40, 48), normal(72, 6), normal(40, 6))
        check_lora_grad(*(strided(t, how) for t in operands), 2.0, 0.2)

    def test_a_gradient_that_was_expanded(self):
        dy = normal(1, 1).expand(40, 72)  # what y.sum().backward() sends
        check_lora_grad(dy, normal(40, 48), normal(72, 6), normal(40, 6), 2.0)

    @pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8)], ids=["no tokens", "no features"])
    def test_of_nothing(self, shape):
        M, K, N = shape
        dxa, da, db = lora_grad(normal(M, N), normal(M, K), normal(N, 3), normal(M, 3), 2.0)
        assert (dxa.shape, da.shape, db.shape) == ((M, 3), (3, K), (N, 3))
        assert not da.any()
        assert M or not db.any()

    @pytest.mark.parametrize("r", [4, 40, 200])
    def test_only_what_is_asked_for(self, r):
        dy, x, b, xa = normal(40, 72), normal(40, 48), normal(72, r), normal(40, r)
        whole = lora_grad(dy, x, b, xa, 2.0)
        for without, missing in (("x", [1]), ("xa", [2]), ("b", [0, 1])):
            given = {"x": x, "b": b, "xa": xa} | {without: None}
            for i, t in enumerate(lora_grad(dy, **given, s=2.0)):
                assert t.numel() == 0 if i in missing else same(t, whole[i])

    @pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
    def test_da_alone_is_that_of_the_whole(self, p):
        dy, x, b, xa = normal(40, 72), normal(40, 48).half(), normal(72, 6), normal(40, 6)
        dxa, da, _ = lora_grad(dy.half(), x, b, xa, 2.0, p, SEED)
        assert torch.equal(lora_grad_a(dxa, x, p, SEED), da)

    @pytest.mark.parametrize("r", [4, 40, 200])
    def test_twice_the_same_bits(self, r):
        operands = normal(300, 72), normal(300, 48), normal(72, r), normal(300, r)
        once, again = (lora_grad(*operands, 2.0, 0.2, SEED) for _ in range(2))
        assert all(torch.equal(t, u) for t, u in zip(once, again, strict=True))


def test_amd_gpus_without_tiles_of_their_own_take_those_of_gfx942_but_no_tf32(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    x = torch.empty(1)
    try:
        for arch, precision, rows in (
            ("gfx942", "tf32", "gfx942"),
            ("gfx90a", "ieee", "gfx942"),
            ("gfx1100", "ieee", "gfx11"),
        ):
            tiles.force_family(tiles.family_of("hip", arch))
            assert dot_precision(x) == precision
            assert tiles.tile("nf4_matmul", 16) == tiles.TILES["nf4_matmul"][rows][tiles.ANY]
            assert not any(row.maxnreg for row in tiles.rows_of("lora_grad", tiles.family()).values()), "NVIDIA's"
            assert tiles.tile("swiglu", 16) == tiles.TILES["swiglu"]["default"][tiles.ANY]
            assert not tiles.has_ptx() and not tiles.has_tma()
    finally:
        tiles.force_family(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (700, 130), (0, 8), (8, 0)], ids=str)
def test_gradients_of_a_scale(shape, dtype):
    M, N = shape
    dy, y, scale = normal(M, N).to(dtype), normal(N, M).to(dtype).t(), normal(N).abs() + 0.5
    dz, dscale = dora_grad(dy, y, scale)
    wide = dy.double(), y.double(), scale.double()
    eager = (dy * scale).to(dtype), (dy.float() * y.float()).sum(0) / scale
    for value, bar, expected in zip((dz, dscale), eager, reference.dora_grad(*wide), strict=True):
        check(value, bar, expected, M)
    assert all(map(torch.equal, dora_grad(dy, y, scale), (dz, dscale)))


@pytest.mark.one_case_in(3)
@pytest.mark.parametrize("gated", [True, False], ids=["", "no up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (33, 65), (0, 8)], ids=str)
def test_swiglu_and_its_gradients(shape, activation, dtype, gated):
    M, K = shape
    gate, up = (2 * normal(M, 2 * K)).to(dtype).chunk(2, dim=1)  # of one tensor: rows are strided
    up = up if gated else None
    dh = normal(K, M, dtype=dtype).t()

    def law(dtype):
        g, u, d = (None if t is None else t.detach().to(dtype).requires_grad_() for t in (gate, up, dh))
        h = reference.swiglu(g, u, activation)
        return h.detach(), *torch.autograd.grad(h, (g,) if u is None else (g, u), d)

    h = swiglu(gate, up, activation)
    eager, truth = law(dtype), law(torch.float64)
    swiglu_backward_(dh, gate, up, activation)
    ours = (h, gate, up) if gated else (h, gate)
    for value, bar, expected in zip(ours, eager, truth, strict=True):
        check(value, bar, expected, 1)
    assert torch.equal(dh, h), "the backward gives the same h"


def test_offsets_beyond_32_bits():
    """Rows so far apart that offsets of rows, and of one step of a loop over them, pass 2^31 elements."""
    M, K, stride = 40, 24, 1 << 26
    reserved = torch.UntypedStorage(2 * ((M - 1) * stride + K), device=DEVICE)  # and neither filled nor touched
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(reserved, 0, (M, K), (stride, 1))
    near = normal(M, K).half()
    far.copy_(near)
    a, b, w, dy = normal(5, K), normal(40, 5), normal(40, K).half(), normal(M, 40).half()
    xa = shrink(far, a, 2.0, 0.3, SEED)
    assert torch.equal(xa, shrink(near, a, 2.0, 0.3, SEED))
    assert torch.equal(lora_matmul(far, w, xa, b), lora_matmul(near, w, xa, b))
    with tiles.use("lora_grad", tiles.Tile(BLOCK_M=32, BLOCK_N=64)):
        assert torch.equal(lora_grad(dy, far, b, xa, 2.0)[1], lora_grad(dy, near, b, xa, 2.0)[1])
    assert torch.equal(swiglu(far, near, "silu"), swiglu(near, near, "silu"))
    far, near, a = far.t(), near.t(), normal(5, M)  # the same by columns
    w, b = normal(K, M).half(), normal(K, 5)
    xa = shrink(far, a, 2.0, 0.3, SEED)
    assert torch.equal(xa, shrink(near, a, 2.0, 0.3, SEED))
    assert torch.equal(lora_matmul(far, w, xa, b), lora_matmul(near, w, xa, b))
    assert torch.equal(swiglu(far, near, "silu"), swiglu(near, near, "silu"))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("ends", [(40, 40, 41, 97), (0, 3, 90, 90), (0, 0, 0, 0)], ids=str)
def test_products_of_experts(ends, p, dtypes):
    """Rows of several tiles, of one, of none; the last rows belong to no expert."""
    (dtype, adapter), M, E, K, N, r = dtypes, 97, 4, 48, 72, 20
    offs, seed = torch.tensor(ends, dtype=torch.int32, device=DEVICE), SEED if p else None
    x, w, dy = normal(M, K, dtype=dtype), normal(E, N, K, dtype=dtype), normal(M, N, dtype=dtype)
    a, b, xa = normal(E, r, K, dtype=adapter), normal(E, N, r, dtype=adapter), normal(M, r, dtype=adapter)
    bias, wt, at = normal(E, N, dtype=adapter), w.transpose(1, 2), a.transpose(1, 2)
    index, weights = torch.randperm(96, device=DEVICE).view(-1, 3), normal(32, 3, dtype=dtype)
    calls = [
        (shrink_experts, (x, a, offs, 0.7, p, seed)),
        (lora_matmul_experts, (x, w, xa, b, offs, bias)),
        (lora_matmul_experts, (dy, wt, xa, at, offs, None, p, seed)),
        (lora_grad_experts, (xa, x, offs, p, seed)),
        (combine_experts, (dy, index, weights)),
        (combine_experts, (dy, index)),
    ]
    for launcher, args in calls:
        ours, formula = launcher(*args), getattr(reference, launcher.__name__)
        truth = formula(*(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args))
        if ours.dtype == torch.float32 and dtype != torch.float32:  # two factors of 16 bits
            assert relative_error(ours, truth) <= FACTOR * 2 * SIXTEEN_BITS, launcher.__name__
        else:
            assert same(ours, truth, dtype=ours.dtype, longest=M), launcher.__name__
        assert torch.equal(launcher(*args), ours)


def test_rows_that_are_not_there_are_none_of_a_token():
    """Their memory is read by no kernel: the rows here are a part of a larger tensor, whose others are NaN."""
    around = torch.full((9, 8), torch.nan, device=DEVICE)
    rows = around[3:6].copy_(normal(3, 8))
    index = torch.tensor([[0, -1], [3, 2], [-3, 5]], device=DEVICE)
    expected = torch.stack([rows[0], rows[2], torch.zeros_like(rows[0])])
    assert torch.equal(combine_experts(rows, index), expected)
