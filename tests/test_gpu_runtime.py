"""How launches behave on a CUDA device: streams, graphs, devices, no waiting, the same bits, offsets beyond 32 bits."""

import threading
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import fastlora
from fastlora import functional, kernel_ops, plans
from fastlora.benchmarks.accuracy import same
from fastlora.benchmarks.cases.ops import decoded, random_weight_4bit

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = torch.bfloat16
S, P = 0.5, 0.25


def step_of(weight="dense", p=0.0, M=192, N=320, K=256, r=16, device="cuda"):
    """A training step of one layer as a function without arguments: y, dx, da, db."""

    def new(*shape, dtype=BF16):
        return torch.randn(shape, device=device).to(dtype)

    x, a, b, dy = new(M, K), new(r, K, dtype=torch.float32), new(N, r, dtype=torch.float32), new(M, N)
    w = new(N, K) if weight == "dense" else random_weight_4bit(N, K, torch.device(device))
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def step():
        y = functional._apply(x, w, a, b, S, None, p)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return step


def op_calls():
    """Every op once, as a function without arguments that gives new tensors."""
    M, N, K, r = 48, 192, 256, 16
    device = torch.device("cuda")

    def new(*shape, dtype=BF16):
        return torch.randn(shape, device=device).to(dtype)

    lora, seed, wide = torch.ops.fastlora, torch.tensor(5, device=device), torch.float32
    x, w, dy = new(M, K), new(N, K), new(M, N)
    a, b, xa = new(r, K, dtype=wide), new(N, r, dtype=wide), new(M, r, dtype=wide)
    w4, gate, up = random_weight_4bit(N, K, device), new(M, K), new(M, K)

    offs = torch.tensor([20, 20, M - 1], dtype=torch.int32, device=device)
    index = torch.arange(32, device=device).view(8, 4)

    def swiglu_backward():
        dh, dgate, dup = dy.new_ones(M, K), gate.clone(), up.clone()
        lora.swiglu_backward_(dh, dgate, dup, "silu")
        return dh, dgate, dup

    return {
        "shrink": lambda: (lora.shrink(x, a, S, P, seed),),
        "shrink_group": lambda: tuple(lora.shrink_group(x, [a, a + 1], [S, S], [0.0, P], [None, seed])),
        "lora_matmul": lambda: (lora.lora_matmul(x, w, xa, b, None, P, seed),),
        "lora_matmul_group": lambda: (
            lora.lora_matmul_group([x, gate], [w, w], [xa, xa], [b, b], [0.0, P], [None, seed]),
        ),
        "lora_grad": lambda: lora.lora_grad(dy, x, b, xa, S, P, seed),
        "lora_grad_a": lambda: (lora.lora_grad_a(xa, x, P, seed),),
        "dora_grad": lambda: lora.dora_grad(dy, dy + 1, xa.new_full((N,), 0.5)),
        "shrink_experts": lambda: (lora.shrink_experts(x, a[None].repeat(3, 1, 1), offs, S, P, seed),),
        "lora_matmul_experts": lambda: (
            lora.lora_matmul_experts(x, w[None].repeat(3, 1, 1), xa, b[None].repeat(3, 1, 1), offs, None, P, seed),
        ),
        "lora_grad_experts": lambda: (lora.lora_grad_experts(xa, x, offs, P, seed),),
        "combine_experts": lambda: (lora.combine_experts(x, index, gate[:8, :4].contiguous()),),
        "swiglu": lambda: (lora.swiglu(gate, up, "gelu"),),
        "swiglu_backward_": swiglu_backward,
        "decode_4bit": lambda: (w4.decode(BF16), w4.decode_merged(BF16, a, b, S)),
        "nf4_matmul": lambda: (lora.nf4_matmul(x, *w4, a, b, S),),
    }


def test_every_op_is_called_here():
    assert op_calls().keys() == kernel_ops._LAUNCHERS.keys()


