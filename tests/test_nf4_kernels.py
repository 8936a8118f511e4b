"""Decoding 4-bit weights: bit for bit what bitsandbytes' format says. Runs where `test_kernels` runs."""

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_kernels import DEVICE, RANKS, check
from test_ops import SHAPES, weight_4bit

from fastlora import reference
from fastlora.kernels import tiles
from fastlora.kernels.limits import FUSED_TOKENS
from fastlora.kernels.nf4 import CODES, decode_4bit
from fastlora.kernels.nf4_lookup import lookup_asm
from fastlora.kernels.nf4_matmul import nf4_matmul
from fastlora.kernels.precision import round_to_tf32

interpreter.repair()

pytestmark = [pytest.mark.usefixtures("nan_in_empty", "bitsandbytes_eager")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


def on_device(*values):
    return (v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values)


def decode(weight, dtype, a=None, b=None, s=1.0):
    return decode_4bit(*on_device(*weight, dtype, a, b, s)).cpu()


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
class TestDecode:
    @pytest.mark.one_case_in(2)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]} by {s[2]}")
    def test_is_that_of_the_reference_rounded_once(self, shape, quant_type, nested, dtype):
        weight, w = weight_4bit(*shape, quant_type, nested)
        assert torch.equal(decode(weight, dtype), w.to(dtype))

    @pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]} by {s[2]}")
    def test_of_no_adapter_is_the_merge_of_a_zero_one(self, shape, quant_type, nested):
        """The merging kernel walks by rows where decoding alone does not, and must decode to the same bits."""
        weight, w = weight_4bit(*shape, quant_type, nested)
        N, K, _ = shape
        assert torch.equal(decode(weight, torch.float32, torch.zeros(3, K), torch.zeros(N, 3)), w)

    @pytest.mark.one_case_in(2)
    @pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
    def test_any_block_size(self, blocksize, quant_type, nested):
        weight, w = weight_4bit(20, 480, blocksize, quant_type, nested)
        a, b = torch.zeros(2, 480), torch.zeros(20, 2)
        assert torch.equal(decode(weight, torch.float32), w)
        assert torch.equal(decode(weight, torch.float32, a, b), w)


def merged_by_reference(w, a, b):
    """In fp32, and in fp64."""
    return (reference.merge(w.to(dtype), a.to(dtype), b.to(dtype), 0.3) for dtype in (torch.float32, torch.float64))


@pytest.mark.one_case_in(2)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_is_that_of_the_reference(dtype, r):
    weight, w = weight_4bit(24, 96)
    a, b = torch.randn(r, 96).to(dtype), torch.randn(24, r)
    merged = decode(weight, dtype, a, b, 0.3)
    check(merged, *merged_by_reference(w, a, b), r)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]} by {s[2]}")
def test_merge_of_any_shape(shape):
    weight, w = weight_4bit(*shape)
    N, K, _ = shape
    a, b = torch.randn(K, 5).t(), torch.randn(N, 10)[:, ::2]
    check(decode(weight, torch.float32, a, b, 0.3), *merged_by_reference(w, a, b), 5)


@triton.jit
def rounding(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, round_to_tf32(tl.load(x_ptr + offs)))


def test_adapters_are_rounded_to_tf32_not_cut():
    x = torch.cat([torch.randn(1018), torch.tensor([0.0, -0.0, 1 + 2**-11, torch.inf, -torch.inf, torch.nan])])
    x.view(torch.int32)[-1] = 0x7FFFFFFF  # the NaN of a GPU
    y = x.to(DEVICE).new_empty(1024)
    rounding[(1,)](x.to(DEVICE), y, 1024)
    y, finite = y.cpu(), x.isfinite()
    assert not (y.view(torch.int32) & 0x1FFF)[:-1].any(), "13 bits are not kept"
    assert ((y - x).abs() <= x.abs() * 2**-11)[finite].all(), "by half of the last bit that is, at most"
    # of a thousand numbers the mean of roundings, each up to 2e-4 of the number either way
    assert ((y - x) * x.sign())[:1018].double().mean().abs() < 1e-5, "cut off they would all be smaller, by 1e-4"
    assert torch.equal(y[~finite].isnan(), x[~finite].isnan()) and torch.equal(y[-3:-1], x[-3:-1])


