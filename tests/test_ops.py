import bitsandbytes as bnb
import pytest
import torch
from accuracy import need_quantised
from dispatch import RecordOps
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map_only

from fastlora import fourbit, ops, reference
from fastlora.benchmarks.accuracy import inexact, same
from fastlora.kernels.limits import ACTIVATIONS

M, K, N, r = 12, 32, 24, 4
LONGEST = 40  # terms in a sum, of all tests here
SEED = torch.tensor(5, dtype=torch.int64)
op = torch.ops.fastlora

pytestmark = pytest.mark.usefixtures("nan_in_empty", "bitsandbytes_eager")


def tensors(dtype=torch.float32, adapter_dtype=None, M=M, K=K, N=N, r=r):
    """x, w, a, b, bias, dy, xa"""
    shapes = (M, K), (N, K), (r, K), (N, r), (N,), (M, N), (M, r)
    x, w, a, b, bias, dy, xa = (torch.randn(shape).to(dtype) for shape in shapes)
    return x, w, a.to(adapter_dtype or dtype), b.to(adapter_dtype or dtype), bias, dy, xa


def weight_4bit(N=N, K=K, blocksize=64, quant_type="nf4", nested=True, storage=torch.uint8, dtype=torch.float32):
    """A quantised weight and its decoding by `reference`."""
    need_quantised(N * K)
    packed, state = bnb.functional.quantize_4bit(
        torch.randn(N, K).to(dtype),
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    weight = fourbit.weight_4bit(bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True))
    absmax = weight.absmax
    if nested:
        absmax = reference.decode_absmax(absmax, weight.code2, weight.absmax2, weight.blocksize2, weight.offset)
    return weight, reference.decode_4bit(packed, absmax, state.code, blocksize, N, K)


def calls(dtype, adapter_dtype):
    """Every op with arguments for each of its forms."""
    x, w, a, b, bias, dy, xa = tensors(dtype, adapter_dtype)
    flat, nested = weight_4bit(nested=False)[0], weight_4bit()[0]
    group = [a, a[:1]], [0.3, 2.0], [0.0, 0.2], [None, SEED]
    ins = [dy, dy[:, :7]], [w.t(), w[:7].t()], [xa, xa[:, :1]], [a.t(), a[:1].t()]
    return {
        "shrink_group": (op.shrink_group, (x, *group)),
        "lora_matmul_group": (op.lora_matmul_group, (*ins, [0.0, 0.0], [None, None])),
        "lora_matmul_group, dropout": (op.lora_matmul_group, (*ins, [0.0, 0.2], [None, SEED])),
        "lora_grad_a": (op.lora_grad_a, (xa, x)),
        "lora_grad_a, dropout": (op.lora_grad_a, (xa, x, 0.2, SEED)),
        "swiglu": (op.swiglu, (x, torch.randn_like(x), "silu")),
        "swiglu, plain": (op.swiglu, (x, None, "gelu_tanh")),
        "swiglu_backward_, plain": (op.swiglu_backward_, (torch.randn_like(x), x, None, "gelu_tanh")),
        "swiglu_backward_": (op.swiglu_backward_, (torch.randn_like(x), x, torch.randn_like(x), "gelu")),
        "shrink": (op.shrink, (x, a, 0.3)),
        "shrink, power of two": (op.shrink, (x, a, 2.0)),
        "shrink, dropout": (op.shrink, (x, a, 0.3, 0.2, SEED)),
        "lora_matmul": (op.lora_matmul, (x, w, xa, b)),
        "lora_matmul, bias": (op.lora_matmul, (x, w, xa, b, bias)),
        "lora_matmul, dx with dropout": (op.lora_matmul, (dy, w.t(), xa, a.t(), None, 0.2, SEED)),
        "lora_grad": (op.lora_grad, (dy, x, b, xa, 0.3)),
        "lora_grad, dropout": (op.lora_grad, (dy, x, b, xa, 0.3, 0.2, SEED)),
        "lora_grad, no da": (op.lora_grad, (dy, None, b, xa, 0.3)),
        "lora_grad, no db": (op.lora_grad, (dy, x, b, None, 0.3)),
        **calls_of_experts(dtype, adapter_dtype),
        "decode_4bit": (op.decode_4bit, (*flat, dtype, None, None, 1.0)),
        "decode_4bit, nested": (op.decode_4bit, (*nested, dtype, None, None, 1.0)),
        "decode_4bit, merged": (op.decode_4bit, (*nested, dtype, a, b, 0.3)),
    }