@pytest.mark.parametrize("op", kernel_ops._LAUNCHERS)
def test_every_op_is_captured_waits_for_nothing_and_repeats_its_bits(op):
    call = op_calls()[op]
    call()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph, results = capture(call)
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, results, strict=True))


STEPS = pytest.mark.parametrize("p", [0.0, P], ids=["", "dropout"])
WEIGHTS = pytest.mark.parametrize("weight", ["dense", "nf4"])


def plan_combinations():
    return [
        {"lora_matmul": matmul, "lora_grad": grad}
        for matmul in plans.PLANS["lora_matmul"]
        for grad in plans.PLANS["lora_grad"]
    ]


@STEPS
@WEIGHTS
@pytest.mark.parametrize("forced", plan_combinations(), ids=lambda forced: " ".join(forced.values()))
def test_the_same_bits_every_time(weight, p, forced):
    step = step_of(weight, p)
    with plans.use(**forced):
        results = []
        for _ in range(5):
            torch.manual_seed(3)
            results.append(step())
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


def test_forced_plans_hold_in_backward(monkeypatch):
    """Which runs in a thread of autograd's."""
    chosen, choose = [], kernel_ops.choose

    def watched(op, *args):
        chosen.append((threading.get_ident(), op, plan := choose(op, *args)))
        return plan

    monkeypatch.setattr(kernel_ops, "choose", watched)
    step = step_of()
    for forced in plan_combinations():
        with plans.use(**forced):
            step()
        assert all(plan == forced[op] for _, op, plan in chosen)
        assert {op for thread, op, _ in chosen if thread != threading.get_ident()} == {"lora_matmul", "lora_grad"}
        chosen.clear()


def test_turned_off_torch_computes():
    step = step_of()
    expected = step()
    with plans.use(kernels="off"), pytest.MonkeyPatch.context() as patch:
        for op in kernel_ops._LAUNCHERS:
            patch.setitem(kernel_ops._LAUNCHERS, op, None)
        off = step()
    for ours, value in zip(off, expected, strict=True):
        assert same(ours, value, BF16)


@STEPS
@WEIGHTS
def test_nothing_waits_for_the_device(weight, p):
    step = step_of(weight, p)
    step()  # compiles, and copies the code book once
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@STEPS
@WEIGHTS
def test_launches_go_to_the_stream_that_is_current(weight, p):
    """The default stream is kept busy: what was launched on it could not be done when the other stream is."""
    step = step_of(weight, p)
    torch.manual_seed(3)
    expected = step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    copies = [torch.full_like(t, float("nan"), device="cpu").pin_memory() for t in expected]
    torch.manual_seed(3)
    torch.cuda._sleep(1 << 30)
    with torch.cuda.stream(stream):
        for copy, t in zip(copies, step(), strict=True):
            copy.copy_(t, non_blocking=True)
    stream.synchronize()
    busy = not torch.cuda.default_stream().query()
    assert all(torch.equal(copy, t.cpu()) for copy, t in zip(copies, expected, strict=True))
    assert busy, "the default stream was idle too early for this test to mean anything"


def test_streams_that_run_at_once_count_their_arrivals_apart():
    """The last program of a tile adds up the parts of the others: those on another stream must not count."""
    from fastlora.kernels.shrink import shrink

    streams = [torch.cuda.Stream() for _ in range(3)]
    x, a = torch.randn(16, 8192, device="cuda"), torch.randn(16, 8192, device="cuda")
    expected = shrink(x, a, 1.0)
    torch.cuda.synchronize()
    found = []
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(shrink(x, a, 1.0))
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in found)


def capture(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@WEIGHTS
def test_a_graph_replays_the_bits_of_an_eager_step(weight):
    step = step_of(weight)
    expected = step()
    graph, results = capture(step)
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, results, strict=True))


