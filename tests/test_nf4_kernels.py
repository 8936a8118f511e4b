"""Decoding 4-bit weights: bit for bit what bitsandbytes' format says. Runs where `test_kernels` runs."""

import interpreter
import pytest
import torch
from test_kernels import DEVICE, check
from test_ops import SHAPES, weight_4bit

from fastlora import reference
from fastlora.kernels.nf4 import CODES, decode_4bit
from fastlora.kernels.nf4_matmul import nf4_matmul

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

    @pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
    def test_any_block_size(self, blocksize, quant_type, nested):
        weight, w = weight_4bit(20, 480, blocksize, quant_type, nested)
        a, b = torch.zeros(2, 480), torch.zeros(20, 2)
        assert torch.equal(decode(weight, torch.float32), w)
        assert torch.equal(decode(weight, torch.float32, a, b), w)


@pytest.mark.parametrize("r", [1, 2, 3, 6, 16, 24, 96, 128, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_is_that_of_the_reference(dtype, r):
    weight, w = weight_4bit(24, 96)
    a, b = torch.randn(r, 96).to(dtype), torch.randn(24, r)
    merged = decode(weight, dtype, a, b, 0.3)
    truth = reference.merge(w.double(), a.double(), b.double(), 0.3)
    rounded = (truth.to(dtype).double() - truth).norm()  # no dtype can do better
    assert (merged.double() - truth).norm() <= 1.5 * rounded + 1e-6 * truth.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]} by {s[2]}")
def test_merge_of_any_shape(shape):
    weight, w = weight_4bit(*shape)
    N, K, _ = shape
    a, b = torch.randn(K, 5).t(), torch.randn(N, 10)[:, ::2]
    torch.testing.assert_close(decode(weight, torch.float32, a, b, 0.3), reference.merge(w, a, b, 0.3))


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_decode_reads_any_quant_storage(storage):
    weight, w = weight_4bit(storage=storage)
    assert torch.equal(decode(weight, torch.float32), w)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_books_are_those_of_bitsandbytes(quant_type):
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(torch.tensor(CODES[quant_type]), get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [0, 1, 6, 16, 96])
@pytest.mark.parametrize("M", [1, 3, 17, 64])
class TestNF4Matmul:
    def test_is_the_product_with_the_merged_weight(self, M, r, dtype, splits):
        N, K, s = 47, 448, 0.3
        weight, w = weight_4bit(N, K)
        x, bias = torch.randn(M, K).to(dtype), torch.randn(N)
        a, b = (torch.randn(r, K), torch.randn(N, r)) if r else (None, None)
        y = nf4_matmul(*on_device(x, *weight, a, b, s, bias, splits)).cpu()
        eager = x @ w.to(dtype).T + bias.to(dtype)
        truth = x.double() @ w.double().T + bias.double()
        if r:
            eager = eager + s * ((x @ a.to(dtype).T) @ b.to(dtype).T)
            truth = truth + s * x.double() @ a.double().T @ b.double().T
        assert y.dtype == dtype
        check(y, eager, truth, K)
