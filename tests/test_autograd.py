import functools

import pytest
import torch
from accuracy import linear, linear_4bit, peft_layer
from dispatch import RecordOps
from torch.utils.checkpoint import checkpoint

from fastlora import autograd, fourbit, functional
from fastlora.benchmarks.accuracy import same
from fastlora.functional import lora_linear
from fastlora.products import is_merged

M, K, N, r = 10, 32, 24, 3
SEED = torch.tensor(9, dtype=torch.int64)

DENSE_OR_4BIT = pytest.mark.parametrize("fourbit_base", [False, True], ids=["dense", "nf4"])
WITH_DROPOUT = pytest.mark.parametrize("p", [0.0, 0.3], ids=["p=0", "p=0.3"])
WITH_BIAS = pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])


def problem(fourbit_base=False, dtype=torch.float32, adapter_dtype=None, with_bias=True, shape=(M,), r=r):
    """x, weight, a, b, bias: all but the weight require grad."""
    w = torch.randn(N, K).to(dtype) / K**0.5
    x, a, b = (
        torch.randn(*s, dtype=t).requires_grad_()
        for s, t in (((*shape, K), dtype), ((r, K), adapter_dtype or dtype), ((N, r), adapter_dtype or dtype))
    )
    bias = torch.randn(N, dtype=dtype).requires_grad_() if with_bias else None
    return x, linear_4bit(w).weight if fourbit_base else w, a, b, bias


def weight_of(w):
    """The weight as autograd takes it."""
    return fourbit.weight_4bit(w) if fourbit.is_4bit(w) else w