def test_every_replay_draws_a_mask_and_backward_the_mask_of_its_forward():
    K = 256
    x = torch.ones(64, K, device="cuda", dtype=BF16, requires_grad=True)
    zero, eye = torch.zeros(K, K, device="cuda", dtype=BF16), torch.eye(K, device="cuda")

    def step():
        y = fastlora.lora_linear(x, zero, eye, eye, 1.0, None, P)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    graph, (y, dx) = capture(step)
    drawn = []
    for _ in range(4):
        graph.replay()
        assert torch.equal(y, dx)
        drawn.append(y.clone())
    assert not any(torch.equal(one, other) for one, other in pairwise(drawn))
    dropped = (torch.stack(drawn) == 0).float().mean().item()
    assert abs(dropped - P) < 5 * (P * (1 - P) / (4 * y.numel())) ** 0.5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@STEPS
@WEIGHTS
def test_launches_go_to_the_device_of_their_tensors(weight, p):
    assert torch.cuda.current_device() == 0
    step = step_of(weight, p, device="cuda:1")
    torch.cuda.manual_seed_all(3)
    results = step()
    assert all(t.device.index == 1 for t in results) and torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        torch.cuda.manual_seed_all(3)
        expected = step()
    assert all(torch.equal(one, other) for one, other in zip(expected, results, strict=True))


class TestOffsets:
    """Rows that are 2^26 elements apart: the last ones begin beyond 2^31 elements."""

    M, APART = 48, 1 << 26

    def far(self, width):
        numel = (self.M - 1) * self.APART + width
        if torch.cuda.mem_get_info()[0] < 2 * numel + (1 << 30):
            pytest.skip(f"needs {2 * numel >> 30} GiB of free memory")
        t = torch.empty(numel, device="cuda", dtype=BF16).as_strided((self.M, width), (self.APART, 1))
        return t.copy_(torch.randn(self.M, width, device="cuda"))

    @STEPS
    @pytest.mark.parametrize("forced", plan_combinations(), ids=lambda forced: " ".join(forced.values()))
    def test_of_x_and_dy_are_those_of_a_copy(self, forced, p):
        r, K, N = 16, 256, 128
        far, seed = self.far(K), torch.tensor(5, device="cuda")
        a, b, bk = (torch.randn(shape, device="cuda") for shape in ((r, K), (N, r), (K, r)))
        w, xa = torch.randn(N, K, device="cuda").to(BF16), torch.randn(self.M, r, device="cuda")
        lora = torch.ops.fastlora
        with plans.use(**forced):
            results = [
                (
                    lora.shrink(t, a, S, p, seed),
                    lora.lora_matmul(t, w, xa, b),
                    *lora.lora_grad(t, t, bk, xa, S, p, seed),
                )
                for t in (far, far.contiguous())
            ]
        for one, other in zip(*results, strict=True):
            assert same(one, other, torch.float16)  # xa is fp32, and summed in another order

    def test_of_a_decoded_weight(self):
        N, K = (1 << 31) // 4096 + 64, 4096
        if torch.cuda.mem_get_info()[0] < 12 * N * K:
            pytest.skip("needs 24 GiB of free memory")
        weight = random_weight_4bit(N, K, torch.device("cuda"))
        rows = slice(N - 64, N)
        last = weight._replace(
            packed=weight.packed.view(N, -1)[rows].reshape(-1, 1), absmax=weight.absmax.view(N, -1)[rows].reshape(-1),
            absmax2=weight.absmax2[(N - 64) * K // 64 // 256 :], N=64,
        )  # fmt: skip
        a, b = torch.randn(16, K, device="cuda"), torch.randn(N, 16, device="cuda")
        assert torch.equal(weight.decode(BF16)[rows], decoded(last, BF16))
        assert torch.equal(weight.decode_merged(BF16, a, b, S)[rows], last.decode_merged(BF16, a, b[rows], S))

    @pytest.mark.parametrize("activation", ["silu"])
    def test_of_gate_and_up(self, activation):
        gate, up = self.far(512), torch.randn(self.M, 512, device="cuda").to(BF16)
        expected = F.silu(gate.float()) * up.float()
        h = torch.ops.fastlora.swiglu(gate, up, activation)
        assert same(h, expected, BF16)