def calls_of_experts(dtype, adapter_dtype):
    """Three experts, of which one has no rows, as the last row of x has no expert."""
    (x, _, _, _, _, dy, xa), E = tensors(dtype, adapter_dtype), 3
    w, bias = torch.randn(E, N, K).to(dtype), torch.randn(E, N).to(dtype)
    a, b = (torch.randn(shape).to(adapter_dtype) for shape in ((E, r, K), (E, N, r)))
    offs, index = torch.tensor([5, 5, M - 1], dtype=torch.int32), torch.randint(0, M, (4, 3))
    packed = weight_4bit(E * N, K)[0]
    wt, at = w.transpose(1, 2), a.transpose(1, 2)
    return {
        "shrink_experts": (op.shrink_experts, (x, a, offs, 0.3)),
        "shrink_experts, dropout": (op.shrink_experts, (x, a, offs, 0.3, 0.2, SEED)),
        "lora_matmul_experts": (op.lora_matmul_experts, (x, w, xa, b, offs)),
        "lora_matmul_experts, bias": (op.lora_matmul_experts, (x, w, xa, b, offs, bias)),
        "lora_matmul_experts, dx with dropout": (op.lora_matmul_experts, (dy, wt, xa, at, offs, None, 0.2, SEED)),
        "lora_matmul_experts_4bit": (
            op.lora_matmul_experts_4bit,
            (x, *packed, xa, b, offs, bias, 0.0, None, False),
        ),
        "lora_matmul_experts_4bit, dx with dropout": (
            op.lora_matmul_experts_4bit,
            (dy, *packed, xa, at, offs, None, 0.2, SEED, True),
        ),
        "lora_grad_experts": (op.lora_grad_experts, (xa, x, offs)),
        "lora_grad_experts, dropout": (op.lora_grad_experts, (xa, x, offs, 0.2, SEED)),
        "combine_experts": (op.combine_experts, (dy, index)),
        "combine_experts, weights": (op.combine_experts, (dy, index, torch.rand(4, 3).to(dtype))),
    }


def check_like(formula, args, *ours):
    """Assert that an op's results are as exact as those of the reference in the dtypes of the arguments."""
    exact = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    eager, truth = tree_leaves(formula(*args)), tree_leaves(formula(*exact))
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    if ours[0].dtype == torch.float64:  # as exact as the truth
        assert all(same(t, expected, longest=LONGEST) for t, expected in zip(ours, truth, strict=True))
    else:
        reason = inexact(ours, eager, truth, LONGEST)
        assert reason is None, reason


DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32 adapters on bf16": (torch.bfloat16, torch.float32),
}


@pytest.mark.one_case_in(3)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("call", calls(torch.float32, torch.float32))
def test_opcheck(call, dtypes):
    function, args = calls(*dtypes)[call]
    opcheck(function.default, args)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("call", calls(torch.float32, torch.float32))