def test_only_the_first_decode_copies_from_the_host(monkeypatch):
    """So that later ones can be captured in a CUDA graph."""
    weight, w = weight_4bit()
    decode(weight, torch.float32)
    monkeypatch.delattr(torch, "tensor")
    monkeypatch.delattr(torch, "as_tensor")
    monkeypatch.setattr(torch.Tensor, "item", None)
    assert torch.equal(decode(weight, torch.float32), w)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_decode_reads_any_quant_storage(storage):
    weight, w = weight_4bit(storage=storage)
    assert torch.equal(decode(weight, torch.float32), w)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_books_are_those_of_bitsandbytes(quant_type):
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(torch.tensor(CODES[quant_type]), get_4bit_type(quant_type, device="cpu"))


@pytest.fixture(params=["in registers", "in memory"])
def lookup(request, monkeypatch):
    """Both ways to look a code up: by PTX, and for what has none of it."""
    ptx = request.param == "in registers"
    if ptx and DEVICE == "cuda" and not tiles.has_ptx():
        pytest.skip("this GPU takes no PTX")
    monkeypatch.setattr(tiles, "has_ptx", lambda: ptx)


@pytest.mark.usefixtures("lookup")
class TestNF4Matmul:
    @pytest.mark.one_case_in(5)
    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        ("M", "r"), [(1, 0), (1, 1), (3, 6), (3, 96), (17, 0), (17, 6), (17, 64), (64, 16), (64, 0)]
    )
    def test_is_the_product_with_the_merged_weight(self, M, r, dtype, splits):
        N, K, s = 47, 448, 0.3
        weight, w = weight_4bit(N, K)
        x, bias = torch.randn(M, K).to(dtype), torch.randn(N)
        a, b = (torch.randn(r, K), torch.randn(N, r)) if r else (None, None)
        y = nf4_matmul(*on_device(x, *weight, a, b, s, bias, splits)).cpu()
        eager = x @ w.to(dtype).T + bias.to(dtype)
        truth = x.double() @ w.double().T + bias.double()
        if r:
            eager = (eager + s * ((x.float() @ a.T) @ b.T)).to(dtype)
            truth = truth + s * x.double() @ a.double().T @ b.double().T
        assert y.dtype == dtype
        check(y, eager, truth, K)

    @pytest.mark.one_case_in(7)
    @pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
    @pytest.mark.parametrize("blocksize", [64, 128, 512, 4096])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_any_block_size(self, quant_type, blocksize, nested):
        """With x the identity, y is the decoded weight: every code in every place of its word, and every scale."""
        N, K = 40, 192
        weight, w = weight_4bit(N, K, blocksize, quant_type, nested)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows = [
                nf4_matmul(*on_device(x, *weight, None, None, 1.0)).cpu()
                for x in torch.eye(K, dtype=dtype).split(FUSED_TOKENS)
            ]
            y = torch.cat(rows).t()
            # The code and its product with the scale are rounded once each, by half an eps at most. A hundredth more
            # is for the sum in fp32. The norm of all elements would hide a single one that is wrong.
            assert (y.double() - w).abs().max() <= 1.01 * torch.finfo(dtype).eps * w.abs().max()
            assert (y[w == 0] == 0).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_few_tokens_of_no_outputs(splits):
    weight = torch.empty(0, dtype=torch.uint8), torch.empty(0), None, None, None, 64, 0, "nf4", 0, 448
    y = nf4_matmul(*on_device(torch.randn(3, 448).to(torch.bfloat16), *weight, None, None, 1.0, None, splits))
    assert y.shape == (3, 0) and y.dtype == torch.bfloat16


def test_lookup_in_registers_is_the_code():
    """All 16 codes in all eight places of both words."""
    for quant_type, code in CODES.items():
        for dtype in (torch.bfloat16, torch.float16):
            for nibble in range(16):
                words = [np.full(1, 0x11111111 * n, np.uint32) for n in (nibble, 15 - nibble)]
                outputs = interpreter.run_ptx(lookup_asm(code, dtype), 8, words)
                values = torch.from_numpy(np.stack(outputs).view(np.int16)).view(dtype)
                expected = torch.tensor([code[nibble], code[15 - nibble]]).to(dtype)
                assert torch.equal(values, expected.expand(8, 2)), (quant_type, dtype, nibble)
            words = [np.array([0x01234567], np.uint32), np.array([0x89ABCDEF], np.uint32)]
            outputs = interpreter.run_ptx(lookup_asm(code, dtype), 8, words)
            values = torch.from_numpy(np.stack(outputs).view(np.int16)).view(dtype)
            places = [[6, 7, 4, 5, 2, 3, 0, 1], [14, 15, 12, 13, 10, 11, 8, 9]]  # a byte's high nibble comes first
            assert torch.equal(values.t(), torch.tensor(code).to(dtype)[torch.tensor(places)])
