"""A layer of ours beside PEFT's, both against the truth, judged by `fastlora.benchmarks.accuracy`.

The truth is `fastlora.reference` in fp64 on the inputs as rounded, each side judged with the dropout mask it drew. The
floor of a result is multiplied by scale / ‖truth‖, with scale the root of the sum of the squares of all terms that are
added up (what independent errors amount to when the terms cancel), but no less than ‖truth‖.
"""

from dataclasses import dataclass
from typing import NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from fastlora import functional, ops, reference
from fastlora.benchmarks.accuracy import floor, judge, relative_error
from fastlora.fourbit import is_4bit, weight_4bit

Results = dict[str, Tensor]  # y, and dx, da, db, dbias where they were asked for


@dataclass(frozen=True)
class LayerCase:
    """One layer with its input and upstream gradient. ``x[..., K]``, ``dy[..., N]``, the rest as in `reference`."""

    x: Tensor
    base: nn.Module  # nn.Linear or bitsandbytes Linear4bit
    a: Tensor
    b: Tensor
    s: float
    dy: Tensor
    p: float = 0.0
    train_bias: bool = False
    seed: int = 0  # of torch's generator when dropout is drawn

    @property
    def M(self) -> int:
        return self.x.shape[:-1].numel()

    @property
    def K(self) -> int:
        return self.x.shape[-1]

    @property
    def N(self) -> int:
        return self.dy.shape[-1]

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def bias(self) -> Tensor | None:
        return None if self.base.bias is None else self.base.bias.detach()


class Run(NamedTuple):
    results: Results
    D: Tensor  # the scaled dropout mask it drew, fp64 [M, K]


def _quantises_odd() -> bool:
    try:
        return bnb.functional.quantize_4bit(torch.ones(5))[0].numel() == 3
    except RuntimeError:  # bitsandbytes 0.49
        return False


QUANTISES_ODD = _quantises_odd()


def need_quantised(n: int) -> None:
    """Skip the test, or have Hypothesis choose another example, if bitsandbytes cannot quantise n weights on a CPU."""
    if n % 2 and not QUANTISES_ODD:
        import hypothesis  # here, since a machine with a GPU need not have it

        if hypothesis.currently_in_test_context():
            hypothesis.reject()
        pytest.skip("this bitsandbytes does not quantise an odd number of weights on a CPU")


def linear_4bit(
    w: Tensor, bias: Tensor | None = None, quant_type="nf4", blocksize=64, nested=True, storage=torch.uint8, dtype=None
) -> bnb.nn.Linear4bit:
    """A quantised ``Linear4bit`` that computes in ``dtype`` (w's unless given)."""
    N, K = w.shape
    need_quantised(N * K)
    layer = bnb.nn.Linear4bit(
        K,
        N,
        bias=bias is not None,
        compute_dtype=dtype or w.dtype,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.weight.data = w.clone()
    layer.weight.blocksize = blocksize
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")


def linear(w: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen ``nn.Linear`` of these tensors."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(w.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def decoded(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weight of a layer by `reference`, 4-bit or not."""
    if not is_4bit(layer.weight):
        return layer.weight.detach().to(dtype)
    w, code = weight_4bit(layer.weight), layer.weight.quant_state.code
    absmax = w.absmax
    if w.code2 is not None:
        absmax = reference.decode_absmax(absmax, w.code2, w.absmax2, w.blocksize2, w.offset)
    return reference.decode_4bit(w.packed, absmax, code.double(), w.blocksize, w.N, w.K).to(dtype)


def peft_layer(base: nn.Module, a: Tensor, b: Tensor, s: float, p: float = 0.0) -> PeftLinear:
    """PEFT's layer around a base layer, with these adapter weights."""
    r = a.shape[0]
    config = LoraConfig(r=r, lora_alpha=1, lora_dropout=p)
    layer = PeftLinear(
        base, "default", config=config, r=r, lora_alpha=1, lora_dropout=p
    )  # 0.18 has no config, newer no p
    layer.lora_A["default"].weight = nn.Parameter(a.clone())
    layer.lora_B["default"].weight = nn.Parameter(b.clone())
    layer.scaling["default"] = s
    return layer


def gradients(y: Tensor, dy: Tensor, inputs: dict[str, Tensor | None]) -> Results:
    """y and, under their names, the gradients of those of these inputs that require them."""
    wanted = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype)) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def run_ours(c: LayerCase) -> Run:
    """`fastlora.lora_linear`, forward and backward."""
    x, a, b = (t.detach().requires_grad_() for t in (c.x, c.a, c.b))
    bias = None if c.bias is None else c.bias.requires_grad_(c.train_bias)
    torch.manual_seed(c.seed)
    y = functional.lora_linear(x, c.base.weight, a, b, c.s, bias, c.p)
    torch.manual_seed(c.seed)
    seed = functional.new_seed(x, c.p)
    D = reference.dropout(torch.ones(c.M, c.K, dtype=torch.float64), c.p, seed)
    return Run(gradients(y, c.dy, {"dx": x, "da": a, "db": b, "dbias": bias}), D)


