import bitsandbytes as bnb
import pytest
import torch
from torch.nn import functional as F

from fastlora import reference
from fastlora.benchmarks.accuracy import same

M, K, N, r = 5, 7, 6, 3
PROBABILITIES = [0.001, 0.01, 0.05, 0.1, 1 / 3, 0.5, 0.9, 0.999]


def seed(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def fp64(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def kept(M, K, p, value=1) -> torch.Tensor:
    return reference.dropout_mask(M, K, p, seed(value)) != 0


def assert_within_5_sigma(hits: torch.Tensor, probability: float):
    n = hits.numel()
    sigma = (probability * (1 - probability) / n) ** 0.5
    assert abs(hits.double().mean().item() - probability) <= 5 * sigma


@pytest.mark.parametrize("s", [1.0, 2.0, 0.0, -1.7])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_formulas_are_the_layer_and_its_gradients(p, s, with_bias):
    x, w, a, b, dy = fp64(M, K), fp64(N, K), fp64(r, K), fp64(N, r), fp64(M, N).detach()
    bias = fp64(N) if with_bias else None
    D = reference.dropout(torch.ones(M, K, dtype=torch.float64), p, seed(3))
    expected = F.linear(x, w, bias) + s * F.linear(F.linear(D * x, a), b)
    assert same(reference.lora_linear(x, w, a, b, s, bias, p, seed(3)), expected, longest=K)

    with torch.no_grad():
        xa = reference.shrink(x, a, s, p, seed(3))
        dxa, da, db = reference.lora_grad(dy, x, b, xa, s, p, seed(3))
        dx = reference.lora_matmul(dy, w.T, dxa, a.T, None, p, seed(3))
    for ours, theirs in zip((dx, da, db), torch.autograd.grad(expected, (x, a, b), dy), strict=True):
        assert same(ours, theirs, longest=K)


def test_merge_is_the_layer_without_dropout():
    x, w, a, b = fp64(M, K), fp64(N, K), fp64(r, K), fp64(N, r)
    assert same(x @ reference.merge(w, a, b, 0.3).T, reference.lora_linear(x, w, a, b, 0.3), longest=K)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 5), (4, 4), (0, 8), (100, 33)], ids=str)
def test_mask_is_all_bits_or_none(shape):
    mask = reference.dropout_mask(*shape, 0.5, seed(1))
    assert mask.shape == shape
    assert mask.dtype == torch.int16
    assert ((mask == 0) | (mask == -1)).all()


def test_mask_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    assert torch.equal(kept(64, 64, 0.5), kept(64, 64, 0.5))
    assert torch.equal(torch.get_rng_state(), before), "drawing a mask must not advance the default generator"
    torch.manual_seed(7)
    assert torch.equal(kept(64, 64, 0.5), kept(64, 64, 0.5))


@pytest.mark.parametrize("p", PROBABILITIES)
def test_keep_rate(p):
    dropped_levels = round(p * reference.DROPOUT_LEVELS)
    assert_within_5_sigma(kept(1000, 1001, p), 1 - dropped_levels / reference.DROPOUT_LEVELS)
    assert abs(dropped_levels / reference.DROPOUT_LEVELS - p) <= 0.5 / reference.DROPOUT_LEVELS


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_different_seeds_are_independent(p):
    both_or_neither = kept(1000, 1000, p, 1) == kept(1000, 1000, p, 2)
    assert_within_5_sigma(both_or_neither, p**2 + (1 - p) ** 2)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 1000], ids=lambda lag: f"lag {lag}")
def test_elements_of_one_mask_are_independent(lag):
    """Four neighbours are drawn from one 64-bit word, and rows follow each other."""
    flat = kept(1000, 1000, 0.3).flatten()
    assert_within_5_sigma(flat[lag:] == flat[:-lag], 0.3**2 + 0.7**2)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_scale_is_one_over_the_keep_probability(p):
    keep_levels = reference.DROPOUT_LEVELS - round(p * reference.DROPOUT_LEVELS)
    assert reference.dropout_scale(p) * keep_levels == reference.DROPOUT_LEVELS
    x = torch.randn(50, 50, dtype=torch.float64)
    expected = torch.where(kept(50, 50, p), x * reference.dropout_scale(p), 0.0)
    assert torch.equal(reference.dropout(x, p, seed(1)), expected)


@pytest.mark.parametrize("p", [0.0, 1e-9], ids=str)
def test_p_below_the_resolution_drops_nothing(p):
    x = torch.randn(30, 30)
    assert torch.equal(reference.dropout(x, p, seed(1)), x)


def test_p_close_to_one_keeps_the_scale_finite():
    assert reference.dropout_scale(1 - 1e-9) == reference.DROPOUT_LEVELS


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("blocksize", [64, 512])
def test_decode_is_that_of_bitsandbytes_bit_for_bit(blocksize, storage, quant_type, nested):
    N, K = 24, 96  # blocks of 64 and 512 cross rows
    packed, state = bnb.functional.quantize_4bit(
        torch.randn(N * K),  # flat, since the CPU kernel of bitsandbytes misreads blocks that cross rows
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    absmax = state.absmax
    if nested:
        absmax = reference.decode_absmax(
            absmax, state.state2.code, state.state2.absmax, state.state2.blocksize, state.offset
        )
    ours = reference.decode_4bit(packed, absmax, state.code, blocksize, N, K)
    assert torch.equal(ours, bnb.functional.dequantize_4bit(packed, state).view(N, K))