def test_fake_has_the_layout_of_the_result(call, dtypes):
    function, args = calls(*dtypes)[call]
    mode = torch._subclasses.FakeTensorMode()
    fake_args = tree_map_only(torch.Tensor, mode.from_tensor, args)
    with mode:
        fakes = function(*fake_args)
    for real, fake in zip(tree_leaves(function(*args)), tree_leaves(fakes), strict=True):
        if real is None and fake is None:  # works in place
            continue
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("s", [1.0, 4.0, 0.0, -0.7])
def test_products_are_those_of_the_reference(s, dtype, p):
    x, w, a, b, bias, dy, xa = tensors(dtype)
    seed = SEED if p else None
    calls = [
        ("shrink", (x, a, s, p, seed)),
        ("lora_matmul", (x, w, xa, b, bias)),
        ("lora_matmul", (x, w, xa, b)),
        ("lora_matmul", (dy, w.t(), xa, a.t(), None, p, seed)),
        ("lora_grad", (dy, x, b, xa, s, p, seed)),
        ("lora_grad_a", (xa, x, p, seed)),
    ]
    for name, args in calls:
        check_like(getattr(reference, name), args, *tree_leaves(getattr(op, name)(*args)))


GROUPS = {  # (r, N, s, p, seed) of each sibling
    "alike": [(4, 24, 0.3, 0.0, None)] * 3,
    "no two alike": [(4, 24, 0.3, 0.0, None), (1, 8, 2.0, 0.3, 5), (7, 40, -1.0, 0.0, None), (3, 6, 1.0, 0.6, 6)],
    "one": [(4, 24, 0.3, 0.2, 7)],
}