def names_of_saved(f):
    """The tensors that f saves for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = f()
    return saved, out


def grads(f, *inputs):
    y = f()
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)


@pytest.mark.as_installed
@pytest.mark.one_case_in(2)
@WITH_DROPOUT
@WITH_BIAS
@pytest.mark.parametrize("scaling", [1.0, -0.7])
def test_gradcheck_dense(p, with_bias, scaling):
    x, w, a, b, bias = problem(dtype=torch.float64, with_bias=with_bias)
    seed = SEED if p else None

    def layer(x, a, b, bias):
        return autograd.fused_linear(x, w, a, b, bias, scaling, p, seed)

    assert torch.autograd.gradcheck(layer, (x, a, b, bias))


@pytest.mark.as_installed
@pytest.mark.one_case_in(2)
@WITH_DROPOUT
@pytest.mark.parametrize("train_base", [False, True], ids=["frozen base", "base gradient"])
def test_gradcheck_opaque(p, train_base):
    x, w, a, b, _ = problem(dtype=torch.float64)
    w.requires_grad_(train_base)

    def layer(x, a, b, w):
        y = (x @ w.t()).tanh()  # a base whose backward needs its own output
        return autograd.add_adapter(x, a, b, y, 0.3, p, SEED if p else None)

    assert torch.autograd.gradcheck(layer, (x, a, b, w))


@WITH_DROPOUT
@WITH_BIAS
def test_4bit_gradients_are_those_of_its_decoded_weight(p, with_bias):
    """gradcheck needs fp64, which bitsandbytes does not decode to."""
    x, weight, a, b, bias = problem(fourbit_base=True, with_bias=with_bias)
    decoded = fourbit.weight_4bit(weight).decode(torch.float32)
    results = []
    for w in (weight, decoded):
        torch.manual_seed(1)
        f = functools.partial(lora_linear, x, w, a, b, 0.3, bias, p)
        results.append(grads(f, x, a, b, bias))
    for ours, expected in zip(*results, strict=True):
        assert same(ours, expected, longest=K)


@pytest.mark.parametrize("shape", [(M,), (2, 5), (2, 5, 1), ()], ids=str)
@DENSE_OR_4BIT
def test_results_have_the_shape_of_their_inputs(fourbit_base, shape):
    x, w, a, b, bias = problem(fourbit_base, shape=shape)
    y, dx, da, db, dbias = grads(lambda: lora_linear(x, w, a, b, 2.0, bias), x, a, b, bias)
    assert y.shape == (*shape, N)
    assert [t.shape for t in (dx, da, db, dbias)] == [t.shape for t in (x, a, b, bias)]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
@WITH_DROPOUT
@DENSE_OR_4BIT
def test_zero_tokens(fourbit_base, p, shape):
    x, w, a, b, bias = problem(fourbit_base, shape=shape)
    y, dx, *small = grads(lambda: lora_linear(x, w, a, b, 0.3, bias, p), x, a, b, bias)
    assert y.shape == (*shape, N)
    assert dx.shape == x.shape
    assert all(torch.equal(t, torch.zeros_like(t)) for t in small)


@WITH_DROPOUT
@DENSE_OR_4BIT
def test_stride_0_dy_of_a_sum(fourbit_base, p):
    x, w, a, b, bias = problem(fourbit_base, shape=(2, 5))
    results = []
    for dy in (torch.ones(()).expand(2, 5, N), torch.ones(2, 5, N)):
        torch.manual_seed(1)
        y = lora_linear(x, w, a, b, 0.3, bias, p)
        results.append(torch.autograd.grad(y, (x, a, b, bias), dy))
    torch.manual_seed(1)
    lora_linear(x, w, a, b, 0.3, bias, p).sum().backward()
    for of_sum, expanded, dense in zip((x.grad, a.grad, b.grad, bias.grad), *results, strict=True):
        assert same(of_sum, dense, longest=K) and same(expanded, dense, longest=K)


@pytest.mark.parametrize("needed", ["x", "a", "b", "bias", "xa", "ab", "xb", "xab"])
@WITH_DROPOUT
@DENSE_OR_4BIT
def test_only_needed_gradients_are_computed(fourbit_base, p, needed):
    """With M, N, K, r distinct, the shape of a product says what it is."""
    tensors = dict(zip(("x", "w", "a", "b", "bias"), problem(fourbit_base), strict=True))
    wanted = ["bias"] if needed == "bias" else list(needed)
    for name in ("x", "a", "b", "bias"):
        tensors[name].requires_grad_(name in wanted)
    y = lora_linear(tensors["x"], tensors["w"], tensors["a"], tensors["b"], 0.3, tensors["bias"], p)
    dy = torch.randn(M, N)
    with RecordOps() as record:
        grads = torch.autograd.grad(y, [tensors[name] for name in wanted], dy)
    assert all(g is not None for g in grads)
    products = [tuple(t.shape) for name, t in record.outputs if name in ("aten::mm", "aten::addmm", "aten::addmm_")]
    assert ((M, K) in products) == ("x" in wanted)
    assert ((r, K) in products) == ("a" in wanted)
    assert ((N, r) in products) == ("b" in wanted)
    merged = is_merged(weight_of(tensors["w"]), p)  # then dx needs no dxa, and xa is computed now
    dxa = "a" in wanted or ("x" in wanted and not merged)
    assert products.count((M, r)) == dxa + (merged and "b" in wanted)
    decoded = [name for name, _ in record.outputs if name == "bitsandbytes::dequantize_4bit"]
    assert bool(decoded) == (fourbit_base and "x" in wanted)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32 adapters"])
@WITH_DROPOUT
@DENSE_OR_4BIT
def test_saves_x_itself_and_nothing_else_as_large(fourbit_base, p, adapter_dtype):
    """No mask, no decoded weight, no fp32 or dropped copy of x."""
    x, w, a, b, bias = problem(fourbit_base, torch.bfloat16, adapter_dtype, shape=(4, 16))
    saved, _ = names_of_saved(lambda: lora_linear(x, w, a, b, 0.3, bias, p))
    allowed = {t.untyped_storage().data_ptr() for t in (x, w, a, b, bias)}
    if fourbit_base:
        weight = fourbit.weight_4bit(w)
        allowed |= {t.untyped_storage().data_ptr() for t in weight[:5]}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in allowed]
    saves_xa = not is_merged(weight_of(w), p)
    assert sorted(tuple(t.shape) for t in new) == sorted([(64, r)] * saves_xa + [()] * (p > 0)), "xa and the seed"
    assert all(t.dtype == adapter_dtype for t in new if t.dim() == 2)
    assert sum(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved) == 1


@WITH_DROPOUT
@DENSE_OR_4BIT
def test_siblings_save_one_x(fourbit_base, p):
    x, w, a, b, bias = problem(fourbit_base, shape=(4, 16))
    saved, _ = names_of_saved(lambda: [lora_linear(x, w, a.detach().requires_grad_(), b, 1.0, bias, p) for _ in "qkv"])
    assert len({t.untyped_storage().data_ptr() for t in saved if t.numel() == x.numel()}) == 1


def test_opaque_saves_x_and_xa_only():
    x, _, a, b, _ = problem()
    y = torch.randn(M, N)
    saved, _ = names_of_saved(lambda: functional.add_adapter_output(y, x, a, b, 0.3, 0.2))
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), a.numel(), b.numel(), M * r, 1])


@DENSE_OR_4BIT
def test_double_backward_raises(fourbit_base):
    x, w, a, b, bias = problem(fourbit_base)
    (dx,) = torch.autograd.grad(lora_linear(x, w, a, b, 1.0, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.one_case_in(2)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32 adapters"])
@WITH_DROPOUT
@DENSE_OR_4BIT
def test_checkpoint_changes_no_bit(fourbit_base, p, adapter_dtype, use_reentrant):
    x, w, a, b, bias = problem(fourbit_base, torch.bfloat16, adapter_dtype)
    _, w2, a2, b2, _ = problem(fourbit_base, torch.bfloat16, adapter_dtype)
    back = torch.randn(K, N, dtype=torch.bfloat16)

    def block(x):
        h = lora_linear(x, w, a, b, 0.3, bias, p)
        return lora_linear(torch.nn.functional.silu(h @ back.t()), w2, a2, b2, 0.3, None, p)

    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        results.append(grads_by_backward(run(x), (x, a, b, a2, b2)))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def grads_by_backward(y, inputs):
    for t in inputs:
        t.grad = None
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), *(t.grad for t in inputs)


@WITH_DROPOUT
@DENSE_OR_4BIT
def test_backward_is_deterministic(fourbit_base, p):
    x, w, a, b, bias = problem(fourbit_base, torch.bfloat16, shape=(300,))
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(grads(lambda: lora_linear(x, w, a, b, 0.3, bias, p), x, a, b, bias))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_dropout_draws_from_the_default_generator():
    x, w, a, b, bias = problem()
    first, second = (lora_linear(x, w, a, b, 1.0, bias, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    problem()
    assert torch.equal(lora_linear(x, w, a, b, 1.0, bias, 0.5), first)


def test_dropout_leaves_the_base_product_alone():
    x, w, a, b, bias = problem()
    y = lora_linear(x, w, a, torch.zeros_like(b), 1.0, bias, 0.9)
    assert same(y, torch.nn.functional.linear(x, w, bias), longest=K)


def test_backward_without_dropout_needs_no_seed_and_keeps_the_generator():
    x, w, a, b, bias = problem()
    before = torch.get_rng_state()
    lora_linear(x, w, a, b, 1.0, bias).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@WITH_DROPOUT
@DENSE_OR_4BIT
def test_backward_leaves_the_saved_x_alone(fourbit_base, p):
    x, w, a, b, bias = problem(fourbit_base)
    before = x.detach().clone()
    y = lora_linear(x, w, a, b, 1.0, bias, p)
    y.sum().backward(retain_graph=True)
    assert torch.equal(x, before)
    first = x.grad.clone()
    x.grad = None
    y.sum().backward()
    assert torch.equal(x.grad, first)


@WITH_DROPOUT
@DENSE_OR_4BIT
def test_func_grad(fourbit_base, p):
    x, w, a, b, bias = problem(fourbit_base)

    def loss(x, a, b):
        return lora_linear(x, w, a, b, 0.3, bias, p).square().sum()

    torch.manual_seed(1)
    functional_grads = torch.func.grad(loss, argnums=(0, 1, 2))(x.detach(), a.detach(), b.detach())
    torch.manual_seed(1)
    expected = torch.autograd.grad(loss(x, a, b), (x, a, b))
    for ours, theirs in zip(functional_grads, expected, strict=True):
        assert same(ours, theirs, longest=K)


@pytest.mark.as_installed
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32 adapters"])
@WITH_DROPOUT
@DENSE_OR_4BIT
def test_compiles_to_one_graph(fourbit_base, p, adapter_dtype):
    torch._dynamo.reset()
    x, w, a, b, bias = problem(fourbit_base, torch.bfloat16, adapter_dtype, shape=(2, 5))
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    results = []
    for f in (lora_linear, compiled):
        torch.manual_seed(4)
        results.append(grads(functools.partial(f, x, w, a, b, 0.3, bias, p), x, a, b, bias))
    for eager, ours in zip(*results, strict=True):
        assert torch.equal(eager, ours)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x fp32", "x bf16"])
@pytest.mark.parametrize("base", ["dense fp32", "dense bf16", "nf4"])
@WITH_DROPOUT
def test_autocast_gives_peft_dtypes(base, x_dtype, p):
    w = torch.randn(N, K)
    layer = linear_4bit(w.bfloat16()) if base == "nf4" else linear(w.bfloat16() if base == "dense bf16" else w)
    a, b = torch.randn(r, K).requires_grad_(), torch.randn(N, r).requires_grad_()
    x = torch.randn(M, K, dtype=x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = peft_layer(layer, a, b, 0.3, p)(x)
        ours = functional.adapted_forward(layer, x, functional.Adapter(a, b, 0.3, p))
    assert ours.dtype == theirs.dtype
    dx, da, db = torch.autograd.grad(ours.float().square().sum(), (x, a, b))
    assert (dx.dtype, da.dtype, db.dtype) == (x_dtype, torch.float32, torch.float32)


@pytest.mark.parametrize("changed", ["x", "weight", "a", "b"])
def test_change_in_place_before_backward_is_detected(changed):
    tensors = dict(zip(("x", "weight", "a", "b", "bias"), problem(), strict=True))
    y = lora_linear(tensors["x"], tensors["weight"], tensors["a"], tensors["b"], 0.3, tensors["bias"])
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_change_of_a_4bit_weight_in_place_before_backward_is_detected():
    x, weight, a, b, bias = problem(fourbit_base=True)
    y = lora_linear(x, weight, a, b, 0.3, bias)
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_saved_without_gradients():
    x, w, a, b, bias = problem()
    with torch.no_grad():
        saved, y = names_of_saved(lambda: lora_linear(x, w, a, b, 0.3, bias, 0.5))
    assert not saved
    assert not y.requires_grad