class RecordingDropout(nn.Dropout):
    """Dropout that keeps what it kept."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.get_rng_state()
        out = super().forward(x)
        torch.set_rng_state(state)
        self.kept = super().forward(torch.ones_like(x)) != 0
        return out


def run_peft(c: LayerCase, autocast: torch.dtype | None = None) -> Run:
    """PEFT's layer, forward and backward; with ``autocast``, its adapters in that dtype as autocast has them.

    Where bitsandbytes misreads its own blocks (some shapes on a CPU), the base is a dense layer of the right weight.
    """
    base, a, b = c.base, c.a, c.b
    if is_4bit(base.weight):
        w = decoded(base, c.x.dtype)
        if not torch.equal(bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).to(w.dtype), w):
            base = linear(w, c.bias)
    if autocast == torch.float16:
        a, b = a.half(), b.half()
    layer = peft_layer(base, a, b, c.s, c.p)
    dropout = layer.lora_dropout["default"] = RecordingDropout(c.p)
    if base.bias is not None:
        base.bias.requires_grad_(c.train_bias)
    x = c.x.detach().requires_grad_()
    torch.manual_seed(c.seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast == torch.bfloat16):
        y = layer(x)
    inputs = {"dx": x, "da": layer.lora_A.default.weight, "db": layer.lora_B.default.weight, "dbias": base.bias}
    return Run(gradients(y, c.dy, inputs), dropout.kept.reshape(c.M, c.K) / (1.0 - c.p))


def law(x, w, a, b, s, bias, dy, D) -> Results:
    """Every formula of `reference`, for the scaled dropout mask D."""
    dropped = D * x
    xa = reference.shrink(dropped, a, s)
    dxa, da, db = reference.lora_grad(dy, dropped, b, xa, s)
    return {
        "y": reference.lora_matmul(x, w, xa, b, bias),
        "dx": dy @ w + D * (dxa @ a),
        "da": da,
        "db": db,
        "dbias": dy.sum(0),
    }


def truth_and_scale(c: LayerCase, D: Tensor) -> tuple[Results, Results]:
    """The truth, and for every element the root of the sum of squares of the terms it adds up (at least its size).

    No intermediate counts as smaller than the smallest normal number, below which rounding errors no longer shrink.
    """
    bias = torch.zeros((), dtype=torch.float64) if c.bias is None else c.bias.double()
    tensors = c.x.reshape(c.M, c.K).double(), decoded(c.base), c.a.double(), c.b.double()
    dy = c.dy.reshape(c.M, c.N).double()
    truth = law(*tensors, c.s, bias, dy, D)

    least = torch.finfo(c.x.dtype).smallest_normal ** 2
    x, w, a, b = (t.square() for t in tensors)
    s, dy, D = c.s**2, dy.square(), D.square()
    xa, dxa = (s * (D * x) @ a.T).clamp_min(least), (s * dy @ b).clamp_min(least)
    squares = {
        "y": x @ w.T + bias.square() + xa @ b.T,
        "dx": dy @ w + D * (dxa @ a),
        "da": dxa.T @ (D * x),
        "db": dy.T @ xa,
        "dbias": dy.sum(0),
    }
    return truth, {name: torch.maximum(t.square(), squares[name]).sqrt() for name, t in truth.items()}


def floor_without_scale(c: LayerCase) -> float:
    M = min(_distinct(c.x)[:-1].numel(), _distinct(c.dy)[:-1].numel())
    n = min(M * c.r, c.r * c.K, c.N * c.K, c.r * _distinct(c.dy)[-1], M * c.K, M * c.N)
    return floor(c.x.dtype, max(c.M, c.K, c.N, c.r), n)


def _distinct(t: Tensor) -> torch.Size:
    """Its shape, with 1 for dimensions that it was expanded in."""
    return torch.Size(size if stride else 1 for size, stride in zip(t.shape, t.stride(), strict=True))


def errors_and_floors(c: LayerCase, run: Run) -> dict[str, tuple[float, float]]:
    """For every result its relative error, and the floor of its bar."""
    truth, scale = truth_and_scale(c, run.D)
    judged = {}
    for name, t in run.results.items():
        expected = truth[name].view(t.shape)
        assert t.isfinite().all(), f"{name} is not finite"
        norm = expected.norm().item()  # 0 without tokens or scaling: the result has to be exactly zero
        least = floor_without_scale(c) * scale[name].norm().item() / norm if norm else 0.0
        judged[name] = relative_error(t, expected), least
    return judged


def measure(c: LayerCase) -> dict[str, tuple[float, float, float]]:
    """Our error, PEFT's and the floor for every result."""
    ours = run_ours(c)
    peft = run_peft(c)
    theirs = errors_and_floors(c, peft)
    if c.a.dtype != c.x.dtype and ops.NO_CPU_KERNELS is not None:
        # torch's ops on a CPU have no bf16 product with fp32 results: fp32 adapters are converted, as autocast does
        autocast = run_peft(c, autocast=c.x.dtype)
        theirs |= {name: e for name, e in errors_and_floors(c, autocast).items() if name in ("da", "db")}
    for name, t in ours.results.items():
        assert t.shape == peft.results[name].shape, f"{name}: {list(t.shape)}, PEFT {list(peft.results[name].shape)}"
        assert t.dtype == peft.results[name].dtype, f"{name}: {t.dtype}, PEFT {peft.results[name].dtype}"
    return {name: (error, theirs[name][0], least) for name, (error, least) in errors_and_floors(c, ours).items()}


def check(c: LayerCase) -> None:
    """Assert that we are as accurate as PEFT."""
    measured = measure(c)
    ours, theirs, floors = ({name: each[i] for name, each in measured.items()} for i in range(3))
    table = ", ".join(f"{k}: ours {o:.2e} PEFT {t:.2e} floor {f:.2e}" for k, (o, t, f) in measured.items())
    assert judge(ours, theirs, floors) is None, f"less accurate than PEFT: {table}"


def check_model(ours: Results, theirs: Results, truth: Results, longest: int, compute_dtype: torch.dtype) -> None:
    """The same bar for the results of a whole model, its floor being that of one element."""
    assert ours.keys() == theirs.keys() == truth.keys()
    for name in truth:
        assert (ours[name].shape, ours[name].dtype) == (theirs[name].shape, theirs[name].dtype), name
    errors, bars = ({name: relative_error(each[name], truth[name]) for name in truth} for each in (ours, theirs))
    reason = judge(errors, bars, dict.fromkeys(truth, floor(compute_dtype, longest)))
    assert reason is None, reason