ENDS = {  # of the rows of each expert, out of 80
    "alike": [20, 40, 60, 80],
    "one has most": [1, 70, 70, 75],  # and the last five rows belong to none
    "few rows": [0, 1, 3, 4],
    "none": [0, 0, 0, 0],
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_experts_are_those_of_the_reference(p, dtype, ends):
    S, E, k = 80, len(ends), 2
    offs, seed = torch.tensor(ends, dtype=torch.int32), SEED if p else None
    x, w, a, b, dy, xa = (
        torch.randn(shape).to(dtype) for shape in ((S, K), (E, N, K), (E, r, K), (E, N, r), (S, N), (S, r))
    )
    bias, weights, index = torch.randn(E, N).to(dtype), torch.rand(S // k, k).to(dtype), torch.randperm(S).view(-1, k)
    wt, at = w.transpose(1, 2), a.transpose(1, 2)
    calls = [
        ("shrink_experts", (x, a, offs, 0.3, p, seed)),
        ("lora_matmul_experts", (x, w, xa, b, offs, bias)),
        ("lora_matmul_experts", (dy, wt, xa, at, offs, None, p, seed)),
        ("lora_grad_experts", (xa, x, offs, p, seed)),
        ("combine_experts", (dy, index, weights)),
        ("combine_experts", (dy, index)),
    ]
    for name, args in calls:
        check_like(getattr(reference, name), args, getattr(op, name)(*args))


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_4bit_experts_are_those_of_their_decoded_weights(dtype, ends, nested):
    S, E, N, K = 80, len(ends), 24, 256
    offs = torch.tensor(ends, dtype=torch.int32)
    weight, w = weight_4bit(E * N, K, nested=nested)
    w = w.view(E, N, K)
    x, dy, xa, a, b = (torch.randn(shape).to(dtype) for shape in ((S, K), (S, N), (S, r), (E, r, K), (E, N, r)))
    bias, rest = torch.randn(E, N).to(dtype), (None, 0.3, SEED)
    check_like(
        lambda x, w, *args: reference.lora_matmul_experts(x, w.to(x.dtype), *args),
        (x, w, xa, b, offs, bias),
        op.lora_matmul_experts_4bit(x, *weight, xa, b, offs, bias, 0.0, None, False),
    )
    check_like(
        lambda dy, w, *args: reference.lora_matmul_experts(dy, w.to(dy.dtype).transpose(1, 2), *args),
        (dy, w, xa, a.transpose(1, 2), offs, *rest),
        op.lora_matmul_experts_4bit(dy, *weight, xa, a.transpose(1, 2), offs, *rest, True),
    )


@pytest.mark.parametrize("rows", [M, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_groups_are_those_of_the_reference(group, dtype, rows):
    x = torch.randn(rows, K).to(dtype)
    seeds = [None if seed is None else torch.tensor(seed) for *_, seed in group]
    ranks, Ns, s, p = ([values[i] for values in group] for i in range(4))
    a = [torch.randn(r, K).to(dtype) for r in ranks]
    check_like(reference.shrink_group, (x, a, s, p, seeds), *op.shrink_group(x, a, s, p, seeds))
    dy = [torch.randn(rows, N).to(dtype) for N in Ns]
    w = [torch.randn(N, K).to(dtype).t() for N in Ns]
    dxa = [torch.randn(rows, r).to(dtype) for r in ranks]
    args = dy, w, dxa, [t.t() for t in a], p, seeds
    check_like(reference.lora_matmul_group, args, op.lora_matmul_group(*args))


@pytest.mark.parametrize("layout", ["contiguous", "rows apart", "transposed"])
@pytest.mark.parametrize("M", [1, 2, 5, 9, 15, 16, 23, 24, 31, 32])  # on either side of where another kernel takes over
def test_bf16_product_of_few_rows(M, layout):
    N, K = 37, 192  # whole chunks of K, and rows of w that are left over from those read together
    x, w, _, b, bias, _, xa = tensors(torch.bfloat16, torch.float32, M, K, N)
    laid_out = {
        "contiguous": w,
        "rows apart": torch.cat([w, torch.full_like(w, torch.nan)], dim=1)[:, :K],
        "transposed": w.t().contiguous().t(),
    }[layout]
    y = op.lora_matmul(x, laid_out, xa, b, bias, 0.3, SEED)
    x, w, xa, b, bias = (t.double() for t in (x, w, xa, b, bias))
    truth = x @ w.t() + bias + reference.dropout(xa @ b.t(), 0.3, SEED)
    assert inexact([y], [truth.bfloat16()], [truth], K + r) is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(12, 33), (1, 1), (3, 1536), (0, 8), (65, 252)], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_swiglu_and_its_backward(gated, shape, dtype, activation):
    columns = 2 * shape[1]  # gate and up may be halves of one tensor
    both, dh = torch.randn(shape[0], columns).to(dtype) * 3, torch.randn(shape).to(dtype)
    gate, up = both[:, : shape[1]], both[:, shape[1] :] if gated else None

    def h_and_gradients(gate, up, dh):
        inputs = [t.clone().requires_grad_() for t in (gate, up) if t is not None]
        h = reference.swiglu(inputs[0], inputs[1] if gated else None, activation)
        return h, h, *torch.autograd.grad(h, inputs, dh)

    args = gate.clone(), up.clone() if gated else None, dh.clone()
    h = op.swiglu(gate, up, activation)
    op.swiglu_backward_(dh, gate, up, activation)
    check_like(h_and_gradients, args, h, dh, gate, *([up] if gated else ()))


def test_swiglu_keeps_infinities_and_nans():
    gate = torch.tensor([[-float("inf"), float("nan"), 1e30, -1e30, -200.0, 200.0] * 4])
    for activation in ACTIVATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            g = gate.to(dtype)
            ours = op.swiglu(g, torch.ones_like(g), activation)
            theirs = reference.swiglu(g, torch.ones_like(g), activation)
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert all(map(same, ours.nan_to_num().flatten(), theirs.nan_to_num().flatten()))


SHAPES = [
    (24, 32, 64),  # two rows a block
    (24, 96, 64),  # blocks cross rows
    (33, 48, 64),  # and the last one is short
    (5, 7, 64),  # odd: a byte holds weights of two rows
    (1, 1, 64),
    (40, 64, 256),  # four rows a block
    (9, 513, 128),
    (16, 576, 4096),
]


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]} by {s[2]}")
class TestDecode4bit:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_is_that_of_the_reference_rounded_once(self, shape, quant_type, nested, dtype):
        weight, w = weight_4bit(*shape, quant_type, nested)
        assert torch.equal(weight.decode(dtype), w.to(dtype))

    @pytest.mark.parametrize("merge_elements", [1, 300, 1 << 20])
    def test_merge_by_rows_is_that_of_the_reference(self, shape, quant_type, nested, merge_elements, monkeypatch):
        monkeypatch.setattr(ops, "MERGE_ELEMENTS", merge_elements)
        N, K, _ = shape
        weight, w = weight_4bit(*shape, quant_type, nested)
        a, b = torch.randn(r, K), torch.randn(N, r)
        check_like(reference.merge, (w, a, b, 0.3), weight.decode_merged(torch.float32, a, b, 0.3))


@pytest.mark.parametrize("merge_elements", [1, 300, 2000])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]} by {s[2]}")
def test_merge_slices_are_whole_rows_bytes_and_blocks(shape, merge_elements, monkeypatch):
    monkeypatch.setattr(ops, "MERGE_ELEMENTS", merge_elements)
    N, K, blocksize = shape
    slices = list(ops._row_slices(N, K, blocksize))
    assert [row for rows, *_ in slices for row in range(rows.start, rows.stop)] == list(range(N))
    for rows, bytes_, blocks in slices:
        assert bytes_.start * 2 == blocks.start * blocksize == rows.start * K
        assert bytes_.stop == -(-rows.stop * K // 2)
        assert blocks.stop == -(-rows.stop * K // blocksize)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_decode_reads_any_quant_storage(storage):
    weight, w = weight_4bit(storage=storage)
    assert torch.equal(weight.decode(torch.float32), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_one_mask_in_forward_and_backward(p, dtype):
    """shrink, lora_grad and lora_matmul drop the same elements of x, those that the reference drops."""
    expected = reference.dropout_mask(M, K, p, SEED) != 0
    ones, identity = torch.ones(M, K, dtype=dtype), torch.eye(K, dtype=dtype)
    in_shrink = op.shrink(ones, identity, 1.0, p, SEED)
    da = op.lora_grad(torch.eye(M, dtype=dtype), ones, torch.eye(M, dtype=dtype), None, 1.0, p, SEED)[1]
    dx = op.lora_matmul(torch.zeros(M, 1, dtype=dtype), torch.zeros(K, 1, dtype=dtype), ones, identity, None, p, SEED)
    for dropped in (in_shrink, da, dx):
        assert torch.equal(dropped != 0, expected)
        scale = torch.tensor(reference.dropout_scale(p), dtype=dtype)
        assert torch.equal(dropped, expected * scale)


def test_dropout_does_not_change_its_input():
    for dtype in (torch.float32, torch.bfloat16):
        x, w, a, b, _, dy, xa = tensors(dtype)
        before = [t.clone() for t in (x, w, a, b, dy, xa)]
        op.shrink(x, a, 0.3, 0.5, SEED)
        op.lora_grad(dy, x, b, xa, 0.3, 0.5, SEED)
        op.lora_matmul(dy, w.t(), xa, a.t(), None, 0.5, SEED)
        assert all(torch.equal(t, old) for t, old in zip((x, w, a, b, dy, xa), before, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_a_product_without_terms_or_columns(dtypes, p):
    """With rows enough for matrix instructions, for which oneDNN has no empty product."""
    seed = SEED if p else None
    x, w, a, b, _, _, xa = tensors(*dtypes, M=32, K=0)
    assert torch.equal(op.shrink(x, a, 0.3, p, seed), torch.zeros_like(xa))
    check_like(reference.lora_matmul, (x, w, xa, b), op.lora_matmul(x, w, xa, b))
    x, _, a, b, _, dy, xa = tensors(*dtypes, M=32, N=0)
    expected = torch.zeros_like(xa), torch.zeros_like(a), b
    assert all(map(torch.equal, op.lora_grad(dy, x, b, xa, 0.3, p, seed), expected))
    none, some = op.shrink_group(x, [a[:0], a], [1.0, 0.3], [p, p], [seed, seed])
    assert none.shape == (32, 0) and torch.equal(some, op.shrink(x, a, 0.3, p, seed))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_lora_matmul_allocates_one_output_and_nothing_as_large(dtypes, with_bias, p):
    dtype, adapter_dtype = dtypes
    x, w, _, b, bias, _, xa = tensors(dtype, adapter_dtype, M=64, K=48, N=40)
    with RecordOps() as record:
        y = ops.lora_matmul(x, w, xa, b, bias if with_bias else None)
    large = [t for t in record.allocated if t.numel() >= min(x.numel(), y.numel())]
    assert len(large) == 1
    assert large[0].data_ptr() == y.data_ptr()
    if p:  # dx: the dropout mask is drawn, and the only float of that size is dx
        with RecordOps() as record:
            ops.lora_matmul(x, w, xa, b, None, p, SEED)
        large = [t for t in record.allocated if t.numel() >= y.numel() and t.is_floating_point()]
        assert len(large) == 1


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fp32_adapters_convert_nothing_as_large_as_x(p):
    x, w, a, b, bias, dy, xa = tensors(torch.bfloat16, torch.float32, M=64, K=48, N=40)
    with RecordOps() as record:
        ops.shrink(x, a, 0.3, p, SEED)
        ops.lora_matmul(x, w, xa, b, bias, p, SEED)
        ops.lora_grad(dy, x, b, xa, 0.3, p, SEED)
    converted = [t.numel() for name, t in record.outputs if name == "aten::_to_copy" and t.is_floating_point()]
    assert converted, "the adapters are converted"
    assert max(converted) < dy.numel()


@pytest.mark.parametrize("s", [2.0, 0.5, 0.3])
def test_scaling_is_rounded_once(s):
    """Also in fp16's subnormals, where even a power of two is not exact if the product was rounded before."""
    for dtype in (torch.bfloat16, torch.float16):
        x, a = (3e-4 * torch.rand(8, 4)).to(dtype), (2e-3 * torch.rand(2, 4)).to(dtype)
        exact = s * (x.double() @ a.double().t())
        assert torch.equal(op.shrink(x, a, s), exact.to(dtype))


def test_not_needed_gradients_come_back_empty():
    _, _, _, b, _, dy, _ = tensors()
    with RecordOps() as record:
        dxa, da, db = ops.lora_grad(dy, None, b, None, 0.3)
    assert dxa.shape == (M, r)
    assert da.numel() == db.numel() == 0
    assert record.count("aten::mm", "aten::addmm") == 1


def test_autocast_changes_nothing_inside():
    x, w, a, b, bias, dy, xa = tensors()
    weight = weight_4bit()[0]
    with torch.autocast("cpu", torch.bfloat16):
        results = (
            op.shrink(x, a, 0.3),
            op.lora_matmul(x, w, xa, b, bias),
            *op.lora_grad(dy, x, b, xa, 0.3),
            weight.decode_merged(torch.float32, a, b, 0.3),
        )
    expected = (
        op.shrink(x, a, 0.3),
        op.lora_matmul(x, w, xa, b, bias),
        *op.lora_grad(dy, x, b, xa, 0.3),
        weight.decode_merged(torch.float32, a, b, 0.3),
    )
    assert all(torch.equal(t, e) for t, e in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    "view", [torch._neg_view, lambda t: torch.view_as_complex(torch.stack((t, t), -1)).conj().imag]
)
def test_the_op_in_place_refuses_views_that_negate_when_read(view):
    """PyTorch's fallback for them would write to copies, and corrupt its stack for an op without results."""
    dh, gate, up = (torch.randn(3, 4) for _ in range(3))
    with pytest.raises(RuntimeError, match="operands must be resolved"):
        torch.ops.fastlora.swiglu_backward_(view(dh), gate, up, "silu")
